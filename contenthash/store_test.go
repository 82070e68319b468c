package contenthash_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/contenthash"
)

// memory is a Store that holds pages, as attachments of a record would.
type memory map[string][]byte

func (m memory) Page(name string) ([]byte, error) {
	if data, ok := m[name]; ok {
		return data, nil
	}
	return nil, fmt.Errorf("page %q: %w", name, errdefs.ErrNotFound)
}

// save stores what a tree wants stored, and returns the names of what was
// written.
func (m memory) save(t *contenthash.Tree) []string {
	s := t.Save()
	if s.Replace {
		clear(m)
	}
	for _, name := range s.Delete {
		delete(m, name)
	}
	maps.Copy(m, s.Put)
	return slices.Sorted(maps.Keys(s.Put))
}

func (m memory) size() (n int) {
	for _, data := range m {
		n += len(data)
	}
	return n
}

func sum(t testing.TB, tree *contenthash.Tree, dir, path string, o contenthash.Options) string {
	t.Helper()
	d, err := tree.Checksum(t.Context(), contenthash.Dir(dir), path, o)
	require.NoError(t, err)
	require.NoError(t, d.Validate())
	return string(d)
}

// fresh is the digest of a path by a tree that knows nothing.
func fresh(t testing.TB, dir, path string) string {
	return sum(t, contenthash.New(), dir, path, contenthash.Options{})
}

// manyFiles makes dirs directories of files files each.
func manyFiles(t testing.TB, dir string, dirs, files int) {
	t.Helper()
	for d := range dirs {
		sub := filepath.Join(dir, fmt.Sprintf("dir%02d", d%25), fmt.Sprintf("sub%04d", d))
		require.NoError(t, os.MkdirAll(sub, 0o755))
		for f := range files {
			require.NoError(t, os.WriteFile(filepath.Join(sub, fmt.Sprintf("file%02d", f)), fmt.Appendf(nil, "%d %d", d, f), 0o644))
		}
	}
}

func TestStoredPages(t *testing.T) {
	dir := scratch(t)
	manyFiles(t, dir, 60, 50)
	tree := contenthash.New()
	want := sum(t, tree, dir, "/", contenthash.Options{})
	m := memory{}
	m.save(tree)
	require.Greater(t, len(m), 10)
	require.Less(t, m.size(), 3000*90)
	require.True(t, tree.Save().Empty(), "nothing changed")

	again, err := contenthash.Load(m)
	require.NoError(t, err)
	require.True(t, again.Confirmed())
	require.Equal(t, want, string(sum(t, again, "/nowhere", "/", contenthash.Options{})), "answered without a file")
	require.Equal(t, sum(t, tree, dir, "dir03", contenthash.Options{}), sum(t, again, "/nowhere", "dir03", contenthash.Options{}))
	require.Equal(t, contenthash.Stats{}, again.Stats())
	require.True(t, again.Save().Empty(), "loading changes nothing")

	// One file, one page and the index.
	p := "dir03/sub0003/file07"
	require.NoError(t, os.WriteFile(filepath.Join(dir, p), []byte("new"), 0o644))
	require.NoError(t, again.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: p}))
	got := sum(t, again, dir, "/", contenthash.Options{})
	require.NotEqual(t, want, got)
	require.Equal(t, fresh(t, dir, "/"), got)
	require.Equal(t, uint64(1), again.Stats().FilesRead)
	written := m.save(again)
	require.Len(t, written, 2, "%v", written)

	third, err := contenthash.Load(m)
	require.NoError(t, err)
	require.Equal(t, got, sum(t, third, "/nowhere", "/", contenthash.Options{}))
	for _, dir25 := range []string{"dir02", "dir03", "dir03/sub0003", "dir04"} {
		require.Equal(t, fresh(t, dir, dir25), sum(t, third, "/nowhere", dir25, contenthash.Options{}))
	}
}

// Facts that were validated one by one are stored as such, and those that were
// not are not trusted for it.
func TestPartlyConfirmed(t *testing.T) {
	for _, pages := range []int{500, 1 << 20} {
		save := pages == 500
		t.Run(fmt.Sprintf("pages of %d", pages), func(t *testing.T) {
			dir := t.TempDir()
			manyFiles(t, dir, 6, 30)
			tree := contenthash.New()
			tree.SetPageTarget(pages)
			sum(t, tree, dir, "/", contenthash.Options{})
			m := memory{}
			if save {
				m.save(tree)
			}
			tree.Unconfirm()
			changed := "dir01/sub0001/file20"
			require.NoError(t, os.WriteFile(filepath.Join(dir, changed), []byte("secret"), 0o644))
			tree.Seal()
			// Looks at the directories around, and at one file.
			sum(t, tree, dir, "dir01/sub0001/file03", contenthash.Options{})
			sum(t, tree, dir, "dir02", contenthash.Options{})
			require.False(t, tree.Confirmed())
			m.save(tree)

			loaded, err := contenthash.Load(m)
			require.NoError(t, err)
			require.Equal(t, fresh(t, dir, "dir02"), sum(t, loaded, "/nowhere", "dir02/", contenthash.Options{}), "needs no file")
			for _, p := range []string{"dir01/sub0001", "dir01", "/", changed} {
				loaded, err = contenthash.Load(m)
				require.NoError(t, err)
				require.Equal(t, fresh(t, dir, p), sum(t, loaded, dir, p, contenthash.Options{}), p)
			}
			sum(t, loaded, dir, "/", contenthash.Options{})
			require.True(t, loaded.Confirmed())
		})
	}
}

// What a tree loses, its pages lose.
func TestPagesShrink(t *testing.T) {
	dir := t.TempDir()
	manyFiles(t, dir, 8, 50)
	tree := contenthash.New()
	tree.SetPageTarget(1000)
	sum(t, tree, dir, "/", contenthash.Options{})
	m := memory{}
	m.save(tree)
	full := len(m)
	require.Greater(t, full, 20)
	for d := range 7 {
		p := fmt.Sprintf("dir%02d", d)
		require.NoError(t, os.RemoveAll(filepath.Join(dir, p)))
		require.NoError(t, tree.HandleChange(contenthash.Change{Kind: contenthash.Delete, Path: p}))
		m.save(tree)
		loaded, err := contenthash.Load(m)
		require.NoError(t, err)
		require.Equal(t, fresh(t, dir, "/"), sum(t, loaded, dir, "/", contenthash.Options{}))
	}
	require.LessOrEqual(t, len(m), full/8+2)
	manyFiles(t, dir, 3, 50)
	for _, name := range []string{"dir00", "dir01", "dir02"} {
		require.NoError(t, tree.HandleChange(contenthash.Change{Kind: contenthash.Add, Path: name, Mode: os.ModeDir}))
	}
	want := sum(t, tree, dir, "/", contenthash.Options{})
	m.save(tree)
	loaded, err := contenthash.Load(m)
	require.NoError(t, err)
	require.Equal(t, want, sum(t, loaded, "/nowhere", "/", contenthash.Options{}))
	require.Equal(t, want, fresh(t, dir, "/"))
}

// A stored tree can be made unconfirmed without loading it.
func TestUnconfirmStored(t *testing.T) {
	dir := t.TempDir()
	manyFiles(t, dir, 3, 10)
	tree := contenthash.New()
	sum(t, tree, dir, "/", contenthash.Options{})
	m := memory{}
	m.save(tree)
	index, err := contenthash.UnconfirmStored(m[contenthash.IndexPage])
	require.NoError(t, err)
	m[contenthash.IndexPage] = index
	write(t, dir, "dir00/sub0000/file03", "x y")
	loaded, err := contenthash.Load(m)
	require.NoError(t, err)
	require.False(t, loaded.Confirmed())
	require.Equal(t, fresh(t, dir, "/"), sum(t, loaded, dir, "/", contenthash.Options{}))
	_, err = contenthash.UnconfirmStored([]byte("rubbish"))
	require.ErrorAs(t, err, new(*contenthash.DamagedError))
}

// What is saved while somebody writes vouches for nothing, not even for what
// was read a moment ago.
func TestSavedWhileSomebodyWrites(t *testing.T) {
	dir := t.TempDir()
	manyFiles(t, dir, 2, 5)
	tree := contenthash.New()
	tree.Unconfirm()
	sum(t, tree, dir, "/", contenthash.Options{})
	m := memory{}
	m.save(tree)
	write(t, dir, "dir00/sub0000/file03", "changed")
	loaded, err := contenthash.Load(m)
	require.NoError(t, err)
	require.False(t, loaded.Confirmed())
	require.Equal(t, fresh(t, dir, "/"), sum(t, loaded, dir, "/", contenthash.Options{}))
}

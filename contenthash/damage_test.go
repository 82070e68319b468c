package contenthash_test

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/contenthash"
)

// A damaged stored tree is told, and costs a computation; it never gives a
// digest.
func TestDamage(t *testing.T) {
	dir := scratch(t)
	manyFiles(t, dir, 6, 10)
	tree := contenthash.New()
	tree.SetPageTarget(1000)
	want := sum(t, tree, dir, "/", contenthash.Options{})
	good := memory{}
	good.save(tree)
	require.Greater(t, len(good), 3)

	check := func(t *testing.T, m memory) {
		t.Helper()
		loaded, err := contenthash.Load(m)
		var damaged *contenthash.DamagedError
		require.ErrorAs(t, err, &damaged)
		require.ErrorIs(t, err, errdefs.ErrDataLoss)
		require.Contains(t, err.Error(), damaged.Page)
		require.Equal(t, want, sum(t, loaded, dir, "/", contenthash.Options{}))
		require.Equal(t, uint64(60), loaded.Stats().FilesRead)
		m.save(loaded)
		again, err := contenthash.Load(m)
		require.NoError(t, err, "what is saved then is whole")
		require.Equal(t, want, sum(t, again, "/nowhere", "/", contenthash.Options{}))
	}
	for _, name := range slices.Sorted(maps.Keys(good)) {
		for _, at := range []int{0, 1, 2, 5, 6, 7, 20, len(good[name]) - 1} {
			bad := maps.Clone(good)
			bad[name] = bytes.Clone(bad[name])
			bad[name][at] ^= 4
			check(t, bad)
		}
		bad := maps.Clone(good)
		bad[name] = bad[name][:len(bad[name])/2]
		check(t, bad)
		bad = maps.Clone(good)
		bad[name] = nil
		check(t, bad)
	}
	pages := slices.Sorted(maps.Keys(good))[1:]
	bad := maps.Clone(good)
	delete(bad, pages[0])
	check(t, bad)
	bad = maps.Clone(good)
	bad[pages[0]], bad[pages[1]] = bad[pages[1]], bad[pages[0]]
	check(t, bad)
	// A page of another save, whole in itself.
	other := contenthash.New()
	other.SetPageTarget(1000)
	write(t, dir, "dir00/sub0000/file00", "other")
	sum(t, other, dir, "/", contenthash.Options{})
	write(t, dir, "dir00/sub0000/file00", "0 0")
	mixed := memory{}
	mixed.save(other)
	for _, name := range pages {
		if !bytes.Equal(mixed[name], good[name]) {
			bad = maps.Clone(good)
			bad[name] = mixed[name]
			check(t, bad)
		}
	}
}

type brokenStore struct{ err error }

func (s brokenStore) Page(string) ([]byte, error) { return nil, s.err }

// A store that fails is not a damaged one, and the tree can be used.
func TestStoreThatFails(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "f", "x")
	bad := errors.New("disk on fire")
	tree, err := contenthash.Load(brokenStore{bad})
	require.ErrorIs(t, err, bad)
	var damaged *contenthash.DamagedError
	require.NotErrorAs(t, err, &damaged)
	require.Equal(t, fresh(t, dir, "/"), sum(t, tree, dir, "/", contenthash.Options{}))
}

// What could not be written is written the next time.
func TestFailedSave(t *testing.T) {
	dir := t.TempDir()
	manyFiles(t, dir, 3, 10)
	tree := contenthash.New()
	want := sum(t, tree, dir, "/", contenthash.Options{})
	m := memory{}
	m.save(tree)
	require.NoError(t, tree.HandleChange(contenthash.Change{Kind: contenthash.Delete, Path: "dir00"}))
	require.NoError(t, os.RemoveAll(dir+"/dir00"))
	tree.Save().Failed()
	m.save(tree)
	loaded, err := contenthash.Load(m)
	require.NoError(t, err)
	require.NotEqual(t, want, sum(t, loaded, dir, "/", contenthash.Options{}))
	require.Equal(t, fresh(t, dir, "/"), sum(t, loaded, dir, "/", contenthash.Options{}))
}

package contenthash_test

import (
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/contenthash/contenthashtest"
)

func compare(t *testing.T, a, b string) (out []contenthash.Difference) {
	t.Helper()
	side := func(dir string) contenthash.Side {
		return contenthash.Side{Tree: contenthash.New(), Open: contenthash.Dir(dir)}
	}
	for d, err := range contenthash.Compare(t.Context(), side(a), side(b)) {
		require.NoError(t, err)
		out = append(out, d)
	}
	return out
}

// TestCompare compares random trees, and expects what comparing the digests of
// all paths gives.
func TestCompare(t *testing.T) {
	needRoot(t, "the trees hold devices, owners and trusted attributes")
	base := scratch(t)
	differ := 0
	for seed := range uint64(120) {
		a, b := filepath.Join(base, fmt.Sprintf("a%d", seed)), filepath.Join(base, fmt.Sprintf("b%d", seed))
		for _, dir := range []string{a, b} {
			require.NoError(t, os.Mkdir(dir, 0o755))
			require.NoError(t, contenthashtest.New(seed/4).Write(dir))
		}
		if seed%4 == 1 {
			require.NoError(t, os.Chmod(b, 0o700))
		}
		if seed%4 > 1 {
			require.NoError(t, os.RemoveAll(b))
			require.NoError(t, os.Mkdir(b, 0o755))
			require.NoError(t, contenthashtest.New(seed/4+1000).Write(b))
		}
		got := compare(t, a, b)
		differ += len(got)
		require.Equal(t, expected(t, a, b), got, "seed %d", seed)
	}
	require.Greater(t, differ, 500)
}

func expected(t *testing.T, a, b string) (out []contenthash.Difference) {
	left, right := owns(t, a), owns(t, b)
	for p := range left {
		if _, ok := right[p]; !ok {
			out = append(out, contenthash.Difference{Path: p, Change: contenthash.Delete})
		}
	}
	for p, own := range right {
		if old, ok := left[p]; !ok {
			out = append(out, contenthash.Difference{Path: p, Change: contenthash.Add})
		} else if old != own {
			out = append(out, contenthash.Difference{Path: p, Change: contenthash.Modify})
		}
	}
	slices.SortFunc(out, func(a, b contenthash.Difference) int {
		return cmp.Compare(strings.ReplaceAll(a.Path, "/", "\x00"), strings.ReplaceAll(b.Path, "/", "\x00"))
	})
	return out
}

// owns are the digests of all paths, of directories that of the header.
func owns(t *testing.T, dir string) map[string]string {
	out := map[string]string{}
	tree := contenthash.New()
	require.NoError(t, filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		rel, relErr := filepath.Rel(dir, p)
		require.NoError(t, relErr)
		if rel == "." {
			rel = ""
		}
		o := contenthash.Options{}
		if e.IsDir() {
			// Only the directory's header is left: all below is excluded.
			o.IncludePatterns = []string{"**"}
			o.ExcludePatterns = []string{"?*"}
		}
		out[rel] = fmt.Sprint(e.Type(), sum(t, tree, dir, rel, o))
		return err
	}))
	return out
}

// What is equal is not looked into, and nothing is read that is known.
func TestCompareReadsNothing(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	manyFiles(t, dir, 4, 4)
	manyFiles(t, other, 4, 4)
	write(t, other, "dir01/sub0001/file02", "new")
	write(t, other, "dir02/sub0002/extra", "new")
	require.NoError(t, os.RemoveAll(filepath.Join(other, "dir03/sub0003")))
	a, b := contenthash.New(), contenthash.New()
	sum(t, a, dir, "/", contenthash.Options{})
	sum(t, b, other, "/", contenthash.Options{})
	got := map[string]contenthash.ChangeKind{}
	for d, err := range contenthash.Compare(t.Context(), contenthash.Side{Tree: a, Open: noFiles}, contenthash.Side{Tree: b, Open: noFiles}) {
		require.NoError(t, err)
		got[d.Path] = d.Change
	}
	want := map[string]contenthash.ChangeKind{
		"dir01/sub0001/file02": contenthash.Modify,
		"dir02/sub0002/extra":  contenthash.Add,
		"dir03/sub0003":        contenthash.Delete,
	}
	for i := range 4 {
		want[fmt.Sprintf("dir03/sub0003/file%02d", i)] = contenthash.Delete
	}
	require.Equal(t, want, got)
	for range contenthash.Compare(t.Context(), contenthash.Side{Tree: a, Open: noFiles}, contenthash.Side{Tree: b, Open: noFiles}) {
		break // stopping early is fine
	}
	for _, err := range contenthash.Compare(t.Context(), contenthash.Side{Tree: contenthash.New(), Open: noFiles}, contenthash.Side{Tree: b, Open: noFiles}) {
		require.ErrorIs(t, err, errNoFiles)
	}
	b.Unconfirm()
	for _, err := range contenthash.Compare(t.Context(), contenthash.Side{Tree: a, Open: noFiles}, contenthash.Side{Tree: b, Open: noFiles}) {
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	}
	b.Confirm()
	// Trees that were stored know fewer digests of directories.
	sides := [2]contenthash.Side{}
	for i, tree := range []*contenthash.Tree{a, b} {
		tree.SetPageTarget(200)
		m := memory{}
		m.save(tree)
		loaded, err := contenthash.Load(m)
		require.NoError(t, err)
		sides[i] = contenthash.Side{Tree: loaded, Open: noFiles}
	}
	again := map[string]contenthash.ChangeKind{}
	for d, err := range contenthash.Compare(t.Context(), sides[0], sides[1]) {
		require.NoError(t, err)
		again[d.Path] = d.Change
	}
	require.Equal(t, want, again)
}

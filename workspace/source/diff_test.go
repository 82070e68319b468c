package source

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func scanned(t *testing.T, dir string) *Tree {
	t.Helper()
	tree, err := Scan(t.Context(), dir, Options{}, nil)
	require.NoError(t, err)
	return tree
}

func TestChanged(t *testing.T) {
	dir := t.TempDir()
	put := func(name, text string) {
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
	}
	put("a/b/c", "1")
	put("a/b.txt", "1")
	put("gone/x", "1")
	put("was file", "1")
	require.NoError(t, os.Symlink("a", filepath.Join(dir, "link")))
	before := scanned(t, dir)
	require.Empty(t, slices.Collect(Changed(before, before)))

	put("a/b/c", "2")
	put("a/new/d", "1")
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "gone")))
	require.NoError(t, os.Remove(filepath.Join(dir, "was file")))
	put("was file/now dir", "1")
	require.NoError(t, os.Remove(filepath.Join(dir, "link")))
	require.NoError(t, os.Symlink("gone", filepath.Join(dir, "link")))
	require.NoError(t, os.Chmod(filepath.Join(dir, "a/b"), 0o700))
	require.NoError(t, os.Chtimes(filepath.Join(dir, "a/b.txt"), before.started.time(), before.started.time()))
	now := scanned(t, dir)
	want := []string{"a/b", "a/b/c", "a/new", "a/new/d", "gone", "gone/x", "link", "was file", "was file/now dir"}
	require.Equal(t, want, slices.Collect(Changed(before, now)))
	require.Equal(t, want, slices.Collect(Changed(now, before)))
	for p := range Changed(before, now) {
		require.Equal(t, "a/b", p)
		break
	}
}

// Nothing is yielded if and only if the digests are equal.
func TestChangedAgreesWithTheDigest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b := someTree(t, "a"), someTree(t, "b")
		changed := slices.Collect(Changed(a, b))
		require.Equal(t, a.Digest() == b.Digest(), len(changed) == 0)
		require.True(t, slices.IsSortedFunc(changed, comparePaths), changed)
	})
}

// someTree is a tree of a few entries.
func someTree(t *rapid.T, label string) *Tree {
	tree := &Tree{}
	var fill func(parent int32, depth int)
	fill = func(parent int32, depth int) {
		for _, name := range []string{"a", "a.b", "c"} {
			typ := rapid.SampledFrom([]Type{0, 0, Dir, File, Symlink}).Draw(t, label)
			if typ == 0 {
				continue
			}
			i := int32(len(tree.nodes))
			n := node{name: name, parent: parent, link: i, typ: typ, mode: uint32(rapid.IntRange(0, 1).Draw(t, "mode"))}
			switch typ {
			case File:
				n.sum[0] = byte(rapid.IntRange(0, 1).Draw(t, "content"))
			case Symlink:
				n.target = rapid.SampledFrom([]string{"x", "y"}).Draw(t, "target")
			}
			tree.nodes = append(tree.nodes, n)
			if typ == Dir && depth < 2 {
				fill(i, depth+1)
			}
		}
	}
	fill(-1, 0)
	tree.index()
	return tree
}

// comparePaths is path order.
func comparePaths(a, b string) int {
	return slices.Compare(keyOf(a), keyOf(b))
}

func keyOf(path string) []byte {
	key := []byte(path)
	for i, c := range key {
		if c == '/' {
			key[i] = 0
		}
	}
	return key
}

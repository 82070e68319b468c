package snapshot_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
)

func stacker(t *testing.T, d snapshot.Driver) snapshot.Stacker {
	t.Helper()
	s, ok := d.Stacker()
	require.True(t, ok)
	return s
}

// finalized commits what do writes on parent, cleaned.
func finalized(t *testing.T, d snapshot.Driver, name, parent string, do func(dir string)) {
	t.Helper()
	key := name + "-w"
	_, err := d.Prepare(t.Context(), key, parent)
	require.NoError(t, err)
	mounted(t, d, key, false, do)
	used, err := stacker(t, d).Clean(t.Context(), key)
	require.NoError(t, err)
	require.NoError(t, d.Commit(t.Context(), name, key))
	got, err := d.Usage(t.Context(), name)
	require.NoError(t, err)
	require.Equal(t, used, got)
}

func file(t *testing.T, path, content string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
}

func TestStackIsFlatAndCountsAsChild(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	d := openWith(t, snapshot.Overlay, root, &steps{})
	s := stacker(t, d)
	for _, name := range []string{"a", "b", "c"} {
		finalized(t, d, name, "", func(dir string) {
			file(t, filepath.Join(dir, name), name)
			file(t, filepath.Join(dir, "all"), name)
		})
	}
	require.NoError(t, s.Stack(t.Context(), "ab", []string{"a", "b"}))
	require.NoError(t, s.Stack(t.Context(), "aba", []string{"ab", "a"}))
	require.NoError(t, s.Stack(t.Context(), "cab", []string{"c", "ab"}))
	layers := func(key string) (out []string) {
		list, err := s.Layers(t.Context(), key)
		require.NoError(t, err)
		for _, l := range list {
			require.True(t, l.Clean)
			require.DirExists(t, l.Dir)
			out = append(out, l.Name)
		}
		return out
	}
	require.Equal(t, []string{"a", "b"}, layers("ab"))
	require.Equal(t, []string{"b", "a"}, layers("aba"))
	require.Equal(t, []string{"c", "a", "b"}, layers("cab"))
	require.Equal(t, "a=a all=b b=b", content(t, d, "ab"))
	require.Equal(t, "a=a all=a b=b", content(t, d, "aba"))
	require.Equal(t, "a=a all=b b=b c=c", content(t, d, "cab"))
	finalized(t, d, "top", "cab", func(dir string) { file(t, filepath.Join(dir, "all"), "top") })
	require.Equal(t, []string{"c", "a", "b", "top"}, layers("top"))
	require.Equal(t, "a=a all=top b=b c=c", content(t, d, "top"))
	entries, err := os.ReadDir(filepath.Join(root, "snapshots", "committed", "cab"))
	require.NoError(t, err)
	require.Len(t, entries, 5, "info, id and a link per layer")
	for _, name := range []string{"a", "b", "c", "cab"} {
		err := d.Remove(t.Context(), name)
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	}
	for _, name := range []string{"top", "cab", "aba", "ab", "a", "b", "c"} {
		require.NoError(t, d.Remove(t.Context(), name))
	}
	require.NoError(t, d.Cleanup(t.Context()))
}

func TestStackOf500(t *testing.T) {
	needRoot(t)
	d := openWith(t, snapshot.Overlay, scratch(t), &steps{})
	s := stacker(t, d)
	var layers []string
	for i := range 501 {
		name := fmt.Sprint("l", i)
		_, err := d.Prepare(t.Context(), name+"-w", "")
		require.NoError(t, err)
		require.NoError(t, d.Commit(t.Context(), name, name+"-w", snapshot.WithExactLayer))
		layers = append(layers, name)
	}
	require.NoError(t, s.Stack(t.Context(), "full", layers[:500]))
	mounted(t, d, "full", true, func(string) {})
	var depth *snapshot.DepthError
	require.ErrorAs(t, s.Stack(t.Context(), "more", layers), &depth)
	require.Equal(t, snapshot.DepthError{Layers: 501, Max: 500}, *depth)
	_, err := d.Stat(t.Context(), "more")
	require.True(t, errdefs.IsNotFound(err))
}

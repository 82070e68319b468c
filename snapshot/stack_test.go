package snapshot_test

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

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

// An exact layer is measured when somebody asks, where no file of it can have
// become another snapshot's, too; else its commit measures it.
func TestUsageOfExactLayers(t *testing.T) {
	for _, driver := range []string{snapshot.Overlay, snapshot.Native} {
		t.Run(driver, func(t *testing.T) {
			needRoot(t)
			root := scratch(t)
			d := openWith(t, driver, root, &steps{})
			_, err := d.Prepare(t.Context(), "k", "")
			require.NoError(t, err)
			put(t, root, "k", "one")
			put(t, root, "k", "two")
			used, err := d.Usage(t.Context(), "k")
			require.NoError(t, err)
			require.EqualValues(t, 3, used.Inodes)
			require.NoError(t, d.Commit(t.Context(), "n", "k", snapshot.WithExactLayer))
			got, err := d.Usage(t.Context(), "n")
			require.NoError(t, err)
			require.Equal(t, used, got)

			require.NoError(t, os.Link(filepath.Join(root, "snapshots", "committed", "n", "fs", "one"), filepath.Join(root, "another")))
			got, err = d.Usage(t.Context(), "n")
			require.NoError(t, err)
			if driver == snapshot.Overlay {
				used.Inodes--
				used.Size = got.Size
			}
			require.Equal(t, used, got)
		})
	}
}

// A stack costs the same however many files its layers have: a directory, a
// description and a link per layer.
func TestStackCosts(t *testing.T) {
	needRoot(t)
	root := scratch(t)
	d := openWith(t, snapshot.Overlay, root, &steps{})
	var layers []string
	for _, files := range []int{1, 1000} {
		name := fmt.Sprint("l", files)
		finalized(t, d, name, "", func(dir string) {
			for i := range files {
				file(t, filepath.Join(dir, fmt.Sprint("f", i)), "")
			}
		})
		layers = append(layers, name)
	}
	inodes := func() int {
		seen := map[uint64]bool{}
		require.NoError(t, filepath.Walk(root, func(_ string, fi os.FileInfo, err error) error {
			if err == nil {
				seen[fi.Sys().(*syscall.Stat_t).Ino] = true
			}
			return err
		}))
		return len(seen)
	}
	for i, list := range [][]string{{"l1"}, {"l1000"}, layers} {
		name := fmt.Sprint("m", i)
		before := inodes()
		require.NoError(t, stacker(t, d).Stack(t.Context(), name, list))
		// The first child of a layer makes that one's id.
		require.LessOrEqual(t, inodes()-before, 2+len(list), "inodes")
		entry := filepath.Join(root, "snapshots", "committed", name)
		info, err := os.Stat(filepath.Join(entry, "info"))
		require.NoError(t, err)
		require.Less(t, info.Size(), int64(300))
		links, err := filepath.Glob(filepath.Join(entry, "parent*"))
		require.NoError(t, err)
		require.Len(t, links, len(list))
	}
}

// The root of a layer that was applied can be opaque, which the kernel does
// not know: what is below is left out of the mount.
func TestOpaqueRoot(t *testing.T) {
	d, root := stage(t)
	s := stacker(t, d)
	require.NoError(t, s.CleanCopy(t.Context(), "base-c", "base"))
	for name, parent := range map[string]string{"alone": "", "child": "base"} {
		_, err := d.Prepare(t.Context(), name+"-w", parent)
		require.NoError(t, err)
		put(t, root, name+"-w", "new")
		require.NoError(t, unix.Setxattr(upper(t, d, name+"-w"), "trusted.overlay.opaque", []byte("y"), 0))
		require.NoError(t, d.Commit(t.Context(), name, name+"-w", snapshot.WithExactLayer))
		list, err := s.Layers(t.Context(), name)
		require.NoError(t, err)
		require.True(t, list[len(list)-1].Opaque)
	}
	finalized(t, d, "top", "", func(dir string) { file(t, filepath.Join(dir, "top"), "top") })
	require.NoError(t, s.Stack(t.Context(), "m", []string{"base-c", "alone", "top"}))
	require.NoError(t, s.Diff(t.Context(), "diff", "base", "m"))
	require.NoError(t, s.Stack(t.Context(), "m2", []string{"base-c", "diff"}))
	_, err := d.Prepare(t.Context(), "flat-w", "")
	require.NoError(t, err)
	require.NoError(t, snapshot.Apply(t.Context(), d, "flat-w", []snapshot.Change{{Upper: "base"}, {Upper: "alone"}, {Upper: "top"}}))
	require.NoError(t, d.Commit(t.Context(), "flat", "flat-w", snapshot.WithExactLayer))
	for range 2 {
		require.Equal(t, "new=new", content(t, d, "alone"))
		require.Equal(t, "new=new", content(t, d, "child"))
		for _, name := range []string{"m", "m2", "flat"} {
			require.Equal(t, "new=new top=top", content(t, d, name), name)
		}
		d = openWith(t, snapshot.Overlay, root, &steps{}) // with nothing remembered
	}
	finalized(t, d, "on child", "child", func(dir string) { require.Equal(t, []string{"new"}, names(t, dir)) })
}

// Whiteouts that the driver writes do not show as names where no other layer
// has the directory.
func TestWrittenWhiteoutsNeverShow(t *testing.T) {
	needRoot(t)
	for _, class := range []string{snapshot.Trusted, snapshot.User} {
		t.Run(class, func(t *testing.T) {
			d, err := snapshot.Open(t.Context(), t.TempDir(), snapshot.Options{Driver: snapshot.Overlay, Attributes: class})
			require.NoError(t, err)
			defer func() { require.NoError(t, d.Close()) }()
			s := stacker(t, d)
			for _, name := range []string{"a", "b"} {
				finalized(t, d, name, "", func(dir string) {
					require.NoError(t, os.MkdirAll(filepath.Join(dir, "d", "e"), 0o755))
					file(t, filepath.Join(dir, "d", "e", name), "")
				})
			}
			require.NoError(t, s.Diff(t.Context(), "diff", "a", "b"))
			require.Equal(t, []string{"a", "b"}, names(t, filepath.Join(upper(t, d, "diff"), "d", "e")), "a is a whiteout")
			for name, layers := range map[string][]string{"alone": {"diff"}, "over b": {"b", "diff"}, "over a": {"a", "diff"}} {
				require.NoError(t, s.Stack(t.Context(), name, layers))
				mounted(t, d, name, true, func(dir string) {
					require.Equal(t, []string{"b"}, names(t, filepath.Join(dir, "d", "e")), name)
				})
			}
		})
	}
}

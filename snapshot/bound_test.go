package snapshot_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot"
)

// adopted is a tree of two adopted layers, of which the second was written
// through a mount with the given options.
func adopted(t *testing.T, options string, do func(dir string), bound string) snapshot.Driver {
	t.Helper()
	needRoot(t)
	root, dir := t.TempDir(), t.TempDir()
	at := func(elem ...string) string {
		return filepath.Join(append([]string{root, "snapshots", "snapshots"}, elem...)...)
	}
	for _, n := range []string{"1/fs/d", "2/fs", "2/work"} {
		require.NoError(t, os.MkdirAll(at(n), 0o755))
	}
	file(t, at("1/fs/d/e"), "e")
	file(t, at("1/fs/a"), "a")
	require.NoError(t, unix.Mount("overlay", dir, "overlay", 0,
		"lowerdir="+at("1/fs")+",upperdir="+at("2/fs")+",workdir="+at("2/work")+",index=off,"+options))
	do(dir)
	require.NoError(t, unix.Unmount(dir, 0))
	entries := []snapshot.Adopted{
		{Key: "base", Kind: snapshots.KindCommitted, Dir: "1"},
		{Key: "n", Parent: "base", Kind: snapshots.KindCommitted, Dir: "2", Bound: bound},
	}
	require.NoError(t, snapshot.Adopt(t.Context(), root, snapshot.Options{Driver: snapshot.Overlay}, slices.Values(entries), nil))
	return openWith(t, snapshot.Overlay, root, &steps{})
}

// Adopted layers are links to directories elsewhere; a clean copy of one is a
// layer as any other.
func TestCleanCopyOfAdopted(t *testing.T) {
	d := adopted(t, "redirect_dir=off,metacopy=off", func(dir string) {
		require.NoError(t, os.Mkdir(filepath.Join(dir, ".tmp"), 0o755))
		move(t, dir, ".tmp", "x")
		move(t, dir, "a", "t")
		move(t, dir, "t", "a")
		require.NoError(t, os.Remove(filepath.Join(dir, "d", "e")))
		file(t, filepath.Join(dir, "f"), "f")
	}, "")
	s := stacker(t, d)
	before := snapshotOf(t, d, "n")
	require.NoError(t, s.CleanCopy(t.Context(), "base-c", "base"))
	require.NoError(t, s.CleanCopy(t.Context(), "n-c", "n"))
	require.Equal(t, []string{"d", "f", "x"}, names(t, upper(t, d, "n-c")))
	require.Equal(t, []string{"a", "d", "f", "x"}, names(t, upper(t, d, "n")), "the adopted one is as it was")
	require.NoError(t, s.Stack(t.Context(), "m", []string{"base-c", "n-c"}))
	require.Equal(t, before, snapshotOf(t, d, "m"))
	require.NoError(t, d.Remove(t.Context(), "n"))
	require.NoError(t, d.Remove(t.Context(), "base"))
	require.NoError(t, d.Cleanup(t.Context()))
	require.Equal(t, before, snapshotOf(t, d, "m"))
}

func redirected(t *testing.T) func(dir string) {
	return func(dir string) {
		move(t, dir, "d", "moved")
		require.NoError(t, os.Chmod(filepath.Join(dir, "a"), 0o600))
	}
}

// A layer that got redirects or files without data when it was in use already:
// it is found when it is to be stacked, and refused, and so are trees of it.
func TestUnknownBoundLayer(t *testing.T) {
	for name, mark := range map[string]string{"moved": "redirect", "file": "metacopy"} {
		t.Run(name, func(t *testing.T) {
			d := adopted(t, "redirect_dir=off,metacopy=off", func(dir string) {
				require.NoError(t, os.Mkdir(filepath.Join(dir, "moved"), 0o755))
				file(t, filepath.Join(dir, "file"), "data")
			}, "")
			s := stacker(t, d)
			layer := upper(t, d, "n")
			require.NoError(t, unix.Setxattr(filepath.Join(layer, name), "trusted.overlay."+mark, []byte("/d"), 0))
			err := s.CleanCopy(t.Context(), "n-c", "n")
			var bound *snapshot.LayerError
			require.ErrorAs(t, err, &bound)
			require.True(t, bound.Bound)
			require.Equal(t, "n", bound.Name)
			require.NotEmpty(t, bound.Path)
			require.ErrorContains(t, err, bound.Path)
			require.ErrorAs(t, s.Diff(t.Context(), "d", "", "n"), &bound)
			for _, name := range []string{"n-c", "d"} {
				_, err = d.Stat(t.Context(), name)
				require.Error(t, err)
			}
		})
	}
}

// Such layers are mounted with options that follow the marks, and so is what
// lies over them; merges and differences of them are made from mounts.
func TestBoundLayers(t *testing.T) {
	for name, bound := range map[string]string{"told": "has redirects", "found": ""} {
		t.Run(name, func(t *testing.T) {
			testBoundLayers(t, adopted(t, "redirect_dir=on,metacopy=on", redirected(t), bound))
		})
	}
}

func testBoundLayers(t *testing.T, d snapshot.Driver) {
	t.Helper()
	s := stacker(t, d)
	show := func(key string) {
		t.Helper()
		mounted(t, d, key, true, func(dir string) {
			require.Equal(t, []string{"a", "moved"}, names(t, dir))
			require.Equal(t, []string{"e"}, names(t, filepath.Join(dir, "moved")))
			data, err := os.ReadFile(filepath.Join(dir, "a"))
			require.NoError(t, err)
			require.Equal(t, "a", string(data))
		})
	}
	show("n")
	mounts, err := d.Prepare(t.Context(), "k", "n")
	require.NoError(t, err)
	require.Contains(t, strings.Join(mounts[0].Options, ","), "redirect_dir=on")
	dir := t.TempDir()
	require.NoError(t, mount.All(mounts, dir))
	require.FileExists(t, filepath.Join(dir, "moved", "e"))
	move(t, dir, "moved", "t")
	move(t, dir, "t", "moved")
	require.NoError(t, unix.Unmount(dir, 0))
	show("k")
	var bound *snapshot.LayerError
	_, err = s.Clean(t.Context(), "k")
	require.ErrorAs(t, err, &bound)
	require.NoError(t, d.Commit(t.Context(), "child", "k", snapshot.WithExactLayer))
	show("child")
	list, err := s.Layers(t.Context(), "child")
	require.NoError(t, err)
	require.Empty(t, list[0].Bound)
	for _, l := range list[1:] {
		require.NotEmpty(t, l.Bound)
		require.False(t, l.Clean)
		require.ErrorAs(t, s.Stack(t.Context(), "m", []string{l.Name}), &bound)
		require.True(t, bound.Bound)
		require.ErrorAs(t, s.CleanCopy(t.Context(), "c", l.Name), &bound)
	}
	require.NoError(t, s.Diff(t.Context(), "d", "base", "child"))
	require.NoError(t, s.CleanCopy(t.Context(), "base-c", "base"))
	require.NoError(t, s.Stack(t.Context(), "m", []string{"base-c", "d"}))
	show("m")
	_, err = d.Prepare(t.Context(), "flat-w", "")
	require.NoError(t, err)
	require.NoError(t, snapshot.Apply(t.Context(), d, "flat-w", []snapshot.Change{
		{Upper: "base"}, {Lower: "base", Upper: "n"}, {Lower: "n", Upper: "child"},
	}))
	require.NoError(t, d.Commit(t.Context(), "flat", "flat-w", snapshot.WithExactLayer))
	show("flat")
}

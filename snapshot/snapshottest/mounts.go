package snapshottest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot"
)

// mountTests are about what mounts show and allow.
var mountTests = map[string]func(*testing.T, *env){
	"ReadOnlyMounts":   testReadOnly,
	"Layers":           testLayers,
	"MountAgain":       testMountAgain,
	"MountsAfterMount": testMountsAfterMount,
	"InUse":            testInUse,
	"CommitMounted":    testCommitMounted,
	"Dir":              testDir,
	"RootMode":         testRootMode,
}

func testReadOnly(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	e.layer("n", "base", tree{"b": "2"})
	e.prepare("k", "n")
	e.mounted("k", false, func(dir string) { writeTree(t, dir, tree{"c": "3"}) })
	e.prepare("first", "")
	for key, parent := range map[string]string{"view": "n", "view1": "base", "view0": ""} {
		_, err := e.View(e.ctx, key, parent)
		require.NoError(t, err)
	}
	for key, want := range map[string]tree{
		"base":  {"a": "1"},
		"n":     {"a": "1", "b": "2"},
		"k":     {"a": "1", "b": "2", "c": "3"},
		"first": {},
		"view":  {"a": "1", "b": "2"},
		"view1": {"a": "1"},
		"view0": {},
	} {
		for _, readOnly := range []bool{true, false} {
			if !readOnly && (key == "k" || key == "first") {
				continue
			}
			e.mounted(key, readOnly, func(dir string) {
				require.Equal(t, want, readTree(t, dir))
				require.ErrorIs(t, os.WriteFile(filepath.Join(dir, "new"), nil, 0o644), unix.EROFS, key)
				require.ErrorIs(t, os.Mkdir(filepath.Join(dir, "newdir"), 0o755), unix.EROFS, key)
				require.ErrorIs(t, os.Chmod(dir, 0o700), unix.EROFS, key)
				for name := range want {
					require.ErrorIs(t, os.Remove(filepath.Join(dir, name)), unix.EROFS, key)
				}
			})
		}
		e.requireTree(want, key)
	}
}

func testLayers(t *testing.T, e *env) {
	e.layer("l1", "", tree{"keep": "1", "gone": "1", "dir/old": "1", "dir/sub/x": "1", "file": "1"})
	e.prepare("k", "l1")
	e.mounted("k", false, func(dir string) {
		require.NoError(t, os.Remove(filepath.Join(dir, "gone")))
		require.NoError(t, os.RemoveAll(filepath.Join(dir, "dir")))
		writeTree(t, dir, tree{"dir/new": "2"})
		require.NoError(t, os.Remove(filepath.Join(dir, "file")))
		writeTree(t, dir, tree{"file/inside": "2"})
	})
	require.NoError(t, e.Commit(e.ctx, "l2", "k"))
	want := tree{"keep": "1", "dir/": "", "dir/new": "2", "file/": "", "file/inside": "2"}
	e.requireTree(want, "l2")
	e.requireTree(tree{
		"keep": "1", "gone": "1", "dir/": "", "dir/old": "1", "dir/sub/": "", "dir/sub/x": "1", "file": "1",
	}, "l1")
	e.prepare("k", "l2")
	e.requireTree(want, "k")
	mounts, err := e.View(e.ctx, "v", "l2")
	require.NoError(t, err)
	e.mountedBy(mounts, func(dir string) { require.Equal(t, want, readTree(t, dir)) })
	mounts, err = e.View(e.ctx, "v1", "l1")
	require.NoError(t, err)
	e.mountedBy(mounts, func(dir string) { require.Contains(t, readTree(t, dir), "gone") })
}

func testMountAgain(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1", "b": "1"})
	e.prepare("k", "base")
	want := tree{"a": "1", "b": "1"}
	for _, name := range []string{"c", "d", "e"} {
		e.mounted("k", false, func(dir string) {
			require.Equal(t, want, readTree(t, dir))
			writeTree(t, dir, tree{name: "2"})
			_ = os.Remove(filepath.Join(dir, "b"))
		})
		want[name] = "2"
		delete(want, "b")
		e.requireTree(want, "k")
	}
	e.reopen()
	e.mounted("k", false, func(dir string) { require.Equal(t, want, readTree(t, dir)) })
}

func testMountsAfterMount(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	for key, parent := range map[string]string{"k": "base", "first": ""} {
		e.prepare(key, parent)
		e.mounted(key, false, func(dir string) { writeTree(t, dir, tree{"b": "2"}) })
		mounts, err := e.Mounts(e.ctx, key)
		require.NoError(t, err)
		e.mountedBy(mounts, func(dir string) { writeTree(t, dir, tree{"c": "3"}) })
		e.mounted(key, false, func(dir string) {
			got := readTree(t, dir)
			require.Equal(t, "2", got["b"])
			require.Equal(t, "3", got["c"])
		})
	}
}

func testInUse(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	e.prepare("k", "base")
	inUse := func(want bool) {
		t.Helper()
		got, err := e.InUse(e.ctx, "k")
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	inUse(false)
	e.mounted("k", true, func(string) { inUse(false) })
	e.mounted("k", false, func(dir string) {
		busy, err := e.InUse(e.ctx, "k")
		require.NoError(t, err)
		if !busy {
			require.NotEqual(t, snapshot.Overlay, e.Info().Name)
			return // a driver that cannot know
		}
		second := t.TempDir()
		err = e.Mount(e.ctx, "k", second, false)
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		require.Empty(t, readTree(t, second))
		inUse(true)
		writeTree(t, dir, tree{"b": "2"})
		require.NoError(t, os.Remove(filepath.Join(dir, "a")))
	})
	inUse(false)
}

// A snapshot that is committed while it is mounted: what the mount's holder
// does then is not the driver's concern, but the mount must not break.
func testCommitMounted(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1", "b": "1"})
	e.prepare("k", "base")
	e.mounted("k", false, func(dir string) {
		writeTree(t, dir, tree{"c": "3"})
		require.NoError(t, e.Commit(e.ctx, "n", "k"))
		require.NoError(t, e.Cleanup(e.ctx))
		require.NoError(t, os.Remove(filepath.Join(dir, "a")))
	})
	require.NoError(t, e.Cleanup(e.ctx))
	e.requireTree(tree{"b": "1", "c": "3"}, "n")
}

func testDir(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	e.prepare("k", "base")
	e.mounted("k", false, func(dir string) { writeTree(t, dir, tree{"b": "2"}) })
	_, err := e.View(e.ctx, "v", "base")
	require.NoError(t, err)
	for key, want := range map[string]tree{"base": {"a": "1"}, "k": {"a": "1", "b": "2"}, "v": {"a": "1"}} {
		dir, ok, err := e.Dir(e.ctx, key)
		require.NoError(t, err)
		require.Equal(t, e.Info().Name == snapshot.Native, ok)
		if ok {
			require.Equal(t, want, readTree(t, dir))
		}
	}
}

func testRootMode(t *testing.T, e *env) {
	if name := e.Info().Name; name != snapshot.Overlay && name != snapshot.Native {
		return // containerd's own drivers leave it to the umask
	}
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	e.prepare("k", "")
	require.NoError(t, e.Commit(e.ctx, "n", "k"))
	e.prepare("k", "n")
	for _, key := range []string{"n", "k"} {
		e.mounted(key, true, func(dir string) {
			fi, err := os.Stat(dir)
			require.NoError(t, err)
			require.Equal(t, os.ModeDir|0o755, fi.Mode(), key)
		})
	}
}

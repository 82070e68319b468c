package snapshottest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
)

// applyTests are about merges and differences that are made file by file, which
// every driver can do.
var applyTests = map[string]func(*testing.T, *env){
	"Apply":          testApply,
	"ApplyRefused":   testApplyRefused,
	"ApplyNoLeaks":   testApplyNoLeaks,
	"ApplyCountsOne": testApplyUsage,
}

// applied commits what results from changes.
func (e *env) applied(name string, changes ...snapshot.Change) {
	e.t.Helper()
	e.prepare(name+"-w", "")
	require.NoError(e.t, snapshot.Apply(e.ctx, e, name+"-w", changes))
	require.NoError(e.t, e.Commit(e.ctx, name, name+"-w", snapshot.WithExactLayer))
}

// edited commits a child of parent after do.
func (e *env) edited(name, parent string, do func(dir string)) {
	e.t.Helper()
	e.prepare(name+"-w", parent)
	e.mounted(name+"-w", false, do)
	require.NoError(e.t, e.Commit(e.ctx, name, name+"-w"))
}

func testApply(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1", "d/e": "1", "d/f": "1"})
	e.edited("n", "base", func(dir string) {
		require.NoError(t, os.Remove(filepath.Join(dir, "d", "e")))
		require.NoError(t, os.RemoveAll(filepath.Join(dir, "a")))
		writeTree(t, dir, tree{"a/b": "2", "d/g": "2"})
	})
	e.layer("other", "", tree{"a": "3", "d/e": "3", "x": "3"})
	base, n := snapshot.Change{Upper: "base"}, snapshot.Change{Lower: "base", Upper: "n"}
	other := snapshot.Change{Upper: "other"}
	e.applied("m1", base, n)
	e.requireTree(tree{"a/": "", "a/b": "2", "d/": "", "d/f": "1", "d/g": "2"}, "m1")
	e.applied("m2", other, n)
	e.requireTree(tree{"a/": "", "a/b": "2", "d/": "", "d/g": "2", "x": "3"}, "m2")
	e.applied("m3", n, other)
	e.requireTree(tree{"a": "3", "d/": "", "d/e": "3", "d/g": "2", "x": "3"}, "m3")
	e.applied("m4", snapshot.Change{Lower: "m1", Upper: "n"})
	e.requireTree(tree{}, "m4")
	e.applied("m5", snapshot.Change{Lower: "n", Upper: "other"})
	e.requireTree(tree{"a": "3", "d/": "", "d/e": "3", "x": "3"}, "m5")
	e.applied("m6", base, snapshot.Change{Lower: "n", Upper: "other"})
	e.requireTree(tree{"a": "3", "d/": "", "d/e": "3", "x": "3"}, "m6")
	e.applied("m7")
	e.requireTree(tree{}, "m7")
}

func testApplyRefused(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	e.prepare("child", "base")
	e.prepare("k", "")
	_, err := e.View(e.ctx, "v", "")
	require.NoError(t, err)
	change := []snapshot.Change{{Upper: "base"}}
	for _, key := range []string{"base", "child", "v"} {
		err := snapshot.Apply(e.ctx, e, key, change)
		require.True(t, errdefs.IsFailedPrecondition(err), "%s: %v", key, err)
	}
	for _, c := range []snapshot.Change{{Upper: "none"}, {Lower: "none", Upper: "base"}} {
		err = snapshot.Apply(e.ctx, e, "k", []snapshot.Change{c})
		require.True(t, errdefs.IsNotFound(err), "%v", err)
	}
	err = snapshot.Apply(e.ctx, e, "none", change)
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	e.requireTree(tree{}, "k")
	e.requireTree(tree{"a": "1"}, "base")
}

// What is written to a child of a merge reaches no layer, whatever the files
// of the merge share with those of its layers.
func testApplyNoLeaks(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1", "d/e": "1"})
	e.layer("other", "", tree{"b": "2"})
	e.applied("m", snapshot.Change{Upper: "base"}, snapshot.Change{Upper: "other"})
	e.edited("n", "m", func(dir string) {
		for _, name := range []string{"a", "b", "d/e"} {
			f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_APPEND, 0)
			require.NoError(t, err)
			_, err = f.WriteString("more")
			require.NoError(t, err)
			require.NoError(t, f.Chmod(0o600))
			require.NoError(t, f.Close())
		}
	})
	e.requireTree(tree{"a": "1more", "b": "2more", "d/": "", "d/e": "1more"}, "n")
	e.requireTree(tree{"a": "1", "b": "2", "d/": "", "d/e": "1"}, "m")
	e.requireTree(tree{"a": "1", "d/": "", "d/e": "1"}, "base")
	e.requireTree(tree{"b": "2"}, "other")
	e.mounted("base", true, func(dir string) {
		fi, err := os.Stat(filepath.Join(dir, "a"))
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o644), fi.Mode())
	})
	// The merge outlives its layers.
	for _, name := range []string{"base", "other"} {
		require.NoError(t, e.Remove(e.ctx, name))
	}
	require.NoError(t, e.Cleanup(e.ctx))
	e.requireTree(tree{"a": "1", "b": "2", "d/": "", "d/e": "1"}, "m")
}

// Files that the merge shares with a layer are counted once.
func testApplyUsage(t *testing.T, e *env) {
	big := make([]byte, 1<<20)
	e.layer("base", "", tree{"a": string(big)})
	e.applied("m", snapshot.Change{Upper: "base"})
	shared := false
	if dir, ok, err := e.Dir(e.ctx, "m"); ok {
		require.NoError(t, err)
		base, _, err := e.Dir(e.ctx, "base")
		require.NoError(t, err)
		one, err := os.Stat(filepath.Join(dir, "a"))
		require.NoError(t, err)
		two, err := os.Stat(filepath.Join(base, "a"))
		require.NoError(t, err)
		shared = os.SameFile(one, two)
		require.True(t, shared, "a driver of whole trees shares files")
	}
	used, err := e.Usage(e.ctx, "m")
	require.NoError(t, err)
	require.Equal(t, shared, used.Size < int64(len(big)))
}

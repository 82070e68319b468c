package snapshottest

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
)

// stackTests are about drivers with layers; for the others they only look that
// these say so.
var stackTests = map[string]func(*testing.T, *env){
	"Stack":        stacking(testStack),
	"StackRefused": stacking(testStackRefused),
	"StackRemoval": stacking(testStackRemoval),
	"StackMounts":  stacking(testStackMounts),
	"LayersList":   stacking(testLayersList),
	"Clean":        stacking(testClean),
	"CleanCopy":    stacking(testCleanCopy),
	"Diff":         stacking(testDiff),
}

func stacking(test func(*testing.T, *env, snapshot.Stacker)) func(*testing.T, *env) {
	return func(t *testing.T, e *env) {
		s, ok := e.Stacker()
		if !ok {
			require.Nil(t, s)
			return
		}
		test(t, e, s)
	}
}

// cleaned commits files on parent as a clean layer.
func (e *env) cleaned(name, parent string, files tree) {
	e.t.Helper()
	e.prepare(name+"-w", parent)
	e.mounted(name+"-w", false, func(dir string) { writeTree(e.t, dir, files) })
	s, _ := e.Stacker()
	_, err := s.Clean(e.ctx, name+"-w")
	require.NoError(e.t, err)
	require.NoError(e.t, e.Commit(e.ctx, name, name+"-w"))
}

func (e *env) layers(key string) []string {
	e.t.Helper()
	s, _ := e.Stacker()
	list, err := s.Layers(e.ctx, key)
	require.NoError(e.t, err)
	var names []string
	for _, l := range list {
		require.DirExists(e.t, l.Dir)
		require.Equal(e.t, e.Info().Attributes, l.Attributes)
		names = append(names, l.Name)
	}
	return names
}

func testStack(t *testing.T, e *env, s snapshot.Stacker) {
	e.cleaned("a", "", tree{"x": "a", "a": "a"})
	e.cleaned("b", "", tree{"x": "b", "b": "b"})
	labels := map[string]string{"l": "1"}
	require.NoError(t, s.Stack(e.ctx, "m", []string{"a", "b"}, snapshots.WithLabels(labels)))
	want := tree{"x": "b", "a": "a", "b": "b"}
	for range 2 {
		e.requireTree(want, "m")
		info, err := e.Stat(e.ctx, "m")
		require.NoError(t, err)
		require.Equal(t, snapshots.KindCommitted, info.Kind)
		require.Empty(t, info.Parent)
		require.Equal(t, labels, info.Labels)
		require.False(t, info.Created.IsZero())
		require.Equal(t, info, e.all()["m"])
		names, err := e.Committed(e.ctx)
		require.NoError(t, err)
		require.Contains(t, names, "m")
		used, err := e.Usage(e.ctx, "m")
		require.NoError(t, err)
		require.Zero(t, used)
		e.reopen()
		require.NoError(t, e.Settle(e.ctx))
		s, _ = e.Stacker()
	}
	require.NoError(t, s.Stack(e.ctx, "again", []string{"b", "m", "b"}))
	require.Equal(t, []string{"a", "b"}, e.layers("again"))
	require.NoError(t, s.Stack(e.ctx, "none", nil))
	e.requireTree(tree{}, "none")
	e.layer("on none", "none", tree{"y": "1"})
	e.requireTree(tree{"y": "1"}, "on none")
}

func testStackRefused(t *testing.T, e *env, s snapshot.Stacker) {
	e.layer("raw", "", tree{"a": "1"})
	e.cleaned("a", "", tree{"a": "1"})
	e.prepare("k", "")
	before := e.all()
	refused := func(is func(error) bool, name string, layers ...string) {
		t.Helper()
		err := s.Stack(e.ctx, name, layers)
		require.True(t, is(err), "%v", err)
		require.Equal(t, before, e.all())
	}
	var raw *snapshot.LayerError
	require.ErrorAs(t, s.Stack(e.ctx, "m", []string{"a", "raw"}), &raw)
	refused(errdefs.IsFailedPrecondition, "m", "a", "raw")
	require.Equal(t, "raw", raw.Name)
	require.False(t, raw.Bound)
	refused(errdefs.IsFailedPrecondition, "m", "a", "k")
	refused(errdefs.IsNotFound, "m", "a", "none")
	refused(errdefs.IsAlreadyExists, "a", "a")
	refused(errdefs.IsAlreadyExists, "k", "a")
	refused(errdefs.IsInvalidArgument, "", "a")
	refused(errdefs.IsInvalidArgument, "m", "")
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	require.ErrorIs(t, s.Stack(ctx, "m", []string{"a"}), context.Canceled)
	require.Equal(t, before, e.all())
	require.NoError(t, e.Remove(e.ctx, "a"), "nothing counts as its child")
}

func testStackRemoval(t *testing.T, e *env, s snapshot.Stacker) {
	e.cleaned("a", "", tree{"a": "1"})
	e.cleaned("b", "a", tree{"b": "1"})
	require.NoError(t, s.Stack(e.ctx, "m", []string{"a", "b"}))
	e.prepare("k", "m")
	busy := func(keys ...string) {
		t.Helper()
		for _, key := range keys {
			_, err := e.Detach(e.ctx, key)
			require.True(t, errdefs.IsFailedPrecondition(err), "%s: %v", key, err)
		}
	}
	busy("a", "b", "m")
	require.NoError(t, e.Remove(e.ctx, "k"))
	require.NoError(t, e.Cleanup(e.ctx))
	p := e.detach("m")
	require.NoError(t, e.Restore(e.ctx, p))
	busy("a", "b")
	e.requireTree(tree{"a": "1", "b": "1"}, "m")
	p = e.detach("m")
	layer := e.detach("b")
	err := e.Restore(e.ctx, p)
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.NoError(t, e.Restore(e.ctx, layer))
	require.NoError(t, e.Restore(e.ctx, p))
	busy("a", "b")
	p = e.detach("m")
	e.reopen()
	require.NoError(t, e.Settle(e.ctx))
	require.Equal(t, []string{"m"}, e.pending(snapshot.PendingRemoval))
	require.NoError(t, e.Discard(e.ctx, p))
	for _, key := range []string{"b", "a"} {
		require.NoError(t, e.Remove(e.ctx, key))
	}
	require.NoError(t, e.Cleanup(e.ctx))
	require.Empty(t, e.pending(snapshot.PendingRemoval))
	require.Empty(t, e.all())
}

func testStackMounts(t *testing.T, e *env, s snapshot.Stacker) {
	e.cleaned("a", "", tree{"x": "a"})
	e.cleaned("b", "", tree{"y": "b"})
	require.NoError(t, s.Stack(e.ctx, "one", []string{"a"}))
	require.NoError(t, s.Stack(e.ctx, "two", []string{"a", "b"}))
	for name, want := range map[string]tree{"one": {"x": "a"}, "two": {"x": "a", "y": "b"}} {
		e.mounted(name, false, func(dir string) {
			require.Equal(t, want, readTree(t, dir))
			require.Error(t, os.WriteFile(filepath.Join(dir, "z"), nil, 0o644), "committed")
		})
		busy, err := e.InUse(e.ctx, name)
		require.NoError(t, err)
		require.False(t, busy)
		for _, create := range []func(context.Context, string, string, ...snapshots.Opt) ([]mount.Mount, error){e.View, e.Prepare} {
			mounts, err := create(e.ctx, "k", name)
			require.NoError(t, err)
			e.mountedBy(mounts, func(dir string) { require.Equal(t, want, readTree(t, dir)) })
			e.requireTree(want, "k")
			require.NoError(t, e.Remove(e.ctx, "k"))
		}
		_, ok, err := e.Dir(e.ctx, name)
		require.NoError(t, err)
		require.False(t, ok)
		_, err = e.Mounts(e.ctx, name)
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	}
	e.layer("child", "two", tree{"x": "c"})
	e.layer("grandchild", "child", tree{"z": "g"})
	e.requireTree(tree{"x": "c", "y": "b", "z": "g"}, "grandchild")
	e.requireTree(tree{"x": "a", "y": "b"}, "two")
}

func testLayersList(t *testing.T, e *env, s snapshot.Stacker) {
	e.layer("a", "", tree{"a": "1"})
	e.cleaned("b", "a", tree{"b": "1"})
	e.cleaned("c", "", tree{"c": "1"})
	require.NoError(t, s.Stack(e.ctx, "m", []string{"c", "b"}))
	e.layer("d", "m", tree{"d": "1"})
	e.prepare("k", "d")
	_, err := e.View(e.ctx, "v", "d")
	require.NoError(t, err)
	_, err = e.View(e.ctx, "v0", "")
	require.NoError(t, err)
	for range 2 {
		for key, want := range map[string][]string{
			"a": {"a"}, "b": {"a", "b"}, "m": {"c", "b"}, "d": {"c", "b", "d"}, "k": {"c", "b", "d", "k"},
			"v": {"c", "b", "d"}, "v0": {"v0"},
		} {
			require.Equal(t, want, e.layers(key), key)
		}
		list, err := s.Layers(e.ctx, "d")
		require.NoError(t, err)
		require.True(t, list[0].Clean)
		require.True(t, list[1].Clean)
		require.False(t, list[2].Clean)
		require.FileExists(t, filepath.Join(list[1].Dir, "b"))
		require.NoFileExists(t, filepath.Join(list[1].Dir, "a"))
		e.reopen()
		s, _ = e.Stacker()
	}
	_, err = s.Layers(e.ctx, "none")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
}

func testClean(t *testing.T, e *env, s snapshot.Stacker) {
	e.layer("base", "", tree{"a": "1", "b": "1"})
	e.prepare("k", "base")
	e.mounted("k", false, func(dir string) {
		require.NoError(t, os.Rename(filepath.Join(dir, "a"), filepath.Join(dir, "t")))
		require.NoError(t, os.Rename(filepath.Join(dir, "t"), filepath.Join(dir, "a")))
		writeTree(t, dir, tree{"c": "1"})
		_, err := s.Clean(e.ctx, "k")
		require.True(t, errdefs.IsFailedPrecondition(err), "it is mounted: %v", err)
	})
	for range 2 {
		used, err := s.Clean(e.ctx, "k")
		require.NoError(t, err)
		require.EqualValues(t, 2, used.Inodes, "the root and c")
		e.requireTree(tree{"a": "1", "b": "1", "c": "1"}, "k")
	}
	// A writer in between: what was found counts no more.
	e.mounted("k", false, func(dir string) { writeTree(t, dir, tree{"d": "1"}) })
	require.NoError(t, e.Commit(e.ctx, "n", "k"))
	list, err := s.Layers(e.ctx, "n")
	require.NoError(t, err)
	require.False(t, list[1].Clean)
	used, err := e.Usage(e.ctx, "n")
	require.NoError(t, err)
	require.EqualValues(t, 3, used.Inodes)

	_, err = e.View(e.ctx, "v", "base")
	require.NoError(t, err)
	for _, key := range []string{"n", "v"} {
		_, err = s.Clean(e.ctx, key)
		require.True(t, errdefs.IsFailedPrecondition(err), "%s: %v", key, err)
	}
	_, err = s.Clean(e.ctx, "none")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	// A commit that fails loses nothing.
	e.prepare("k", "base")
	_, err = s.Clean(e.ctx, "k")
	require.NoError(t, err)
	require.True(t, errdefs.IsAlreadyExists(e.Commit(e.ctx, "n", "k")))
	require.NoError(t, e.Commit(e.ctx, "n2", "k"))
	require.NoError(t, s.Stack(e.ctx, "m", []string{"n2"}))
}

func testCleanCopy(t *testing.T, e *env, s snapshot.Stacker) {
	e.layer("base", "", tree{"a": "1"})
	e.layer("n", "base", tree{"b": "1", "d/e": "1"})
	labels := map[string]string{"l": "1"}
	require.NoError(t, s.CleanCopy(e.ctx, "c", "n", snapshots.WithLabels(labels)))
	info, err := e.Stat(e.ctx, "c")
	require.NoError(t, err)
	require.Empty(t, info.Parent)
	require.Equal(t, labels, info.Labels)
	e.requireTree(tree{"b": "1", "d/": "", "d/e": "1"}, "c")
	require.NoError(t, s.Stack(e.ctx, "m", []string{"c"}))
	for _, name := range []string{"n", "base"} {
		require.NoError(t, e.Remove(e.ctx, name))
	}
	require.NoError(t, e.Cleanup(e.ctx))
	e.requireTree(tree{"b": "1", "d/": "", "d/e": "1"}, "m")
	e.prepare("k", "")
	for from, is := range map[string]func(error) bool{
		"none": errdefs.IsNotFound, "k": errdefs.IsFailedPrecondition, "m": errdefs.IsInvalidArgument,
	} {
		err := s.CleanCopy(e.ctx, "c2", from)
		require.True(t, is(err), "%s: %v", from, err)
	}
	require.True(t, errdefs.IsAlreadyExists(s.CleanCopy(e.ctx, "m", "c")))
}

func testDiff(t *testing.T, e *env, s snapshot.Stacker) {
	e.cleaned("a", "", tree{"x": "a", "d/e": "a", "d/f": "a"})
	e.cleaned("b", "", tree{"x": "b", "d/e": "a", "g/": ""})
	require.NoError(t, s.Diff(e.ctx, "d", "a", "b"))
	e.requireTree(tree{"d/": "", "d/e": "a", "g/": "", "x": "b"}, "d")
	require.NoError(t, s.Stack(e.ctx, "m", []string{"a", "d"}))
	e.requireTree(tree{"d/": "", "d/e": "a", "g/": "", "x": "b"}, "m")
	require.NoError(t, s.Diff(e.ctx, "all", "", "b"))
	e.requireTree(tree{"d/": "", "d/e": "a", "g/": "", "x": "b"}, "all")
	require.NoError(t, s.Diff(e.ctx, "same", "b", "m"))
	require.NoError(t, s.Diff(e.ctx, "self", "b", "b"))
	e.requireTree(tree{}, "self")
	// It needs neither of the two.
	for _, name := range []string{"m", "a", "b"} {
		require.NoError(t, e.Remove(e.ctx, name))
	}
	require.NoError(t, e.Cleanup(e.ctx))
	e.requireTree(tree{"d/": "", "d/e": "a", "g/": "", "x": "b"}, "d")
	e.prepare("k", "")
	require.True(t, errdefs.IsNotFound(s.Diff(e.ctx, "d2", "none", "d")))
	require.True(t, errdefs.IsNotFound(s.Diff(e.ctx, "d2", "", "none")))
	require.True(t, errdefs.IsInvalidArgument(s.Diff(e.ctx, "d2", "d", "")))
	require.True(t, errdefs.IsFailedPrecondition(s.Diff(e.ctx, "d2", "k", "d")))
	require.True(t, errdefs.IsAlreadyExists(s.Diff(e.ctx, "all", "", "d")))
}

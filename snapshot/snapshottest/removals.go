package snapshottest

import (
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
)

// removalTests are about removal in two steps.
var removalTests = map[string]func(*testing.T, *env){
	"Restore":              testRestore,
	"RestoreOrphan":        testRestoreOrphan,
	"RestoreTakenName":     testRestoreTaken,
	"Discard":              testDiscard,
	"DiscardParentFirst":   testDiscardParentFirst,
	"CleanupSparesHeld":    testCleanup,
	"RemoveFreesTheKey":    testRemoveFreesKey,
	"PendingAfterReopen":   testPendingReopen,
	"ManyChildrenAndViews": testManyChildren,
}

func (e *env) detach(key string) snapshot.Pending {
	e.t.Helper()
	p, err := e.Detach(e.ctx, key)
	require.NoError(e.t, err)
	require.Equal(e.t, key, p.Key)
	require.Equal(e.t, snapshot.PendingRemoval, p.Kind)
	_, err = e.Stat(e.ctx, key)
	require.True(e.t, errdefs.IsNotFound(err), "%v", err)
	require.NotContains(e.t, e.all(), key)
	return p
}

func testRestore(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	e.prepare("k", "base", snapshots.WithLabels(map[string]string{"l": "1"}))
	e.mounted("k", false, func(dir string) { writeTree(t, dir, tree{"b": "2"}) })
	e.prepare("other", "base")
	require.NoError(t, e.Commit(e.ctx, "n", "other", snapshots.WithLabels(map[string]string{"l": "2"})))
	before := e.all()
	for _, key := range []string{"k", "n"} {
		p := e.detach(key)
		require.NoError(t, e.Restore(e.ctx, p))
		got := e.all()
		for name, info := range got {
			// A driver may note the removal and its end as updates.
			info.Updated = before[name].Updated
			got[name] = info
		}
		require.Equal(t, before, got)
		require.Empty(t, e.pending(snapshot.PendingRemoval))
		err := e.Remove(e.ctx, "base")
		require.True(t, errdefs.IsFailedPrecondition(err), "a child again: %v", err)
		require.Error(t, e.Restore(e.ctx, p), "only once")
	}
	e.requireTree(tree{"a": "1", "b": "2"}, "k")
	e.mounted("k", false, func(dir string) { writeTree(t, dir, tree{"c": "3"}) })
	e.requireTree(tree{"a": "1", "b": "2", "c": "3"}, "k")
}

func testRestoreOrphan(t *testing.T, e *env) {
	e.layer("base", "", nil)
	e.prepare("k", "base")
	child := e.detach("k")
	parent := e.detach("base")
	err := e.Restore(e.ctx, child)
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.NotContains(t, e.all(), "k")
	require.NoError(t, e.Restore(e.ctx, parent))
	require.NoError(t, e.Restore(e.ctx, child))
	require.Len(t, e.all(), 2)
}

func testRestoreTaken(t *testing.T, e *env) {
	e.prepare("k", "")
	p := e.detach("k")
	if _, err := e.Prepare(e.ctx, "k", ""); errdefs.IsAlreadyExists(err) {
		return // the adaptor's limit: a detached key is free after Discard
	}
	err := e.Restore(e.ctx, p)
	require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
	require.NoError(t, e.Discard(e.ctx, p))
	_, err = e.Stat(e.ctx, "k")
	require.NoError(t, err)
}

func testDiscard(t *testing.T, e *env) {
	e.layer("base", "", nil)
	e.prepare("k", "base")
	p := e.detach("k")
	require.NoError(t, e.Discard(e.ctx, p))
	require.NoError(t, e.Discard(e.ctx, p), "repeated")
	require.Empty(t, e.pending(snapshot.PendingRemoval))
	err := e.Restore(e.ctx, p)
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	e.prepare("k", "base")
	require.NoError(t, e.Discard(e.ctx, p), "an old removal is not the new name")
	_, err = e.Stat(e.ctx, "k")
	require.NoError(t, err)
}

func testDiscardParentFirst(t *testing.T, e *env) {
	e.layer("a", "", nil)
	e.layer("b", "a", nil)
	e.prepare("c", "b")
	c, b, a := e.detach("c"), e.detach("b"), e.detach("a")
	for _, p := range []snapshot.Pending{a, b, c} {
		require.NoError(t, e.Discard(e.ctx, p))
	}
	require.Empty(t, e.pending(snapshot.PendingRemoval))
	require.Empty(t, e.all())
	e.layer("a", "", nil)
}

func testCleanup(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	e.prepare("k", "base")
	e.prepare("gone", "base")
	held := e.detach("k")
	require.NoError(t, e.Remove(e.ctx, "gone"))
	require.NoError(t, e.Cleanup(e.ctx))
	require.Equal(t, []string{"k"}, e.pending(snapshot.PendingRemoval))
	require.NoError(t, e.Restore(e.ctx, held))
	require.NoError(t, e.Cleanup(e.ctx))
	e.requireTree(tree{"a": "1"}, "k")
}

func testRemoveFreesKey(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	for range 3 {
		e.prepare("k", "base")
		e.mounted("k", false, func(dir string) { writeTree(t, dir, tree{"b": "2"}) })
		require.NoError(t, e.Remove(e.ctx, "k"))
	}
	e.prepare("k", "base")
	e.requireTree(tree{"a": "1"}, "k")
	require.NoError(t, e.Remove(e.ctx, "k"))
	require.NoError(t, e.Remove(e.ctx, "base"))
	// The name may have another parent, and other content, the next time.
	e.layer("other", "", tree{"x": "1"})
	e.layer("base", "other", tree{"y": "1"})
	e.requireTree(tree{"x": "1", "y": "1"}, "base")
	require.NoError(t, e.Cleanup(e.ctx))
	require.Empty(t, e.pending(snapshot.PendingRemoval))
}

func testPendingReopen(t *testing.T, e *env) {
	e.layer("base", "", nil)
	e.prepare("k", "base")
	e.prepare("gone", "base")
	_, err := e.View(e.ctx, "v", "base")
	require.NoError(t, err)
	e.detach("gone")
	e.reopen()
	require.NoError(t, e.Settle(e.ctx))
	require.ElementsMatch(t, []string{"k", "v"}, e.pending(snapshot.PendingActive))
	require.Equal(t, []string{"gone"}, e.pending(snapshot.PendingRemoval))
	list, err := e.Pending(e.ctx)
	require.NoError(t, err)
	for _, p := range list {
		if p.Kind == snapshot.PendingRemoval {
			require.NoError(t, e.Restore(e.ctx, p))
		}
	}
	require.ElementsMatch(t, []string{"k", "v", "gone"}, e.pending(snapshot.PendingActive))
	require.True(t, errdefs.IsFailedPrecondition(e.Remove(e.ctx, "base")))
}

func testManyChildren(t *testing.T, e *env) {
	e.layer("base", "", nil)
	keys := []string{"c1", "c2", "c3", "v1", "v2"}
	for _, key := range keys {
		if key[0] == 'v' {
			_, err := e.View(e.ctx, key, "base")
			require.NoError(t, err)
			continue
		}
		e.prepare(key, "base")
	}
	require.NoError(t, e.Commit(e.ctx, "n1", "c1"))
	keys[0] = "n1"
	for _, key := range keys {
		err := e.Remove(e.ctx, "base")
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		require.NoError(t, e.Remove(e.ctx, key))
	}
	require.NoError(t, e.Remove(e.ctx, "base"))
	require.Empty(t, e.all())
}

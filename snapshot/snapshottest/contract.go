package snapshottest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
)

// contractTests are about what containerd's interface promises and its own
// suite does not try. The classes of errors are those of its storage package.
var contractTests = map[string]func(*testing.T, *env){
	"RefusalsChangeNothing": testRefusals,
	"CommitReplacesLabels":  testCommitLabels,
	"CommitWithParent":      testCommitWithParent,
	"Update":                testUpdate,
	"Usage":                 testUsage,
	"Reopen":                testReopen,
	"SettleOfNothing":       testSettleNothing,
	"Sync":                  testSync,
}

func withParent(name string) snapshots.Opt {
	return func(info *snapshots.Info) error {
		info.Parent = name
		return nil
	}
}

func testRefusals(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	e.layer("other", "", nil)
	e.prepare("active", "base")
	_, err := e.View(e.ctx, "view", "base")
	require.NoError(t, err)

	prepare := func(key, parent string) func() error {
		return func() error { _, err := e.Prepare(e.ctx, key, parent); return err }
	}
	view := func(key, parent string) func() error {
		return func() error { _, err := e.View(e.ctx, key, parent); return err }
	}
	commit := func(name, key string, opts ...snapshots.Opt) func() error {
		return func() error { return e.Commit(e.ctx, name, key, opts...) }
	}
	remove := func(key string) func() error {
		return func() error { return e.Remove(e.ctx, key) }
	}
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		call  func() error
		class func(error) bool
	}{
		"prepare, empty key":           {prepare("", ""), errdefs.IsInvalidArgument},
		"prepare, taken by active":     {prepare("active", ""), errdefs.IsAlreadyExists},
		"prepare, taken by view":       {prepare("view", "base"), errdefs.IsAlreadyExists},
		"prepare, taken by committed":  {prepare("base", ""), errdefs.IsAlreadyExists},
		"prepare, unknown parent":      {prepare("x", "none"), errdefs.IsNotFound},
		"prepare, active parent":       {prepare("x", "active"), errdefs.IsInvalidArgument},
		"prepare, view as parent":      {prepare("x", "view"), errdefs.IsInvalidArgument},
		"view, empty key":              {view("", "base"), errdefs.IsInvalidArgument},
		"view, taken":                  {view("active", "base"), errdefs.IsAlreadyExists},
		"view, unknown parent":         {view("x", "none"), errdefs.IsNotFound},
		"commit, empty name":           {commit("", "active"), errdefs.IsInvalidArgument},
		"commit, empty key":            {commit("x", ""), errdefs.IsInvalidArgument},
		"commit, unknown key":          {commit("x", "none"), errdefs.IsNotFound},
		"commit, name of a committed":  {commit("base", "active"), errdefs.IsAlreadyExists},
		"commit, name of an active":    {commit("view", "active"), errdefs.IsAlreadyExists},
		"commit, name is the key":      {commit("active", "active"), errdefs.IsAlreadyExists},
		"commit of a view":             {commit("x", "view"), errdefs.IsFailedPrecondition},
		"commit of a committed":        {commit("x", "base"), errdefs.IsFailedPrecondition},
		"commit, another parent":       {commit("x", "active", withParent("other")), errdefs.IsInvalidArgument},
		"remove, empty key":            {remove(""), anyClass},
		"remove, unknown":              {remove("none"), errdefs.IsNotFound},
		"remove of a parent":           {remove("base"), errdefs.IsFailedPrecondition},
		"detach of a parent":           {func() error { _, err := e.Detach(e.ctx, "base"); return err }, errdefs.IsFailedPrecondition},
		"detach, unknown":              {func() error { _, err := e.Detach(e.ctx, "none"); return err }, errdefs.IsNotFound},
		"stat, unknown":                {func() error { _, err := e.Stat(e.ctx, "none"); return err }, errdefs.IsNotFound},
		"usage, unknown":               {func() error { _, err := e.Usage(e.ctx, "none"); return err }, errdefs.IsNotFound},
		"mounts, unknown":              {func() error { _, err := e.Mounts(e.ctx, "none"); return err }, errdefs.IsNotFound},
		"mounts of a committed":        {func() error { _, err := e.Mounts(e.ctx, "base"); return err }, errdefs.IsFailedPrecondition},
		"mount, unknown":               {func() error { return e.Mount(e.ctx, "none", dir, true) }, errdefs.IsNotFound},
		"mount, no such target":        {func() error { return e.Mount(e.ctx, "base", filepath.Join(dir, "none"), true) }, anyClass},
		"dir, unknown":                 {func() error { _, _, err := e.Dir(e.ctx, "none"); return err }, errdefs.IsNotFound},
		"in use, unknown":              {func() error { _, err := e.InUse(e.ctx, "none"); return err }, errdefs.IsNotFound},
		"discard of what is no remove": {func() error { return e.Discard(e.ctx, activePending(t, e)) }, errdefs.IsInvalidArgument},
		"restore of what is no remove": {func() error { return e.Restore(e.ctx, activePending(t, e)) }, errdefs.IsInvalidArgument},
		"update, unknown key": {func() error {
			_, err := e.Update(e.ctx, snapshots.Info{Name: "none"})
			return err
		}, errdefs.IsNotFound},
		"update, fixed field": {func() error {
			_, err := e.Update(e.ctx, snapshots.Info{Name: "active", Parent: "other"}, "parent")
			return err
		}, errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			before := e.all()
			err := tc.call()
			require.Error(t, err)
			require.True(t, tc.class(err), "class of: %v", err)
			require.Equal(t, before, e.all())
			require.Empty(t, e.pending(snapshot.PendingRemoval))
		})
	}
	e.requireTree(tree{"a": "1"}, "active")
	e.requireTree(tree{"a": "1"}, "base")
}

func anyClass(error) bool { return true }

func activePending(t *testing.T, e *env) snapshot.Pending {
	list, err := e.Pending(e.ctx)
	require.NoError(t, err)
	require.NotEmpty(t, list)
	require.Equal(t, snapshot.PendingActive, list[0].Kind)
	return list[0]
}

func testCommitLabels(t *testing.T, e *env) {
	e.prepare("k", "", snapshots.WithLabels(map[string]string{"old": "1", "both": "1"}))
	before, err := e.Stat(e.ctx, "k")
	require.NoError(t, err)
	require.Equal(t, map[string]string{"old": "1", "both": "1"}, before.Labels)
	require.NoError(t, e.Commit(e.ctx, "n", "k", snapshots.WithLabels(map[string]string{"both": "2", "new": "2"})))
	after, err := e.Stat(e.ctx, "n")
	require.NoError(t, err)
	require.Equal(t, map[string]string{"both": "2", "new": "2"}, after.Labels)
	require.Equal(t, after.Created, after.Updated)
	require.False(t, after.Created.Before(before.Created))
	require.Equal(t, snapshots.KindCommitted, after.Kind)

	e.prepare("k", "n")
	require.NoError(t, e.Commit(e.ctx, "n2", "k"))
	bare, err := e.Stat(e.ctx, "n2")
	require.NoError(t, err)
	require.Empty(t, bare.Labels)
	require.Equal(t, "n", bare.Parent)
}

func testCommitWithParent(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1", "b": "1"})
	e.prepare("other", "base")
	e.prepare("k", "")
	e.mounted("k", false, func(dir string) { writeTree(t, dir, tree{"b": "2", "c": "2"}) })

	err := e.Commit(e.ctx, "n", "k", withParent("none"))
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	err = e.Commit(e.ctx, "n", "k", withParent("other"))
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)

	err = e.Commit(e.ctx, "n", "k", withParent("base"))
	if errdefs.IsNotImplemented(err) {
		// As if never asked: the snapshot can be committed without.
		require.NoError(t, e.Commit(e.ctx, "n", "k"))
		e.requireTree(tree{"b": "2", "c": "2"}, "n")
		return
	}
	require.NoError(t, err)
	info, err := e.Stat(e.ctx, "n")
	require.NoError(t, err)
	require.Equal(t, "base", info.Parent)
	require.NoError(t, e.Remove(e.ctx, "other"))
	err = e.Remove(e.ctx, "base")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	if e.Info().Name == snapshot.Overlay {
		// Containerd's copying snapshotter takes the parent and shows
		// nothing of it.
		e.requireTree(tree{"a": "1", "b": "2", "c": "2"}, "n")
	}
	require.NoError(t, e.Remove(e.ctx, "n"))
	require.NoError(t, e.Remove(e.ctx, "base"))

	e.layer("base2", "", nil)
	e.prepare("k", "base2")
	require.NoError(t, e.Commit(e.ctx, "n", "k", withParent("base2")), "the parent that it has")
}

func testUpdate(t *testing.T, e *env) {
	e.prepare("k", "", snapshots.WithLabels(map[string]string{"a": "1", "b": "1"}))
	e.layer("n", "", nil)
	for _, key := range []string{"k", "n"} {
		_, err := e.Update(e.ctx, snapshots.Info{Name: key, Labels: map[string]string{"a": "1", "b": "1"}}, "labels")
		require.NoError(t, err)
		was, err := e.Stat(e.ctx, key)
		require.NoError(t, err)
		got, err := e.Update(e.ctx, snapshots.Info{Name: key, Labels: map[string]string{"b": "2", "c": "ignored"}}, "labels.b")
		require.NoError(t, err)
		require.Equal(t, map[string]string{"a": "1", "b": "2"}, got.Labels)
		require.Equal(t, was.Created, got.Created)
		require.False(t, got.Updated.Before(was.Updated))

		_, err = e.Update(e.ctx, snapshots.Info{Name: key}, "labels.a")
		require.NoError(t, err)
		got, err = e.Stat(e.ctx, key)
		require.NoError(t, err)
		require.Equal(t, map[string]string{"b": "2"}, got.Labels, "an empty value takes the label away")

		_, err = e.Update(e.ctx, snapshots.Info{Name: key, Labels: map[string]string{"z": "ü \n \"quoted\""}})
		require.NoError(t, err)
		got, err = e.Stat(e.ctx, key)
		require.NoError(t, err)
		require.Equal(t, map[string]string{"z": "ü \n \"quoted\""}, got.Labels)
		require.Equal(t, e.all()[key], got)
	}
}

func testUsage(t *testing.T, e *env) {
	e.layer("base", "", tree{"big": string(make([]byte, 1<<20))})
	e.prepare("k", "base")
	empty, err := e.Usage(e.ctx, "k")
	require.NoError(t, err)
	e.mounted("k", false, func(dir string) {
		require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
		data := make([]byte, 64<<10)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "d", "f"), data, 0o644))
		// One inode with three names, and a file that is all hole.
		require.NoError(t, os.Link(filepath.Join(dir, "d", "f"), filepath.Join(dir, "g")))
		require.NoError(t, os.Link(filepath.Join(dir, "d", "f"), filepath.Join(dir, "h")))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "hole"), nil, 0o644))
		require.NoError(t, os.Truncate(filepath.Join(dir, "hole"), 1<<30))
	})
	used, err := e.Usage(e.ctx, "k")
	require.NoError(t, err)
	require.Equal(t, empty.Inodes+3, used.Inodes, "directory, file, hole")
	require.GreaterOrEqual(t, used.Size, empty.Size+64<<10)
	require.Less(t, used.Size, empty.Size+2*64<<10, "counted once, holes not at all")

	require.NoError(t, e.Commit(e.ctx, "n", "k"))
	sealed, err := e.Usage(e.ctx, "n")
	require.NoError(t, err)
	require.Equal(t, used, sealed)
	_, err = e.View(e.ctx, "v", "n")
	require.NoError(t, err)
	viewed, err := e.Usage(e.ctx, "v")
	require.NoError(t, err)
	require.Zero(t, viewed)
}

func testReopen(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	e.layer("n", "base", tree{"b": "2"})
	e.prepare("k", "n", snapshots.WithLabels(map[string]string{"l": "1"}))
	e.mounted("k", false, func(dir string) { writeTree(t, dir, tree{"c": "3"}) })
	before, info := e.all(), e.Info()
	e.reopen()
	require.Equal(t, before, e.all())
	require.Equal(t, info, e.Info())
	e.requireTree(tree{"a": "1", "b": "2", "c": "3"}, "k")
	e.mounted("k", false, func(dir string) { writeTree(t, dir, tree{"d": "4"}) })
	require.NoError(t, e.Commit(e.ctx, "k2", "k"))
	e.requireTree(tree{"a": "1", "b": "2", "c": "3", "d": "4"}, "k2")
}

func testSettleNothing(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	e.prepare("k", "base")
	p, err := e.Detach(e.ctx, "k")
	require.NoError(t, err)
	e.prepare("k2", "base")
	before := e.all()
	require.NoError(t, e.Settle(e.ctx))
	require.NoError(t, e.Settle(e.ctx))
	require.Equal(t, before, e.all())
	require.Equal(t, []string{"k2"}, e.pending(snapshot.PendingActive))
	require.Equal(t, []string{"k"}, e.pending(snapshot.PendingRemoval))
	require.NoError(t, e.Discard(e.ctx, p))
}

func testSync(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	require.NoError(t, e.Sync(e.ctx))
}

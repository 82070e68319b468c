package snapshot_test

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
)

// odd is a key that no directory can be called by, and long one that needs a
// digest in its place.
var (
	odd  = "sha256:../a b%\n+"
	long = strings.Repeat("long", 60)
)

// estate is a directory in which another snapshotter left a chain, a writable
// snapshot on it, and two beside.
func estate(t *testing.T, driver string) (root string) {
	t.Helper()
	if driver == snapshot.Overlay {
		needRoot(t)
	}
	root = t.TempDir()
	entries := []snapshot.Adopted{
		{Key: "base", Kind: snapshots.KindCommitted, Dir: "1", Created: time.Unix(1, 2), Usage: snapshots.Usage{Size: 4096, Inodes: 2}},
		{Key: odd, Parent: "base", Kind: snapshots.KindCommitted, Dir: "2"},
		{Key: "m-w", Parent: odd, Kind: snapshots.KindActive, Dir: "3"},
		{Key: "x-w", Kind: snapshots.KindActive, Dir: "4"},
		{Key: long, Kind: snapshots.KindCommitted, Dir: "5"},
	}
	for _, a := range entries {
		tree := filepath.Join(root, "snapshots", "snapshots", a.Dir)
		if driver == snapshot.Overlay {
			require.NoError(t, os.MkdirAll(filepath.Join(tree, "work"), 0o755))
			tree = filepath.Join(tree, "fs")
		}
		require.NoError(t, os.MkdirAll(tree, 0o755))
		// Names that an entry has would mislead who took this for one.
		for _, name := range []string{"info", "id", "parent", "own-" + a.Dir} {
			file(t, filepath.Join(tree, name), a.Dir)
		}
	}
	require.NoError(t, snapshot.Adopt(t.Context(), root, snapshot.Options{Driver: driver}, slices.Values(entries), nil))
	return root
}

func bothDrivers(t *testing.T, test func(t *testing.T, driver string)) {
	t.Helper()
	for _, driver := range []string{snapshot.Overlay, snapshot.Native} {
		t.Run(driver, func(t *testing.T) { test(t, driver) })
	}
}

// entries are the names that an adoption has made so far.
func entries(t *testing.T, root string) (list []string) {
	t.Helper()
	for _, dir := range []string{"new", "active", "committed", "trash"} {
		list = append(list, names(t, filepath.Join(root, "snapshots", dir))...)
	}
	return list
}

func pendingKeys(t *testing.T, d snapshot.Driver, kind snapshot.PendingKind) (keys []string) {
	t.Helper()
	all, err := d.Pending(t.Context())
	require.NoError(t, err)
	for _, p := range all {
		if p.Kind == kind {
			keys = append(keys, p.Key)
		}
	}
	slices.Sort(keys)
	return keys
}

func committedKeys(t *testing.T, d snapshot.Driver) []string {
	t.Helper()
	keys, err := d.Committed(t.Context())
	require.NoError(t, err)
	slices.Sort(keys)
	return keys
}

func walked(t *testing.T, d snapshot.Driver) map[string]snapshots.Info {
	t.Helper()
	found := map[string]snapshots.Info{}
	require.NoError(t, d.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		require.NotContains(t, found, info.Name, "once")
		found[info.Name] = info
		return nil
	}))
	return found
}

// Whoever asks is told, and makes no inode; the first use of one gives it, and
// what it lies on, an entry, and all answers stay the same.
func TestAdoptedWaits(t *testing.T) {
	bothDrivers(t, func(t *testing.T, driver string) {
		root := estate(t, driver)
		require.Empty(t, entries(t, root))
		d := openWith(t, driver, root, &steps{})
		committed := []string{"base", long, odd}
		ask := func() map[string]snapshots.Info {
			require.Equal(t, committed, committedKeys(t, d))
			require.Equal(t, []string{"m-w", "x-w"}, pendingKeys(t, d, snapshot.PendingActive))
			found := walked(t, d)
			for key, info := range found {
				stat, err := d.Stat(t.Context(), key)
				require.NoError(t, err)
				require.Equal(t, info, stat)
			}
			used, err := d.Usage(t.Context(), "base")
			require.NoError(t, err)
			require.Equal(t, snapshots.Usage{Size: 4096, Inodes: 2}, used)
			return found
		}
		before := ask()
		require.Len(t, before, 5)
		require.Equal(t, odd, before["m-w"].Parent)
		require.Equal(t, snapshots.KindActive, before["m-w"].Kind)
		require.Equal(t, time.Unix(1, 2).UTC(), before["base"].Created)
		require.NoError(t, d.Settle(t.Context()))
		require.Empty(t, entries(t, root))
		for _, key := range []string{"base", "m-w", long} {
			_, err := d.Prepare(t.Context(), key, "")
			require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
		}

		_, err := d.Prepare(t.Context(), "k", "m-w")
		require.Error(t, err, "it is not committed")
		_, err = d.Prepare(t.Context(), "k", odd)
		require.NoError(t, err)
		require.NoError(t, d.Remove(t.Context(), "k"))
		require.NoError(t, d.Cleanup(t.Context()))
		require.Len(t, entries(t, root), 3, "base, odd, and m-w, which was looked for")
		require.Equal(t, before, ask())
		_, err = d.View(t.Context(), "v", long)
		require.NoError(t, err)
		require.NoError(t, d.Remove(t.Context(), "v"))
		require.NoError(t, d.Commit(t.Context(), "x", "x-w"))
		require.NoError(t, d.Commit(t.Context(), "m", "m-w"))
		again := openWith(t, driver, root, &steps{})
		require.NoError(t, again.Settle(t.Context()))
		require.NoFileExists(t, filepath.Join(root, "snapshots", "adopted"), "nothing waits")
		require.Equal(t, []string{"base", long, "m", odd, "x"}, committedKeys(t, again))
		if driver == snapshot.Overlay {
			mounted(t, again, "m", true, func(dir string) {
				require.Subset(t, names(t, dir), []string{"own-1", "own-2", "own-3"})
			})
		}
	})
}

// A parent stays as long as it has children, with and without entries; removal
// makes nothing, and can be taken back until the bytes go.
func TestAdoptedRemoval(t *testing.T) {
	bothDrivers(t, func(t *testing.T, driver string) {
		root := estate(t, driver)
		d := openWith(t, driver, root, &steps{})
		for _, key := range []string{"base", odd} {
			_, err := d.Detach(t.Context(), key)
			require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		}
		p, err := d.Detach(t.Context(), "m-w")
		require.NoError(t, err)
		require.Equal(t, []string{"m-w"}, pendingKeys(t, d, snapshot.PendingRemoval))
		_, err = d.Stat(t.Context(), "m-w")
		require.True(t, errdefs.IsNotFound(err), "%v", err)
		require.NoError(t, d.Cleanup(t.Context()), "leaves it alone")
		require.NoError(t, d.Restore(t.Context(), p))
		require.NoDirExists(t, filepath.Join(root, "snapshots", "active", "m-w"))
		_, err = d.Detach(t.Context(), odd)
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)

		p, err = d.Detach(t.Context(), "m-w")
		require.NoError(t, err)
		odds, err := d.Detach(t.Context(), odd)
		require.NoError(t, err)
		err = d.Restore(t.Context(), p)
		require.True(t, errdefs.IsFailedPrecondition(err), "its parent went: %v", err)
		require.NoError(t, d.Restore(t.Context(), odds))
		require.NoError(t, d.Restore(t.Context(), p))

		// With one of the two as an entry.
		_, err = d.Prepare(t.Context(), "k", odd)
		require.NoError(t, err)
		p, err = d.Detach(t.Context(), "m-w")
		require.NoError(t, err)
		require.NoError(t, d.Restore(t.Context(), p))
		_, err = d.Detach(t.Context(), "base")
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		require.NoError(t, d.Remove(t.Context(), "k"))

		p, err = d.Detach(t.Context(), "m-w")
		require.NoError(t, err)
		require.NoError(t, d.Discard(t.Context(), p))
		require.NoError(t, d.Discard(t.Context(), p), "repeating it is harmless")
		err = d.Restore(t.Context(), p)
		require.True(t, errdefs.IsNotFound(err), "%v", err)
		for _, key := range []string{odd, "base", "x-w", long} {
			require.NoError(t, d.Remove(t.Context(), key))
		}
		require.NoError(t, d.Cleanup(t.Context()))
		require.Empty(t, names(t, filepath.Join(root, "snapshots", "snapshots")))
		require.Empty(t, entries(t, root))
		require.Empty(t, walked(t, d))
	})
}

// Stopped at each step of uses and removals, then opened and settled: each
// snapshot is there or in trash, never twice, never lost.
func TestAdoptedStoppedAtEachStep(t *testing.T) {
	bothDrivers(t, func(t *testing.T, driver string) {
		boom := errors.New("boom")
		uses := map[string]func(d snapshot.Driver) error{
			"prepare": func(d snapshot.Driver) error {
				_, err := d.Prepare(t.Context(), "k", odd)
				return err
			},
			"commit":       func(d snapshot.Driver) error { return d.Commit(t.Context(), "m", "m-w") },
			"remove":       func(d snapshot.Driver) error { return d.Remove(t.Context(), "m-w") },
			"remove entry": func(d snapshot.Driver) error { return d.Remove(t.Context(), long) },
			"restore": func(d snapshot.Driver) error {
				p, err := d.Detach(t.Context(), "m-w")
				if err == nil {
					err = d.Restore(t.Context(), p)
				}
				return err
			},
			"discard": func(d snapshot.Driver) error {
				p, err := d.Detach(t.Context(), "m-w")
				if err == nil {
					err = d.Discard(t.Context(), p)
				}
				return err
			},
		}
		if driver == snapshot.Overlay { // where making and moving differ
			maps.DeleteFunc(uses, func(name string, _ func(snapshot.Driver) error) bool {
				return name != "prepare" && name != "discard"
			})
		}
		for name, use := range uses {
			for at := 1; ; at++ {
				root := estate(t, driver)
				s := &steps{at: func(n int, _ string) error {
					if n >= at { // killed: nothing is done any more
						return boom
					}
					return nil
				}}
				err := use(openWith(t, driver, root, s))
				d := openWith(t, driver, root, &steps{})
				require.NoError(t, d.Settle(t.Context()), "%s, %d", name, at)
				found := walked(t, d)
				for _, key := range pendingKeys(t, d, snapshot.PendingRemoval) {
					require.NotContains(t, found, key, "%s, %d", name, at)
					found[key] = snapshots.Info{}
				}
				for _, key := range []string{"base", odd, "x-w", long} {
					require.Contains(t, found, key, "%s, %d", name, at)
				}
				_, was := found["m-w"]
				_, is := found["m"]
				if name != "discard" {
					require.NotEqual(t, was, is, "%s, %d", name, at)
				}
				for _, key := range []string{"k", "m", "m-w", odd, "base", "x-w", long} {
					if _, live := walked(t, d)[key]; live {
						require.NoError(t, d.Remove(t.Context(), key), "%s, %d: %s", name, at, key)
					}
				}
				require.NoError(t, d.Cleanup(t.Context()))
				require.Empty(t, names(t, filepath.Join(root, "snapshots", "snapshots")), "%s, %d", name, at)
				require.Empty(t, entries(t, root), "%s, %d", name, at)
				if err == nil {
					require.Greater(t, at, 1, name)
					break
				}
				require.ErrorIs(t, err, boom)
			}
		}
	})
}

// A power cut takes the marks back, and leaves the names as they are: what has
// an entry, is in trash or is gone does not come back.
func TestAdoptedMarksLost(t *testing.T) {
	bothDrivers(t, func(t *testing.T, driver string) {
		root := estate(t, driver)
		path := filepath.Join(root, "snapshots", "adopted")
		list, err := os.ReadFile(path)
		require.NoError(t, err)
		d := openWith(t, driver, root, &steps{})
		require.NoError(t, d.Commit(t.Context(), "m", "m-w"))
		require.NoError(t, d.Remove(t.Context(), "x-w"))
		_, err = d.Prepare(t.Context(), "k", long)
		require.NoError(t, err)
		require.NoError(t, d.Remove(t.Context(), "k"))
		require.NoError(t, d.Remove(t.Context(), long))
		require.NoError(t, os.WriteFile(path, list, 0o600))
		for range 2 {
			d = openWith(t, driver, root, &steps{})
			require.NoError(t, d.Settle(t.Context()))
			require.Equal(t, []string{"base", "m", odd}, committedKeys(t, d))
			require.Empty(t, pendingKeys(t, d, snapshot.PendingActive))
			require.Len(t, pendingKeys(t, d, snapshot.PendingRemoval), 3, "k, x-w, long")
		}
		require.NoError(t, d.Cleanup(t.Context()))
		require.Len(t, names(t, filepath.Join(root, "snapshots", "snapshots")), 3)
	})
}

// A line that is damaged costs its own snapshot.
func TestAdoptedLineDamaged(t *testing.T) {
	root := estate(t, snapshot.Native)
	path := filepath.Join(root, "snapshots", "adopted")
	list, err := os.ReadFile(path)
	require.NoError(t, err)
	for at := 0; at < len(list); at += 5 {
		for _, c := range []byte{0, '\n', ' ', '-', 'z'} {
			torn := slices.Clone(list)
			if torn[at] = c; c == list[at] {
				continue
			}
			require.NoError(t, os.WriteFile(path, torn, 0o600))
			d, err := snapshot.Open(t.Context(), root, snapshot.Options{})
			require.NoError(t, err)
			found := walked(t, d)
			require.GreaterOrEqual(t, len(found), 3, "at %d", at)
			for key := range found {
				require.Contains(t, []string{"base", odd, "m-w", "x-w", long}, key, "at %d", at)
			}
			require.NoError(t, d.Close())
		}
	}
}

// What an adoption left, whole or cut off, another one replaces.
func TestAdoptAgain(t *testing.T) {
	bothDrivers(t, func(t *testing.T, driver string) {
		root := estate(t, driver)
		boom := errors.New("boom")
		again := []snapshot.Adopted{{Key: "other", Kind: snapshots.KindCommitted, Dir: "1"}}
		for at := 1; ; at++ {
			n := 0
			err := snapshot.Adopt(t.Context(), root, snapshot.Options{Driver: driver, Step: func(string) error {
				if n++; n >= at {
					return boom
				}
				return nil
			}}, slices.Values(again), []string{"5"})
			if err == nil {
				break
			}
			require.ErrorIs(t, err, boom)
		}
		d := openWith(t, driver, root, &steps{})
		require.NoError(t, d.Settle(t.Context()))
		require.Equal(t, []string{"other"}, committedKeys(t, d))
		require.NoError(t, d.Cleanup(t.Context()))
		require.Equal(t, []string{"1", "2", "3", "4"}, names(t, filepath.Join(root, "snapshots", "snapshots")))

		for _, bad := range []snapshot.Adopted{{Key: "", Dir: "1"}, {Key: "a", Dir: ".."}, {Key: "a", Dir: "1/fs"}, {Key: "a"}} {
			err := snapshot.Adopt(t.Context(), root, snapshot.Options{Driver: driver}, slices.Values([]snapshot.Adopted{bad}), nil)
			require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
		}
		err := snapshot.Adopt(t.Context(), root, snapshot.Options{Driver: driver}, slices.Values([]snapshot.Adopted{
			{Key: "a", Dir: "1"}, {Key: "a", Dir: "2"},
		}), nil)
		require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
	})
}

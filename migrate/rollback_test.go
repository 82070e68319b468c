package migrate_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

func rollback(t *testing.T, dir string) migrate.RollbackReport {
	t.Helper()
	reports, err := migrate.Rollback(t.Context(), dir, migrate.Options{})
	require.NoError(t, err)
	require.Len(t, reports, 1)
	return reports[0]
}

// use opens the cache, does something, and closes it.
func use(t *testing.T, root string, do func(ctx context.Context, m *cache.Manager)) {
	t.Helper()
	m, err := cache.Open(t.Context(), cache.Options{Root: root, NoCreate: true, SyncInterval: -1, Unconfirm: contenthash.UnconfirmStored})
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	do(t.Context(), m)
}

// What looks, or makes something new beside, leaves the way back open; what
// changes an adopted snapshot closes it.
func TestRollback(t *testing.T) {
	get := func(ctx context.Context, m *cache.Manager, id cache.ID, do func(ref *cache.ImmutableRef)) {
		ref, err := m.Get(ctx, id, cache.GetOptions{})
		require.NoError(t, err)
		do(ref)
		require.NoError(t, ref.Release(ctx))
	}
	tests := map[string]struct {
		do   func(ctx context.Context, m *cache.Manager)
		why  string
		made int
	}{
		"nothing": {do: func(context.Context, *cache.Manager) {}},
		"mounted and used": {do: func(ctx context.Context, m *cache.Manager) {
			for _, id := range []cache.ID{"i", "b"} {
				get(ctx, m, id, func(ref *cache.ImmutableRef) { treeOf(t, ref) })
			}
		}},
		"a child of a finalized one": {made: 1, do: func(ctx context.Context, m *cache.Manager) {
			get(ctx, m, "b", func(ref *cache.ImmutableRef) {
				mut, err := m.New(ctx, ref, cache.NewOptions{Description: "mine"})
				require.NoError(t, err)
				imm, err := mut.Commit(ctx)
				require.NoError(t, err)
				require.NoError(t, imm.Release(ctx))
			})
		}},
		"finalized": {why: "record i was committed and is finalized", do: func(ctx context.Context, m *cache.Manager) {
			get(ctx, m, "i", func(ref *cache.ImmutableRef) { require.NoError(t, ref.Finalize(ctx)) })
		}},
		"reopened": {why: "record i was reopened or removed", do: func(ctx context.Context, m *cache.Manager) {
			mut, err := m.GetMutable(ctx, "i")
			require.NoError(t, err)
			require.NoError(t, mut.Release(ctx))
		}},
		"a mutable written to": {why: "record x was written to", do: func(ctx context.Context, m *cache.Manager) {
			mut, err := m.GetMutable(ctx, "x")
			require.NoError(t, err)
			mount, err := mut.Mount(ctx, cache.MountOptions{})
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(mount.Path(), "new"), nil, 0o600))
			require.NoError(t, mount.Unmount())
			require.NoError(t, mut.Release(ctx))
		}},
		"removed": {why: "no longer there", do: func(ctx context.Context, m *cache.Manager) {
			removed, err := m.Remove(ctx, "i")
			require.NoError(t, err)
			require.NoError(t, removed[0].Err)
		}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			b := small(t)
			before := names(t, b.Dir)
			run(t, b.Dir, migrate.Options{})
			sums := checksums(t, b.Dir)
			use(t, b.Dir, tt.do)
			r := rollback(t, b.Dir)
			if tt.why != "" {
				require.ErrorIs(t, r.Err, migrate.ErrNoWayBack)
				require.ErrorIs(t, r.Err, errdefs.ErrFailedPrecondition)
				require.ErrorContains(t, r.Err, tt.why)
				use(t, b.Dir, func(context.Context, *cache.Manager) {})
				return
			}
			require.NoError(t, r.Err)
			require.Equal(t, migrate.RolledBack, r.Status)
			require.Len(t, r.Records, tt.made)
			for _, rec := range r.Records {
				require.Equal(t, "mine", rec.Description)
				require.DirExists(t, filepath.Join(r.Aside, "snapshots", "active", rec.Key))
			}
			require.FileExists(t, filepath.Join(r.Aside, cache.StoreFile))
			require.NoError(t, os.RemoveAll(r.Aside))
			// The garbage went with the first opening, all else is as it was.
			require.Subset(t, before, names(t, b.Dir))
			now := checksums(t, b.Dir)
			delete(now, "snapshots/snapshots")
			for name, sum := range now {
				require.Equal(t, sums[name], sum, name)
			}
			require.Equal(t, migrate.Untouched, rollback(t, b.Dir).Status)
			require.Equal(t, migrate.Migrated, run(t, b.Dir, migrate.Options{}).Status)
		})
	}
}

// A merge with a snapshot of its own is mounted, hashed and built upon as it is,
// also where its inputs are layers that nobody has extracted; their blobs, which
// hold no layers, are not even looked at, and there is a way back.
func TestAdoptedMergeNeedsNoInputs(t *testing.T) {
	for _, driver := range []string{"native", "overlayfs"} {
		t.Run(driver, func(t *testing.T) {
			needsRoot(t)
			b := legacytest.NewBuilder(t.TempDir(), driver)
			for _, id := range []string{"one", "two"} {
				d := string(b.Blob("no layer: "+id, nil))
				b.Row(id, legacytest.Row{"cache.blob": d, "cache.diffID": d, "cache.chainID": d, "cache.snapshot": id, "cache.blobonly": true, "snapshot.committed": true})
				b.Lease(id, nil)
			}
			b.Finalized("base", "", nil)
			b.Row("merge", legacytest.Row{"cache.mergeParents": []string{"base", "one", "two"}, "cache.snapshot": "merged"})
			b.Lease("merge", []string{"merged"})
			b.Snapshot("merged", "base", legacytest.Committed, "of-the-merge")
			require.NoError(t, b.Write())
			run(t, b.Dir, migrate.Options{})
			get := func(m *cache.Manager, id cache.ID) *cache.ImmutableRef {
				ref, err := m.Get(t.Context(), id, cache.GetOptions{})
				require.NoError(t, err)
				return ref
			}
			var child cache.ID
			use(t, b.Dir, func(ctx context.Context, m *cache.Manager) {
				one, merge := get(m, "one"), get(m, "merge")
				require.Equal(t, metadata.Lazy, one.Record().State)
				require.Equal(t, metadata.Finalized, merge.Record().State)
				require.Error(t, one.Extract(ctx), "its blob is no layer")
				require.NoError(t, merge.Extract(ctx))
				mut, err := m.New(ctx, merge, cache.NewOptions{})
				require.NoError(t, err)
				imm, err := mut.Commit(ctx)
				require.NoError(t, err)
				child = imm.ID()
				for _, ref := range []*cache.ImmutableRef{merge, imm, one} {
					require.NoError(t, ref.Release(ctx))
				}
			})
			use(t, b.Dir, func(ctx context.Context, m *cache.Manager) {
				for _, id := range []cache.ID{"merge", child} {
					ref := get(m, id)
					mount, err := ref.Mount(ctx)
					require.NoError(t, err)
					require.FileExists(t, filepath.Join(mount.Path(), "of-the-merge"))
					require.NoError(t, mount.Unmount())
					require.NoError(t, ref.Release(ctx))
				}
			})
			require.NoError(t, rollback(t, b.Dir).Err)
		})
	}
}

// A store that was not migrated, and one that a process works in.
func TestRollbackRefused(t *testing.T) {
	dir := t.TempDir()
	m, err := cache.Open(t.Context(), cache.Options{Root: filepath.Join(dir, "runc-native"), DriverName: "native", SyncInterval: -1})
	require.NoError(t, err)
	r := rollback(t, dir)
	require.ErrorIs(t, r.Err, errdefs.ErrUnavailable)
	require.NoError(t, m.Close())
	require.ErrorContains(t, rollback(t, dir).Err, "not made by a migration")
}

// Once the old daemon has worked in the directory there is no way back, and
// the store is for looking only; moved away, its databases are no matter.
func TestOldDaemonWorkedSince(t *testing.T) {
	for _, name := range databases() {
		b := small(t)
		run(t, b.Dir, migrate.Options{})
		use(t, b.Dir, func(context.Context, *cache.Manager) {})
		put := func(tx *bolt.Tx) error {
			bucket := tx.Bucket([]byte("v1"))
			if bucket == nil {
				bucket = tx.Bucket([]byte("_main"))
			}
			_, err := bucket.CreateBucket([]byte("later"))
			return err
		}
		edit(t, filepath.Join(b.Dir, name), put)

		r := rollback(t, b.Dir)
		require.ErrorIs(t, r.Err, migrate.ErrNoWayBack)
		require.ErrorContains(t, r.Err, name)
		m, err := cache.Open(t.Context(), cache.Options{Root: b.Dir, SyncInterval: -1})
		require.NoError(t, err)
		ref, err := m.Get(t.Context(), "i", cache.GetOptions{})
		require.NoError(t, err, "it can be looked at")
		for _, change := range []func() error{
			func() error { return ref.Finalize(t.Context()) },
			func() error { _, err := m.New(t.Context(), nil, cache.NewOptions{}); return err },
			func() error { _, err := m.Remove(t.Context(), "b"); return err },
			func() error { _, err := m.GetMutable(t.Context(), "x"); return err },
		} {
			err := change()
			require.ErrorIs(t, err, cache.ErrOriginChanged)
			require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
			require.ErrorContains(t, err, name)
			require.ErrorContains(t, err, "move")
		}
		require.NoError(t, ref.Release(t.Context()))
		require.NoError(t, m.Close())

		for _, db := range databases() {
			require.NoError(t, os.Remove(filepath.Join(b.Dir, db)))
		}
		use(t, b.Dir, func(ctx context.Context, m *cache.Manager) {
			mut, err := m.New(ctx, nil, cache.NewOptions{})
			require.NoError(t, err)
			require.NoError(t, mut.Release(ctx))
		})
		require.ErrorIs(t, rollback(t, b.Dir).Err, migrate.ErrNoWayBack)
	}
}

// A time that was changed, or a copy, is no work of another daemon's.
func TestCopiedDatabaseIsUnchanged(t *testing.T) {
	b := small(t)
	run(t, b.Dir, migrate.Options{})
	for _, name := range databases() {
		path := filepath.Join(b.Dir, name)
		data, err := os.ReadFile(path)
		require.NoError(t, err)
		require.NoError(t, errors.Join(os.Remove(path), os.WriteFile(path, data, 0o600)))
	}
	use(t, b.Dir, func(ctx context.Context, m *cache.Manager) {
		_, err := m.Remove(ctx, "merge")
		require.NoError(t, err)
	})
}

// Killed at each step of going back, then run again: the old daemon's state is
// whole, and the store is somewhere.
func TestRollbackKilledAtEachStep(t *testing.T) {
	for step := 1; ; step++ {
		b := small(t)
		run(t, b.Dir, migrate.Options{})
		killed := killedAt(t, "rollback", b.Dir, step)
		r := rollback(t, b.Dir)
		require.NoError(t, r.Err, step)
		require.NoFileExists(t, filepath.Join(b.Dir, cache.StoreFile))
		require.NoDirExists(t, filepath.Join(b.Dir, "snapshots", "active"))
		stores, err := filepath.Glob(filepath.Join(b.Dir, "lamina-rolled-back-*", cache.StoreFile))
		require.NoError(t, err)
		require.Len(t, stores, 1)
		run(t, b.Dir, migrate.Options{})
		if !killed {
			require.Greater(t, step, 5)
			return
		}
	}
}

package migrate_test

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// Trees stay what they are: after each pair was finalized, after a restart in
// this boot and after one in another, and for children that are made.
func TestTreesStay(t *testing.T) {
	theseArchives(t, func(t *testing.T, worker string, e *legacytest.Expect) {
		run(t, worker, migrate.Options{})
		want := map[string]*legacytest.Record{}
		session := func(boot string, do func(m *cache.Manager)) {
			m, err := cache.Open(t.Context(), cache.Options{Root: worker, NoCreate: true, BootID: boot, SyncInterval: -1, Unconfirm: contenthash.UnconfirmStored})
			require.NoError(t, err)
			defer func() { require.NoError(t, m.Close()) }()
			do(m)
			check(t, m)
			compareTrees(t, m, want)
		}
		session("one", func(m *cache.Manager) {
			have := map[string]*metadata.Record{}
			for rec, err := range m.Records(t.Context()) {
				require.NoError(t, err)
				have[string(rec.ID)] = rec
			}
			want, _ = survivors(e, have)
		})
		session("one", func(m *cache.Manager) {
			for id, r := range want {
				if r.Kind != "committed" {
					continue
				}
				ref, err := m.Get(t.Context(), cache.ID(id), cache.GetOptions{})
				require.NoError(t, err)
				require.NoError(t, ref.Finalize(t.Context()))
				require.Equal(t, r.Tree, treeOf(t, ref), "tree of %s, finalized", id)
				child, err := m.New(t.Context(), ref, cache.NewOptions{})
				require.NoError(t, err)
				require.NoError(t, ref.Release(t.Context()))
				imm, err := child.Commit(t.Context())
				require.NoError(t, err)
				require.Equal(t, r.Tree, treeOf(t, imm), "an unchanged child of %s", id)
				require.NoError(t, imm.Release(t.Context()))
			}
			_, err := m.Sync(t.Context())
			require.NoError(t, err)
		})
		session("one", func(m *cache.Manager) {
			for id, r := range want {
				if r.Kind != "lazy" {
					continue
				}
				ref, err := m.Get(t.Context(), cache.ID(id), cache.GetOptions{})
				require.NoError(t, err)
				lazy := ref.Record().State == metadata.Lazy
				for _, b := range ref.Record().Blobs {
					require.Equal(t, lazy && b.DiffID != b.Digest, b.Claimed, "what nobody here has read of blob %s of %s", b.Digest, id)
				}
				require.NoError(t, ref.Extract(t.Context()), id)
				if blobs := ref.Record().Blobs; lazy && len(blobs) > 0 {
					require.True(t, slices.ContainsFunc(blobs, func(b cache.Blob) bool { return !b.Claimed }), "one was applied")
				}
				require.NoError(t, ref.Release(t.Context()))
			}
			_, err := m.Sync(t.Context())
			require.NoError(t, err)
		})
		session("two", func(*cache.Manager) {})
	}, "v0.6.4-v1", "v0.34.1-native", "v0.34.1-crash-many", "v0.8.3-to-v0.34.1")
}

// Reopening a folded pair works in the same data directory and kills the id.
func TestReopenAdopted(t *testing.T) {
	theseArchives(t, func(t *testing.T, worker string, e *legacytest.Expect) {
		run(t, worker, migrate.Options{})
		m := open(t, worker)
		for _, fold := range e.Folds {
			r := e.Records[fold.Immutable]
			key := fold.Mutable + "-w"
			rec, err := m.Lookup(t.Context(), cache.ID(fold.Immutable))
			require.NoError(t, err)
			require.Equal(t, key, rec.Key)
			mut, err := m.GetMutable(t.Context(), cache.ID(fold.Immutable))
			require.NoError(t, err)
			require.NotEqual(t, fold.Immutable, string(mut.ID()))
			_, err = m.Lookup(t.Context(), cache.ID(fold.Immutable))
			require.ErrorIs(t, err, errdefs.ErrNotFound)
			for _, index := range r.Indexes {
				ids, err := m.Search(t.Context(), index)
				require.NoError(t, err)
				require.Contains(t, ids, mut.ID(), index)
			}
			mount, err := mut.Mount(t.Context(), cache.MountOptions{})
			require.NoError(t, err)
			listing, err := legacytest.Listing(mount.Path())
			require.NoError(t, err)
			require.Equal(t, r.Tree, legacytest.Sum(listing))
			data, err := os.Readlink(filepath.Join(worker, "snapshots", "active", key, "fs"))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(mount.Path(), "new-file"), []byte("x"), 0o644))
			require.NoError(t, mount.Unmount())
			imm, err := mut.Commit(t.Context())
			require.NoError(t, err)
			require.Equal(t, key, imm.Record().Key)
			there := filepath.Join(worker, "snapshots", "active", key, data, "new-file")
			require.FileExists(t, there, "in the same directory")
			require.NoError(t, imm.Release(t.Context()))
			removed, err := m.Remove(t.Context(), imm.ID())
			require.NoError(t, err)
			require.NoError(t, removed[0].Err)
			require.NoDirExists(t, filepath.Dir(there), "the adopted data goes with the record")
		}
		require.NotEmpty(t, e.Folds)
		check(t, m)
	}, "v0.6.4-v1", "v0.10.6-clean", "v0.34.1-native", "v0.34.1-crash-many")
}

// A retained mutable goes on in its own directory.
func TestMutableGoesOn(t *testing.T) {
	theseArchives(t, func(t *testing.T, worker string, e *legacytest.Expect) {
		run(t, worker, migrate.Options{})
		m := open(t, worker)
		n := 0
		for _, id := range slices.Sorted(maps.Keys(e.Records)) {
			r := e.Records[id]
			if r.Kind != "mutable" || !r.Retain {
				continue
			}
			n++
			mut, err := m.GetMutable(t.Context(), cache.ID(id))
			require.NoError(t, err)
			require.Equal(t, id, string(mut.ID()))
			mount, err := mut.Mount(t.Context(), cache.MountOptions{})
			require.NoError(t, err)
			listing, err := legacytest.Listing(mount.Path())
			require.NoError(t, err)
			require.Equal(t, r.Tree, legacytest.Sum(listing), id)
			require.NoError(t, mount.Unmount())
			require.NoError(t, mut.Release(t.Context()))
		}
		require.Positive(t, n)
		check(t, m)
	}, "v0.6.4-v1", "v0.34.1-native", "v0.34.1-crash-many")
}

// What nobody needs is gone with the first opening, and nothing else.
func TestGarbageGoes(t *testing.T) {
	theseArchives(t, func(t *testing.T, worker string, _ *legacytest.Expect) {
		report := run(t, worker, migrate.Options{})
		before := dataDirs(t, worker)
		open(t, worker)
		gone := len(before) - len(dataDirs(t, worker))
		require.Equal(t, count(report.Plan, migrate.Free), gone)
		entries, err := os.ReadDir(filepath.Join(worker, "snapshots", "trash"))
		require.NoError(t, err)
		require.Empty(t, entries)
	}, "v0.12.5-clean", "v0.34.1-native")
}

func dataDirs(t *testing.T, worker string) []os.DirEntry {
	t.Helper()
	dirs, err := os.ReadDir(filepath.Join(worker, "snapshots", "snapshots"))
	require.NoError(t, err)
	return dirs
}

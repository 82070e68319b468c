package cache_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// Each code of Check has a fixture that triggers exactly it.
func TestFindings(t *testing.T) {
	for _, f := range []struct {
		code string
		kind kind
		// damage damages a store that holds base, finalized, and top, a
		// committed child of it. It returns the id and the key that the
		// finding names.
		damage func(w *world, d snapshot.Driver, s *metadata.Store, base, top *cache.Record) (cache.ID, string)
	}{
		{cache.FindingSnapshotMissing, overlayKind, func(w *world, d snapshot.Driver, _ *metadata.Store, _, top *cache.Record) (cache.ID, string) {
			removeName(w, d, top.Key)
			return top.ID, top.Key
		}},
		{cache.FindingSnapshotKind, overlayKind, func(w *world, _ snapshot.Driver, s *metadata.Store, _, top *cache.Record) (cache.ID, string) {
			edit(w, s, top.ID, func(rec *cache.Record) { rec.State = cache.Finalized })
			return top.ID, top.Key
		}},
		{cache.FindingSnapshotParent, nativeKind, func(w *world, d snapshot.Driver, _ *metadata.Store, _, top *cache.Record) (cache.ID, string) {
			// The same name again, over nothing.
			removeName(w, d, top.Key)
			_, err := d.Prepare(w.ctx, top.Key, "")
			require.NoError(w, err)
			return top.ID, top.Key
		}},
		{cache.FindingSnapshotUnrecorded, containerdKind, func(w *world, d snapshot.Driver, _ *metadata.Store, base, _ *cache.Record) (cache.ID, string) {
			_, err := d.Prepare(w.ctx, "stray", base.Key)
			require.NoError(w, err)
			return "", "stray"
		}},
		{cache.FindingRemovalPending, overlayKind, func(w *world, d snapshot.Driver, _ *metadata.Store, _, _ *cache.Record) (cache.ID, string) {
			_, err := d.Prepare(w.ctx, "stray", "")
			require.NoError(w, err)
			detachName(w, d, "stray")
			return "", "stray"
		}},
		{cache.FindingSnapshotDamaged, overlayKind, func(w *world, d snapshot.Driver, _ *metadata.Store, _, _ *cache.Record) (cache.ID, string) {
			// Not one that a record names: that would miss its snapshot.
			_, err := d.Prepare(w.ctx, "stray", "")
			require.NoError(w, err)
			require.NoError(w, os.Truncate(filepath.Join(w.root, "snapshots", "active", "stray", "info"), 3))
			return "", ""
		}},
	} {
		t.Run(f.code, func(t *testing.T) {
			w := newWorld(t, f.kind)
			w.broken = true
			base := w.layer(nil, "a", "1")
			top := w.layer(base, "b", "2")
			w.release(base, top)
			w.check()
			var id cache.ID
			var key string
			w.tamper(func(d snapshot.Driver, s *metadata.Store) {
				id, key = f.damage(w, d, s, base.Record(), top.Record())
			})
			// Behind the back of a store that believes itself clean.
			require.NoError(t, os.Rename(filepath.Join(w.root, "dirty"), filepath.Join(w.root, "clean")))
			w.reopenStore()
			found := w.findings()
			require.Len(t, found, 1)
			require.Equal(t, f.code, found[0].Code)
			require.Equal(t, id, found[0].ID)
			require.Equal(t, key, found[0].Key)
			require.NotEmpty(t, found[0].Message)

			// The caller may stop at the first one.
			for range w.Check(w.ctx) {
				break
			}
			require.Equal(t, 0, w.transactions(func() { w.findings() }), "Check changes nothing")
			w.closeStore()
		})
	}
}

func edit(w *world, s *metadata.Store, id cache.ID, fn func(*cache.Record)) {
	w.Helper()
	require.NoError(w, s.Update(w.ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Get(id)
		if err == nil {
			fn(rec)
			_, err = tx.Put(rec)
		}
		return err
	}))
}

// What the store itself finds is handed on.
func TestFindingsOfTheStore(t *testing.T) {
	w := newWorld(t, nativeKind)
	imm := w.layer(nil, "a", "1")
	w.release(imm)
	w.damageRow(imm.ID())
	codes := map[string]bool{}
	for _, f := range w.findings() {
		codes[f.Code] = true
	}
	require.Contains(t, codes, metadata.CodeRecordDamaged)
	w.closeStore()
}

// A mutable that is in memory only, a removal that is under way, and what a
// living process has are not found wrong.
func TestCheckKnowsWhatIsUnderWay(t *testing.T) {
	forKinds(t, func(w *world) {
		base := w.layer(nil, "a", "1")
		mut := w.new(base, cache.NewOptions{}, "b", "2")
		mnt, err := mut.Mount(w.ctx, cache.MountOptions{})
		require.NoError(w, err)
		w.check()
		require.NoError(w, mnt.Unmount())
		w.release(mut)
		w.check()
		held, err := base.Detach(w.ctx)
		require.NoError(w, err)
		w.check()
		require.NoError(w, held.Release())
	})
}

// damageRow closes the store, makes a record unreadable, and opens it again.
func (w *world) damageRow(id cache.ID) {
	w.Helper()
	w.broken = true
	w.closeStore()
	path := filepath.Join(w.root, cache.StoreFile)
	data, err := os.ReadFile(path)
	require.NoError(w, err)
	// The record's row has its id in front of its checksum.
	require.NoError(w, flipAfter(data, []byte(id+"\x01"), 8))
	require.NoError(w, os.WriteFile(path, data, 0o600))
	w.reopenStore()
}

// flipAfter flips a byte that many bytes behind each place where prefix is.
func flipAfter(data, prefix []byte, n int) error {
	found := false
	for at := 0; ; {
		i := bytes.Index(data[at:], prefix)
		if i < 0 {
			break
		}
		at += i + len(prefix)
		data[at+n] ^= 0xff
		found = true
	}
	if !found {
		return errors.New("nothing to damage")
	}
	return nil
}

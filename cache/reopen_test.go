package cache_test

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// A reopened record has its first handle only after its transaction, and
// meanwhile the blobs go that described the old tree. Whoever prunes, removes
// or reopens just then finds it held.
func TestAReopenedRecordIsHeldFromItsTransactionOn(t *testing.T) {
	needRoot(t)
	var w *world
	var between func()
	w = newWorldIn(t, overlayKind, filepath.Join(t.TempDir(), "store"), func(name string) error {
		if do := between; name == "blob delete" && do != nil {
			between = nil
			do()
		}
		return nil
	})
	imm := w.layer(nil, "a", "1")
	id := imm.ID()
	w.release(imm)
	b := pack(w, layer.Gzip, layerTar(w, file{name: "a", text: "1"}))
	w.store(b)
	w.tamper(func(_ snapshot.Driver, s *metadata.Store) {
		require.NoError(t, s.Update(w.ctx, func(tx *metadata.Tx) error {
			rec, err := tx.Get(id)
			if err != nil {
				return err
			}
			rec.Blobs = []metadata.Blob{{Digest: b.desc.Digest, MediaType: b.desc.MediaType, Size: b.desc.Size, Stored: true}}
			_, err = tx.Put(rec)
			return err
		}))
	})
	w.reopenStore()

	var next cache.ID
	between = func() {
		for rec, err := range w.Records(w.ctx) {
			require.NoError(t, err)
			next = rec.ID
		}
		require.NotEqual(t, id, next, "the transaction is done")
		out, err := w.Prune(w.ctx, policy.Policy{All: true})
		require.NoError(t, err)
		require.Zero(t, out.Removed)
		removed, err := w.Remove(w.ctx, next)
		require.NoError(t, err)
		require.ErrorIs(t, removed[0].Err, cache.ErrLocked)
		_, err = w.GetMutable(w.ctx, next)
		require.ErrorIs(t, err, cache.ErrLocked)
	}
	mut, err := w.GetMutable(w.ctx, id)
	require.NoError(t, err)
	require.Nil(t, between, "nobody came between")
	require.Equal(t, next, mut.ID())
	require.Empty(t, w.stored())
	w.write(mut, "b", "2")
	imm = w.commit(mut)
	require.Equal(t, "a=1 b=2", w.tree(imm))
	w.release(imm)
}

package checksum_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
)

// A digest that was asked for once costs no read and no mount again: in
// memory, after a restart, after Finalize.
func TestKept(t *testing.T) {
	forKinds(t, func(w *world) {
		ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 5) })
		var want string
		require.Equal(t, reads{1, 100}, w.cost(ref, func() { want = w.sum(ref, "/") }))
		require.Equal(t, want, w.fresh(ref, "/"))
		free := func(what string) {
			t.Helper()
			require.Equal(t, reads{}, w.cost(ref, func() { require.Equal(t, want, w.sum(ref, "/")) }), what)
			require.Equal(t, reads{}, w.cost(ref, func() { w.sum(ref, "d003") }), what)
			require.Equal(t, reads{}, w.cost(ref, func() {
				_, err := w.sums.Checksum(w.ctx, ref, "missing/path", contenthash.Options{})
				require.ErrorIs(t, err, errdefs.ErrNotFound)
			}), what)
		}
		free("in memory")
		id := ref.ID()
		w.release(ref)
		w.restart()
		ref = w.get(id)
		free("after a restart")
		require.NoError(t, ref.Finalize(w.ctx))
		free("after Finalize")
		w.release(ref)
		w.restart()
		ref = w.get(id)
		free("after Finalize and a restart")
		w.release(ref)
	})
}

// Saving hashes neither moves a record's revision nor costs a transaction when
// there is nothing new.
func TestSavingLeavesTheRevision(t *testing.T) {
	w := newWorld(t, kinds[0])
	ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 2) })
	before := ref.Record().Revision
	w.sum(ref, "/")
	require.NoError(t, w.sums.Flush(w.ctx))
	rec, err := w.Lookup(w.ctx, ref.ID())
	require.NoError(t, err)
	require.Equal(t, before, rec.Revision)
	_, err = ref.Attachment(w.ctx, cache.TreeIndex)
	require.NoError(t, err)
	tx := w.Manager.Stats().Transactions
	w.sum(ref, "/")
	w.sum(ref, "d000/f01")
	require.NoError(t, w.sums.Flush(w.ctx))
	require.Equal(t, tx, w.Manager.Stats().Transactions)
	w.release(ref)
}

// A file that is changed behind our back in a reopened record is never
// answered from the old hash, though its size and mtime are the old ones.
func TestReopenedRecordIsValidated(t *testing.T) {
	forKinds(t, func(w *world) {
		for _, plain := range []bool{false, true} {
			ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 3) })
			old := w.sum(ref, "/")
			id := ref.ID()
			w.release(ref)
			w.plain = plain
			w.restart()
			mut, err := w.GetMutable(w.ctx, id)
			require.NoError(t, err)
			w.in(mut, func(dir string) {
				file := filepath.Join(dir, "d001/f07")
				st, err := os.Stat(file)
				require.NoError(t, err)
				require.NoError(t, os.WriteFile(file, []byte("9 9"), 0o644))
				require.NoError(t, os.Chtimes(file, st.ModTime(), st.ModTime()))
			})
			ref, err = mut.Commit(w.ctx)
			require.NoError(t, err)
			_, err = ref.Attachment(w.ctx, cache.TreeIndex)
			if plain {
				require.ErrorIs(t, err, errdefs.ErrNotFound, "without Unconfirm nothing is carried over")
			} else {
				require.NoError(t, err)
			}
			now := w.sum(ref, "/")
			require.NotEqual(t, old, now)
			require.Equal(t, w.fresh(ref, "/"), now)
			// From here on it is settled.
			require.Equal(t, reads{}, w.cost(ref, func() { w.sum(ref, "/") }))
			id = ref.ID()
			w.release(ref)
			w.restart()
			ref = w.get(id)
			require.Equal(t, reads{}, w.cost(ref, func() { require.Equal(t, now, w.sum(ref, "/")) }))
			w.release(ref)
		}
	})
}

// What is stored for a mutable record, wherever it came from, is not believed
// once it is committed.
func TestTreeOfAMutableRecord(t *testing.T) {
	for _, plain := range []bool{false, true} {
		w := newWorld(t, kinds[0])
		w.plain = plain
		w.restart()
		mut, err := w.New(w.ctx, nil, cache.NewOptions{Retain: true})
		require.NoError(t, err)
		w.in(mut, func(dir string) { manyFiles(w, dir, 2) })
		other := w.commit(nil, func(dir string) { manyFiles(w, dir, 2) })
		w.sum(other, "/")
		require.NoError(t, w.sums.Flush(w.ctx))
		stored := map[string][]byte{}
		require.NoError(t, w.ViewAttachments(w.ctx, other.ID(), func(a *cache.Attachments) error {
			for name := range a.Names(cache.TreePrefix) {
				data, err := a.Get(name)
				require.NoError(t, err)
				stored[name] = data
			}
			return nil
		}))
		for name, data := range stored {
			require.NoError(t, mut.Attach(w.ctx, name, data))
		}
		w.in(mut, func(dir string) { write(t, dir, "d001/f01", "something else") })
		ref, err := mut.Commit(w.ctx)
		require.NoError(t, err)
		require.Equal(t, w.fresh(ref, "/"), w.sum(ref, "/"))
		w.release(other, ref)
	}
}

// A stored tree that is damaged is told, computed anew and replaced.
func TestDamagedTree(t *testing.T) {
	w := newWorld(t, kinds[0])
	for _, page := range []string{"index", "p1"} {
		ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 3) })
		want := w.sum(ref, "/")
		require.NoError(t, w.sums.Flush(w.ctx))
		require.NoError(t, ref.Attach(w.ctx, cache.TreePrefix+page, []byte("rubbish")))
		id := ref.ID()
		w.release(ref)
		w.restart()
		found := w.findings()
		require.Len(t, found, 1)
		require.Equal(t, checksum.FindingTreeDamaged, found[0].Code)
		require.Equal(t, id, found[0].ID)
		require.Equal(t, cache.TreePrefix+page, found[0].Key)

		ref = w.get(id)
		require.Equal(t, want, w.sum(ref, "/"))
		require.Contains(t, w.log.String(), "damaged")
		require.NoError(t, w.sums.Flush(w.ctx))
		require.Empty(t, w.findings())

		require.NoError(t, ref.Attach(w.ctx, cache.TreePrefix+page, []byte("rubbish")))
		require.NoError(t, checksum.Drop(w.ctx, w.Manager, id))
		require.Empty(t, w.findings())
		w.release(ref)
		// A damaged index must not stand in the way of a writer.
		require.NoError(t, w.EditAttachments(w.ctx, id, func(a *cache.Attachments) error {
			return a.Set(cache.TreePrefix+page, []byte("rubbish"))
		}))
		mut, err := w.GetMutable(w.ctx, id)
		require.NoError(t, err)
		if page == "index" {
			require.Empty(t, w.findings())
		}
		require.ErrorIs(t, checksum.Drop(w.ctx, w.Manager, mut.ID()), cache.ErrLocked)
		require.NoError(t, mut.Release(w.ctx))
		require.NoError(t, checksum.Drop(w.ctx, w.Manager, mut.ID()))
		require.Empty(t, w.findings())
	}
}

// Verify finds what changed under a stored digest, and says what it could not
// compare.
func TestVerify(t *testing.T) {
	w := newWorld(t, kinds[0])
	ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 3) })
	w.sum(ref, "/d001")
	require.NoError(t, w.sums.Flush(w.ctx))
	tree, err := checksum.Load(w.ctx, w.Manager, ref)
	require.NoError(t, err)
	v, err := tree.Verify(w.ctx, checksum.Files(ref), 100)
	require.NoError(t, err)
	require.EqualValues(t, 20, v.Files)
	require.Empty(t, v.Differ)

	// Rot: the file changes without anybody telling.
	layers, err := ref.SnapshotLayers(w.ctx)
	require.NoError(t, err)
	require.Len(t, layers, 1)
	require.NoError(t, os.WriteFile(filepath.Join(layers[0].Dir, "d001/f03"), []byte("rot"), 0o644))
	require.NoError(t, os.Remove(filepath.Join(layers[0].Dir, "d001/f04")))
	v, err = tree.Verify(w.ctx, checksum.Files(ref), 100)
	require.NoError(t, err)
	require.EqualValues(t, 18, v.Files)
	require.Equal(t, []string{"d001/f03", "d001/f04"}, v.Differ)
	some, err := tree.Verify(w.ctx, checksum.Files(ref), 0.0001)
	require.NoError(t, err)
	require.Less(t, some.Files, uint64(18))
	w.release(ref)
}

package checksum_test

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
)

// What is stored of all records is listed, and can be dropped in each state.
func TestStoredAndDrop(t *testing.T) {
	w := newWorld(t, kinds[0])
	known := w.commit(nil, func(dir string) { manyFiles(w, dir, 2) })
	unknown := w.commit(nil, func(dir string) { manyFiles(w, dir, 1) })
	w.sum(known, "/")
	require.NoError(t, known.Finalize(w.ctx))
	require.NoError(t, w.sums.Flush(w.ctx))
	lists := func() (with, without []cache.ID) {
		with, without, err := checksum.Stored(w.ctx, w.Manager)
		require.NoError(t, err)
		return with, without
	}
	with, without := lists()
	require.Equal(t, []cache.ID{known.ID()}, with)
	require.Equal(t, []cache.ID{unknown.ID()}, without)

	require.NoError(t, checksum.Drop(w.ctx, w.Manager, known.ID()))
	with, without = lists()
	require.Empty(t, with)
	require.ElementsMatch(t, []cache.ID{known.ID(), unknown.ID()}, without)
	require.Equal(t, w.fresh(known, "/"), w.sum(known, "/"))

	// Of a mutable record, too, unless somebody holds it.
	w.sum(unknown, "/")
	require.NoError(t, w.sums.Flush(w.ctx))
	id := unknown.ID()
	w.release(unknown)
	mut, err := w.GetMutable(w.ctx, id)
	require.NoError(t, err)
	id = mut.ID()
	_, err = mut.Attachment(w.ctx, cache.TreeIndex)
	require.NoError(t, err)
	require.ErrorIs(t, checksum.Drop(w.ctx, w.Manager, id), cache.ErrLocked)
	require.NoError(t, mut.Release(w.ctx))
	require.NoError(t, checksum.Drop(w.ctx, w.Manager, id))
	with, without = lists()
	require.Empty(t, with)
	require.Equal(t, []cache.ID{known.ID()}, without, "mutable records are not listed")
	mut, err = w.GetMutable(w.ctx, id)
	require.NoError(t, err)
	_, err = mut.Attachment(w.ctx, cache.TreeIndex)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.NoError(t, mut.Release(w.ctx))
	require.ErrorIs(t, checksum.Drop(w.ctx, w.Manager, "none"), errdefs.ErrNotFound)
	w.release(known)
}

// A page that no index names is a finding, and Drop is its repair.
func TestPageWithoutAnIndex(t *testing.T) {
	w := newWorld(t, kinds[0])
	ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 1) })
	require.NoError(t, w.EditAttachments(w.ctx, ref.ID(), func(a *cache.Attachments) error {
		return a.Set(cache.TreePrefix+"7", []byte("stray"))
	}))
	found := w.findings()
	require.Len(t, found, 1)
	require.Equal(t, checksum.FindingTreeDamaged, found[0].Code)
	require.Equal(t, ref.ID(), found[0].ID)
	require.Equal(t, cache.TreePrefix+"7", found[0].Key)
	for range checksum.Check(w.ctx, w.Manager) {
		break // who has seen enough may stop
	}
	require.NoError(t, checksum.Drop(w.ctx, w.Manager, ref.ID()))
	require.Empty(t, w.findings())
	w.release(ref)
}

package cache_test

import (
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
)

func (w *world) durable(id cache.ID) bool {
	w.Helper()
	rec, err := w.Lookup(w.ctx, id)
	require.NoError(w, err)
	return rec.Durable
}

func TestSyncMarksAllAtOnce(t *testing.T) {
	w := newWorld(t, overlayKind)
	base := w.layer(nil, "a", "1")
	top := w.layer(base, "b", "2")
	mut := w.new(nil, cache.NewOptions{Retain: true}, "c", "3")
	before := w.driver.Count("Sync", "")
	require.Equal(t, 1, w.transactions(func() {
		n, err := w.Sync(w.ctx)
		require.NoError(t, err)
		require.Equal(t, 2, n)
	}))
	require.Equal(t, 1, w.driver.Count("Sync", "")-before, "one sync serves them all")
	require.True(t, w.durable(base.ID()))
	require.True(t, w.durable(top.ID()))
	require.False(t, w.durable(mut.ID()), "what is written to is never durable")
	require.Equal(t, 0, w.transactions(func() {
		n, err := w.Sync(w.ctx)
		require.NoError(t, err)
		require.Zero(t, n)
	}))
	w.release(base, top)

	reopened, err := w.GetMutable(w.ctx, top.ID())
	require.NoError(t, err)
	require.False(t, reopened.Record().Durable)
	w.release(mut, reopened)
}

// A result that was computed on an older state is dropped.
func TestSyncDoesNotMarkWhatMovedOn(t *testing.T) {
	w := newWorld(t, overlayKind)
	imm := w.layer(nil, "a", "1")
	u, err := w.Unsynced(w.ctx)
	require.NoError(t, err)
	require.Equal(t, 1, u.Len())
	require.NoError(t, u.Sync(w.ctx))
	require.NoError(t, imm.Finalize(w.ctx))
	n, err := w.MarkSynced(w.ctx, u)
	require.NoError(t, err)
	require.Zero(t, n, "the rename came after the sync")
	require.False(t, imm.Record().Durable)
	w.release(imm)
}

func TestSyncInTheBackground(t *testing.T) {
	w := newWorld(t, overlayKind)
	w.opts = func(o *cache.Options) { o.SyncInterval = 10 * time.Millisecond }
	w.reopenStore()
	imm := w.layer(nil, "a", "1")
	require.Eventually(t, func() bool { return w.durable(imm.ID()) }, time.Minute, time.Millisecond)
	w.release(imm)

	w.opts = func(o *cache.Options) { o.SyncInterval = time.Hour }
	w.reopenStore()
	imm = w.layer(nil, "b", "1")
	require.False(t, w.durable(imm.ID()))
	w.release(imm)
	w.opts = nil
	w.reopenStore() // Close does the rest
	require.True(t, w.durable(imm.ID()))
}

func TestManyCommitsShareASync(t *testing.T) {
	w := newWorld(t, overlayKind)
	w.opts = func(o *cache.Options) { o.SyncInterval = time.Second }
	w.reopenStore()
	const writers, each = 64, 10
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				mut, err := w.New(w.ctx, nil, cache.NewOptions{})
				if err != nil {
					t.Error(err)
					return
				}
				imm, err := mut.Commit(w.ctx)
				if err != nil {
					t.Error(err)
					return
				}
				if err := imm.Release(w.ctx); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	u, err := w.Unsynced(w.ctx)
	require.NoError(t, err)
	if u.Len() > 0 {
		_, err = w.Sync(w.ctx)
		require.NoError(t, err)
	}
	syncs := w.driver.Count("Sync", "")
	require.LessOrEqual(t, syncs, writers*each/10, "syncs for %d commits", writers*each)
}

// The kernel drops what it could not write: a later sync that succeeds proves
// nothing.
func TestAFailedSyncIsFinal(t *testing.T) {
	w := newWorld(t, overlayKind)
	safe := w.layer(nil, "a", "1")
	_, err := w.Sync(w.ctx)
	require.NoError(t, err)
	lost := w.layer(safe, "b", "2")
	w.driver.FailOp("Sync", "", unix.EIO)
	_, err = w.Sync(w.ctx)
	require.ErrorIs(t, err, cache.ErrSync)
	require.ErrorIs(t, err, unix.EIO)
	w.driver.Clear()
	_, err = w.Sync(w.ctx)
	require.ErrorIs(t, err, cache.ErrSync)
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
	_, err = w.New(w.ctx, safe, cache.NewOptions{})
	require.ErrorIs(t, err, cache.ErrSync)
	require.False(t, w.durable(lost.ID()))
	require.Equal(t, "a=1", w.tree(safe), "reading goes on")
	w.release(safe, lost)

	w.reopenStore()
	w.release(w.get(safe.ID()))
	_, err = w.Get(w.ctx, lost.ID(), cache.GetOptions{})
	require.ErrorIs(t, err, errdefs.ErrNotFound, "as after a power cut")
}

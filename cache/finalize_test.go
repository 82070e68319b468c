package cache_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
)

var errInjected = errors.New("injected")

// halfFinalized is a committed record whose snapshot the driver has committed
// already, while the transaction that says so failed.
func halfFinalized(t *testing.T) (w *world, id cache.ID) {
	w = newWorld(t, overlayKind)
	fail := false
	w.opts = func(o *cache.Options) {
		o.Step = func(name string) error {
			if fail && strings.HasPrefix(name, "tx") {
				return errInjected
			}
			return nil
		}
	}
	w.reopenStore()
	imm := w.layer(nil, "a", "1")
	fail = true
	require.ErrorIs(t, imm.Finalize(w.ctx), errInjected)
	fail = false
	require.Equal(t, cache.Committed, imm.Record().State)
	require.Equal(t, "a=1", w.tree(imm))
	w.release(imm)
	w.check()
	return w, imm.ID()
}

func (w *world) dirty() bool {
	_, err := os.Lstat(filepath.Join(w.root, "dirty"))
	return err == nil
}

func TestHalfAFinalize(t *testing.T) {
	t.Run("is finished by the next one", func(t *testing.T) {
		w, id := halfFinalized(t)
		imm := w.get(id)
		require.NoError(t, imm.Finalize(w.ctx))
		require.Equal(t, 1, w.driver.Count("Commit", ""))
		top := w.layer(imm, "b", "2")
		require.Equal(t, "a=1 b=2", w.tree(top))
		w.release(imm, top)
		w.closeStore()
		require.False(t, w.dirty())
	})
	t.Run("is finished by a reopen, which it refuses", func(t *testing.T) {
		w, id := halfFinalized(t)
		_, err := w.GetMutable(w.ctx, id)
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.Equal(t, cache.Finalized, w.state(id))
		require.Equal(t, "a=1", w.treeOf(id))
	})
	t.Run("is finished by the next open", func(t *testing.T) {
		w, id := halfFinalized(t)
		w.closeStore()
		require.True(t, w.dirty())
		w.reopenStore()
		require.Equal(t, cache.Finalized, w.state(id))
		require.Equal(t, "a=1", w.treeOf(id))
	})
	t.Run("is removed", func(t *testing.T) {
		w, id := halfFinalized(t)
		require.NoError(t, removeOne(w, id))
		require.Empty(t, w.names())
		w.closeStore()
		require.False(t, w.dirty())
	})
}

// A driver that fails, and then does not tell whether it did its work, leaves
// that open; nobody takes the one or the other for granted.
func TestFinalizeOfUnknownOutcome(t *testing.T) {
	for _, done := range []bool{true, false} {
		w := newWorld(t, overlayKind)
		imm := w.layer(nil, "a", "1")
		key := imm.Record().Key
		fail := w.driver.FailOp
		if done {
			fail = w.driver.FailOpAfter
		}
		fail("Commit", key, errInjected)
		w.driver.FailOp("Stat", "", errInjected)
		require.ErrorIs(t, imm.Finalize(w.ctx), errInjected)
		w.release(imm)
		_, err := w.GetMutable(w.ctx, imm.ID())
		require.ErrorIs(t, err, errInjected)
		w.driver.Clear()
		mut, err := w.GetMutable(w.ctx, imm.ID())
		if done {
			require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
			require.Equal(t, cache.Finalized, w.state(imm.ID()))
			require.Equal(t, "a=1", w.treeOf(imm.ID()))
			continue
		}
		require.NoError(t, err)
		again := w.commit(mut)
		require.Equal(t, "a=1", w.tree(again))
		w.release(again)
	}
}

// Close lets a New end that is under way, and knows that its snapshot has no
// record.
func TestCloseDuringNew(t *testing.T) {
	w := newWorld(t, overlayKind)
	reached, release := w.driver.Block("Prepare", "")
	var group sync.WaitGroup
	group.Go(func() {
		_, err := w.New(w.ctx, nil, cache.NewOptions{})
		if err != nil {
			panic(err)
		}
	})
	<-reached
	var closed error
	group.Go(func() { closed = w.Manager.Close() })
	for {
		if _, err := w.Search(w.ctx, "x"); err != nil {
			break // closing has begun
		}
	}
	release()
	group.Wait()
	require.NoError(t, closed)
	require.True(t, w.dirty(), "a name is left")
	require.NoError(t, w.driver.Close())
	w.Manager = nil
	w.reopenStore()
	require.Empty(t, w.names())
	w.closeStore()
	require.False(t, w.dirty())
}

// Nobody gets a handle on what is being removed: of a removal and those who
// want the record, one side gets it.
func TestGetRacesWithRemove(t *testing.T) {
	w := newWorld(t, nativeKind)
	for range 150 {
		imm := w.layer(nil, "a", "1")
		id := imm.ID()
		w.release(imm)
		var group sync.WaitGroup
		var removed error
		refs, errs := make([]*cache.ImmutableRef, 3), make([]error, 3)
		group.Go(func() { removed = removeOne(w, id) })
		for i := range refs {
			group.Go(func() { refs[i], errs[i] = w.Get(w.ctx, id, cache.GetOptions{}) })
		}
		group.Wait()
		for i, ref := range refs {
			if errs[i] != nil {
				require.ErrorIs(t, errs[i], errdefs.ErrNotFound)
				continue
			}
			require.ErrorIs(t, removed, cache.ErrLocked)
			require.Equal(t, "a=1", w.tree(ref))
			w.release(ref)
		}
		if removed != nil {
			require.NoError(t, removeOne(w, id))
		}
	}
}

// A caller's function that panics leaves the record as it was.
func TestAnEditThatPanics(t *testing.T) {
	w := newWorld(t, nativeKind)
	imm := w.layer(nil, "a", "1")
	boom := func(*cache.Edit) error { panic("boom") }
	require.PanicsWithValue(t, "boom", func() { _ = imm.Edit(w.ctx, boom) })
	w.release(imm)
	require.PanicsWithValue(t, "boom", func() {
		_, _ = w.GetMutableWith(w.ctx, imm.ID(), cache.ReopenOptions{Edit: boom})
	})
	mut, err := w.GetMutable(w.ctx, imm.ID())
	require.NoError(t, err)
	require.PanicsWithValue(t, "boom", func() {
		_, _ = mut.CommitWith(w.ctx, cache.CommitOptions{Edit: boom})
	})
	w.release(w.commit(mut))
}

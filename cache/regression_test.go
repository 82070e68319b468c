package cache_test

import (
	"errors"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
)

// Bugs that caches of this kind have had, and that no other test is named
// after: docs/testing.md has the list.

// A New over a parent that cannot be finalized leaves nobody in the parent.
func TestFailedNewLeavesItsParentFree(t *testing.T) {
	forKinds(t, func(w *world) {
		parent := w.layer(nil, "a", "1")
		injected := errors.New("injected")
		w.driver.FailOp("Commit", "", injected)
		_, err := w.New(w.ctx, parent, cache.NewOptions{})
		require.ErrorIs(t, err, injected)
		w.driver.Clear()
		w.release(parent)
		require.Empty(t, w.Refs(parent.ID()))
		out, err := w.Prune(w.ctx, policy.Policy{All: true})
		require.NoError(t, err)
		require.Equal(t, 1, out.Removed)
	})
}

// A parent outlives its children, in whatever order handles are released.
func TestParentOutlivesItsChildren(t *testing.T) {
	forKinds(t, func(w *world) {
		for _, parentFirst := range []bool{true, false} {
			parent := w.layer(nil, "a", "1")
			child := w.layer(parent, "b", "2")
			if parentFirst {
				w.release(parent, child)
			} else {
				w.release(child, parent)
			}
			out, err := w.Remove(w.ctx, parent.ID())
			require.NoError(t, err)
			require.ErrorIs(t, out[0].Err, errdefs.ErrFailedPrecondition)
			_, err = w.DiskUsage(w.ctx, nil)
			require.NoError(t, err)
			require.Equal(t, "a=1 b=2", w.treeOf(child.ID()))
		}
	})
}

// Of two handles on a committed record the second is worth as much after the
// first was released and a prune went over the store.
func TestSecondHandleAfterTheFirstWasReleased(t *testing.T) {
	forKinds(t, func(w *world) {
		first := w.layer(nil, "a", "1")
		second, err := first.Clone()
		require.NoError(t, err)
		w.release(first, first)
		_, err = w.Prune(w.ctx, policy.Policy{All: true})
		require.NoError(t, err)
		require.NoError(t, second.Finalize(w.ctx))
		require.Equal(t, "a=1", w.tree(second))
		w.release(second)
	})
}

// Looking at sizes that nobody knows yet, and at anything else, leaves nothing
// in use and counts as no use.
func TestLookingIsNoUse(t *testing.T) {
	forKinds(t, func(w *world) {
		imm := w.layer(nil, "a", "1")
		w.release(imm)
		before, err := w.Lookup(w.ctx, imm.ID())
		require.NoError(t, err)
		for range 5 {
			u, err := w.DiskUsage(w.ctx, nil)
			require.NoError(t, err)
			require.Zero(t, u.InUse)
			_, err = w.Plan(w.ctx, policy.Policy{All: true})
			require.NoError(t, err)
			_, err = w.SearchPrefix(w.ctx, "")
			require.NoError(t, err)
			w.check()
			w.reopenStore()
		}
		after, err := w.Lookup(w.ctx, imm.ID())
		require.NoError(t, err)
		require.Equal(t, before.UsageCount, after.UsageCount)
		require.Equal(t, before.LastUsed, after.LastUsed)
	})
}

// A retained record whose result was only looked at and released is not
// finalized, so that the next writer goes on in the same snapshot.
func TestReleasedResultCanBeReopened(t *testing.T) {
	forKinds(t, func(w *world) {
		imm := w.commit(w.new(nil, cache.NewOptions{Retain: true}, "a", "1"))
		key := imm.Record().Key
		require.Equal(t, "a=1", w.tree(imm))
		w.release(imm)
		w.reopenStore()
		mut, err := w.GetMutable(w.ctx, imm.ID())
		require.NoError(t, err)
		require.Equal(t, key, mut.Record().Key)
		again := w.commit(mut)
		require.Equal(t, "a=1", w.tree(again))
		w.release(again)
	})
}

// Whoever looks records up while others prune gets a handle, or is told that
// the record is gone or locked; nothing else, and no panic.
func TestLookupsBesidePrunes(t *testing.T) {
	forKinds(t, func(w *world) {
		var made sync.WaitGroup
		done := make(chan struct{})
		errs := make(chan error, 1)
		go func() {
			for {
				select {
				case <-done:
					errs <- nil
					return
				default:
				}
				if _, err := w.Prune(w.ctx, policy.Policy{All: true}); err != nil {
					errs <- err
					return
				}
			}
		}()
		failures := make([]error, 4)
		for i := range failures {
			made.Go(func() {
				for range 15 {
					mut, err := w.New(w.ctx, nil, cache.NewOptions{Retain: true, Values: []cache.Value{{Name: "k", Index: "shared"}}})
					if err != nil {
						failures[i] = err
						return
					}
					// Nobody may take a record that has just been given out.
					imm, err := mut.Commit(w.ctx)
					if err != nil {
						failures[i] = err
						return
					}
					failures[i] = errors.Join(failures[i], imm.Release(w.ctx))
					ids, err := w.Search(w.ctx, "shared")
					failures[i] = errors.Join(failures[i], err)
					for _, id := range ids {
						got, err := w.Get(w.ctx, id, cache.GetOptions{})
						if err == nil {
							err = got.Release(w.ctx)
						}
						if !expected(err) {
							failures[i] = errors.Join(failures[i], err)
						}
					}
				}
			})
		}
		made.Wait()
		close(done)
		require.NoError(t, errors.Join(errors.Join(failures...), <-errs))
	})
}

// A handle that is released once more is no use of the record, even while
// others look at it.
func TestSecondReleaseIsNoUse(t *testing.T) {
	forKinds(t, func(w *world) {
		imm := w.layer(nil, "a", "1")
		mnt, err := imm.Mount(w.ctx)
		require.NoError(t, err)
		w.release(imm)
		look, err := w.Get(w.ctx, imm.ID(), cache.GetOptions{NoUpdate: true})
		require.NoError(t, err)
		w.release(imm, look)
		require.NoError(t, mnt.Unmount())
		rec, err := w.Lookup(w.ctx, imm.ID())
		require.NoError(t, err)
		require.EqualValues(t, 1, rec.UsageCount)
	})
}

package cache_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
)

// seed is printed by the tests that use it, and can be given to repeat one.
func seed(t testing.TB) uint64 {
	n := uint64(time.Now().UnixNano())
	if s := os.Getenv("LAMINA_TEST_SEED"); s != "" {
		var err error
		n, err = strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("LAMINA_TEST_SEED=%d", n)
	return n
}

// crowd is what the workers of the stress test share: the ids that they may
// meet.
type crowd struct {
	w *world

	mu  sync.Mutex
	ids []cache.ID

	committed, reopened, removed atomic.Int64
}

func (c *crowd) add(id cache.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ids = append(c.ids, id)
}

func (c *crowd) pick(rng *rand.Rand) (cache.ID, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.ids) == 0 {
		return "", false
	}
	return c.ids[rng.IntN(len(c.ids))], true
}

// expected are the ways in which an operation may lose against another.
func expected(err error) bool {
	return err == nil || errors.Is(err, cache.ErrLocked) || errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err)
}

// sign writes the record's id into its snapshot: an immutable id that shows
// another one names two contents.
func sign(ctx context.Context, mut *cache.MutableRef, was cache.ID) error {
	mnt, err := mut.Mount(ctx, cache.MountOptions{})
	if err != nil {
		return err
	}
	path := filepath.Join(mnt.Path(), "id")
	if was != "" {
		if data, rerr := os.ReadFile(path); rerr != nil || cache.ID(data) != was {
			err = errors.Join(rerr, fmt.Errorf("record %s took over from %s, which held %q", mut.ID(), was, data))
		}
	}
	return errors.Join(err, os.WriteFile(path, []byte(mut.ID()), 0o644), mnt.Unmount())
}

func checkSignature(ctx context.Context, imm *cache.ImmutableRef) error {
	mnt, err := imm.Mount(ctx)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(filepath.Join(mnt.Path(), "id"))
	if err == nil && cache.ID(data) != imm.ID() {
		err = fmt.Errorf("immutable record %s shows the content of %s", imm.ID(), data)
	}
	return errors.Join(err, mnt.Unmount())
}

// deed is one thing that a worker does. It returns what went wrong, but for
// what is expected.
type deed func(ctx context.Context, c *crowd, rng *rand.Rand) error

func (c *crowd) commit(ctx context.Context, mut *cache.MutableRef) error {
	imm, err := mut.Commit(ctx)
	if err != nil {
		return err
	}
	c.committed.Add(1)
	c.add(imm.ID())
	return errors.Join(checkSignature(ctx, imm), imm.Release(ctx))
}

// onSome runs fn on a handle of a record that somebody made.
func onSome(fn func(ctx context.Context, c *crowd, rng *rand.Rand, imm *cache.ImmutableRef) error) deed {
	return func(ctx context.Context, c *crowd, rng *rand.Rand) error {
		id, ok := c.pick(rng)
		if !ok {
			return nil
		}
		imm, err := c.w.Get(ctx, id, cache.GetOptions{})
		if err != nil {
			if expected(err) {
				return nil
			}
			return err
		}
		return errors.Join(fn(ctx, c, rng, imm), imm.Release(ctx))
	}
}

var deeds = []deed{
	func(ctx context.Context, c *crowd, rng *rand.Rand) error { // New
		mut, err := c.w.New(ctx, nil, cache.NewOptions{
			Retain: rng.IntN(2) == 0, Values: []cache.Value{{Name: "k", Index: "shared"}},
		})
		if err == nil {
			err = sign(ctx, mut, "")
		}
		if err != nil || rng.IntN(4) == 0 && !mut.Record().Retain {
			return errors.Join(err, mut.Release(ctx))
		}
		return c.commit(ctx, mut)
	},
	onSome(func(ctx context.Context, c *crowd, _ *rand.Rand, parent *cache.ImmutableRef) error { // child
		mut, err := c.w.New(ctx, parent, cache.NewOptions{})
		if err != nil {
			return err
		}
		if err := sign(ctx, mut, parent.ID()); err != nil {
			return errors.Join(err, mut.Release(ctx))
		}
		return c.commit(ctx, mut)
	}),
	onSome(func(ctx context.Context, _ *crowd, _ *rand.Rand, imm *cache.ImmutableRef) error { // Get, Clone, Mount
		twin, err := imm.Clone()
		if err != nil {
			return err
		}
		return errors.Join(checkSignature(ctx, imm), checkSignature(ctx, twin), twin.Release(ctx), twin.Release(ctx))
	}),
	onSome(func(ctx context.Context, _ *crowd, _ *rand.Rand, imm *cache.ImmutableRef) error { // Finalize
		return errors.Join(imm.Finalize(ctx), checkSignature(ctx, imm))
	}),
	onSome(func(ctx context.Context, _ *crowd, rng *rand.Rand, imm *cache.ImmutableRef) error { // Edit
		return imm.SetValue(ctx, cache.Value{Name: "w", Index: strconv.Itoa(rng.IntN(5))})
	}),
	reopenSome, reopenSome,
	func(ctx context.Context, c *crowd, rng *rand.Rand) error { // Remove
		a, ok := c.pick(rng)
		b, _ := c.pick(rng)
		if !ok {
			return nil
		}
		out, err := c.w.Remove(ctx, a, b)
		for _, r := range out {
			if r.Err == nil {
				c.removed.Add(1)
			} else if !expected(r.Err) {
				err = errors.Join(err, r.Err)
			}
		}
		return err
	},
	func(ctx context.Context, c *crowd, _ *rand.Rand) error { // Search
		ids, err := c.w.Search(ctx, "shared")
		for _, id := range ids {
			imm, gerr := c.w.Get(ctx, id, cache.GetOptions{})
			if gerr == nil {
				gerr = errors.Join(imm.Release(ctx), imm.Release(ctx))
			}
			if !expected(gerr) {
				err = errors.Join(err, gerr)
			}
		}
		return err
	},
}

// reopenSome takes a committed record over, and now and then leaves it
// interrupted.
func reopenSome(ctx context.Context, c *crowd, rng *rand.Rand) error {
	id, ok := c.pick(rng)
	if !ok {
		return nil
	}
	mut, err := c.w.GetMutable(ctx, id)
	if err != nil {
		if expected(err) {
			return nil
		}
		return err
	}
	c.reopened.Add(1)
	if mut.ID() != id {
		if _, err := c.w.Get(ctx, id, cache.GetOptions{}); !errdefs.IsNotFound(err) {
			return fmt.Errorf("record %s was reopened as %s and is still there: %w", id, mut.ID(), err)
		}
	} else {
		id = "" // interrupted before: it may not have been signed
	}
	if rng.IntN(5) == 0 {
		c.add(mut.ID())
		return mut.Release(ctx)
	}
	if err := sign(ctx, mut, id); err != nil {
		return errors.Join(err, mut.Release(ctx))
	}
	return c.commit(ctx, mut)
}

func TestManyAtOnce(t *testing.T) {
	const workers = 16
	rounds := 25
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		rounds = 1000
	}
	n := seed(t)
	forKinds(t, func(w *world) {
		c := &crowd{w: w}
		var group sync.WaitGroup
		failures := make(chan error, workers)
		for i := range workers {
			group.Go(func() {
				rng := rand.New(rand.NewPCG(n, uint64(i)))
				for range rounds {
					if err := deeds[rng.IntN(len(deeds))](w.ctx, c, rng); err != nil {
						failures <- err
						return
					}
				}
			})
		}
		group.Wait()
		close(failures)
		for err := range failures {
			require.NoError(w, err)
		}
		w.Logf("rig: %d commits, %d reopens, %d removals", c.committed.Load(), c.reopened.Load(), c.removed.Load())
		require.Positive(w, c.committed.Load())
		require.Positive(w, c.reopened.Load())
		require.Positive(w, c.removed.Load())
		w.nothingIsHeld()
		w.check()
		w.reopenStore()
		w.nothingIsHeld()
		for rec, err := range w.Records(w.ctx) {
			require.NoError(w, err)
			if rec.State != cache.Mutable {
				imm := w.get(rec.ID)
				require.NoError(w, checkSignature(w.ctx, imm))
				w.release(imm)
			}
		}
	})
}

// nothingIsHeld says that there is no handle and no name without a record.
func (w *world) nothingIsHeld() {
	w.Helper()
	keys := map[string]bool{}
	for rec, err := range w.Records(w.ctx) {
		require.NoError(w, err)
		require.Empty(w, w.Refs(rec.ID))
		keys[rec.Key] = true
	}
	names := w.names()
	require.Len(w, names, len(keys))
	for name := range names {
		require.True(w, keys[name], "no record names %s", name)
	}
}

// A driver that never comes back from a call about one record delays no call
// about another.
func TestABlockedDriverCallDelaysNobodyElse(t *testing.T) {
	for _, b := range []struct {
		op   string
		do   func(w *world, id cache.ID) error
		then func(w *world, id cache.ID)
	}{
		{"Detach", removeOne, waitsForContext},
		{"Discard", removeOne, func(w *world, id cache.ID) { w.gone(id) }},
		{"Commit", finalizeOne, func(w *world, id cache.ID) { require.Equal(w, "a=1", w.treeOf(id)) }},
		{"Mount", mountOne, func(w *world, id cache.ID) { w.release(w.get(id)) }},
	} {
		t.Run(b.op, func(t *testing.T) {
			forKinds(t, func(w *world) {
				stuck := w.layer(nil, "a", "1")
				other := w.layer(nil, "b", "2")
				leaf := w.layer(other, "c", "3")
				id, key := stuck.ID(), stuck.Record().Key
				w.release(stuck)
				reached, release := w.driver.Block(b.op, key)
				defer release()
				outcome := make(chan error, 1)
				go func() { outcome <- b.do(w, id) }()
				<-reached

				mut := w.new(other, cache.NewOptions{Retain: true}, "d", "4")
				require.NoError(w, mut.SetValue(w.ctx, cache.Value{Name: "k", Index: "key"}))
				imm := w.commit(mut)
				require.Equal(w, "b=2 d=4", w.tree(imm))
				w.release(imm)
				again, err := w.GetMutable(w.ctx, imm.ID())
				require.NoError(w, err)
				imm = w.commit(again)
				require.NoError(w, imm.Finalize(w.ctx))
				w.release(imm, leaf)
				out, err := w.Remove(w.ctx, imm.ID(), leaf.ID())
				require.NoError(w, err)
				require.NoError(w, errors.Join(out[0].Err, out[1].Err))
				_, err = w.Search(w.ctx, "key")
				require.NoError(w, err)
				_, err = w.DiskUsage(w.ctx, nil)
				require.NoError(w, err)
				b.then(w, id)

				release()
				require.NoError(w, <-outcome)
				w.release(other)
			})
		})
	}
}

func removeOne(w *world, id cache.ID) error {
	out, err := w.Remove(w.ctx, id)
	return errors.Join(err, out[0].Err)
}

func finalizeOne(w *world, id cache.ID) error {
	imm, err := w.Get(w.ctx, id, cache.GetOptions{})
	if err != nil {
		return err
	}
	return errors.Join(imm.Finalize(w.ctx), imm.Release(w.ctx))
}

func mountOne(w *world, id cache.ID) error {
	imm, err := w.Get(w.ctx, id, cache.GetOptions{})
	if err != nil {
		return err
	}
	mnt, err := imm.Mount(w.ctx)
	if err == nil {
		err = mnt.Unmount()
	}
	return errors.Join(err, imm.Release(w.ctx))
}

// waitsForContext says that a record which is leaving is waited for as long as
// the caller likes.
func waitsForContext(w *world, id cache.ID) {
	ctx, cancel := context.WithTimeout(w.ctx, 20*time.Millisecond)
	defer cancel()
	_, err := w.Get(ctx, id, cache.GetOptions{})
	require.ErrorIs(w, err, context.DeadlineExceeded)
	_, err = w.GetMutable(ctx, id)
	require.ErrorIs(w, err, context.DeadlineExceeded)
	out, err := w.Remove(ctx, id)
	require.NoError(w, err)
	require.ErrorIs(w, out[0].Err, context.DeadlineExceeded)
}

// A removal whose context ends while it waits for one of several records
// leaves that one and those that it stands on, and removes the rest.
func TestRemovalOfManyWhoseContextEnds(t *testing.T) {
	w := newWorld(t, overlayKind)
	base := w.layer(nil, "a", "1")
	top := w.layer(base, "b", "2")
	w.release(base, top)
	// Somebody finalizes top, and is stuck, with the token of base's child.
	reached, release := w.driver.Block("Commit", top.Record().Key)
	defer release()
	outcome := make(chan error, 1)
	go func() { outcome <- finalizeOne(w, top.ID()) }()
	<-reached
	ctx, cancel := context.WithTimeout(w.ctx, 20*time.Millisecond)
	defer cancel()
	out, err := w.Remove(ctx, base.ID(), top.ID())
	require.NoError(t, err)
	require.Error(t, out[0].Err)
	require.Error(t, out[1].Err)
	release()
	require.NoError(t, <-outcome)
	require.Equal(t, "a=1 b=2", w.treeOf(top.ID()))
}

func TestMountRacesWithFinalize(t *testing.T) {
	forKinds(t, func(w *world) {
		for range 25 {
			imm := w.layer(nil, "a", "1")
			var group sync.WaitGroup
			errs := make([]error, 5)
			for i := range errs {
				group.Go(func() {
					if i == 0 {
						errs[i] = imm.Finalize(w.ctx)
						return
					}
					mnt, err := imm.Mount(w.ctx)
					if errs[i] = err; err == nil {
						_, err = os.ReadFile(filepath.Join(mnt.Path(), "a"))
						errs[i] = errors.Join(err, mnt.Unmount())
					}
				})
			}
			group.Wait()
			require.NoError(w, errors.Join(errs...))
			w.release(imm)
		}
	})
}

// Of two who reopen one record one wins, and the other is told why not; so it
// is with two who continue one, also while others look at it.
func TestOfTwoReopensOneWins(t *testing.T) {
	forKinds(t, func(w *world) {
		for i := range 30 {
			imm := w.layer(nil, "a", "1")
			w.release(imm)
			id := imm.ID()
			if i%2 == 1 { // continued, not reopened
				mut, err := w.GetMutable(w.ctx, id)
				require.NoError(w, err)
				w.release(mut)
				id = mut.ID()
			}
			var group sync.WaitGroup
			muts, errs := make([]*cache.MutableRef, 2), make([]error, 2)
			for i := range muts {
				group.Go(func() { muts[i], errs[i] = w.GetMutable(w.ctx, id) })
				group.Go(func() {
					if i%2 == 0 {
						return
					}
					// Looks, and holds nothing of a mutable record.
					_, _ = w.Lookup(w.ctx, id)
					w.Refs(id)
				})
			}
			if i%2 == 1 {
				group.Go(func() {
					_, err := w.Get(w.ctx, id, cache.GetOptions{})
					if !expected(err) || err == nil {
						panic(fmt.Sprint("got a mutable record: ", err))
					}
				})
			}
			group.Wait()
			won := 0
			for i, mut := range muts {
				if errs[i] == nil {
					won++
					w.release(mut)
					continue
				}
				require.True(w, errors.Is(errs[i], cache.ErrLocked) || errdefs.IsNotFound(errs[i]), errs[i])
			}
			require.Equal(w, 1, won, "%v", errs)
		}
	})
}

// A Release, a Detach or another Commit may come while a Commit of the same
// handle is under way.
func TestCommitRacesWithTheEndOfItsHandle(t *testing.T) {
	w := newWorld(t, nativeKind)
	for i := range 30 {
		mut := w.new(nil, cache.NewOptions{Retain: i%2 == 0}, "a", "1")
		var group sync.WaitGroup
		var imm *cache.ImmutableRef
		var hold *cache.Hold
		var committed, released error
		group.Go(func() { imm, committed = mut.Commit(w.ctx) })
		group.Go(func() { released = mut.Release(w.ctx) })
		if i%3 == 0 {
			group.Go(func() { hold, _ = mut.Detach(w.ctx) })
		}
		group.Wait()
		require.NoError(t, released)
		if hold != nil {
			require.NoError(t, hold.Release())
		}
		if committed != nil {
			require.ErrorIs(t, committed, errdefs.ErrFailedPrecondition)
			continue
		}
		require.Len(t, w.Refs(mut.ID()), 1)
		require.Equal(t, "a=1", w.tree(imm))
		w.release(imm)
	}
}

// Close waits for what is under way. What was acknowledged is there
// afterwards, and what was not is gone or settled.
func TestCloseRacesWithOperations(t *testing.T) {
	w := newWorld(t, overlayKind)
	for range 10 {
		var group sync.WaitGroup
		var mu sync.Mutex
		var acknowledged []cache.ID
		begun := make(chan struct{}, 4)
		for range cap(begun) {
			group.Go(func() {
				for i := 0; ; i++ {
					mut, err := w.New(w.ctx, nil, cache.NewOptions{})
					if i == 0 {
						begun <- struct{}{}
					}
					if err != nil {
						return
					}
					imm, err := mut.Commit(w.ctx)
					if err != nil {
						return
					}
					mu.Lock()
					acknowledged = append(acknowledged, imm.ID())
					mu.Unlock()
					if imm.Finalize(w.ctx) != nil || imm.Release(w.ctx) != nil {
						return
					}
				}
			})
		}
		for range cap(begun) {
			<-begun
		}
		require.NoError(t, w.Manager.Close())
		group.Wait()
		require.NoError(t, w.driver.Close())
		w.Manager = nil
		w.reopenStore()
		w.check()
		for _, id := range acknowledged {
			w.release(w.get(id))
		}
		out, err := w.Remove(w.ctx, acknowledged...)
		require.NoError(t, err)
		for _, r := range out {
			require.NoError(t, r.Err)
		}
	}
}

package cache_test

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

// collecting is a store that collects by itself, with a clock and a disk of its
// own and what the callbacks were told.
type collecting struct {
	*world
	clock atomic.Int64
	free  atomic.Int64
	// begun gets a line for each collection, ended its sums.
	begun chan string
	ended chan cache.Pruned
	// looked gets something each time that somebody was given the figures of
	// the disk, which is what a round of the collector begins with.
	looked chan struct{}
}

// newCollecting opens a store with these policies. change, if not nil, adapts
// the options.
func newCollecting(t *testing.T, change func(*cache.CollectOptions), ps ...policy.Policy) *collecting {
	return newCollectingOn(t, nativeKind, change, ps...)
}

func newCollectingOn(t *testing.T, k kind, change func(*cache.CollectOptions), ps ...policy.Policy) *collecting {
	c := &collecting{begun: make(chan string, 100), ended: make(chan cache.Pruned, 100), looked: make(chan struct{}, 1000)}
	c.clock.Store(time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC).UnixNano())
	c.free.Store(1 << 40)
	c.world = newWorld(t, k)
	c.opts = func(o *cache.Options) {
		o.Now = func() time.Time { return time.Unix(0, c.clock.Load()) }
		o.Disk = func() (policy.Disk, error) {
			free := c.free.Load()
			select {
			case c.looked <- struct{}{}:
			default: // the tests that count them are short
			}
			return policy.Disk{Total: 1 << 41, Free: free}, nil
		}
		o.Collect = &cache.CollectOptions{
			Policies: ps, Every: time.Hour, Pause: -1,
			OnPlan:      func(why string, _ *policy.Plan) { c.begun <- why },
			OnCollected: func(_ string, sum cache.Pruned, err error) { require.NoError(t, err); c.ended <- sum },
		}
		if change != nil {
			change(o.Collect)
		}
	}
	c.reopenStore()
	return c
}

// stop opens the store without a collector: what was to be collected has been.
func (c *collecting) stop() {
	c.opts = nil
	c.reopenStore()
}

// fill makes n records of a megabyte and a bit, each used a second later than the one before, and says
// how large they are.
func (c *collecting) fill(n int, labels map[string]string) (ids []cache.ID, size int64) {
	c.Helper()
	for i := range n {
		c.clock.Add(int64(time.Second))
		imm := c.commit(c.new(nil, cache.NewOptions{Labels: labels}, fmt.Sprint(i), strings.Repeat("x", 1_000_000)))
		ids = append(ids, imm.ID())
		c.release(imm)
	}
	_, err := c.Measure(c.ctx)
	require.NoError(c, err)
	rec, err := c.Lookup(c.ctx, ids[0])
	if err == nil {
		size = rec.Size
	}
	return ids, size
}

func (c *collecting) left() (ids []cache.ID) {
	c.Helper()
	for rec, err := range c.Records(c.ctx) {
		require.NoError(c, err)
		ids = append(ids, rec.ID)
	}
	return ids
}

// TestCollectBetweenWatermarks: nothing as long as the high one is kept, then
// down to the low one, what was used longest ago first.
func TestCollectBetweenWatermarks(t *testing.T) {
	type outcome struct {
		step policy.Step
		r    cache.Removed
	}
	removed := make(chan outcome, 100)
	c := newCollecting(t, func(o *cache.CollectOptions) {
		o.OnRemoved = func(s policy.Step, r cache.Removed) { removed <- outcome{s, r} }
	}, policy.Policy{MaxUsed: policy.Bytes(5_500_000), Target: policy.Bytes(2_500_000)})
	ids, size := c.fill(4, nil)
	require.Positive(t, size)
	c.closeStore()
	require.Empty(t, c.begun, "the limit is kept")
	c.reopenStore()

	more, _ := c.fill(2, nil)
	ids = append(ids, more...)
	require.Contains(t, <-c.begun, ", which is above 5.2 MiB (policy 1)")
	require.Equal(t, cache.Pruned{Removed: 4, Freed: 4 * size, Kept: 2}, <-c.ended)
	for i := range 4 {
		o := <-removed
		require.Equal(t, ids[i], o.r.ID)
		require.NoError(t, o.r.Err)
		require.Equal(t, policy.OverLimit, o.step.Reason)
		require.Equal(t, string(ids[i]), o.step.Record.ID)
	}
	require.Equal(t, ids[4:], c.left())
	c.stop()
	require.Empty(t, c.begun)
}

// TestCollectForTheDisk: others fill it, too.
func TestCollectForTheDisk(t *testing.T) {
	c := newCollecting(t, nil, policy.Policy{MinFree: policy.Bytes(1 << 30)})
	ids, size := c.fill(3, nil)
	c.free.Store(1<<30 - size - 1)
	mut := c.new(nil, cache.NewOptions{}, "f", "1") // New alone says that something has changed
	require.Contains(t, <-c.begun, "above")
	require.Equal(t, 2, (<-c.ended).Removed)
	require.Equal(t, ids[2:], c.left())
	require.NoError(t, mut.Release(c.ctx))
	c.free.Store(1 << 40)
	c.stop()
}

// TestCollectForLayers: what is extracted, and what is written as a blob, takes
// room of the disk as what is committed does. The collector has nothing else to
// go by: the store is opened anew, and it has looked once, before the disk is
// full.
func TestCollectForLayers(t *testing.T) {
	force := cache.RemotesOptions{Create: true, Force: true, Compression: cache.Compression{Algorithm: layer.Zstd}}
	give := func(o cache.RemotesOptions) func(*collecting, *cache.ImmutableRef) error {
		return func(c *collecting, ref *cache.ImmutableRef) error {
			r, err := ref.GetRemotes(c.ctx, o)
			if err != nil {
				return err
			}
			return r.Release(c.ctx)
		}
	}
	extract := func(c *collecting, ref *cache.ImmutableRef) error { return ref.Extract(c.ctx) }
	here := func(c *collecting) *cache.ImmutableRef {
		b := pack(c, layer.Gzip, layerTar(c, file{name: "a", text: "1"}))
		c.store(b)
		return c.byBlob(b, nil, nil)
	}
	for name, tt := range map[string]struct {
		prepare func(c *collecting) *cache.ImmutableRef
		do      func(c *collecting, ref *cache.ImmutableRef) error
		tree    string
	}{
		"extract": {here, extract, "a=1"},
		"mount": {here, func(c *collecting, ref *cache.ImmutableRef) error {
			mnt, err := ref.Mount(c.ctx)
			if err != nil {
				return err
			}
			return mnt.Unmount()
		}, "a=1"},
		"merge": {func(c *collecting) *cache.ImmutableRef {
			a, b := c.layer(nil, "a", "1"), c.layer(nil, "b", "2")
			defer c.release(a, b)
			return c.merge(a, b)
		}, extract, "a=1 b=2"},
		"diff": {func(c *collecting) *cache.ImmutableRef {
			a, b := c.layer(nil, "a", "1"), c.layer(nil, "b", "2")
			defer c.release(a, b)
			return c.diff(a, b)
		}, extract, "b=2"},
		"blob": {func(c *collecting) *cache.ImmutableRef {
			ref := c.layer(nil, "a", "1")
			require.NoError(c, ref.Finalize(c.ctx))
			return ref
		}, give(gzipped), "a=1"},
		"converted": {here, give(force), "a=1"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, k := range []kind{overlayKind, nativeKind} {
				t.Run(k.name, func(t *testing.T) {
					c := newCollectingOn(t, k, nil, policy.Policy{MinFree: policy.Bytes(1 << 30)})
					collects := c.opts
					c.opts = func(o *cache.Options) { collects(o); o.Collect = nil }
					c.reopenStore()
					victims, _ := c.fill(1, nil)
					ref := tt.prepare(c)
					id := ref.ID()
					c.release(ref)
					before := c.left()
					c.closeStore()
					for len(c.looked) > 0 {
						<-c.looked
					}
					// Who measures records says that they have grown, too, but
					// somewhat later.
					looked := make(chan struct{})
					c.opts = func(o *cache.Options) {
						collects(o)
						c.driver.Hook(func(call snapshottest.Call) error {
							if call.Op == "Usage" {
								<-looked
							}
							return nil
						}, nil)
					}
					c.reopenStore()
					for range 2 {
						<-c.looked // its policies were proven, and its first round began
					}
					ref = c.get(id)
					c.free.Store(1<<30 - 1)
					require.NoError(t, tt.do(c, ref))
					select {
					case <-c.looked:
						close(looked)
					case <-time.After(time.Minute):
						close(looked)
						require.Fail(t, "nobody looked at the disk")
					}
					require.Contains(t, <-c.begun, "above")
					require.Equal(t, 1, (<-c.ended).Removed)
					require.Equal(t, slices.DeleteFunc(before, func(id cache.ID) bool { return id == victims[0] }), c.left())
					require.Equal(t, tt.tree, c.tree(ref))
					c.release(ref)
					c.free.Store(1 << 40)
					c.stop()
				})
			}
		})
	}
}

// TestAHandleIsAVeto even if it comes after the plan was made.
func TestAHandleIsAVeto(t *testing.T) {
	var c *collecting
	veto := make(chan *cache.ImmutableRef, 1)
	results := make(chan cache.Removed, 100)
	c = newCollecting(t, func(o *cache.CollectOptions) {
		o.OnPlan = func(_ string, p *policy.Plan) {
			if len(veto) == 0 {
				ref, err := c.Get(c.ctx, cache.ID(p.Victims()[0].Record.ID), cache.GetOptions{})
				require.NoError(t, err)
				veto <- ref
			}
		}
		o.OnRemoved = func(_ policy.Step, r cache.Removed) { results <- r }
	}, policy.Policy{MaxUsed: policy.Bytes(0)})
	ids, _ := c.fill(1, nil)
	<-c.ended
	first := <-results
	require.Equal(t, ids[0], first.ID)
	require.ErrorIs(t, first.Err, cache.ErrLocked)
	require.Equal(t, ids, c.left())

	// Once it is released it goes; a limit that could not be kept is tried
	// again when the store has grown or after a while.
	c.release(<-veto)
	veto <- nil
	c.clock.Add(int64(time.Hour))
	mut := c.new(nil, cache.NewOptions{}, "f", "1")
	<-c.ended
	require.Equal(t, cache.Removed{ID: ids[0], Freed: (<-results).Freed}.ID, ids[0])
	require.Empty(t, c.left())
	require.NoError(t, mut.Release(c.ctx))
	c.stop()
}

// TestALimitThatCannotBeKept is not tried again and again.
func TestALimitThatCannotBeKept(t *testing.T) {
	c := newCollecting(t, nil, policy.Policy{MaxUsed: policy.Bytes(10)})
	held := c.layer(nil, "a", strings.Repeat("x", 90_000))
	_, err := c.Measure(c.ctx)
	require.NoError(t, err)
	<-c.begun
	require.Equal(t, 0, (<-c.ended).Removed)
	for range 3 {
		c.discard(c.new(nil, cache.NewOptions{}, "f", "1"))
	}
	c.closeStoreKeeping(held)
	require.Empty(t, c.begun)
	c.stop()
}

// Such a limit is tried again at once when the store has grown, and like any
// other when it was kept in between.
func TestALimitThatCannotBeKeptIsTriedAgain(t *testing.T) {
	looked := make(chan struct{}, 100)
	c := newCollecting(t, nil, policy.Policy{MaxUsed: policy.Bytes(10)})
	change := c.opts
	c.opts = func(o *cache.Options) {
		change(o)
		disk := o.Disk
		o.Disk = func() (policy.Disk, error) {
			looked <- struct{}{}
			return disk()
		}
	}
	c.reopenStore()
	held := c.layer(nil, "a", strings.Repeat("x", 90_000))
	_, err := c.Measure(c.ctx)
	require.NoError(t, err)
	require.Equal(t, 0, c.collected())
	grown := c.layer(nil, "b", strings.Repeat("x", 90_000))
	c.release(grown)
	_, err = c.Measure(c.ctx)
	require.NoError(t, err)
	require.Equal(t, 1, c.collected(), "what was added goes")

	c.release(held)
	c.removeAll(held.ID())
	for len(looked) > 0 {
		<-looked
	}
	c.discard(c.new(nil, cache.NewOptions{}, "f", "1"))
	<-looked // the limit is kept
	small := c.layer(nil, "c", "x")
	c.release(small)
	_, err = c.Measure(c.ctx)
	require.NoError(t, err)
	require.Equal(t, 1, c.collected(), "the limit was kept in between")
	c.stop()
}

// collected waits for a collection, and says how many records went.
func (c *collecting) collected() int {
	c.Helper()
	select {
	case sum := <-c.ended:
		return sum.Removed
	case <-time.After(time.Minute): // it takes milliseconds
		require.Fail(c, "nothing is collected")
	}
	return 0
}

// discard releases a mutable that nobody wants.
func (w *world) discard(mut *cache.MutableRef) {
	w.Helper()
	require.NoError(w, mut.Release(w.ctx))
}

// closeStoreKeeping closes the store and gives a handle back before.
func (c *collecting) closeStoreKeeping(ref *cache.ImmutableRef) {
	c.Helper()
	c.release(ref)
	c.closeStore()
}

// TestCollectByTime: policies without limits are applied now and then.
func TestCollectByTime(t *testing.T) {
	day := policy.Duration(24 * time.Hour)
	c := newCollecting(t, nil, policy.Policy{KeepDuration: &day})
	require.Contains(t, <-c.begun, "time")
	require.Zero(t, (<-c.ended).Removed)
	ids, _ := c.fill(2, nil)
	used, err := c.Get(c.ctx, ids[0], cache.GetOptions{})
	require.NoError(t, err)
	c.clock.Add(int64(25 * time.Hour))
	c.discard(c.new(nil, cache.NewOptions{}, "f", "1"))
	<-c.begun
	require.Equal(t, 1, (<-c.ended).Removed)
	c.release(used)
	require.Equal(t, ids[:1], c.left())
	c.stop()
}

// TestQuotasAreCollected: over it New still works.
func TestQuotasAreCollected(t *testing.T) {
	c := newCollecting(t, nil, policy.Policy{ByLabel: "team", LabelValues: []string{"a"}, MaxUsed: policy.Bytes(2_500_000)})
	others, size := c.fill(4, map[string]string{"team": "b"})
	require.Empty(t, c.begun)
	ids, _ := c.fill(3, map[string]string{"team": "a"})
	require.Contains(t, <-c.begun, `team="a" uses`)
	require.Equal(t, cache.Pruned{Removed: 1, Freed: size, Kept: 6}, <-c.ended)
	require.Equal(t, append(others, ids[1:]...), c.left())
	u, err := c.DiskUsage(c.ctx, nil)
	require.NoError(t, err)
	require.Equal(t, []cache.LabelCount{
		{Value: "a", Set: true, Count: cache.Count{Records: 2, Bytes: 2 * size}},
		{Value: "b", Set: true, Count: cache.Count{Records: 4, Bytes: 4 * size}},
	}, u.ByLabel("team"))
	c.stop()
}

// TestNobodyWaitsForACollection whose host takes its time, but Close.
func TestNobodyWaitsForACollection(t *testing.T) {
	took, goOn := make(chan struct{}, 100), make(chan struct{})
	c := newCollecting(t, func(o *cache.CollectOptions) {
		o.OnRemoved = func(policy.Step, cache.Removed) {
			took <- struct{}{}
			<-goOn
		}
	}, policy.Policy{MaxUsed: policy.Bytes(0)})
	_, _ = c.fill(1, nil)
	<-took
	imm := c.layer(nil, "a", "1")
	again, err := c.Get(c.ctx, imm.ID(), cache.GetOptions{})
	require.NoError(t, err)
	c.release(imm, again)
	_, err = c.DiskUsage(c.ctx, nil)
	require.NoError(t, err)
	_, err = c.Prune(c.ctx, policy.Policy{})
	require.NoError(t, err)
	close(goOn)
	<-c.ended
	c.stop()
}

// TestCloseEndsACollection, and waits for its callback.
func TestCloseEndsACollection(t *testing.T) {
	began, goOn := make(chan struct{}, 100), make(chan struct{})
	c := newCollecting(t, func(o *cache.CollectOptions) {
		o.OnPlan = func(string, *policy.Plan) {
			began <- struct{}{}
			<-goOn
		}
		o.OnCollected = nil
	}, policy.Policy{MaxUsed: policy.Bytes(0)})
	_, _ = c.fill(1, nil)
	<-began
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		c.closeStore()
	}()
	select {
	case <-closed:
		t.Error("Close did not wait")
	default:
	}
	close(goOn)
	<-closed
	c.stop()
}

func TestCollectRefusesBadPolicies(t *testing.T) {
	w := newWorld(t, nativeKind)
	w.opts = func(o *cache.Options) {
		o.Collect = &cache.CollectOptions{Policies: []policy.Policy{{MaxUsed: policy.Bytes(1), Reserved: policy.Bytes(2)}}}
	}
	err := w.tryOpen()
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "collect: policy 1")
	w.opts = nil
	w.reopenStore()
}

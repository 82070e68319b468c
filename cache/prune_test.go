package cache_test

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// ids of what a plan removes, in its order.
func victims(p *policy.Plan) (out []cache.ID) {
	for _, s := range p.Victims() {
		out = append(out, cache.ID(s.Record.ID))
	}
	return out
}

func (w *world) plan(ps ...policy.Policy) *policy.Plan {
	w.Helper()
	if len(ps) == 0 {
		ps = []policy.Policy{{}}
	}
	p, err := w.Plan(w.ctx, ps...)
	require.NoError(w, err)
	return p
}

func (w *world) execute(p *policy.Plan) (removed []cache.Removed, failed []cache.Removed) {
	w.Helper()
	for r, err := range w.Execute(w.ctx, p) {
		require.NoError(w, err)
		if r.Err != nil {
			failed = append(failed, r)
		} else {
			removed = append(removed, r)
		}
	}
	return removed, failed
}

// TestPrune: leaf first, parents in the same run, what is held stays with all
// that lies below it, and the sums are those of the plan.
func TestPrune(t *testing.T) {
	forKinds(t, func(w *world) {
		base := w.layer(nil, "a", "1")
		top := w.layer(base, "b", "2")
		other := w.layer(base, "c", "3")
		heldBase := w.layer(nil, "d", "4")
		held := w.layer(heldBase, "e", "5")
		w.release(base, top, other, heldBase)
		before, err := w.DiskUsage(w.ctx, nil)
		require.NoError(w, err)
		counts := map[cache.ID]uint64{}
		for _, e := range before.Entries {
			counts[e.Record.ID] = e.Record.UsageCount
		}

		plan := w.plan()
		require.Equal(w, []cache.ID{top.ID(), other.ID(), base.ID()}, victims(plan))
		reasons := map[cache.ID]policy.Reason{}
		for _, s := range plan.Steps {
			reasons[cache.ID(s.Record.ID)] = s.Reason
		}
		require.Equal(w, policy.Held, reasons[held.ID()])
		require.Equal(w, policy.HasChildren, reasons[heldBase.ID()])
		require.Equal(w, before.Reclaimable-before.Blobs, plan.Freed)
		require.NoError(w, w.Verify(w.ctx, plan))

		tx := w.transactions(func() {
			removed, failed := w.execute(plan)
			require.Empty(w, failed)
			require.Len(w, removed, 3)
			var freed int64
			for i, r := range removed {
				require.Equal(w, victims(plan)[i], r.ID)
				freed += r.Freed
			}
			require.Equal(w, plan.Freed, freed)
		})
		require.Equal(w, 1, tx, "all share a transaction")
		after, err := w.DiskUsage(w.ctx, nil)
		require.NoError(w, err)
		require.Equal(w, before.Snapshots-plan.Freed, after.Snapshots)
		require.Zero(w, after.Reclaimable-after.Blobs)
		require.Len(w, after.Entries, 2)
		for _, e := range after.Entries {
			require.True(w, e.InUse)
			require.Equal(w, counts[e.Record.ID], e.Record.UsageCount, "looking counts no use")
		}
		require.ErrorIs(w, w.Verify(w.ctx, plan), errdefs.ErrFailedPrecondition)
		w.release(held)
		sum, err := w.Prune(w.ctx, policy.Policy{})
		require.NoError(w, err)
		require.Equal(w, 2, sum.Removed)
		require.Empty(w, sum.Failed)
		require.Empty(w, walk(w, w.driver))
	})
}

// TestVictimsAreValidatedAgain: what changed since the plan was made stays, and
// the rest goes.
func TestVictimsAreValidatedAgain(t *testing.T) {
	w := newWorld(t, overlayKind)
	taken, edited, used, gone := w.layer(nil, "a", "1"), w.layer(nil, "a", "2"), w.layer(nil, "a", "3"), w.layer(nil, "a", "4")
	parent, plain, reopened := w.layer(nil, "a", "5"), w.layer(nil, "a", "6"), w.layer(nil, "a", "7")
	require.NoError(t, parent.Finalize(w.ctx))
	w.release(taken, edited, used, gone, parent, plain, reopened)
	plan := w.plan()
	require.Equal(t, 7, plan.Removed)
	require.NoError(t, w.Verify(w.ctx, plan))

	// Uses, syncs and sizes are no changes.
	w.release(w.get(used.ID()))
	_, err := w.Sync(w.ctx)
	require.NoError(t, err)
	_, err = w.Measure(w.ctx)
	require.NoError(t, err)
	require.NoError(t, w.Verify(w.ctx, plan))

	hold := w.get(taken.ID())
	e := w.get(edited.ID())
	require.NoError(t, e.SetValue(w.ctx, cache.Value{Name: "n", Data: []byte("x")}))
	w.release(e)
	_, err = w.Remove(w.ctx, gone.ID())
	require.NoError(t, err)
	p := w.get(parent.ID())
	child := w.layer(p, "b", "1")
	w.release(p, child)
	mut, err := w.GetMutable(w.ctx, reopened.ID())
	require.NoError(t, err)
	again := w.commit(mut)
	w.release(again)

	err = w.Verify(w.ctx, plan)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	for _, id := range []cache.ID{taken.ID(), edited.ID(), gone.ID(), parent.ID(), reopened.ID()} {
		require.ErrorContains(t, err, string(id))
	}
	removed, failed := w.execute(plan)
	require.Len(t, removed, 2)
	class := map[cache.ID]error{}
	for _, f := range failed {
		class[f.ID] = f.Err
	}
	require.Len(t, class, 5)
	require.ErrorIs(t, class[taken.ID()], cache.ErrLocked)
	require.ErrorIs(t, class[edited.ID()], errdefs.ErrFailedPrecondition)
	require.ErrorIs(t, class[parent.ID()], errdefs.ErrFailedPrecondition)
	require.ErrorIs(t, class[gone.ID()], errdefs.ErrNotFound)
	require.ErrorIs(t, class[reopened.ID()], errdefs.ErrNotFound)
	last := w.get(again.ID())
	require.Equal(t, "a=7", w.tree(last))
	w.release(hold, last)
}

// TestSpaceIsFreeWhenPruneReturns asks the file system.
func TestSpaceIsFreeWhenPruneReturns(t *testing.T) {
	const size = 8 << 20
	for _, k := range []kind{overlayKind, nativeKind} {
		t.Run(k.name, func(t *testing.T) {
			needRoot(t)
			w := newWorld(t, k)
			dir := filepath.Join(t.TempDir(), "own")
			mountTmpfs(t, dir)
			w.closeStore()
			w.root = filepath.Join(dir, "store")
			require.NoError(t, os.Mkdir(w.root, 0o700))
			w.reopenStore()
			defer w.detachRoot()
			free := func() int64 {
				var st unix.Statfs_t
				require.NoError(t, unix.Statfs(dir, &st))
				return int64(st.Bavail) * st.Bsize
			}
			w.release(w.layer(nil, "big", string(make([]byte, size))))
			before := free()
			plan := w.plan()
			for r, err := range w.Execute(w.ctx, plan) {
				require.NoError(t, err)
				require.NoError(t, r.Err)
				require.GreaterOrEqual(t, free()-before, int64(size), "the space is free when the record is yielded")
				require.GreaterOrEqual(t, r.Freed, int64(size))
			}
		})
	}
}

// detachRoot proves the store now, as its file system goes before the end.
func (w *world) detachRoot() {
	w.check()
	w.closeStore()
	w.root = filepath.Join(w.TempDir(), "empty")
	require.NoError(w, os.Mkdir(w.root, 0o700))
}

func mountTmpfs(t *testing.T, dir string) {
	require.NoError(t, os.Mkdir(dir, 0o700))
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
}

// many makes n committed records without mounting, over parents as chosen.
func (w *world) many(n int, parents func(i int) []cache.ID) (ids []cache.ID) {
	w.Helper()
	w.tamper(func(d snapshot.Driver, s *metadata.Store) {
		for from := 0; from < n; from += 1000 {
			require.NoError(w, s.Update(w.ctx, func(tx *metadata.Tx) error {
				for i := from; i < min(from+1000, n); i++ {
					id := cache.ID(fmt.Sprintf("r%06d", i))
					err := tx.Create(&metadata.Record{
						ID: id, State: metadata.Lazy, Op: metadata.Layer, Parents: parents(i), Retain: true,
						Created: time.Unix(int64(i), 0), Size: 0, Blobs: []metadata.Blob{{Digest: "sha256:none"}},
					})
					if err != nil {
						return err
					}
				}
				return nil
			}))
			for i := from; i < min(from+1000, n); i++ {
				ids = append(ids, cache.ID(fmt.Sprintf("r%06d", i)))
			}
		}
	})
	w.reopenStore()
	return ids
}

// TestPruneOfALongChain: 20,000 generations on a stack that would not hold one
// frame for each.
func TestPruneOfALongChain(t *testing.T) {
	const n = 20_000
	w := newWorld(t, overlayKind)
	w.many(n, func(i int) []cache.ID {
		if i == 0 {
			return nil
		}
		return []cache.ID{cache.ID(fmt.Sprintf("r%06d", i-1))}
	})
	old := debug.SetMaxStack(256 << 10)
	defer debug.SetMaxStack(old)
	var sum cache.Pruned
	tx := w.transactions(func() {
		var err error
		sum, err = w.Prune(w.ctx, policy.Policy{})
		require.NoError(t, err)
	})
	require.Equal(t, n, sum.Removed)
	require.Empty(t, sum.Failed)
	require.LessOrEqual(t, tx, n/50)
}

// TestConsumerThatStopsReading blocks nobody, and leaving the loop ends it.
func TestConsumerThatStopsReading(t *testing.T) {
	w := newWorld(t, overlayKind)
	ids := w.many(300, func(int) []cache.ID { return nil })
	plan := w.plan()
	n := 0
	for r, err := range w.Execute(w.ctx, plan) {
		require.NoError(t, err)
		require.NoError(t, r.Err)
		// In the middle of it everybody else goes on, the collector, too.
		w.release(w.layer(nil, "f", "x"))
		w.release(w.get(ids[len(ids)-1]))
		_, err := w.Prune(w.ctx, policy.Policy{Filters: []string{"id==" + string(ids[len(ids)-2])}})
		require.NoError(t, err)
		if n++; n == 2 {
			break
		}
	}
	left, err := w.DiskUsage(w.ctx, nil)
	require.NoError(t, err)
	require.Greater(t, left.Records, int64(100))
	_, err = w.Prune(w.ctx, policy.Policy{})
	require.NoError(t, err)

	// A close in the middle ends it with an error, and does not wait.
	w.many(300, func(int) []cache.ID { return nil })
	var last error
	for _, err := range w.Execute(w.ctx, w.plan()) {
		if last = err; err == nil && w.Manager != nil {
			require.NoError(t, w.Close())
		}
	}
	require.Error(t, last)
	w.reopenStore()
}

// TestCancelledPrune: each record is gone or as it was.
func TestCancelledPrune(t *testing.T) {
	forKinds(t, func(w *world) {
		for i := range 20 {
			w.release(w.layer(nil, "f", fmt.Sprint(i)))
		}
		plan := w.plan()
		rec, err := w.Lookup(w.ctx, victims(plan)[7])
		require.NoError(w, err)
		ctx, cancel := context.WithCancel(w.ctx)
		defer cancel()
		reached, release := w.driver.Block("Detach", rec.Key)
		// The call waits until its context ends; were it let go as well, it
		// would be a matter of luck which of the two it sees first.
		defer release()
		go func() {
			<-reached
			cancel()
		}()
		left := map[cache.ID]bool{}
		for r, err := range w.Execute(ctx, plan) {
			require.NoError(w, err, "it was one batch")
			left[r.ID] = r.Err != nil
			if r.Err != nil {
				require.ErrorIs(w, r.Err, context.Canceled)
			}
		}
		for i, id := range victims(plan) {
			require.Equal(w, i >= 7, left[id], "%d", i)
			_, err := w.Lookup(w.ctx, id)
			if left[id] {
				require.NoError(w, err)
				imm := w.get(id)
				require.Equal(w, fmt.Sprintf("f=%d", i), w.tree(imm))
				w.release(imm)
			} else {
				require.ErrorIs(w, err, errdefs.ErrNotFound)
			}
		}
		for _, err := range w.Execute(ctx, plan) {
			require.ErrorIs(w, err, context.Canceled, "nothing is begun any more")
		}
	})
}

// TestUsageIsWhatTheDiskSays: after random histories the sum of what is counted
// is what the blocks below the root are.
func TestUsageIsWhatTheDiskSays(t *testing.T) {
	for _, k := range []kind{overlayKind, nativeKind} {
		t.Run(k.name, func(t *testing.T) {
			w := newWorld(t, k)
			r := rand.New(rand.NewPCG(1, 2))
			var refs []*cache.ImmutableRef
			var open []*cache.MutableRef
			data := make([]byte, 64<<10)
			for step := range 120 {
				switch n := len(refs); {
				case n > 0 && r.IntN(4) == 0:
					require.NoError(t, refs[r.IntN(n)].Finalize(w.ctx))
				case n > 3 && r.IntN(6) == 0:
					w.release(refs[n-1])
					refs = refs[:n-1]
				case r.IntN(8) == 0:
					open = append(open, w.new(nil, cache.NewOptions{Retain: r.IntN(2) == 0}, "m", string(data[:r.IntN(len(data))])))
				default:
					var parent *cache.ImmutableRef
					if n > 0 && r.IntN(2) == 0 {
						parent = refs[r.IntN(n)]
					}
					refs = append(refs, w.layer(parent, fmt.Sprint(step), string(data[:r.IntN(len(data))])))
				}
				if step%40 == 39 {
					_, err := w.Prune(w.ctx, policy.Policy{Filters: []string{"size>30kB"}})
					require.NoError(t, err)
				}
				if step%30 != 29 {
					continue
				}
				u, err := w.DiskUsage(w.ctx, nil)
				require.NoError(t, err)
				have := blocksOf(t, w.root)
				require.InDelta(t, have, u.Total, max(float64(have)/100, 256<<10))
				require.Equal(t, u.Snapshots+u.Blobs, u.InUse+u.Reclaimable)
				// What is O(1) agrees once all is measured.
				_, err = w.Measure(w.ctx)
				require.NoError(t, err)
				used, err := w.Used(w.ctx)
				require.NoError(t, err)
				sum, mutable := int64(0), int64(0)
				for _, e := range u.Entries {
					if sum += e.Size; e.Record.State == cache.Mutable {
						mutable += e.Size
					}
				}
				require.Equal(t, sum-mutable, used)
				free, err := w.Reclaimable(w.ctx)
				require.NoError(t, err)
				require.Equal(t, u.Reclaimable-u.Blobs, free)
			}
			for _, m := range open {
				w.release(m)
			}
			for _, imm := range refs {
				w.release(imm)
			}
		})
	}
}

// TestUsageCountsCleanedCopies: a merge of a layer that somebody looked at while
// it was finalized stacks a cleaned copy of it, which has directories of its
// own. They count as that record's, whoever had measured it before.
func TestUsageCountsCleanedCopies(t *testing.T) {
	needRoot(t)
	w := newWorld(t, overlayKind)
	w.opts = func(o *cache.Options) { o.SyncInterval = time.Hour }
	w.reopenStore()
	const dirs = 300
	raw := w.change(nil, func(dir string) {
		for i := range dirs {
			require.NoError(t, os.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(i), "f"), []byte("x"), 0o644))
		}
	})
	mnt, err := raw.Mount(w.ctx)
	require.NoError(t, err)
	require.NoError(t, raw.Finalize(w.ctx))
	require.NoError(t, mnt.Unmount())
	require.True(t, raw.Record().Raw)
	other := w.layer(nil, "g", "1")
	agrees := func() {
		t.Helper()
		u, err := w.DiskUsage(w.ctx, nil)
		require.NoError(t, err)
		have := blocksOf(t, w.root)
		require.InDelta(t, have, u.Total, max(float64(have)/100, 256<<10))
		_, err = w.Measure(w.ctx)
		require.NoError(t, err)
		used, err := w.Used(w.ctx)
		require.NoError(t, err)
		require.Equal(t, u.Snapshots, used)
	}
	agrees()
	before := raw.Record().Size
	require.Positive(t, before)
	merged := w.merge(raw, other)
	require.NoError(t, merged.Extract(w.ctx))
	agrees()
	require.Greater(t, raw.Record().Size, before)

	// They go with their record.
	w.release(raw, other, merged)
	w.removeAll(idsOf(w)...)
	agrees()
	w.opts = nil
}

// blocksOf measures a directory as du does: each inode once.
func blocksOf(t testing.TB, root string) (bytes int64) {
	seen := map[uint64]bool{}
	require.NoError(t, filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if st := info.Sys().(*syscall.Stat_t); !seen[st.Ino] {
			seen[st.Ino] = true
			bytes += st.Blocks * 512
		}
		return nil
	}))
	return bytes
}

// TestSizesAreMeasuredInTheBackground: soon after their commits, several in one
// transaction, and not under a revision that has moved on.
func TestSizesAreMeasuredInTheBackground(t *testing.T) {
	needRoot(t)
	w := newWorld(t, overlayKind)
	w.opts = func(o *cache.Options) { o.SyncInterval = time.Hour }
	w.reopenStore()
	defer func() { w.opts = nil }()
	var ids []cache.ID
	for i := range 10 {
		imm := w.layer(nil, "f", string(make([]byte, 4096*(i+1))))
		ids = append(ids, imm.ID())
		w.release(imm)
	}
	before := w.Stats().Transactions
	require.Eventually(t, func() bool {
		used, err := w.Used(w.ctx)
		require.NoError(t, err)
		return used > 55*4096
	}, time.Minute, 10*time.Millisecond)
	require.LessOrEqual(t, w.Stats().Transactions-before, uint64(3))
	for i, id := range ids {
		rec, err := w.Lookup(w.ctx, id)
		require.NoError(t, err)
		require.Greater(t, rec.Size, int64(4096*(i+1)))
		require.Equal(t, uint64(1), rec.Revision, "a size is no change")
	}
}

// TestUsageMeasuresOnce: who asks again without a background that writes sizes
// is told what was found out before, until the record changes.
func TestUsageMeasuresOnce(t *testing.T) {
	forKinds(t, func(w *world) {
		imm := w.layer(nil, "f", string(make([]byte, 8192)))
		id := imm.ID()
		mut := w.new(nil, cache.NewOptions{}, "g", string(make([]byte, 4096)))
		measured := func() (keys []string, sizes int64) {
			from := len(w.driver.Calls())
			tx := w.Stats().Transactions
			u, err := w.DiskUsage(w.ctx, nil)
			require.NoError(w, err)
			require.Equal(w, tx, w.Stats().Transactions, "looking writes nothing")
			for _, c := range w.driver.Calls()[from:] {
				if c.Op == "Usage" {
					keys = append(keys, c.Key)
				}
			}
			for _, e := range u.Entries {
				sizes += e.Size
			}
			return keys, sizes
		}
		first, size := measured()
		require.Len(w, first, 2, "the committed one and the one that is written to")
		require.GreaterOrEqual(w, size, int64(8192)) // directories take nothing on some file systems
		again, same := measured()
		require.Len(w, again, 1, "the one that is written to may have grown")
		require.Equal(w, size, same)

		require.NoError(w, imm.SetValue(w.ctx, cache.Value{Name: "v", Data: []byte("1")}))
		keys, same := measured()
		require.Len(w, keys, 2)
		require.Equal(w, size, same)
		w.release(imm)
		re, err := w.GetMutable(w.ctx, id)
		require.NoError(w, err)
		w.write(re, "more", string(make([]byte, 64<<10)))
		grown, err := re.Commit(w.ctx)
		require.NoError(w, err)
		_, now := measured()
		require.GreaterOrEqual(w, now, size+64<<10)
		w.release(grown)
		w.release(mut)
	})
}

// A parent whose child stays is refused before the driver is asked for it.
func TestAParentStaysWithItsChild(t *testing.T) {
	forKinds(t, func(w *world) {
		parent := w.layer(nil, "a", "1")
		child := w.layer(parent, "b", "2")
		require.NoError(w, child.Finalize(w.ctx))
		w.release(parent)
		out, err := w.Remove(w.ctx, parent.ID(), child.ID())
		require.NoError(w, err)
		require.ErrorIs(w, out[0].Err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(w, out[0].Err, string(child.ID()))
		require.ErrorIs(w, out[1].Err, cache.ErrLocked)
		require.Zero(w, w.driver.Count("Detach", ""))
		require.Equal(w, "a=1 b=2", w.tree(child))
		w.release(child)
		w.removeAll(parent.ID(), child.ID())
	})
}

// What lies below a record that cannot be read is no victim: a prune that says
// what it frees must not count on bytes that stay.
func TestParentOfADamagedRecordIsSpared(t *testing.T) {
	w := newWorld(t, overlayKind)
	// Without a snapshot nothing but the row of its parent tells of the child.
	base := w.byBlob(pack(t, layer.Gzip, layerTar(t, file{name: "a"})), nil, nil)
	top := w.byBlob(pack(t, layer.Gzip, layerTar(t, file{name: "b"})), base, nil)
	other := w.layer(nil, "a", "2")
	w.release(base, other, top)
	w.damageRow(top.ID())

	plan := w.plan()
	require.Equal(t, []cache.ID{other.ID()}, victims(plan))
	require.Len(t, plan.Kept(), 1)
	require.Equal(t, string(base.ID()), plan.Kept()[0].Record.ID)
	require.Equal(t, policy.Held, plan.Kept()[0].Reason)
	require.Contains(t, plan.Kept()[0].Message, "cannot be read")
	removed, failed := w.execute(plan)
	require.Empty(t, failed)
	require.Len(t, removed, 1)
	require.Equal(t, plan.Freed, removed[0].Freed)
	w.closeStore()
}

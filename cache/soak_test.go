package cache_test

import (
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache/policy"
)

// weight is what a process and its store weigh when nobody is at work.
type weight struct {
	records, files, mounts, goroutines int
	heap, database                     int64
}

// weigh removes all but a few records and looks.
func (w *world) weigh(c *crowd) (x weight) {
	out, err := w.Prune(w.ctx, policy.Policy{All: true})
	require.NoError(w, err)
	require.Empty(w, out.Failed)
	c.ids = nil
	for _, err := range w.Records(w.ctx) {
		require.NoError(w, err)
		x.records++
	}
	open, err := os.ReadDir("/proc/self/fd")
	require.NoError(w, err)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(w.root))
	require.NoError(w, err)
	u, err := w.DiskUsage(w.ctx, nil)
	require.NoError(w, err)
	require.Zero(w, u.Pending)
	require.Zero(w, u.Snapshots)
	used, err := w.Used(w.ctx)
	require.NoError(w, err)
	require.Zero(w, used, "the totals of nothing")
	w.driver.Clear() // the test's own log of all calls
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	x.files, x.mounts, x.goroutines = len(open), len(mounts), runtime.NumGoroutine()
	x.heap, x.database = int64(m.HeapAlloc), u.Database
	return x
}

// Under a mixed load of many rounds nothing grows: after each round, when
// everything was removed, there are as many files, mounts and goroutines as
// before, and the memory and the database are no larger than the first rounds
// made them. LAMINA_SOAK says how long; hack/soak runs half an hour.
func TestSoak(t *testing.T) {
	length := 3 * time.Second
	if text := os.Getenv("LAMINA_SOAK"); text != "" {
		var err error
		length, err = time.ParseDuration(text)
		require.NoError(t, err)
	}
	n := seed(t)
	for _, k := range []kind{overlayKind, nativeKind} {
		t.Run(k.name, func(t *testing.T) {
			w := newWorld(t, k)
			c := &crowd{w: w}
			const warm, workers, deedsEach = 4, 8, 25
			var rounds []weight
			for end := time.Now().Add(length / 2); len(rounds) < 2*warm || time.Now().Before(end); {
				var group sync.WaitGroup
				errs := make([]error, workers)
				for i := range workers {
					group.Go(func() {
						rng := rand.New(rand.NewPCG(n, uint64(len(rounds)*workers+i)))
						for j := 0; j < deedsEach && errs[i] == nil; j++ {
							errs[i] = deeds[rng.IntN(len(deeds))](w.ctx, c, rng)
						}
					})
				}
				group.Wait()
				for _, err := range errs {
					require.NoError(t, err)
				}
				w.check()
				rounds = append(rounds, w.weigh(c))
			}
			first, last := rounds[warm-1], rounds[len(rounds)-1]
			for _, r := range rounds[:warm] {
				first.heap, first.database = max(first.heap, r.heap), max(first.database, r.database)
			}
			t.Logf("%d rounds of %d deeds, %d commits, %d reopens, %d removals; after the first %d rounds %+v, at the end %+v",
				len(rounds), workers*deedsEach, c.committed.Load(), c.reopened.Load(), c.removed.Load(), warm, first, last)
			require.Zero(t, last.records)
			require.Equal(t, first.files, last.files, "open files")
			require.Equal(t, first.mounts, last.mounts, "mounts")
			require.LessOrEqual(t, last.goroutines, slices.MaxFunc(rounds[:warm], func(a, b weight) int { return a.goroutines - b.goroutines }).goroutines)
			require.LessOrEqual(t, last.heap, 2*first.heap+1<<20, "memory")
			require.LessOrEqual(t, last.database, 2*first.database, "the database")
		})
	}
}

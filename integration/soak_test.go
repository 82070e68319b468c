package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
)

// weight is what a process and its store weigh when nobody is at work.
type weight struct {
	files, mounts, goroutines int
	// blobs is what the directories of a content store take without blobs.
	heap, database, blobs int64
}

// soak is a store under load.
type soak struct {
	testing.TB
	*load
	ctx context.Context
	// failed is what the background met.
	failed chan error
}

func newSoak(t testing.TB, driver string) *soak {
	s := &soak{TB: t, ctx: context.Background(), failed: make(chan error, 1)}
	m, err := cache.Open(s.ctx, cache.Options{
		Root: filepath.Join(t.TempDir(), "store"), DriverName: driver, Unconfirm: contenthash.UnconfirmStored,
		SyncInterval: time.Second, FlushInterval: time.Second,
		Collect: &cache.CollectOptions{
			Policies: []policy.Policy{{All: true, MaxUsed: policy.Bytes(2 << 20), Target: policy.Bytes(1 << 20)}},
			OnCollected: func(_ string, _ cache.Pruned, err error) {
				if err != nil {
					select {
					case s.failed <- err:
					default: // the first one is enough
					}
				}
			},
		},
	})
	require.NoError(t, err)
	s.load = &load{
		Manager: m, sums: checksum.New(m, checksum.Options{}), layers: newLayers(t, 6),
		digests: map[cache.ID]digest.Digest{}, done: map[string]int{},
	}
	return s
}

// until waits for what the background has to come to, in the test's own
// goroutine, of which there are none more then.
func until(t testing.TB, done func() bool, what string) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(time.Minute); !done(); <-tick.C {
		require.True(t, time.Now().Before(end), "it does not come to this: %s", what)
	}
}

// round has all workers do some deeds at once.
func (s *soak) round(seed uint64, number int) {
	s.Helper()
	const workers, deedsEach = 8, 25
	errs := make([]error, workers)
	var group sync.WaitGroup
	for i := range workers {
		group.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(number*workers+i)))
			for range deedsEach {
				d := soakDeeds[rng.IntN(len(soakDeeds))]
				if err := d.do(s.ctx, s.load, rng); err != nil && !lost(err) {
					errs[i] = fmt.Errorf("%s: %w", d.name, err)
					return
				} else if err == nil {
					s.count(d.name)
				}
			}
		})
	}
	group.Wait()
	require.NoError(s, errors.Join(errs...))
	select {
	case err := <-s.failed:
		require.NoError(s, err, "in the background")
	default:
	}
}

// check looks for damage, and compares the totals with a sum over all records.
func (s *soak) check() {
	s.Helper()
	require.NoError(s, s.sums.Flush(s.ctx))
	for f, err := range s.Check(s.ctx) {
		require.NoError(s, err)
		require.Fail(s, "a finding", "%+v", f)
	}
	for f, err := range checksum.Check(s.ctx, s.Manager) {
		require.NoError(s, err)
		require.Fail(s, "a finding", "%+v", f)
	}
	for again := true; again; {
		again = s.changedDuringSum()
	}
}

// changedDuringSum compares the totals with a sum over all records, unless they
// changed meanwhile: sizes are measured in the background, and the collector
// may be at work.
func (s *soak) changedDuringSum() bool {
	s.Helper()
	totals, err := s.Totals(s.ctx)
	require.NoError(s, err)
	var records, counted, bytes int64
	for _, t := range totals {
		counted += t.Count
		bytes += t.Bytes
	}
	var held []cache.Holder
	for rec, err := range s.Records(s.ctx) {
		require.NoError(s, err)
		held = append(held, s.Refs(rec.ID)...)
		records++
		if rec.Size > 0 {
			bytes -= rec.Size
		}
	}
	after, err := s.Totals(s.ctx)
	require.NoError(s, err)
	if !slices.Equal(totals, after) {
		return true
	}
	held = slices.DeleteFunc(held, func(h cache.Holder) bool { return h.Kind == cache.HolderOperation })
	require.Empty(s, held)
	require.Equal(s, records, counted)
	require.Zero(s, bytes, "the totals less the sizes of all records")
	return false
}

// weigh removes everything and looks.
func (s *soak) weigh() (x weight) {
	s.Helper()
	var u *cache.Usage
	until(s, func() bool { // the collector may be at work, too
		_, err := s.Prune(s.ctx, policy.Policy{All: true})
		require.NoError(s, err)
		u, err = s.DiskUsage(s.ctx, nil)
		require.NoError(s, err)
		return u.Records == 0 && u.Pending == 0
	}, "everything was removed")
	s.mu.Lock()
	s.ids = nil
	clear(s.digests)
	s.mu.Unlock()
	require.Zero(s, u.Snapshots, "bytes of nothing")
	used, err := s.Used(s.ctx)
	require.NoError(s, err)
	require.Zero(s, used, "the totals of nothing")
	// A removal of the collector lets go of its holds after its records are gone.
	var left []string
	defer func() {
		if s.Failed() {
			s.Logf("below the root are left %v", left)
		}
	}()
	until(s, func() bool { left = s.leftovers(); return len(left) == 0 }, "nothing is left below the root")
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(s.Root()))
	require.NoError(s, err)
	open, err := os.ReadDir("/proc/self/fd")
	require.NoError(s, err)
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	x.files, x.mounts, x.goroutines = len(open), len(mounts), runtime.NumGoroutine()
	x.heap, x.database, x.blobs = int64(m.HeapAlloc), u.Database, u.Blobs
	return x
}

// leftovers are the names where there should be none when there is no record.
func (s *soak) leftovers() (left []string) {
	s.Helper()
	for _, dir := range []string{"snapshots/active", "snapshots/committed", "snapshots/trash", "snapshots/new", "mounts", "holds", "content/blobs/sha256", "content/ingest"} {
		names, err := os.ReadDir(filepath.Join(s.Root(), dir))
		if err != nil {
			require.ErrorIs(s, err, fs.ErrNotExist)
		}
		for _, e := range names {
			if dir != "holds" || e.Type().IsRegular() && e.Name() != "blobs" {
				left = append(left, filepath.Join(dir, e.Name()))
			}
		}
	}
	return left
}

// heaviest is the largest of each figure.
func heaviest(rounds []weight) (x weight) {
	for _, r := range rounds {
		x.files, x.mounts = max(x.files, r.files), max(x.mounts, r.mounts)
		x.goroutines = max(x.goroutines, r.goroutines)
		x.heap, x.database, x.blobs = max(x.heap, r.heap), max(x.database, r.database), max(x.blobs, r.blobs)
	}
	return x
}

// Under a mixed load of many rounds nothing grows: after each round, when
// everything was removed, there are no more files, mounts and goroutines than
// before, and the memory and the database are no larger than the first rounds
// made them. LAMINA_SOAK says how long; hack/soak runs half an hour.
func TestSoak(t *testing.T) {
	if !inOwnMounts(t) {
		return
	}
	length := 3 * time.Second
	if text := os.Getenv("LAMINA_SOAK"); text != "" {
		var err error
		length, err = time.ParseDuration(text)
		require.NoError(t, err)
	}
	seed := newSeed(t)
	for _, driver := range []string{"overlay", "native"} {
		t.Run(driver, func(t *testing.T) {
			s := newSoak(t, driver)
			const warm = 4
			var rounds []weight
			for end := time.Now().Add(length / 2); len(rounds) < 2*warm || time.Now().Before(end); {
				s.round(seed, len(rounds))
				s.check()
				rounds = append(rounds, s.weigh())
			}
			first, last := heaviest(rounds[:warm]), rounds[len(rounds)-1]
			// The background may be at work just when we look.
			until(t, func() bool {
				quiet := last.files <= first.files && last.goroutines <= first.goroutines
				if !quiet {
					last = s.weigh()
				}
				return quiet
			}, "no more open files and goroutines than after the first rounds")
			deeds := 0
			for _, d := range soakDeeds {
				require.Positive(t, s.done[d.name], "nobody came to %s", d.name)
				deeds += s.done[d.name]
			}
			t.Logf("rig: on %s, seed %d: %d rounds, %d deeds", driver, seed, len(rounds), deeds)
			t.Logf("%s; the first %d rounds at most %+v, at the end %+v", strings.TrimPrefix(fmt.Sprint(s.done), "map"), warm, first, last)
			require.LessOrEqual(t, last.mounts, first.mounts, "mounts")
			require.LessOrEqual(t, last.heap, 2*first.heap+1<<20, "memory")
			// Directories that had many names keep their blocks on some file systems.
			require.LessOrEqual(t, last.blobs, 2*first.blobs+(64<<10), "what is left of blobs")
			require.LessOrEqual(t, last.database, 2*first.database, "the database")
			require.NoError(t, s.sums.Close())
			require.NoError(t, s.Close())
		})
	}
}

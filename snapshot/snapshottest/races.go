package snapshottest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
)

// raceTests are about calls at the same time.
var raceTests = map[string]func(*testing.T, *env){
	"OneWinsAKey":         testOneWinsKey,
	"OneWinsAName":        testOneWinsName,
	"ChildOrRemoval":      testChildOrRemoval,
	"ManyAtOnce":          testManyAtOnce,
	"CleanupBesideDetach": testCleanupBesideDetach,
}

// together runs n calls at the same time and returns their errors.
func together(n int, call func(i int) error) []error {
	errs := make([]error, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			errs[i] = call(i)
		})
	}
	close(start)
	wg.Wait()
	return errs
}

// requireOne wants one success, and AlreadyExists or NotFound otherwise.
func requireOne(t *testing.T, errs []error) {
	t.Helper()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
			continue
		}
		require.True(t, errdefs.IsAlreadyExists(err) || errdefs.IsNotFound(err), "%v", err)
	}
	require.Equal(t, 1, won)
}

func testOneWinsKey(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	for round := range 5 {
		key := fmt.Sprint("k", round)
		requireOne(t, together(8, func(i int) error {
			var err error
			if i%2 == 0 {
				_, err = e.Prepare(e.ctx, key, "base")
			} else {
				_, err = e.View(e.ctx, key, "")
			}
			return err
		}))
		require.NoError(t, e.Remove(e.ctx, key))
	}
	require.NoError(t, e.Remove(e.ctx, "base"), "losers leave no child behind")
}

func testOneWinsName(t *testing.T, e *env) {
	for round := range 5 {
		name := fmt.Sprint("n", round)
		for i := range 8 {
			e.prepare(fmt.Sprint(name, "-", i), "")
		}
		requireOne(t, together(8, func(i int) error {
			return e.Commit(e.ctx, name, fmt.Sprint(name, "-", i))
		}))
		require.Len(t, e.pending(snapshot.PendingActive), 7*(round+1))
	}
	e.prepare("k", "")
	requireOne(t, together(8, func(i int) error { return e.Commit(e.ctx, fmt.Sprint("to", i), "k") }))
}

// A name is either removed or gets a child, never both.
func testChildOrRemoval(t *testing.T, e *env) {
	for round := range 20 {
		base, child := fmt.Sprint("base", round), fmt.Sprint("child", round)
		e.prepare("k", "")
		require.NoError(t, e.Commit(e.ctx, base, "k"))
		errs := together(2, func(i int) error {
			if i == 0 {
				return e.Remove(e.ctx, base)
			}
			_, err := e.Prepare(e.ctx, child, base)
			return err
		})
		if errs[1] == nil {
			require.True(t, errdefs.IsFailedPrecondition(errs[0]), "%v", errs[0])
			e.requireTree(tree{}, child)
			continue
		}
		require.NoError(t, errs[0])
		require.True(t, errdefs.IsNotFound(errs[1]), "%v", errs[1])
	}
}

// testManyAtOnce has workers do everything on shared parents; afterwards
// everything can be taken down leaf first.
func testManyAtOnce(t *testing.T, e *env) {
	e.layer("base", "", tree{"a": "1"})
	var names sync.Map // committed names
	names.Store("base", true)
	var made atomic.Int64
	const workers, steps = 16, 12
	together(workers, func(w int) error {
		rng := rand.New(rand.NewPCG(uint64(w), 1))
		for s := range steps {
			key := fmt.Sprintf("w%d-%d", w, s)
			parent := anyName(&names, rng)
			_, err := e.Prepare(e.ctx, key, parent)
			if errdefs.IsNotFound(err) {
				continue // removed by another worker
			}
			if !assert.NoError(t, err) {
				return nil
			}
			switch rng.IntN(4) {
			case 0:
				assert.NoError(t, e.Remove(e.ctx, key))
			case 1:
				p, err := e.Detach(e.ctx, key)
				assert.NoError(t, err)
				switch err := e.Restore(e.ctx, p); {
				case err == nil:
					made.Add(1)
				case errdefs.IsFailedPrecondition(err): // its parent went meanwhile
					assert.NoError(t, e.Discard(e.ctx, p))
				default:
					assert.NoError(t, err)
				}
			default:
				assert.NoError(t, e.Commit(e.ctx, "c"+key, key))
				names.Store("c"+key, true)
				made.Add(1)
			}
			if victim := anyName(&names, rng); victim != "base" && rng.IntN(3) == 0 {
				switch err := e.Remove(e.ctx, victim); {
				case err == nil:
					names.Delete(victim)
					made.Add(-1)
				case !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err):
					assert.NoError(t, err)
				}
			}
			if rng.IntN(4) == 0 {
				assert.NoError(t, e.Walk(e.ctx, func(context.Context, snapshots.Info) error { return nil }))
				assert.NoError(t, e.Cleanup(e.ctx))
			}
		}
		return nil
	})
	require.Equal(t, int(made.Load())+1, len(e.all()))
	for left := e.all(); len(left) > 0; left = e.all() {
		parents := map[string]bool{}
		for _, info := range left {
			parents[info.Parent] = true
			if info.Parent != "" {
				require.Contains(t, left, info.Parent, "a parent outlives its children")
			}
		}
		for name := range left {
			if !parents[name] {
				require.NoError(t, e.Remove(e.ctx, name))
			}
		}
	}
	require.NoError(t, e.Cleanup(e.ctx))
	list, err := e.Pending(e.ctx)
	require.NoError(t, err)
	require.Empty(t, list)
}

func anyName(names *sync.Map, rng *rand.Rand) string {
	var all []string
	names.Range(func(k, _ any) bool { all = append(all, k.(string)); return true })
	return all[rng.IntN(len(all))]
}

func testCleanupBesideDetach(t *testing.T, e *env) {
	ctx, stop := context.WithCancel(e.ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	wg.Go(func() {
		for ctx.Err() == nil {
			if err := e.Cleanup(ctx); ctx.Err() == nil {
				assert.NoError(t, err)
			}
		}
	})
	e.layer("base", "", tree{"a": "1"})
	for range 20 {
		e.prepare("k", "base")
		p := e.detach("k")
		require.NoError(t, e.Restore(e.ctx, p))
		require.True(t, errdefs.IsFailedPrecondition(e.Remove(e.ctx, "base")))
		require.NoError(t, e.Remove(e.ctx, "k"))
	}
	e.requireTree(tree{"a": "1"}, "base")
}

package metadata_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/metadata"
)

// gate holds a store's commits up, so that tests decide who shares one.
type gate struct {
	commits chan struct{} // a commit waits here
	pass    chan error    // and goes on, or fails, with this
	on      atomic.Bool
}

func gated(t *testing.T) (*metadata.Store, *gate) {
	t.Helper()
	g := &gate{commits: make(chan struct{}), pass: make(chan error)}
	s := open(t, storePath(t), metadata.Options{FlushInterval: -1, Step: func(name string) error {
		if name != "tx commit" || !g.on.Load() {
			return nil
		}
		g.commits <- struct{}{}
		return <-g.pass
	}})
	create(t, s, rec("p"))
	g.on.Store(true)
	return s, g
}

// begin starts an update and waits until it has run and is about to commit.
func (g *gate) begin(t *testing.T, s *metadata.Store, fn func(*metadata.Tx) error) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- s.Update(context.WithoutCancel(t.Context()), fn) }()
	<-g.commits
	return done
}

// queue starts updates that wait behind the one that commits, in order.
func queue(ctx context.Context, t *testing.T, s *metadata.Store, fns ...func(*metadata.Tx) error) []<-chan error {
	t.Helper()
	var all []<-chan error
	for _, fn := range fns {
		done := make(chan error, 1)
		before := metadata.Waiting(s)
		go func() {
			defer func() {
				if p := recover(); p != nil {
					done <- fmt.Errorf("panicked: %v", p)
				}
			}()
			done <- s.Update(ctx, fn)
		}()
		for metadata.Waiting(s) == before {
			runtime.Gosched()
		}
		all = append(all, done)
	}
	return all
}

func creates(ids ...metadata.ID) []func(*metadata.Tx) error {
	var fns []func(*metadata.Tx) error
	for _, id := range ids {
		fns = append(fns, func(tx *metadata.Tx) error { return tx.Create(rec(id)) })
	}
	return fns
}

func TestOneWriterOneTransaction(t *testing.T) {
	s := fresh(t)
	for i := range 50 {
		create(t, s, rec(metadata.ID(fmt.Sprint(i))))
		require.EqualValues(t, i+1, s.Stats().Transactions)
		require.EqualValues(t, i+1, s.Stats().Updates)
	}
	update(t, s, func(*metadata.Tx) error { return nil })
	require.EqualValues(t, 50, s.Stats().Transactions, "nothing written, no transaction")
}

func TestWaitingUpdatesShareATransaction(t *testing.T) {
	s, g := gated(t)
	first := g.begin(t, s, creates("first")[0])
	var ids []metadata.ID
	for i := range 64 {
		ids = append(ids, metadata.ID(fmt.Sprintf("w%02d", i)))
	}
	before := s.Stats().Transactions
	waiting := queue(t.Context(), t, s, creates(ids...)...)
	g.pass <- nil
	require.NoError(t, <-first)
	<-g.commits
	for _, w := range waiting {
		require.Empty(t, w, "nobody returns before the commit")
	}
	g.pass <- nil
	for _, w := range waiting {
		require.NoError(t, <-w)
	}
	require.EqualValues(t, before+2, s.Stats().Transactions)
	g.on.Store(false)
	for _, id := range ids {
		require.EqualValues(t, 1, get(t, s, id).Revision)
	}
}

// Who comes while the functions of a transaction run is in it, too, also if
// one of them fails and the others have to run again.
func TestLateUpdatesShareTheTransaction(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("p"))
	before := s.Stats()
	boom := errors.New("boom")
	late := []func(*metadata.Tx) error{
		creates("late")[0],
		func(tx *metadata.Tx) error { return errors.Join(tx.Create(rec("bad")), boom) },
		creates("later")[0],
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	var waiting, cancelled []<-chan error
	runs := 0
	update(t, s, func(tx *metadata.Tx) error {
		if runs++; runs == 1 {
			waiting = queue(t.Context(), t, s, late...)
			cancelled = queue(ctx, t, s, creates("cancelled")...)
			cancel(boom)
		}
		return tx.Create(rec("first"))
	})
	require.Equal(t, 2, runs, "once more without the one that failed")
	require.NoError(t, <-waiting[0])
	require.ErrorIs(t, <-waiting[1], boom)
	require.NoError(t, <-waiting[2])
	require.ErrorIs(t, <-cancelled[0], boom)
	require.EqualValues(t, before.Transactions+1, s.Stats().Transactions)
	require.EqualValues(t, before.Updates+3, s.Stats().Updates)
	for _, id := range []metadata.ID{"first", "late", "later"} {
		require.EqualValues(t, 1, get(t, s, id).Revision)
	}
	view(t, s, func(tx *metadata.Tx) {
		for _, id := range []metadata.ID{"bad", "cancelled"} {
			_, err := tx.Get(id)
			require.ErrorIs(t, err, errdefs.ErrNotFound)
		}
	})
}

func TestOneFailsAlone(t *testing.T) {
	s, g := gated(t)
	first := g.begin(t, s, creates("first")[0])
	boom := errors.New("boom")
	runs := map[string]int{}
	fn := func(name string, err error, id metadata.ID) func(*metadata.Tx) error {
		return func(tx *metadata.Tx) error {
			runs[name]++
			return errors.Join(tx.Create(rec(id)), err)
		}
	}
	waiting := queue(t.Context(), t, s,
		fn("good", nil, "good"),
		fn("fails late", boom, "bad"), // after it wrote
		fn("fails early", nil, "p"),   // before it wrote
		func(tx *metadata.Tx) error { _ = tx.Create(rec("panics")); panic("at the disco") },
		fn("last", nil, "last"),
		fn("taken by the one before", nil, "last"),
	)
	before := s.Stats()
	g.pass <- nil
	require.NoError(t, <-first)
	<-g.commits
	g.pass <- nil
	require.NoError(t, <-waiting[0])
	require.ErrorIs(t, <-waiting[1], boom)
	require.True(t, errdefs.IsAlreadyExists(<-waiting[2]))
	require.ErrorContains(t, <-waiting[3], "panicked: at the disco")
	require.NoError(t, <-waiting[4])
	require.True(t, errdefs.IsAlreadyExists(<-waiting[5]))
	g.on.Store(false)

	require.EqualValues(t, before.Transactions+2, s.Stats().Transactions)
	require.EqualValues(t, before.Updates+3, s.Stats().Updates)
	require.Equal(t, 1, runs["fails late"])
	require.Equal(t, 1, runs["fails early"])
	view(t, s, func(tx *metadata.Tx) {
		for _, id := range []metadata.ID{"bad", "panics"} {
			_, err := tx.Get(id)
			require.True(t, errdefs.IsNotFound(err), "%s", id)
		}
	})
	get(t, s, "good")
	get(t, s, "last")
}

func TestPanicIsTheCallers(t *testing.T) {
	s := fresh(t)
	why := errors.New("why")
	require.PanicsWithValue(t, why, func() {
		_ = s.Update(t.Context(), func(tx *metadata.Tx) error { _ = tx.Create(rec("x")); panic(why) })
	})
	create(t, s, rec("x"))
}

// TestGoexit: a function that ends its goroutine, as a failing test does in
// there, does not take the store or the others with it.
func TestGoexit(t *testing.T) {
	s, g := gated(t)
	first := g.begin(t, s, creates("first")[0])
	// The first of the queue leads and is killed by what the second does.
	waiting := queue(t.Context(), t, s,
		creates("leader")[0],
		func(tx *metadata.Tx) error { _ = tx.Create(rec("x")); runtime.Goexit(); return nil },
		creates("third")[0],
	)
	g.pass <- nil
	require.NoError(t, <-first)
	require.ErrorIs(t, <-waiting[1], errdefs.ErrAborted)
	<-g.commits
	g.pass <- nil
	require.NoError(t, <-waiting[2])
	g.on.Store(false)
	create(t, s, rec("x"))
	get(t, s, "third")
}

func TestStepPanics(t *testing.T) {
	crash := atomic.Bool{}
	s := open(t, storePath(t), metadata.Options{Step: func(name string) error {
		if crash.Load() {
			panic(name)
		}
		return nil
	}})
	crash.Store(true)
	require.PanicsWithValue(t, "tx begin", func() { _ = s.Update(t.Context(), creates("x")[0]) })
	crash.Store(false)
	create(t, s, rec("x"))
}

func TestContextOfAWaiter(t *testing.T) {
	s, g := gated(t)
	first := g.begin(t, s, creates("first")[0])
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	var ran atomic.Bool
	leaving := queue(ctx, t, s, func(*metadata.Tx) error { ran.Store(true); return nil })
	staying := queue(t.Context(), t, s, creates("staying")[0])
	cancel(why)
	require.ErrorIs(t, <-leaving[0], why, "it leaves the queue at once")
	g.pass <- nil
	require.NoError(t, <-first)
	<-g.commits
	g.pass <- nil
	require.NoError(t, <-staying[0])
	require.False(t, ran.Load())

	// One that is in the transaction waits for its outcome.
	ctx, cancel = context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Update(ctx, creates("taken")[0]) }()
	<-g.commits
	cancel(why)
	g.pass <- nil
	require.NoError(t, <-done)
	g.on.Store(false)
	get(t, s, "taken")
}

func TestFailedCommitIsEverybodys(t *testing.T) {
	for errno, attempts := range map[syscall.Errno]int{syscall.EIO: 1, syscall.ENOSPC: 4} {
		t.Run(errno.Error(), func(t *testing.T) {
			s, g := gated(t)
			first := g.begin(t, s, creates("first")[0])
			waiting := queue(t.Context(), t, s, creates("a", "b", "c")...)
			g.pass <- nil
			require.NoError(t, <-first)
			// Without space each is tried alone.
			for range attempts {
				<-g.commits
				g.pass <- errno
			}
			for _, w := range waiting {
				err := <-w
				require.ErrorIs(t, err, errno)
				require.Equal(t, errno == syscall.ENOSPC, errdefs.IsResourceExhausted(err))
			}
			g.on.Store(false)
			create(t, s, rec("a"), rec("b"), rec("c"))
		})
	}
}

// TestManyWriters is for the race detector, and counts.
func TestManyWriters(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("p"))
	const writers, each = 64, 8
	var wg sync.WaitGroup
	for w := range writers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range each {
				id := metadata.ID(fmt.Sprintf("%02d-%d", w, i))
				err := s.Update(t.Context(), func(tx *metadata.Tx) error {
					if err := tx.Create(rec(id, over("p"), indexed("all"))); err != nil {
						return err
					}
					if i%4 == 3 {
						return fmt.Errorf("no: %w", errdefs.ErrAborted)
					}
					return nil
				})
				if want := i%4 == 3; want != errdefs.IsAborted(err) || (!want && err != nil) {
					t.Errorf("update %s: %v", id, err)
				}
				s.Touch("p", time.Unix(int64(i), 0))
				_ = s.View(t.Context(), func(tx *metadata.Tx) error { _, err := tx.Get("p"); return err })
			}
		}()
	}
	wg.Wait()
	st := s.Stats()
	require.EqualValues(t, writers*each*3/4+1, st.Updates)
	require.Less(t, st.Transactions, st.Updates, "some must have shared")
	require.Len(t, search(t, s, "all"), writers*each*3/4)
	require.EqualValues(t, writers*each, get(t, s, "p").UsageCount)
}

func TestUses(t *testing.T) {
	path := storePath(t)
	s := open(t, path, metadata.Options{FlushInterval: -1})
	create(t, s, rec("a"), rec("b"))
	before := s.Stats().Transactions
	at := func(n int64) time.Time { return time.Unix(n, 0).UTC() }
	s.Touch("a", at(5))
	s.Touch("a", at(9))
	s.Touch("a", at(7))
	s.Touch("ghost", at(1))
	s.Touch("", at(1))
	check := func(count uint64, last int64) {
		t.Helper()
		r := get(t, s, "a")
		require.Equal(t, count, r.UsageCount)
		require.Equal(t, at(last), r.LastUsed)
		view(t, s, func(tx *metadata.Tx) {
			for r, err := range tx.Records() {
				require.NoError(t, err)
				require.Equal(t, map[metadata.ID]uint64{"a": count, "b": 0}[r.ID], r.UsageCount)
			}
		})
	}
	check(3, 9)
	require.Equal(t, before, s.Stats().Transactions, "nothing is written by itself")

	// They ride on the next transaction and make no Put fail.
	r := get(t, s, "a")
	r.Description, r.UsageCount = "d", 77
	s.Touch("a", at(8))
	update(t, s, func(tx *metadata.Tx) error { _, err := tx.Put(r); return err })
	require.Equal(t, before+1, s.Stats().Transactions)
	require.Zero(t, s.Stats().WaitingUses)
	check(4, 9)
	require.EqualValues(t, 2, get(t, s, "a").Revision)

	s.Touch("a", at(1))
	require.NoError(t, s.Flush(t.Context()))
	require.NoError(t, s.Flush(t.Context()))
	require.Equal(t, before+2, s.Stats().Transactions)
	check(5, 9)

	s.Touch("a", at(20))
	require.NoError(t, s.Close())
	s.Touch("a", at(30))
	s = open(t, path, metadata.Options{})
	check(6, 20)
}

// TestUsesDoNotCostAnUpdate: on a full disk an update that fits goes through
// without the uses that would have come along.
func TestUsesDoNotCostAnUpdate(t *testing.T) {
	var full atomic.Int32
	s := open(t, storePath(t), metadata.Options{FlushInterval: -1, Step: func(name string) error {
		if name == "tx commit" && full.Add(-1) >= 0 {
			return syscall.ENOSPC
		}
		return nil
	}})
	create(t, s, rec("a"))
	s.Touch("a", time.Unix(1, 0))
	full.Store(1)
	create(t, s, rec("b"))
	require.Equal(t, 1, s.Stats().WaitingUses)
	full.Store(1)
	require.True(t, errdefs.IsResourceExhausted(s.Flush(t.Context())))
	require.NoError(t, s.Flush(t.Context()))
	require.Zero(t, s.Stats().WaitingUses)
}

// TestUsesShowWhileTheyAreWritten reads in the middle of the commit that
// takes them along.
func TestUsesShowWhileTheyAreWritten(t *testing.T) {
	s, g := gated(t)
	s.Touch("p", time.Unix(1, 0))
	first := g.begin(t, s, creates("first")[0])
	require.EqualValues(t, 1, get(t, s, "p").UsageCount)
	s.Touch("p", time.Unix(2, 0))
	require.EqualValues(t, 2, get(t, s, "p").UsageCount)
	g.pass <- nil
	require.NoError(t, <-first)
	require.EqualValues(t, 2, get(t, s, "p").UsageCount)
	require.Equal(t, 1, s.Stats().WaitingUses)
	g.on.Store(false)
}

func TestUsesAreFlushedInTime(t *testing.T) {
	committed := make(chan string, 10)
	s := open(t, storePath(t), metadata.Options{FlushInterval: time.Millisecond, Step: func(name string) error {
		if name == "tx commit" {
			committed <- name
		}
		return nil
	}})
	create(t, s, rec("a"))
	<-committed
	s.Touch("a", time.Unix(1, 0))
	<-committed
	s.Touch("a", time.Unix(2, 0))
	<-committed
}

func TestUsesSurviveAFailure(t *testing.T) {
	var fail atomic.Bool
	s := open(t, storePath(t), metadata.Options{FlushInterval: -1, Step: func(name string) error {
		if fail.Load() && name == "tx commit" {
			return syscall.EIO
		}
		return nil
	}})
	create(t, s, rec("a"))
	s.Touch("a", time.Unix(1, 0))
	fail.Store(true)
	require.ErrorIs(t, s.Flush(t.Context()), syscall.EIO)
	require.ErrorIs(t, s.Update(t.Context(), creates("b")[0]), syscall.EIO)
	require.EqualValues(t, 1, get(t, s, "a").UsageCount)
	fail.Store(false)
	s.Touch("a", time.Unix(2, 0))
	require.NoError(t, s.Flush(t.Context()))
	require.EqualValues(t, 2, get(t, s, "a").UsageCount)
}

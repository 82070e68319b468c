package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
)

// victims says how many records one sample of a prune chooses from: a part of
// the state, and no more than the peer, which takes longer for each the more
// there are, can make and remove in bearable time.
func victims(c *Config) []int { return []int{min(max(slices.Max(c.Sizes)/4, 32), 1000)} }

// half is how many of n records a prune to a size removes.
func half(n int) int { return n / 2 }

// usageOperations measure what a store occupies and how it gives it back.
func usageOperations() []operation {
	return []operation{
		{
			name: "usage-total", batch: 1, everySize: true, rounds: 10, prepare: prepareUsed, limit: limitUsed,
			note: "what all records occupy; the peer has no other way than to list them; limit: one bbolt get",
		},
		{
			name: "usage-list", batch: 1, everySize: true, rounds: 5, prepare: prepareList, limit: limitList,
			note: "all records with their sizes and who uses them; limit: a bbolt cursor over all, with checksums",
		},
		{
			name: "usage-list-get", batch: 1, everySize: true, rounds: 5, prepare: prepareGetBesideList, limit: limitUsed,
			note: "the longest of the Gets that are made one after the other beside such a list; limit: one bbolt get",
		},
		{
			name: "prune", batch: 1, sizes: victims, parts: each, rounds: 5, prepare: preparePrune, limit: limitPrune,
			note: "of n records that a filter picks, the time is that of one; limit: a rename of each, one bbolt transaction for all, and the removal of their directories",
		},
		{
			name: "prune-to-size", batch: 1, sizes: victims, parts: half, rounds: 5, prepare: preparePruneToSize, limit: limitPruneToSize,
			note: "of half of n records that a filter picks, until the store is small enough, the time is that of one that goes; limit as of prune",
		},
	}
}

func prepareUsed(_ context.Context, w *world, _ int) (sample, error) {
	return sample{run: func(ctx context.Context) error {
		_, err := w.subject.Used(ctx)
		return err
	}}, nil
}

func prepareList(ctx context.Context, w *world, _ int) (sample, error) {
	// A prune that takes nothing measures what nobody measured yet, as a daemon
	// has long done in the background.
	if _, err := w.subject.Prune(ctx, "nothing", nil); err != nil {
		return sample{}, err
	}
	return sample{run: func(ctx context.Context) error {
		n, err := w.subject.List(ctx)
		if err == nil && n < len(w.ids) {
			err = fmt.Errorf("%d records of %d are listed", n, len(w.ids))
		}
		return err
	}}, nil
}

// prepareGetBesideList is prepareList, and what is timed are calls of Get
// meanwhile.
func prepareGetBesideList(ctx context.Context, w *world, n int) (sample, error) {
	list, err := prepareList(ctx, w, n)
	var longest time.Duration
	return sample{
		run: func(ctx context.Context) error {
			return beside(func() error { return list.run(ctx) }, func() error {
				start := time.Now()
				imm, err := w.subject.Look(ctx, w.base.ID())
				longest = max(longest, time.Since(start))
				if err != nil {
					return err
				}
				return imm.Release(ctx)
			})
		},
		took: func() time.Duration { return longest },
	}, err
}

// beside makes calls, one at least, for as long as work takes, and waits for it.
func beside(work, call func() error) error {
	var wg sync.WaitGroup
	var werr error
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		werr = work()
	})
	var err error
	for running := true; running && err == nil; {
		err = call()
		select {
		case <-done:
			running = false
		default:
		}
	}
	wg.Wait()
	return errors.Join(err, werr)
}

// makeVictims makes n records that a prune takes, with a file in each.
func (w *world) makeVictims(ctx context.Context, n int) error {
	for range n {
		mut, err := w.subject.NewVictim(ctx, w.base)
		if err != nil {
			return err
		}
		if err := writeFile(ctx, mut, "file", make([]byte, fileSize)); err != nil {
			return errors.Join(err, mut.Release(ctx))
		}
		imm, err := mut.Commit(ctx)
		if err != nil {
			return errors.Join(err, mut.Release(ctx))
		}
		if err := errors.Join(imm.Finalize(ctx), imm.Release(ctx)); err != nil {
			return err
		}
	}
	return nil
}

func preparePrune(ctx context.Context, w *world, n int) (sample, error) {
	if err := w.makeVictims(ctx, n); err != nil {
		return sample{}, err
	}
	return sample{run: func(ctx context.Context) error {
		removed, err := w.subject.Prune(ctx, Victims, nil)
		if err == nil && removed != n {
			err = fmt.Errorf("%d records of %d were removed", removed, n)
		}
		return err
	}}, nil
}

func preparePruneToSize(ctx context.Context, w *world, n int) (sample, error) {
	before, err := w.subject.Used(ctx)
	if err != nil {
		return sample{}, err
	}
	if err := w.makeVictims(ctx, n); err != nil {
		return sample{}, err
	}
	if _, err := w.subject.Prune(ctx, "nothing", nil); err != nil {
		return sample{}, err
	}
	after, err := w.subject.Used(ctx)
	if err != nil {
		return sample{}, err
	}
	limit := (before + after) / 2
	return sample{
		run: func(ctx context.Context) error {
			removed, err := w.subject.Prune(ctx, Victims, &limit)
			if err == nil && (removed < n/2 || removed > n/2+1) {
				err = fmt.Errorf("%d records of %d were removed", removed, n)
			}
			return err
		},
		after: func(ctx context.Context) error {
			_, err := w.subject.Prune(ctx, Victims, nil)
			return err
		},
	}, nil
}

func limitUsed(ctx context.Context, l *limits, _ int) (sample, error) { return limitGet(ctx, l, 0) }

func limitList(_ context.Context, l *limits, _ int) (sample, error) {
	return sample{run: func(context.Context) error {
		return l.db.View(func(tx *bolt.Tx) error {
			return tx.Bucket(recordBucket).ForEach(func(k, v []byte) error {
				if len(v) < 4 || crc32.Checksum(v[4:], castagnoli()) != binary.BigEndian.Uint32(v) {
					return fmt.Errorf("record %s is not what was written", k)
				}
				return nil
			})
		})
	}}, nil
}

func limitPrune(_ context.Context, l *limits, n int) (sample, error) { return l.removal(n, n) }

func limitPruneToSize(_ context.Context, l *limits, n int) (sample, error) {
	return l.removal(n, half(n))
}

// removal removes some of n committed records, with a file in each.
func (l *limits) removal(n, some int) (sample, error) {
	ids := make([]int, n)
	for i := range ids {
		ids[i] = l.next()
		if err := l.directories(ids[i]); err != nil {
			return sample{}, err
		}
		if err := os.WriteFile(filepath.Join(l.name("active", ids[i]), "fs", "file"), make([]byte, fileSize), 0o600); err != nil {
			return sample{}, err
		}
	}
	if err := l.put(ids...); err != nil {
		return sample{}, err
	}
	remove := func(ids []int) error {
		for _, i := range ids {
			if err := os.Rename(l.name("active", i), l.name("new", i)); err != nil {
				return err
			}
		}
		err := l.db.Update(func(tx *bolt.Tx) error {
			for _, i := range ids {
				if err := tx.Bucket(recordBucket).Delete(recordKey(i)); err != nil {
					return err
				}
			}
			return nil
		})
		for _, i := range ids {
			err = errors.Join(err, os.RemoveAll(l.name("new", i)))
		}
		return err
	}
	return sample{
		run:   func(context.Context) error { return remove(ids[:some]) },
		after: func(context.Context) error { return remove(ids[some:]) },
	}, nil
}

// besidePrune is measured last of all: it leaves nothing of the state.
const besidePrune = "beside-prune"

const besideNote = "the 99th percentile of %s while all n records are pruned, with the range from the median to the longest; " +
	"tx and syncs are those of the prune for each record; limit: the same on the same store, idle, between the parts of the prune"

// peerBears is the largest state that the peer prunes in bearable time.
const peerBears = 1000

// besideParts are the calls that are measured, each a result of its own.
func besideParts() []struct{ suffix, what string } {
	return []struct{ suffix, what string }{{"", "New"}, {"-get", "Get"}, {"-release", "Release"}}
}

// beside measures New, Get and Release while all of the state is pruned, and
// on the idle store before.
func (c *Config) beside(ctx context.Context, worlds []*world, n int) ([]Result, error) {
	results := make([]Result, 0, len(besideParts()))
	for _, p := range besideParts() {
		results = append(results, Result{Name: besidePrune + p.suffix, N: n, Note: fmt.Sprintf(besideNote, p.what)})
	}
	for _, w := range worlds {
		if w.opener.Name == Peer && n > peerBears {
			continue
		}
		idle, busy, each, err := c.besidePrune(ctx, w)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.opener.Name, err)
		}
		for i := range results {
			f := percentile(w.opener.Name, busy[i])
			f.Transactions = each.transactions
			if c.Syncs != nil {
				f.Syncs = &each.syncs
			}
			results[i].Figures = append(results[i].Figures, f)
			if c.Limits && w.opener.Name != Peer {
				results[i].Figures = append(results[i].Figures, percentile(Limit, idle[i]))
			}
		}
	}
	return results, nil
}

// percentile is the figure of the 99th percentile; Low is the median, and High
// the longest of all.
func percentile(subject string, times []time.Duration) Figure {
	slices.Sort(times)
	return Figure{
		Subject: subject, Median: quantile(times, 0.99), Low: quantile(times, 0.5), High: quantile(times, 1), Samples: len(times),
	}
}

// besidePrune gives the times of New, Get and Release, and what the prune cost
// for each record. The state is pruned in parts, and between them the store is
// idle: what else the machine does then hits both alike.
func (c *Config) besidePrune(ctx context.Context, w *world) (idle, busy [3][]time.Duration, each cost, err error) {
	// Enough, but each with some hundred records.
	parts := min(max(len(w.ids)/200, 1), 10)
	used, err := w.subject.Used(ctx)
	if err != nil {
		return idle, busy, each, err
	}
	who := contender{databases: w.opener.Databases(w.dir)}
	removed := 0
	for left := parts - 1; left >= 0; left-- {
		if err := c.timeIdle(ctx, w, parts, &idle); err != nil {
			return idle, busy, each, err
		}
		var limit *int64 // all goes in the end
		if left > 0 {
			most := used / int64(parts) * int64(left)
			limit = &most
		}
		before, err := c.count(who)
		if err != nil {
			return idle, busy, each, err
		}
		n, err := w.timeBeside(ctx, limit, &busy)
		removed += n
		if err != nil {
			return idle, busy, each, err
		}
		after, err := c.count(who)
		if err != nil {
			return idle, busy, each, err
		}
		spent := after.since(before)
		each.transactions += spent.transactions
		each.syncs += spent.syncs
	}
	each.transactions /= float64(max(removed, 1))
	each.syncs /= float64(max(removed, 1))
	return idle, busy, each, nil
}

// timeIdle times calls while nothing else is done: a part of the thousands
// that a 99th percentile needs, as far as the patience for them goes.
func (c *Config) timeIdle(ctx context.Context, w *world, parts int, into *[3][]time.Duration) error {
	const calls = 5000
	patience := c.Patience
	if patience == 0 {
		patience = 10 * time.Second
	}
	start := time.Now()
	for n := 0; n < calls/parts && time.Since(start) < patience/time.Duration(parts); n++ {
		if err := w.timeCalls(ctx, into); err != nil {
			return err
		}
	}
	return nil
}

// timeBeside times calls for as long as a prune to a limit takes, and says how
// many records went.
func (w *world) timeBeside(ctx context.Context, limit *int64, into *[3][]time.Duration) (removed int, err error) {
	err = beside(func() (err error) {
		removed, err = w.subject.Prune(ctx, "", limit)
		return err
	}, func() error { return w.timeCalls(ctx, into) })
	return removed, err
}

// timeCalls makes each call once, on the base, which is held.
func (w *world) timeCalls(ctx context.Context, into *[3][]time.Duration) error {
	start := time.Now()
	mut, err := w.subject.New(ctx, w.base)
	into[0] = append(into[0], time.Since(start))
	if err != nil {
		return err
	}
	if err := mut.Release(ctx); err != nil {
		return err
	}
	start = time.Now()
	imm, err := w.subject.Get(ctx, w.base.ID())
	into[1] = append(into[1], time.Since(start))
	if err != nil {
		return err
	}
	start = time.Now()
	err = imm.Release(ctx)
	into[2] = append(into[2], time.Since(start))
	return err
}

package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// operation is one thing to measure.
type operation struct {
	name string
	// note says what the limit is, and what else a reader must know.
	note string
	// batch is how often one sample runs it: enough that reading the clock
	// does not count.
	batch int
	// parts is how many operations one run with n consists of, one if nil.
	parts func(n int) int
	// rounds bounds the rounds of an operation whose runs are long; there is
	// one for each five of the others.
	rounds int
	// ns are the numbers to measure it with where they are not that of the
	// records in the state.
	ns []int
	// sizes gives ns where they depend on the configuration.
	sizes func(c *Config) []int
	// everySize says that it is measured on each size of the state; others
	// are measured on the largest only.
	everySize bool
	// footprint says that what it leaves on the disk is counted.
	footprint bool
	// ownOnly says that the peer has no such operation.
	ownOnly bool
	// legacy says that it works on the state of an old daemon.
	legacy bool
	// prepare does what is not measured and returns what is. after undoes
	// it, not measured either. It is called for each of the batch.
	prepare func(ctx context.Context, w *world, n int) (sample, error)
	// destroys marks the operation that is measured on all states at once and
	// leaves nothing of them.
	destroys bool
	// ours and against stand for prepare and limit where the command itself is
	// measured; against is what it is compared with.
	ours, against func(ctx context.Context, t *commands, n int) (sample, error)
	// tool is a program that it needs, if any.
	tool string
	// limit is the same for the least that the disk and the kernel must do.
	limit func(ctx context.Context, l *limits, n int) (sample, error)
}

// sample is one run of an operation. after may be nil.
type sample struct {
	run, after func(context.Context) error
	// took, if not nil, says what time is that of the run.
	took func() time.Duration
}

// operations lists all, in the order in which they are measured. Names are
// part of what --json promises.
func operations() []operation {
	return slices.Concat(lifeOperations(), checksumOperations(), layerOperations(), commandOperations(), usageOperations(), migrationOperations(), []operation{{name: besidePrune, destroys: true}})
}

// lifeOperations are those on single records.
func lifeOperations() []operation {
	return []operation{
		{
			name: "new", batch: 1, prepare: prepareNew, limit: limitNew,
			note: "limit: three mkdir and a rename",
		},
		{
			name: "new-commit-release", batch: 1, prepare: prepareLife, limit: limitLife,
			note: "limit: three mkdir, a rename and one bbolt put in a transaction of its own",
		},
		{
			name: "commit", batch: 1, prepare: prepareCommit, limit: limitCommit,
			note: "limit: one bbolt put in a transaction of its own, after directories that nobody synced",
		},
		{
			name: "finalize", batch: 1, prepare: prepareFinalize, limit: limitFinalize,
			note: "limit: a rename and one bbolt put; the sync of the files' data is not part of any figure",
		},
		{
			name: "reopen", batch: 1, prepare: prepareReopen, limit: limitReopen,
			note: "limit: one bbolt transaction that deletes a record and puts another",
		},
		{
			name: "get-release", batch: 20, prepare: prepareGetRelease, limit: limitGet,
			note: "of a record without children: of others the peer notes no use, and writes nothing; " +
				"limit: one bbolt get, its checksum and a copy",
		},
		{
			name: "get-no-update", batch: 50, ns: []int{1, 50}, prepare: prepareLook, limit: limitGet,
			note: "n is the depth of the record; a Get and Release that is not noted as a use; limit as of get-release",
		},
		{
			name: "release", batch: 1, prepare: prepareRelease, limit: limitRelease,
			note: "of a record just committed; limit: a count in memory under a lock, for nothing has to reach the disk",
		},
		{
			name: "search", batch: 50, prepare: prepareSearch, limit: limitSearch,
			note: "limit: one seek of a bbolt cursor and a copy",
		},
		{
			name: "set-value", batch: 1, prepare: prepareSetValue, limit: limitSetValue,
			note: "limit: one bbolt put in a transaction of its own",
		},
		{
			name: "set-value-waiting", batch: 1, ns: []int{64}, parts: each, rounds: 10,
			prepare: prepareSetValues, limit: limitSetValues,
			note: "n goroutines set one value each, the time is that of one value; limit: n puts in one transaction",
		},
		{
			name: "open", batch: 1, everySize: true, prepare: prepareOpen, limit: limitOpen,
			note: "after a clean close; limit: bbolt alone, with its list of free pages stored",
		},
		{
			name: "throughput", batch: 1, ns: []int{1, 8, 64}, parts: lives, rounds: 5,
			prepare: prepareThroughput, limit: limitThroughput,
			note: "n goroutines run new-commit-release, the time is that of one; " +
				"limit: three mkdir and a rename each, and one transaction for n puts",
		},
	}
}

// each is one operation for each of n goroutines.
func each(n int) int { return n }

// Names are the names of all operations.
func Names() []string {
	var names []string
	for _, op := range operations() {
		names = append(names, op.name)
	}
	return names
}

func prepareNew(_ context.Context, w *world, _ int) (sample, error) {
	var mut Mutable
	return sample{
		run: func(ctx context.Context) (err error) {
			mut, err = w.subject.New(ctx, w.base)
			return err
		},
		after: func(ctx context.Context) error { return mut.Release(ctx) },
	}, nil
}

// life is New, Commit and Release of a record that stays.
func (w *world) life(ctx context.Context) error {
	imm, err := w.committed(ctx)
	if err != nil {
		return err
	}
	return imm.Release(ctx)
}

// committed makes a record that nobody finalized yet.
func (w *world) committed(ctx context.Context) (Immutable, error) {
	mut, err := w.subject.New(ctx, w.base)
	if err != nil {
		return nil, err
	}
	imm, err := mut.Commit(ctx)
	if err != nil {
		return nil, errors.Join(err, mut.Release(ctx))
	}
	return imm, nil
}

func prepareLife(_ context.Context, w *world, _ int) (sample, error) {
	return sample{run: w.life}, nil
}

func prepareCommit(ctx context.Context, w *world, _ int) (sample, error) {
	mut, err := w.subject.New(ctx, w.base)
	if err != nil {
		return sample{}, err
	}
	var imm Immutable
	return sample{
		run: func(ctx context.Context) (err error) {
			imm, err = mut.Commit(ctx)
			return err
		},
		after: func(ctx context.Context) error { return imm.Release(ctx) },
	}, nil
}

func prepareFinalize(ctx context.Context, w *world, _ int) (sample, error) {
	imm, err := w.committed(ctx)
	if err != nil {
		return sample{}, err
	}
	return sample{run: imm.Finalize, after: imm.Release}, nil
}

func prepareReopen(ctx context.Context, w *world, _ int) (sample, error) {
	imm, err := w.committed(ctx)
	if err != nil {
		return sample{}, err
	}
	id := imm.ReopenID()
	if err := imm.Release(ctx); err != nil {
		return sample{}, err
	}
	var mut Mutable
	return sample{
		run: func(ctx context.Context) (err error) {
			mut, err = w.subject.GetMutable(ctx, id)
			return err
		},
		after: func(ctx context.Context) error {
			imm, err := mut.Commit(ctx)
			if err != nil {
				return err
			}
			return imm.Release(ctx)
		},
	}, nil
}

func prepareGetRelease(_ context.Context, w *world, _ int) (sample, error) {
	// A record with children is held by them in the peer, as one that is
	// about to note its use; so its own release notes nothing.
	id := w.tips[w.turn*7919%len(w.tips)]
	w.turn++
	return sample{run: func(ctx context.Context) error {
		imm, err := w.subject.Get(ctx, id)
		if err != nil {
			return err
		}
		return imm.Release(ctx)
	}}, nil
}

func prepareLook(ctx context.Context, w *world, n int) (sample, error) {
	id, err := w.deep(ctx, n)
	return sample{run: func(ctx context.Context) error {
		imm, err := w.subject.Look(ctx, id)
		if err != nil {
			return err
		}
		return imm.Release(ctx)
	}}, err
}

func prepareRelease(ctx context.Context, w *world, _ int) (sample, error) {
	imm, err := w.committed(ctx)
	if err != nil {
		return sample{}, err
	}
	return sample{run: imm.Release}, nil
}

func prepareSearch(_ context.Context, w *world, _ int) (sample, error) {
	i := w.next()
	return sample{run: func(ctx context.Context) error {
		ids, err := w.subject.Search(ctx, indexKey(i))
		if err != nil {
			return err
		}
		if len(ids) != 1 || ids[0] != w.ids[i] {
			return fmt.Errorf("search for %s found %q, want %s", indexKey(i), ids, w.ids[i])
		}
		return nil
	}}, nil
}

func prepareSetValue(ctx context.Context, w *world, _ int) (sample, error) {
	imm, err := w.subject.Get(ctx, w.ids[w.next()])
	if err != nil {
		return sample{}, err
	}
	v := w.changing()
	return sample{
		run:   func(ctx context.Context) error { return imm.SetValue(ctx, v) },
		after: imm.Release,
	}, nil
}

// changing is a value that each call gives other contents and another index.
func (w *world) changing() Value {
	return Value{Name: "changing", Data: fmt.Sprint(w.turn), Index: fmt.Sprintf("changing/%d", w.turn)}
}

// prepareSetValues sets n values from n goroutines at once.
func prepareSetValues(ctx context.Context, w *world, n int) (_ sample, err error) {
	refs, values := make([]Immutable, n), make([]Value, n)
	for i := range n {
		if refs[i], err = w.subject.Get(ctx, w.ids[w.next()]); err != nil {
			return sample{}, err
		}
		values[i] = w.changing()
	}
	return sample{
		run: func(ctx context.Context) error {
			return together(n, func(i int) error { return refs[i].SetValue(ctx, values[i]) })
		},
		after: func(ctx context.Context) error {
			var err error
			for _, imm := range refs {
				err = errors.Join(err, imm.Release(ctx))
			}
			return err
		},
	}, nil
}

// together runs do in n goroutines and waits for them.
func together(n int, do func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = do(i) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func prepareOpen(ctx context.Context, w *world, _ int) (sample, error) {
	open, err := w.reopen(ctx)
	if err != nil {
		return sample{}, err
	}
	return sample{run: open, after: w.hold}, nil
}

// lives is how many records one sample of throughput makes: at least four for
// each goroutine, so that most of them meet in the queue.
func lives(n int) int { return max(64, 4*n) }

// prepareThroughput runs New, Commit and Release from n goroutines at once.
func prepareThroughput(_ context.Context, w *world, n int) (sample, error) {
	return sample{run: func(ctx context.Context) error {
		return together(n, func(int) error {
			for range lives(n) / n {
				if err := w.life(ctx); err != nil {
					return err
				}
			}
			return nil
		})
	}}, nil
}

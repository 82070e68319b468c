package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// operation is one thing to measure.
type operation struct {
	name string
	// batch is how often one sample runs it: enough that reading the clock
	// does not count.
	batch int
	// parts is how many operations one run consists of, one if zero.
	parts int
	// rounds bounds the rounds of an operation whose runs are long.
	rounds int
	// goroutines is set where n counts goroutines and not records.
	goroutines []int
	// everySize says that it is measured on each size of the state; others
	// are measured on the largest only.
	everySize bool
	// prepare does what is not measured and returns what is. after undoes
	// it, not measured either. It is called for each of the batch.
	prepare func(ctx context.Context, w *world, n int) (sample, error)
}

// sample is one run of an operation. after may be nil.
type sample struct{ run, after func(context.Context) error }

// operations lists all, in the order in which they are measured. Names are
// part of what --json promises.
func operations() []operation {
	return []operation{
		{name: "new", batch: 1, prepare: prepareNew},
		{name: "new-commit-release", batch: 1, prepare: prepareLife},
		{name: "commit", batch: 1, prepare: prepareCommit},
		{name: "finalize", batch: 1, prepare: prepareFinalize},
		{name: "reopen", batch: 1, prepare: prepareReopen},
		{name: "get-release", batch: 50, prepare: prepareGetRelease},
		{name: "release", batch: 1, prepare: prepareRelease},
		{name: "search", batch: 50, prepare: prepareSearch},
		{name: "set-value", batch: 1, prepare: prepareSetValue},
		{name: "open", batch: 1, everySize: true, prepare: prepareOpen},
		{name: "throughput", batch: 1, parts: lives, rounds: 5, goroutines: []int{1, 8, 64}, prepare: prepareThroughput},
	}
}

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
	id := w.ids[w.next()]
	return sample{run: func(ctx context.Context) error {
		imm, err := w.subject.Get(ctx, id)
		if err != nil {
			return err
		}
		return imm.Release(ctx)
	}}, nil
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
	v := Value{Name: "changing", Data: fmt.Sprint(w.turn), Index: fmt.Sprintf("changing/%d", w.turn)}
	return sample{
		run:   func(ctx context.Context) error { return imm.SetValue(ctx, v) },
		after: imm.Release,
	}, nil
}

func prepareOpen(ctx context.Context, w *world, _ int) (sample, error) {
	open, err := w.reopen(ctx)
	if err != nil {
		return sample{}, err
	}
	return sample{run: open, after: w.hold}, nil
}

// lives is how many records one sample of throughput makes: as many for each
// number of goroutines, and enough for the largest to get going.
const lives = 256

// prepareThroughput runs New, Commit and Release from n goroutines at once.
func prepareThroughput(_ context.Context, w *world, n int) (sample, error) {
	return sample{run: func(ctx context.Context) error {
		errs := make([]error, n)
		var wg sync.WaitGroup
		for g := range n {
			wg.Go(func() {
				for range lives / n {
					if err := w.life(ctx); err != nil {
						errs[g] = err
						return
					}
				}
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	}}, nil
}

package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Config says what to measure.
type Config struct {
	// Openers are the subjects. Each operation is run on all of them.
	Openers []Opener
	// Dir is where the states are built; what is measured is its disk.
	Dir string
	// Sizes are the numbers of records in the states, ascending.
	Sizes []int
	// Rounds is the number of samples of each operation.
	Rounds int
	// Only names the operations to run; all if empty.
	Only []string
	// Progress is told what is under way, if not nil.
	Progress func(what string)
}

// Result is what one operation cost on each subject.
type Result struct {
	Name string
	// N is the number of records in the state or, for throughput, of
	// goroutines.
	N       int
	Figures []Figure
}

// Figure is the cost of one operation on one subject.
type Figure struct {
	Subject string
	// Median, Low and High are the median, the 10th and the 90th percentile.
	Median, Low, High time.Duration
	// Transactions is the median number of write transactions.
	Transactions float64
	Samples      int
}

// Run measures and hands each result to report as soon as it is there. The
// states are removed before it returns.
func Run(ctx context.Context, c Config, report func(Result) error) (err error) {
	ops, err := choose(c.Only)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(c.Dir, "lamina-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeAll(dir)) }()

	for i, size := range c.Sizes {
		largest := i == len(c.Sizes)-1
		now := slices.DeleteFunc(slices.Clone(ops), func(op operation) bool { return !largest && !op.everySize })
		if len(now) == 0 {
			continue
		}
		if err := c.runSize(ctx, dir, size, now, report); err != nil {
			return err
		}
	}
	return nil
}

func choose(only []string) ([]operation, error) {
	ops := operations()
	for _, name := range only {
		if !slices.Contains(Names(), name) {
			return nil, fmt.Errorf("no operation is called %q; there are %q", name, Names())
		}
	}
	if len(only) == 0 {
		return ops, nil
	}
	return slices.DeleteFunc(ops, func(op operation) bool { return !slices.Contains(only, op.name) }), nil
}

// runSize builds a state of size records for each subject and measures ops on it.
func (c *Config) runSize(ctx context.Context, dir string, size int, ops []operation, report func(Result) error) (err error) {
	var worlds []*world
	defer func() {
		for _, w := range worlds {
			err = errors.Join(err, w.close(ctx))
		}
	}()
	for _, o := range c.Openers {
		c.progress(fmt.Sprintf("building %d records for %s", size, o.Name))
		w, err := newWorld(ctx, o, dir, size)
		if err != nil {
			return err
		}
		worlds = append(worlds, w)
	}
	for _, op := range ops {
		ns := op.goroutines
		if ns == nil {
			ns = []int{size}
		}
		for _, n := range ns {
			c.progress(fmt.Sprintf("%s, n = %d", op.name, n))
			r, err := c.measure(ctx, op, n, worlds)
			if err != nil {
				return fmt.Errorf("%s: %w", op.name, err)
			}
			if err := report(r); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Config) progress(what string) {
	if c.Progress != nil {
		c.Progress(what)
	}
}

// series are the samples of one operation on one subject.
type series struct {
	times        []time.Duration
	transactions []float64
}

// measure runs the rounds of one operation; the first ones are not counted.
func (c *Config) measure(ctx context.Context, op operation, n int, worlds []*world) (Result, error) {
	all := make([]series, len(worlds))
	warmup, rounds := 2, c.Rounds
	if op.rounds > 0 {
		// One run of these is many operations.
		warmup, rounds = 1, min(rounds, op.rounds)
	}
	for round := range warmup + rounds {
		for i := range worlds {
			// Nobody is always first: the order rotates.
			at := (round + i) % len(worlds)
			if err := ctx.Err(); err != nil {
				return Result{}, err
			}
			took, tx, err := worlds[at].sample(ctx, op, n)
			if err != nil {
				return Result{}, fmt.Errorf("%s: %w", worlds[at].opener.Name, err)
			}
			if round >= warmup {
				all[at].times = append(all[at].times, took)
				all[at].transactions = append(all[at].transactions, tx)
			}
		}
	}
	r := Result{Name: op.name, N: n}
	for i, w := range worlds {
		r.Figures = append(r.Figures, all[i].figure(w.opener.Name))
	}
	return r, nil
}

// sample runs an operation's batch once and returns the time and the write
// transactions of one operation.
func (w *world) sample(ctx context.Context, op operation, n int) (took time.Duration, tx float64, err error) {
	files := w.opener.Databases(w.dir)
	for range op.batch {
		s, err := op.prepare(ctx, w, n)
		if err != nil {
			return 0, 0, fmt.Errorf("prepare: %w", err)
		}
		before, err := transactions(files)
		if err != nil {
			return 0, 0, err
		}
		start := time.Now()
		err = s.run(ctx)
		took += time.Since(start)
		if err != nil {
			return 0, 0, err
		}
		after, err := transactions(files)
		if err != nil {
			return 0, 0, err
		}
		tx += float64(after - before)
		if s.after == nil {
			continue
		}
		if err := s.after(ctx); err != nil {
			return 0, 0, fmt.Errorf("clean up: %w", err)
		}
	}
	runs := op.batch * max(op.parts, 1)
	return took / time.Duration(runs), tx / float64(runs), nil
}

func (s *series) figure(name string) Figure {
	slices.Sort(s.times)
	slices.Sort(s.transactions)
	return Figure{
		Subject:      name,
		Median:       quantile(s.times, 0.5),
		Low:          quantile(s.times, 0.1),
		High:         quantile(s.times, 0.9),
		Transactions: quantile(s.transactions, 0.5),
		Samples:      len(s.times),
	}
}

// quantile picks from sorted values the one that q of them do not exceed.
func quantile[T any](sorted []T, q float64) T {
	var none T
	if len(sorted) == 0 {
		return none
	}
	return sorted[int(q*float64(len(sorted)-1)+0.5)]
}

// removeAll removes the states. Directories that overlayfs made without any
// permission stop an ordinary user, so they are opened first.
func removeAll(dir string) error {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() && err == nil {
			return os.Chmod(path, 0o700) //nolint:gosec // a directory is entered to be removed
		}
		return nil
	})
	return errors.Join(err, os.RemoveAll(dir))
}

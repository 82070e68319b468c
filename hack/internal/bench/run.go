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

	"golang.org/x/sys/unix"
)

// Config says what to measure.
type Config struct {
	// Openers are the subjects. Each operation is run on all of them.
	Openers []Opener
	// Limits adds the least that the disk and the kernel must do.
	Limits bool
	// Syncs counts the syncs of this process; nil if nobody can.
	Syncs *Syncs
	// Dir is where the states are built; what is measured is its disk.
	Dir string
	// Sizes are the numbers of records in the states, ascending.
	Sizes []int
	// Command is the path of the lamina command; empty if it is not measured.
	Command string
	// Skipped is told which operation cannot be measured, and why, if not nil.
	Skipped func(name, why string)
	// Files is the number of files in trees whose content hashes are asked
	// for.
	Files int
	// Rounds is the number of samples of each operation.
	Rounds int
	// Patience bounds the time for the rounds of one operation, if positive:
	// on a machine that is busy there are fewer, though no less than three.
	Patience time.Duration
	// Only names the operations to run; all if empty.
	Only []string
	// Progress is told what is under way, if not nil.
	Progress func(what string)
}

// Result is what one operation cost on each subject.
type Result struct {
	Name string
	// Note says what the limit is, and what else a reader must know.
	Note string
	// N is the number of records in the state or, where the note says so, of
	// goroutines or of the record's ancestors.
	N       int
	Figures []Figure
}

// of is the figure of a subject, nil if it was not measured.
func (r Result) of(subject string) *Figure {
	for i := range r.Figures {
		if r.Figures[i].Subject == subject {
			return &r.Figures[i]
		}
	}
	return nil
}

// Figure is the cost of one operation on one subject.
type Figure struct {
	Subject string
	// Median, Low and High are the median, the 10th and the 90th percentile;
	// beside a prune the 99th, the median and the longest.
	Median, Low, High time.Duration
	// Transactions and Syncs are the median numbers of write transactions
	// and of fsync, fdatasync and syncfs calls; of the latter nil if nobody
	// counted them.
	Transactions float64
	Syncs        *float64
	Samples      int
	// Made is what one operation left on the disk, nil if that was not looked
	// at.
	Made *Footprint
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
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeAll(dir)) }()

	for i, size := range c.Sizes {
		largest := i == len(c.Sizes)-1
		now := slices.DeleteFunc(slices.Clone(ops), func(op operation) bool { return !largest && !op.everySize })
		if len(now) == 0 {
			continue
		}
		if !slices.ContainsFunc(now, operation.wantsState) {
			size = fewestRecords
		}
		if err := c.runSize(ctx, dir, size, now, report); err != nil {
			return err
		}
	}
	return nil
}

// fewestRecords is the size of the state where nobody asks for records: what
// these operations measure they make themselves.
const fewestRecords = chain + 1

// wantsState says that what is measured depends on the records in the state.
func (op operation) wantsState() bool { return op.sizes == nil && op.ours == nil }

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

// contender is what stands in one column of the results.
type contender struct {
	name string
	// dir is where it keeps what it makes.
	dir       string
	databases []string
	prepare   func(ctx context.Context, op operation, n int) (sample, error)
}

// runSize builds a state of size records for each subject and measures ops on it.
func (c *Config) runSize(ctx context.Context, dir string, size int, ops []operation, report func(Result) error) (err error) {
	openers := c.Openers
	if !slices.ContainsFunc(ops, func(op operation) bool { return op.ours == nil }) {
		openers = nil // the command makes its own stores
	}
	c.progress(fmt.Sprintf("building %d records", size))
	worlds, err := build(ctx, openers, dir, size)
	defer func() {
		for _, w := range worlds {
			err = errors.Join(err, w.close(ctx))
		}
	}()
	if err != nil {
		return err
	}
	var all []contender
	for _, w := range worlds {
		all = append(all, contender{
			name:      w.opener.Name,
			dir:       w.dir,
			databases: w.opener.Databases(w.dir),
			prepare: func(ctx context.Context, op operation, n int) (sample, error) {
				return op.prepare(ctx, w, n)
			},
		})
	}
	legacy := map[int]*legacyState{}
	for _, w := range worlds {
		w.legacy = legacy
	}
	if c.Limits {
		l, err := newLimits(dir, size)
		if err != nil {
			return fmt.Errorf("limits: %w", err)
		}
		l.legacy = legacy
		defer func() { err = errors.Join(err, l.close()) }()
		all = append(all, contender{
			name: Limit,
			dir:  l.dir,
			prepare: func(ctx context.Context, op operation, n int) (sample, error) {
				return op.limit(ctx, l, n)
			},
		})
	}
	tools := &commands{lamina: c.Command, dir: filepath.Join(dir, fmt.Sprintf("command-%d", size))}
	if err := os.Mkdir(tools.dir, 0o755); err != nil { //nolint:gosec // source trees lie in it
		return err
	}
	// What building wrote must not be paid for by the first sync measured.
	unix.Sync()
	for _, op := range ops {
		if op.destroys {
			c.progress(fmt.Sprintf("%s, n = %d", op.name, size))
			results, err := c.beside(ctx, worlds, size)
			if err != nil {
				return fmt.Errorf("%s: %w", op.name, err)
			}
			for _, r := range results {
				if err := report(r); err != nil {
					return err
				}
			}
			continue
		}
		contenders := all
		if why := c.missing(op); why != "" {
			if c.Skipped != nil {
				c.Skipped(op.name, why)
			}
			continue
		}
		if op.ours != nil {
			contenders = tools.contenders(c.Limits)
		}
		ns := op.ns
		if op.sizes != nil {
			ns = op.sizes(c)
		}
		if ns == nil {
			ns = []int{size}
		}
		for _, n := range ns {
			if op.legacy && legacy[n] == nil {
				c.progress(fmt.Sprintf("making the state of a daemon with %d records", n))
				if legacy[n], err = c.makeLegacy(ctx, dir, n); err != nil {
					return fmt.Errorf("%s: %w", op.name, err)
				}
			}
			c.progress(fmt.Sprintf("%s, n = %d", op.name, n))
			r, err := c.measure(ctx, op, n, op.contenders(contenders))
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

// contenders are those that have the operation.
func (op operation) contenders(all []contender) []contender {
	if !op.ownOnly {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(c contender) bool { return c.name == Peer })
}

// build makes the states of all subjects at once. Those that it made are
// returned with the error of another, too.
func build(ctx context.Context, openers []Opener, dir string, size int) ([]*world, error) {
	worlds := make([]*world, len(openers))
	err := together(len(openers), func(i int) (err error) {
		worlds[i], err = newWorld(ctx, openers[i], dir, size)
		return err
	})
	return slices.DeleteFunc(worlds, func(w *world) bool { return w == nil }), err
}

func (c *Config) progress(what string) {
	if c.Progress != nil {
		c.Progress(what)
	}
}

// cost is what one operation took.
type cost struct {
	time                time.Duration
	transactions, syncs float64
}

// fewest rounds have a median that one bad moment does not move.
const fewest = 3

// measure runs the rounds of one operation; the first ones are not counted.
func (c *Config) measure(ctx context.Context, op operation, n int, all []contender) (Result, error) {
	costs := make([][]cost, len(all))
	made := make([]*Footprint, len(all))
	warmup, rounds := 2, c.Rounds
	if op.rounds > 0 {
		// One run of these is many operations.
		warmup, rounds = 1, min(max(rounds/5, 1), op.rounds)
	}
	start := time.Now()
	for round := range warmup + rounds {
		if c.Patience > 0 && round >= warmup+fewest && time.Since(start) > c.Patience {
			break
		}
		for i := range all {
			// Nobody is always first: the order rotates.
			at := (round + i) % len(all)
			if err := ctx.Err(); err != nil {
				return Result{}, err
			}
			// What is made is counted where no time is taken.
			var left *Footprint
			if op.footprint && round == warmup-1 {
				left = &Footprint{}
				made[at] = left
			}
			took, err := c.sample(ctx, op, n, all[at], left)
			if err != nil {
				return Result{}, fmt.Errorf("%s: %w", all[at].name, err)
			}
			if round >= warmup {
				costs[at] = append(costs[at], took)
			}
		}
	}
	r := Result{Name: op.name, N: n, Note: op.note}
	for i := range all {
		f := figure(all[i].name, costs[i])
		if c.Syncs == nil {
			f.Syncs = nil
		}
		f.Made = made[i]
		r.Figures = append(r.Figures, f)
	}
	return r, nil
}

// sample runs an operation's batch once and returns what one operation took. If
// left is not nil, it is set to what the last of the batch made.
func (c *Config) sample(ctx context.Context, op operation, n int, who contender, left *Footprint) (cost, error) {
	var sum cost
	for range op.batch {
		s, err := who.prepare(ctx, op, n)
		if err != nil {
			return cost{}, fmt.Errorf("prepare: %w", err)
		}
		var was Footprint
		if left != nil {
			if was, err = footprint(who.dir); err != nil {
				return cost{}, err
			}
		}
		before, err := c.count(who)
		if err != nil {
			return cost{}, err
		}
		start := time.Now()
		err = s.run(ctx)
		took := time.Since(start)
		if s.took != nil {
			took = s.took()
		}
		sum.time += took
		if err != nil {
			return cost{}, err
		}
		after, err := c.count(who)
		if err != nil {
			return cost{}, err
		}
		spent := after.since(before)
		sum.transactions += spent.transactions
		sum.syncs += spent.syncs
		if left != nil {
			now, err := footprint(who.dir)
			if err != nil {
				return cost{}, err
			}
			*left = now.minus(was)
		}
		if s.after == nil {
			continue
		}
		if err := s.after(ctx); err != nil {
			return cost{}, fmt.Errorf("clean up: %w", err)
		}
	}
	runs := op.batch
	if op.parts != nil {
		runs *= op.parts(n)
	}
	sum.time /= time.Duration(runs)
	sum.transactions /= float64(runs)
	sum.syncs /= float64(runs)
	return sum, nil
}

// count is what the counters say now.
func (c *Config) count(who contender) (cost, error) {
	tx, err := transactions(who.databases)
	if err != nil || c.Syncs == nil {
		return cost{transactions: float64(tx)}, err
	}
	syncs, err := c.Syncs.Count()
	return cost{transactions: float64(tx), syncs: float64(syncs)}, err
}

// since is what was counted between two calls of count.
func (after cost) since(before cost) cost {
	spent := cost{transactions: after.transactions - before.transactions, syncs: after.syncs - before.syncs}
	if spent.transactions < 0 {
		// The store wrote its file anew, smaller, and counts from there on.
		spent.transactions = spent.syncs / 2
	}
	return spent
}

func figure(name string, costs []cost) Figure {
	var times []time.Duration
	var tx, syncs []float64
	for _, c := range costs {
		times, tx, syncs = append(times, c.time), append(tx, c.transactions), append(syncs, c.syncs)
	}
	slices.Sort(times)
	slices.Sort(tx)
	slices.Sort(syncs)
	waits := quantile(syncs, 0.5)
	return Figure{
		Subject:      name,
		Median:       quantile(times, 0.5),
		Low:          quantile(times, 0.1),
		High:         quantile(times, 0.9),
		Transactions: quantile(tx, 0.5),
		Syncs:        &waits,
		Samples:      len(costs),
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

package migrate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/migrate/buildkit"
)

// Options say how to migrate. The zero value does it, in silence.
type Options struct {
	// DryRun plans and changes nothing.
	DryRun bool
	// Progress, if set, hears how far a migration is. It is called by the
	// goroutine that works, so it must be quick.
	Progress func(Progress)
	// Step is called before each durable step, with a name for it, and an error
	// from it fails that step: the seam of tests that stop a migration at
	// every point. The steps of the store and of the driver are among them.
	Step func(name string) error
	// Now is the clock; time.Now if nil.
	Now func() time.Time
}

// Progress says how far a migration is.
type Progress struct {
	Worker, Stage string
	Done, Total   int
}

// What became of a worker.
const (
	// Planned is the outcome of a dry run.
	Planned Status = "planned"
	// Migrated says that the worker's directory is a store now.
	Migrated Status = "migrated"
	// Already says that it was one before: nothing was done.
	Already Status = "already"
	// Skipped says that the worker's state is not in its directory.
	Skipped Status = "skipped"
	// Failed says that nothing was changed, and Err says why.
	Failed Status = "failed"
)

// Status is what became of a worker.
type Status string

// Report is what became of one worker.
type Report struct {
	// Worker names the worker, Root is its directory, which is that of the
	// store.
	Worker, Root string
	Status       Status
	// Reason says why a worker was skipped.
	Reason string
	// Plan is what was done, or would be, nil if there was nothing to plan.
	Plan *Plan
	// Err is set with Failed.
	Err      error
	Duration time.Duration
}

// Run migrates the workers in dir, which is the root of a daemon or the
// directory of one worker, one after the other. A worker that fails is
// reported as Failed and keeps no other from being migrated; what is in its
// directory is as before.
//
// Errors are of the directory as a whole: buildkit.ErrNotBuildKit and
// errdefs.ErrPermissionDenied.
func Run(ctx context.Context, dir string, o Options) ([]Report, error) {
	workers, err := buildkit.Workers(dir)
	if err != nil {
		return nil, err
	}
	reports := make([]Report, 0, len(workers))
	for _, w := range workers {
		r := Report{Worker: w.Name, Root: w.Dir, Status: Skipped, Reason: w.Reason}
		if w.Reason == "" {
			r = runWorker(ctx, w, o)
		}
		reports = append(reports, r)
	}
	return reports, nil
}

func runWorker(ctx context.Context, w buildkit.Worker, o Options) Report {
	began := time.Now()
	r := Report{Worker: w.Name, Root: w.Dir}
	r.Status, r.Plan, r.Err = worker(ctx, w.Dir, o)
	switch {
	case r.Err != nil && ctx.Err() != nil:
		r.Err = fmt.Errorf("migrate %s: %w; the old state is as it was, run it again", w.Dir, r.Err)
	case r.Err != nil:
		r.Err = fmt.Errorf("migrate %s: %w", w.Dir, classify(r.Err))
	}
	r.Duration = time.Since(began)
	return r
}

// worker migrates one directory, unless it is a store already.
func worker(ctx context.Context, dir string, o Options) (_ Status, _ *Plan, err error) {
	lock, err := buildkit.LockDir(dir)
	if err != nil {
		return Failed, nil, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if there, err := isStore(dir); err != nil {
		return Failed, nil, err
	} else if there {
		return Already, nil, nil
	}
	if o.Progress != nil {
		o.Progress(Progress{Worker: filepath.Base(dir), Stage: "reading"})
	}
	s, p, err := read(ctx, dir)
	if err != nil {
		return Failed, p, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if o.DryRun {
		return Planned, p, nil
	}
	x := &execution{s: s, p: p, o: o}
	if err := x.run(ctx); err != nil {
		return Failed, p, err
	}
	return Migrated, p, nil
}

// classified is an error of the system with its class.
type classified struct{ err, class error }

func (e *classified) Error() string   { return e.err.Error() }
func (e *classified) Unwrap() []error { return []error{e.err, e.class} }

// classify gives an error of the system its class, and says what to do about a
// full disk.
func classify(err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, errdefs.ErrResourceExhausted):
		return fmt.Errorf("%w; the old state is as it was, make room and run it again", &classified{err, errdefs.ErrResourceExhausted})
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return &classified{err, errdefs.ErrPermissionDenied}
	}
	return err
}

// isStore says whether a directory has a store.
func isStore(dir string) (bool, error) {
	_, err := os.Lstat(filepath.Join(dir, cache.StoreFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Open is cache.Open for daemons: if o.Root holds the state of a BuildKit
// worker and no store, that is migrated first. Errors are those of cache.Open
// and of Run.
func Open(ctx context.Context, o cache.Options, mo Options) (*cache.Manager, error) {
	m, err := cache.Open(ctx, o)
	if !errors.Is(err, cache.ErrLegacy) || o.ReadOnly || o.NoCreate {
		return m, err
	}
	mo.DryRun = false
	root, err := filepath.Abs(o.Root)
	if err != nil {
		return nil, err
	}
	if r := runWorker(ctx, buildkit.Worker{Name: filepath.Base(root), Dir: root}, mo); r.Err != nil {
		return nil, r.Err
	}
	return cache.Open(ctx, o)
}

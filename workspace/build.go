package workspace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace/cachemount"
	"github.com/lamina-build/lamina/workspace/runlog"
	"github.com/lamina-build/lamina/workspace/sandbox"
	"github.com/lamina-build/lamina/workspace/source"
)

// build syncs the source in, runs the command and brings the outputs out.
func (r *run) build(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, r.letGo()) }()
	synced := r.syncBeside(ctx)
	defer synced()
	if err := os.MkdirAll(filepath.Dir(r.job.dir()), 0o700); err != nil {
		return err
	}
	if err := r.syncSource(ctx); err != nil {
		return err
	}
	log, err := runlog.NewWriter(runlog.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	failed, err := r.withCaches(ctx, func(mounts []sandbox.Mount) error {
		if r.job.OnStart != nil {
			r.job.OnStart(r.res)
		}
		start := time.Now()
		failed := r.command(ctx, log, mounts)
		r.res.Duration = time.Since(start)
		return failed
	})
	if err != nil {
		return errors.Join(failed, err)
	}
	if ctx.Err() != nil {
		return failed // the next run continues it
	}
	done := newMemo(r.job, r.tree.Digest(), nil)
	done.Exit = r.res.ExitCode
	if failed == nil && r.res.ExitCode == 0 {
		failed = r.collect(ctx)
		done.Failed = failed != nil
	}
	synced()
	return errors.Join(failed, r.end(ctx, done, log))
}

// syncSource makes the workspace hold the source. A source that changes
// meanwhile is read again a few times.
func (r *run) syncSource(ctx context.Context) error {
	const tries = 5
	for try := 1; ; try++ {
		res, err := r.tree.SyncTo(ctx, r.sourceDir(), r.mount.Path(), r.prev, r.job.Progress)
		r.res.Changed += res.Changed
		r.res.Removed += res.Removed
		if res.Tree != nil {
			r.prev = res.Tree
		}
		if err == nil {
			r.tree = res.Tree
			r.res.SourceDigest = r.tree.Digest()
			r.note(res.Notes)
			return nil
		}
		if !errors.Is(err, source.ErrChanged) || try == tries {
			return err
		}
		if err := r.scan(ctx); err != nil {
			return err
		}
	}
}

// sourceDir is what the tree was scanned from. An empty source has nothing to
// copy, so any directory will do.
func (r *run) sourceDir() string {
	if r.job.Source == "" {
		return filepath.Dir(r.job.dir())
	}
	return r.job.Source
}

// command runs it. The error says that it could not be started, or was ended.
func (r *run) command(ctx context.Context, log *runlog.Writer, caches []sandbox.Mount) error {
	exit, err := sandbox.Run(ctx, sandbox.Spec{
		Args: r.job.Args, Env: r.job.Env,
		Dir: r.job.dir(), Source: r.mount.Path(), Mounts: slices.Concat(r.job.Mounts, caches),
		Stdout:  io.MultiWriter(r.job.Stdout, log.Stdout()),
		Stderr:  io.MultiWriter(r.job.Stderr, log.Stderr()),
		Signals: r.job.Signals, Private: r.job.Private,
	})
	r.res.ExitCode = exit.Status()
	var start *sandbox.StartError
	if errors.As(err, &start) {
		r.res.ExitCode = start.Status()
	}
	return err
}

// syncBeside writes what earlier runs left unsynced to the disk while the
// command runs. The function that it returns waits for that; how it went is on
// the list.
func (r *run) syncBeside(ctx context.Context) (wait func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.unsynced.Sync(ctx)
	}()
	return func() { <-done }
}

// end commits the workspace with what is to be known of this run.
func (r *run) end(ctx context.Context, done *memo, log *runlog.Writer) (err error) {
	if err := Unmount(r.mount); err != nil {
		return err
	}
	r.mount = nil
	text, err := log.Finish()
	if err != nil {
		return err
	}
	tree, err := r.tree.Encode()
	if err != nil {
		return err
	}
	value, err := done.value()
	if err != nil {
		return err
	}
	// From here on the run is over: what it made must not be lost because
	// somebody gives up now.
	ctx = context.WithoutCancel(ctx)
	m, err := r.job.Open(ctx, false)
	if err != nil {
		return fmt.Errorf("commit workspace %q: %w", r.job.Key, err)
	}
	defer closing(m, &err)
	if r.unsynced.Done() {
		// First of all: if the disk has failed, nothing may be built on it.
		if _, err := m.MarkSynced(ctx, r.unsynced); err != nil {
			return err
		}
	}
	mut, err := m.Attach(ctx, r.hold)
	if err != nil {
		return err
	}
	imm, err := mut.CommitWith(ctx, cache.CommitOptions{
		Cost: r.res.Duration,
		Take: []string{ValueKey},
		Edit: func(e *cache.Edit) error {
			e.ClearValue(ValueNext)
			for name, value := range r.job.Labels {
				e.SetLabel(name, value)
			}
			return errors.Join(e.SetValue(value), e.Attach(runlog.Attachment, text), e.Attach(AttachmentSource, tree))
		},
	})
	if err != nil {
		return errors.Join(err, mut.Release(ctx))
	}
	err = errors.Join(imm.Release(ctx), r.hold.Release())
	r.hold = nil // before the store is closed, so that it can be closed clean
	if len(r.job.Caches) > 0 {
		_, rerr := m.RemoveReleased(ctx)
		err = errors.Join(err, rerr)
	}
	return err
}

// withCaches lets do run while the cache directories are held. failed is its
// error, err that of the directories.
func (r *run) withCaches(ctx context.Context, do func([]sandbox.Mount) error) (failed, err error) {
	if len(r.job.Caches) == 0 {
		return do(nil), nil
	}
	set, err := cachemount.Acquire(ctx, cachemount.Options{
		Root: r.job.Root, NoWait: r.job.NoWait, OnWait: r.job.OnCacheWait,
		Open: func(ctx context.Context) (*cache.Manager, error) { return r.job.Open(ctx, false) },
	}, r.job.Caches)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, set.Release()) }()
	// They are gone before the outputs are looked for.
	undo, err := cachemount.MakeTargets(r.mount.Path(), r.job.Caches, r.tree.Has)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, undo()) }()
	return do(set.Mounts(r.job.dir())), nil
}

// closing closes m at the end of a function.
func closing(m *cache.Manager, err *error) {
	*err = errors.Join(*err, m.Close())
}

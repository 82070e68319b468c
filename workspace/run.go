package workspace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace/output"
	"github.com/lamina-build/lamina/workspace/runlog"
	"github.com/lamina-build/lamina/workspace/sandbox"
	"github.com/lamina-build/lamina/workspace/source"
)

// Run runs the job. The Result is complete when err is nil, be the command's
// exit code what it may; otherwise it holds what is known.
//
// Errors of the command itself are no errors of Run, except that a command
// which cannot be started gives a *sandbox.StartError, after the workspace was
// put back. A cancelled context ends the command; the workspace is then
// continued by the next run.
func Run(ctx context.Context, j Job) (Result, error) {
	if err := j.validate(); err != nil {
		return Result{Key: j.Key}, err
	}
	var forced []string
	for {
		r := &run{job: &j, res: Result{Key: j.Key}, forced: forced}
		again, err := r.attempt(ctx)
		if err != nil || !again {
			return r.res, err
		}
		forced = r.forced
	}
}

// run is one attempt at a job: from the look at the store to its end. It is
// started over when somebody else changed the workspace in between.
type run struct {
	job *Job
	res Result
	// forced are reasons to run that an earlier attempt met.
	forced []string

	// seen is the record that look found, nil if there is none.
	seen *cache.Record
	memo *memo
	// prev is the source tree that the workspace holds, nil if unknown.
	prev *source.Tree
	// tree is the source as it is now.
	tree *source.Tree

	// Set by begin.
	mount    *cache.Mount
	hold     *cache.Hold
	log      []byte // of a cached run
	unsynced *cache.Unsynced
}

func (r *run) attempt(ctx context.Context) (again bool, err error) {
	if err := r.look(ctx); err != nil {
		return false, err
	}
	if err := r.scan(ctx); err != nil {
		return false, err
	}
	why := r.why()
	again, err = r.begin(ctx, why)
	if again || err != nil {
		return again, err
	}
	if len(why) == 0 {
		return r.replay(ctx)
	}
	return false, r.build(ctx)
}

func (r *run) why() []string {
	why := []string{}
	if r.seen == nil {
		why = append(why, "first")
	} else {
		why = append(why, r.memo.why(r.job, r.tree.Digest())...)
		why = append(why, r.forced...)
	}
	r.res.Why, r.res.SourceDigest = why, r.tree.Digest()
	return why
}

// look reads what is known of the workspace, changing nothing.
func (r *run) look(ctx context.Context) (err error) {
	m, err := r.job.Open(ctx, true)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer closing(m, &err)
	if r.seen, err = findRecord(ctx, m, r.job.Key); err != nil || r.seen == nil {
		return err
	}
	r.memo = memoOf(r.seen)
	data, err := m.Attachment(ctx, r.seen.ID, AttachmentSource)
	if err == nil {
		r.prev, err = source.Decode(data)
	}
	if errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrDataLoss) || errors.Is(err, errdefs.ErrNotImplemented) {
		// Without it everything is read and compared anew.
		r.prev, r.memo = nil, nil
		return nil
	}
	return err
}

// findRecord is the record that a run of key would go on with: the workspace
// itself or, if a run that made a child of it was cut off, that child.
func findRecord(ctx context.Context, m *cache.Manager, key string) (*cache.Record, error) {
	id, err := Find(ctx, m, key)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	next, err := m.Search(ctx, nextIndex(key))
	if err != nil {
		return nil, err
	}
	if len(next) > 0 {
		child, err := m.Lookup(ctx, newest(next))
		if err == nil && len(child.Parents) == 1 && child.Parents[0] == id {
			return child, nil
		}
	}
	rec, err := m.Lookup(ctx, id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, nil
	}
	return rec, err
}

// scan reads the source, with the help of what the last run knew.
func (r *run) scan(ctx context.Context) (err error) {
	dir := r.job.Source
	if dir == "" {
		// No source is an empty one, so that a source that is given up is
		// removed from the workspace.
		if dir, err = os.MkdirTemp("", "lamina-no-source-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.Remove(dir)) }()
	}
	r.tree, err = source.Scan(ctx, dir, source.Options{
		Exclude: r.job.Exclude, Skip: r.job.skip(), Progress: r.job.Progress,
	}, r.prev)
	return err
}

// begin takes the workspace: for reading if nothing has to run, else for
// writing. If it is not what look saw any more, all starts again.
func (r *run) begin(ctx context.Context, why []string) (again bool, err error) {
	m, err := r.job.Open(ctx, false)
	if err != nil {
		return false, err
	}
	defer closing(m, &err)
	r.res.Driver = m.Driver().Name
	rec, err := findRecord(ctx, m, r.job.Key)
	if err != nil {
		return false, err
	}
	if (rec == nil) != (r.seen == nil) || rec != nil && (rec.ID != r.seen.ID || rec.State != r.seen.State) {
		return true, nil
	}
	if len(why) == 0 {
		return r.beginReplay(ctx, m)
	}
	mut, err := r.open(ctx, m, rec)
	var locked *cache.LockedError
	if errors.As(err, &locked) {
		return r.wait(ctx, m, locked)
	}
	if errors.Is(err, errdefs.ErrNotFound) && rec != nil {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	if r.unsynced, err = m.Unsynced(ctx); err == nil {
		r.mount, err = mountWritable(ctx, mut)
	}
	if err == nil {
		r.hold, err = mut.Detach(ctx)
	}
	if err != nil {
		return false, errors.Join(err, r.letGo(), mut.Release(ctx))
	}
	r.res.ID = mut.ID()
	return false, nil
}

// open gives the handle to write with: on a new record, on the present one
// under a new id, on one that a run left interrupted, or on a child of one
// that was finalized.
func (r *run) open(ctx context.Context, m *cache.Manager, rec *cache.Record) (*cache.MutableRef, error) {
	var prev *source.Tree
	if rec != nil {
		prev = r.prev
	}
	// Until the end of the run the record names all that the sync may have
	// brought, so that nothing of it is taken for a build product later.
	intent, err := r.tree.Intent(prev).Encode()
	if err != nil {
		return nil, err
	}
	begin := func(e *cache.Edit) error {
		e.ClearValue(ValueMemo)
		return e.Attach(AttachmentSource, intent)
	}
	key := cache.Value{Name: ValueKey, Data: []byte(r.job.Key), Index: Index(r.job.Key)}
	var mut *cache.MutableRef
	switch {
	case rec == nil:
		mut, err = m.New(ctx, nil, r.newOptions(key))
	case rec.State == cache.Committed:
		if mut, err = m.GetMutableWith(ctx, rec.ID, cache.ReopenOptions{Edit: begin}); err == nil {
			r.res.Reopened, r.res.PreviousID = true, rec.ID
		}
		return mut, err
	case rec.State == cache.Mutable:
		r.res.Reopened = true
		mut, err = m.GetMutable(ctx, rec.ID)
	default:
		r.res.PreviousID = rec.ID
		mut, err = r.child(ctx, m, rec.ID)
	}
	if err != nil {
		return nil, err
	}
	if err := mut.Edit(ctx, begin); err != nil {
		return nil, errors.Join(err, mut.Release(ctx))
	}
	return mut, nil
}

func (r *run) newOptions(v cache.Value) cache.NewOptions {
	return cache.NewOptions{
		Type: Type, Description: "workspace " + r.job.Key, Retain: true, Values: []cache.Value{v},
	}
}

// child makes the next snapshot of a workspace that was finalized. The key
// moves to it at the end of the run.
func (r *run) child(ctx context.Context, m *cache.Manager, id cache.ID) (mut *cache.MutableRef, err error) {
	parent, err := m.Get(ctx, id, cache.GetOptions{NoUpdate: true})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, parent.Release(ctx)) }()
	return m.New(ctx, parent, r.newOptions(cache.Value{Name: ValueNext, Data: []byte(r.job.Key), Index: nextIndex(r.job.Key)}))
}

// wait lets another run of the same key finish, with the store closed.
func (r *run) wait(ctx context.Context, m *cache.Manager, locked *cache.LockedError) (again bool, err error) {
	if r.job.NoWait {
		return false, locked
	}
	if r.job.OnWait != nil && len(locked.Holders) > 0 {
		r.job.OnWait(locked.Holders[0])
	}
	if err := m.Close(); err != nil {
		return false, err
	}
	return true, cache.AwaitHold(ctx, r.job.Root, locked.ID, true)
}

// mountWritable waits for the last processes of a run that was killed: they
// die soon after it, not at once.
func mountWritable(ctx context.Context, mut *cache.MutableRef) (*cache.Mount, error) {
	// What is written back when a killed run's mount goes can take seconds.
	deadline := time.Now().Add(30 * time.Second)
	for {
		mnt, err := mut.Mount(ctx, cache.MountOptions{})
		if err == nil || !errors.Is(err, cache.ErrLocked) || time.Now().After(deadline) {
			return mnt, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// beginReplay takes what a cached run needs: the log, and the tree if there
// are outputs.
func (r *run) beginReplay(ctx context.Context, m *cache.Manager) (again bool, err error) {
	imm, err := m.Get(ctx, r.seen.ID, cache.GetOptions{})
	if errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, cache.ErrLocked) || errors.Is(err, errdefs.ErrFailedPrecondition) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	r.log, err = imm.Attachment(ctx, runlog.Attachment)
	if errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrDataLoss) {
		r.forced = append(r.forced, "log")
		return true, imm.Release(ctx)
	}
	if err == nil && len(r.job.Outputs) > 0 {
		r.mount, err = imm.Mount(ctx)
	}
	if err == nil {
		r.hold, err = imm.Detach(ctx)
	}
	if err != nil {
		return false, errors.Join(err, r.letGo(), imm.Release(ctx))
	}
	r.res.ID, r.res.Cached = imm.ID(), true
	return false, nil
}

// replay gives the outcome of the run that made the present content.
func (r *run) replay(ctx context.Context) (again bool, err error) {
	defer func() { err = errors.Join(err, r.letGo()) }()
	var missing *output.MissingError
	if err := r.collect(ctx); errors.As(err, &missing) {
		// They were not asked for before; perhaps the command makes them.
		for _, p := range missing.Paths {
			r.forced = append(r.forced, "output:"+p)
		}
		return true, nil
	} else if err != nil {
		return false, err
	}
	if r.job.OnCached != nil {
		r.job.OnCached()
	}
	return false, runlog.Replay(r.log, r.job.Stdout, r.job.Stderr)
}

// collect brings the outputs out.
func (r *run) collect(ctx context.Context) error {
	if len(r.job.Outputs) == 0 {
		return nil
	}
	res, err := output.Collect(ctx, r.mount.Path(), r.job.Outputs)
	r.note(res.Notes)
	return err
}

func (r *run) note(notes []source.Note) {
	for _, n := range notes {
		if r.job.OnNote != nil {
			r.job.OnNote(n)
		}
	}
}

// letGo ends mount and hold.
func (r *run) letGo() error {
	var errs []error
	if r.mount != nil {
		errs = append(errs, r.mount.Unmount())
		r.mount = nil
	}
	if r.hold != nil {
		errs = append(errs, r.hold.Release())
		r.hold = nil
	}
	return errors.Join(errs...)
}

// build syncs the source in, runs the command and brings the outputs out.
func (r *run) build(ctx context.Context) (err error) {
	defer func() { err = errors.Join(err, r.letGo()) }()
	synced := r.syncBeside(ctx)
	defer func() { err = errors.Join(err, synced()) }()
	if err := os.MkdirAll(filepath.Dir(r.job.dir()), 0o755); err != nil {
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
	if r.job.OnStart != nil {
		r.job.OnStart(r.res.Why)
	}
	start := time.Now()
	failed := r.command(ctx, log)
	r.res.Duration = time.Since(start)
	if ctx.Err() != nil {
		return failed // the next run continues it
	}
	done := newMemo(r.job, r.tree.Digest(), nil)
	done.Exit = r.res.ExitCode
	if failed == nil && r.res.ExitCode == 0 {
		failed = r.collect(ctx)
		done.Failed = failed != nil
	}
	if err := synced(); err != nil {
		return errors.Join(failed, err)
	}
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
func (r *run) command(ctx context.Context, log *runlog.Writer) error {
	exit, err := sandbox.Run(ctx, sandbox.Spec{
		Args: r.job.Args, Env: r.job.Env,
		Dir: r.job.dir(), Source: r.mount.Path(), Mounts: r.job.Mounts,
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
// command runs. The function that it returns waits for that.
func (r *run) syncBeside(ctx context.Context) (wait func() error) {
	done := make(chan error, 1)
	go func() { done <- r.unsynced.Sync(ctx) }()
	var err error
	waited := false
	return func() error {
		if !waited {
			err, waited = <-done, true
			if ctx.Err() != nil {
				err = nil // not synced, not marked: nothing is lost by that
			}
		}
		return err
	}
}

// end commits the workspace with what is to be known of this run.
func (r *run) end(ctx context.Context, done *memo, log *runlog.Writer) (err error) {
	if err := r.mount.Unmount(); err != nil {
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
	mut, err := m.Attach(ctx, r.hold)
	if err != nil {
		return err
	}
	imm, err := mut.CommitWith(ctx, cache.CommitOptions{
		Cost: r.res.Duration,
		Take: []string{ValueKey},
		Edit: func(e *cache.Edit) error {
			e.ClearValue(ValueNext)
			return errors.Join(e.SetValue(value), e.Attach(runlog.Attachment, text), e.Attach(AttachmentSource, tree))
		},
	})
	if err != nil {
		return errors.Join(err, mut.Release(ctx))
	}
	_, err = m.MarkSynced(ctx, r.unsynced)
	err = errors.Join(err, imm.Release(ctx), r.hold.Release())
	r.hold = nil // before the store is closed, so that it can be closed clean
	return err
}

// closing closes m at the end of a function.
func closing(m *cache.Manager, err *error) {
	*err = errors.Join(*err, m.Close())
}

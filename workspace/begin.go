package workspace

import (
	"context"
	"errors"
	"maps"
	"time"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace/source"
)

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
		Labels: r.labels(),
	}
}

// labels are those of a new record: what the workspace had before, with the
// job's.
func (r *run) labels() map[string]string {
	out := map[string]string{}
	if r.seen != nil {
		maps.Copy(out, r.seen.Labels)
	}
	maps.Copy(out, r.job.Labels)
	maps.DeleteFunc(out, func(_, value string) bool { return value == "" })
	return out
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

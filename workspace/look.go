package workspace

import (
	"context"
	"errors"
	"os"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace/source"
)

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

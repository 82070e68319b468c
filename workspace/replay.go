package workspace

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace/output"
	"github.com/lamina-build/lamina/workspace/runlog"
	"github.com/lamina-build/lamina/workspace/source"
)

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

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace"
)

// held is a record that stays mounted, and held against others, while this
// process does not have the store open.
type held struct {
	state stateView
	path  string
	mount *cache.Mount
	hold  *cache.Hold
}

// heldRef is what mutable and immutable handles have in common here.
type heldRef interface {
	Record() *cache.Record
	Detach(context.Context) (*cache.Hold, error)
	Release(context.Context) error
}

// take mounts the record that arg means, for writing or to be looked at, and
// closes the store again. A look that only looks is not counted as a use.
func (a *app) take(ctx context.Context, arg string, write, count bool) (_ *held, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return nil, err
	}
	defer shut(m, &err)
	id, err := resolve(ctx, m, arg)
	if err != nil {
		return nil, err
	}
	defer func() { err = about(id, err) }()
	rec, err := m.Lookup(ctx, id)
	if err != nil {
		return nil, err
	}
	if write || rec.State == cache.Mutable {
		if write && rec.State != cache.Mutable && rec.State != cache.Committed {
			return nil, fmt.Errorf("record %s is %s and cannot be written to; make a child of it: lamina new --parent %s: %w",
				safe(string(rec.ID)), rec.State, safe(string(rec.ID)), errdefs.ErrFailedPrecondition)
		}
		mut, err := m.GetMutable(ctx, rec.ID)
		if err != nil {
			return nil, err
		}
		h, err := a.keep(ctx, mut, func() (*cache.Mount, error) {
			return mut.Mount(ctx, cache.MountOptions{ReadOnly: !write})
		})
		if err != nil && mut.ID() != rec.ID {
			err = fmt.Errorf("%w; the record has the id %s now", err, mut.ID())
		}
		return a.mounted(h, rec.ID, err)
	}
	imm, err := m.Get(ctx, rec.ID, cache.GetOptions{NoUpdate: !count})
	if err != nil {
		return nil, err
	}
	h, err := a.keep(ctx, imm, func() (*cache.Mount, error) { return imm.Mount(ctx) })
	return a.mounted(h, rec.ID, err)
}

// patiently repeats what meets the last processes of a command that was killed:
// they die soon after it, not at once. It goes on for as long as one waits for
// an open store.
func (a *app) patiently(ctx context.Context, try func() error) error {
	deadline := time.Now().Add(a.wait)
	for {
		err := try()
		if !isLeftover(err) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// isLeftover says whether a record is held by nobody but processes that are
// about to die.
func isLeftover(err error) bool {
	var locked *cache.LockedError
	if !errors.As(err, &locked) {
		return false
	}
	for _, h := range locked.Holders {
		if h.Kind != cache.HolderWriter {
			return false
		}
	}
	return len(locked.Holders) > 0
}

// keep mounts a record and turns its handle into a hold.
func (a *app) keep(ctx context.Context, ref heldRef, mount func() (*cache.Mount, error)) (*held, error) {
	h := &held{state: stateOf(ref.Record(), "")}
	err := a.patiently(ctx, func() (err error) {
		h.mount, err = mount()
		return err
	})
	if err != nil {
		return nil, errors.Join(err, ref.Release(ctx))
	}
	h.path = h.mount.Path()
	if h.hold, err = ref.Detach(ctx); err != nil {
		return nil, errors.Join(err, h.mount.Unmount(), ref.Release(ctx))
	}
	return h, nil
}

// mounted completes the outcome of take.
func (a *app) mounted(h *held, previous cache.ID, err error) (*held, error) {
	if err != nil {
		if ns := a.namespace; ns != nil && !ns.Private {
			err = hintf(err, "%s", ns.Reason)
		}
		return nil, err
	}
	h.state.PreviousID = ""
	if previous != h.state.ID {
		h.state.PreviousID = previous
	}
	return h, nil
}

// end unmounts the record and gives it back.
func (h *held) end() error {
	return errors.Join(workspace.Unmount(h.mount), h.hold.Release())
}

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// Prepare implements snapshots.Snapshotter.
func (t *tree) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	m, err := t.create(ctx, key, parent, false, opts)
	if err != nil {
		return nil, fmt.Errorf("prepare %q: %w", key, err)
	}
	return m, nil
}

// View implements snapshots.Snapshotter.
func (t *tree) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	m, err := t.create(ctx, key, parent, true, opts)
	if err != nil {
		return nil, fmt.Errorf("view %q: %w", key, err)
	}
	return m, nil
}

// create makes an active entry: complete in new, then by one rename.
func (t *tree) create(ctx context.Context, key, parent string, view bool, opts []snapshots.Opt) (_ []mount.Mount, err error) {
	if err := requireKey(key); err != nil {
		return nil, err
	}
	base, err := applyOpts(opts)
	if err != nil {
		return nil, err
	}
	if parent != "" {
		if err := t.requireCommitted(parent, errdefs.ErrInvalidArgument); err != nil {
			return nil, err
		}
		if err := t.backend.check(parent); err != nil {
			return nil, err
		}
	}
	if err := t.free(key); err != nil {
		return nil, err
	}

	e := entry{dirActive, encodeKey(key)}
	now := t.clock().UnixNano()
	s := state{View: view, Parent: text(parent), Created: now, Updated: now}
	if err := t.bind(&s); err != nil {
		return nil, err
	}
	if hashed(e.name) {
		s.Key = text(key)
	}
	s.setLabels(base.Labels)

	making := entry{dirNew, randomName(e.name)}
	t.mark(&t.making, making.name, true)
	defer t.mark(&t.making, making.name, false)
	defer func() {
		if err != nil {
			err = errors.Join(err, t.unmake(making))
		}
	}()
	if err := t.make(ctx, making, s); err != nil {
		return nil, err
	}
	// Described before it is published: afterwards nothing may fail.
	mounts, err := t.backend.mounts(e, s, t.at(making))
	if err != nil {
		return nil, err
	}
	return mounts, t.publish(key, making, e)
}

// bind makes a snapshot bound if its parent is.
func (t *tree) bind(s *state) error {
	if s.Parent == "" || s.Bound != "" {
		return nil
	}
	l, err := t.layerOf(string(s.Parent))
	if err == nil && l.bound != "" {
		s.Bound = text(fmt.Sprintf("lies over %q, which cannot be stacked either", s.Parent))
	}
	return err
}

func applyOpts(opts []snapshots.Opt) (base snapshots.Info, err error) {
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return snapshots.Info{}, err
		}
	}
	return base, nil
}

// make builds the entry in new.
func (t *tree) make(ctx context.Context, making entry, s state) error {
	path := t.at(making)
	if err := t.step("make.mkdir"); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	from, parent := "", string(s.Parent)
	if parent != "" {
		// The link comes first: from then on nobody removes the parent.
		if err := t.joinLocked(parent, path, 0); err != nil {
			return err
		}
		top, err := t.chain(parent, 1)
		if err != nil {
			return err
		}
		from = t.path(dirCommitted, encodeKey(top[0]), "fs")
	}
	if err := t.step("make.fill"); err != nil {
		return err
	}
	if err := t.backend.fill(ctx, path, from, s.View); err != nil {
		return err
	}
	if err := t.step("make.info"); err != nil {
		return err
	}
	return createState(below(path, "info"), s)
}

// publish gives a made entry its name.
func (t *tree) publish(key string, making, e entry) error {
	defer t.lock(key)()
	other := dirCommitted
	if e.dir == dirCommitted {
		other = dirActive
	}
	if ok, err := exists(t.path(other, e.name)); err != nil {
		return err
	} else if ok {
		return fmt.Errorf("snapshot %q: %w", key, errdefs.ErrAlreadyExists)
	}
	return t.rename("make.rename", making, e)
}

// unmake removes what was made in vain. What it cannot remove is left for
// Settle.
func (t *tree) unmake(making entry) error {
	if err := t.step("make.undo"); err != nil {
		return err
	}
	return removeTree(t.at(making)) // the links to parents are in it
}

// mark notes a name in one of the sets of names, or drops it.
func (t *tree) mark(set *map[string]bool, name string, on bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if on {
		(*set)[name] = true
	} else {
		delete(*set, name)
	}
}

func (t *tree) marked(set *map[string]bool, name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return (*set)[name]
}

// requireCommitted refuses a name that is not committed: NotFound where
// there is none, otherwise as class.
func (t *tree) requireCommitted(name string, class error) error {
	e, err := t.find(name)
	if err != nil {
		return fmt.Errorf("parent: %w", err)
	}
	if e.dir != dirCommitted {
		return fmt.Errorf("parent %q is not committed: %w", name, class)
	}
	return nil
}

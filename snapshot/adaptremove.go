package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// Remove implements snapshots.Snapshotter.
func (a *adapted) Remove(ctx context.Context, key string) error {
	p, err := a.Detach(ctx, key)
	if err != nil {
		return err
	}
	return a.Discard(ctx, p)
}

// Detach implements Driver.
func (a *adapted) Detach(ctx context.Context, key string) (Pending, error) {
	if err := a.detach(ctx, key); err != nil {
		return Pending{}, fmt.Errorf("remove %q: %w", key, err)
	}
	return Pending{Key: key, Kind: PendingRemoval, entry: key}, nil
}

func (a *adapted) detach(ctx context.Context, key string) error {
	defer a.lock(key)()
	if _, err := a.visible(ctx, key); err != nil {
		return err
	}
	live, _, err := a.children(ctx, key)
	if err != nil {
		return err
	}
	if live != "" {
		return fmt.Errorf("cannot remove %q, which is the parent of %q: %w", key, live, errdefs.ErrFailedPrecondition)
	}
	a.hold(key, true)
	_, err = a.s.Update(ctx, snapshots.Info{
		Name: key, Labels: map[string]string{labelRemoval: "detached"},
	}, "labels."+labelRemoval)
	if err != nil {
		a.hold(key, false)
	}
	return err
}

// children finds a child of key that counts, and whether there are detached
// ones. The view for mounts does not count.
func (a *adapted) children(ctx context.Context, key string) (live string, detached bool, err error) {
	err = a.walk(ctx, func(_ context.Context, info snapshots.Info) error {
		switch {
		case info.Parent != key || info.Labels[labelView] != "":
		case info.Labels[labelRemoval] != "":
			detached = true
		default:
			live = info.Name
		}
		return nil
	})
	return live, detached, err
}

func (a *adapted) hold(key string, on bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if on {
		a.held[key] = true
	} else {
		delete(a.held, key)
	}
}

func (a *adapted) doom(key string, on bool) (was bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	was = a.doomed[key]
	if on {
		a.doomed[key] = true
	} else {
		delete(a.doomed, key)
	}
	return was
}

// Discard implements Driver. A name whose detached children are still there
// goes with the last of them, as the snapshotter below would not remove it
// before.
func (a *adapted) Discard(ctx context.Context, p Pending) error {
	if p.Kind != PendingRemoval {
		return fmt.Errorf("discard: %q is not a removal: %w", p.Key, errdefs.ErrInvalidArgument)
	}
	for key := p.entry; key != ""; {
		parent, err := a.discard(ctx, key)
		if err != nil {
			return fmt.Errorf("discard %q: %w", key, err)
		}
		if parent != "" && !a.doom(parent, false) {
			break
		}
		key = parent
	}
	return nil
}

// discard lets the snapshotter remove a detached name, and returns its parent
// if it did so.
func (a *adapted) discard(ctx context.Context, key string) (parent string, err error) {
	defer a.lock(key)()
	defer a.hold(key, false)
	info, err := a.s.Stat(ctx, key)
	if errdefs.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if info.Labels[labelRemoval] == "" {
		return "", nil // restored, or the key was used again
	}
	if err := a.s.Remove(ctx, viewKey(key)); err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	err = a.s.Remove(ctx, key)
	if errdefs.IsFailedPrecondition(err) {
		// Told before it is looked for: a child that goes meanwhile takes its
		// parent along, or is gone when the second attempt is made.
		a.doom(key, true)
		live, detached, walkErr := a.children(ctx, key)
		if walkErr == nil && live == "" && detached {
			return "", nil
		}
		a.doom(key, false)
		if walkErr == nil && live == "" {
			err = a.s.Remove(ctx, key)
		}
		err = errors.Join(err, walkErr)
	}
	if err != nil {
		return "", err
	}
	return info.Parent, nil
}

// Restore implements Driver.
func (a *adapted) Restore(ctx context.Context, p Pending) error {
	if err := a.restore(ctx, p); err != nil {
		return fmt.Errorf("restore %q: %w", p.Key, err)
	}
	return nil
}

func (a *adapted) restore(ctx context.Context, p Pending) error {
	if p.Kind != PendingRemoval {
		return fmt.Errorf("not a removal: %w", errdefs.ErrInvalidArgument)
	}
	info, err := a.s.Stat(ctx, p.entry)
	if err != nil {
		return err
	}
	defer a.lock(p.entry, info.Parent)()
	defer a.hold(p.entry, false)
	if info, err = a.s.Stat(ctx, p.entry); err != nil {
		return err
	}
	if info.Labels[labelRemoval] == "" {
		return fmt.Errorf("the key is in use: %w", errdefs.ErrAlreadyExists)
	}
	if info.Parent != "" {
		if _, err := a.visible(ctx, info.Parent); errdefs.IsNotFound(err) {
			return fmt.Errorf("its parent %q is gone: %w", info.Parent, errdefs.ErrFailedPrecondition)
		} else if err != nil {
			return err
		}
	}
	// An empty value takes the label away.
	_, err = a.s.Update(ctx, snapshots.Info{Name: p.entry}, "labels."+labelRemoval)
	if err == nil {
		a.doom(p.entry, false)
	}
	return err
}

// Cleanup implements snapshots.Cleaner: it discards the removals that nobody
// holds and has the snapshotter below reclaim their bytes.
func (a *adapted) Cleanup(ctx context.Context) error {
	pending, err := a.Pending(ctx)
	errs := []error{err}
	for _, p := range pending {
		a.mu.Lock()
		skip := p.Kind != PendingRemoval || a.held[p.Key]
		a.mu.Unlock()
		if skip {
			continue
		}
		if live, _, err := a.children(ctx, p.Key); err != nil || live != "" {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, a.Discard(ctx, p))
	}
	if err := errors.Join(append(errs, a.cleanBelow(ctx))...); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

// cleanBelow lets the snapshotter below remove what none of its names needs.
func (a *adapted) cleanBelow(ctx context.Context) error {
	c, ok := a.s.(snapshots.Cleaner)
	if !ok {
		return nil
	}
	// NotFound: see walk.
	if err := c.Cleanup(ctx); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

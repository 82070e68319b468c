package cache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/snapshot"
)

// discardKey removes a snapshot that no record names. What it cannot remove is
// tried again with the next removal, or else by the next open, which the dirty
// mark tells.
func (m *Manager) discardKey(ctx context.Context, key string) error {
	// The caller may be gone already, the snapshot must go all the same.
	ctx = context.WithoutCancel(ctx)
	p, err := m.detachKey(ctx, key)
	switch {
	case errors.Is(err, errdefs.ErrNotFound):
		return nil
	case err == nil:
		return m.discardPending(ctx, p)
	}
	return m.orphan(snapshot.Pending{Key: key, Kind: snapshot.PendingActive}, err)
}

// discardPending is the second half of a removal.
func (m *Manager) discardPending(ctx context.Context, p snapshot.Pending) error {
	if err := m.driver.Discard(ctx, p); err != nil {
		return m.orphan(p, err)
	}
	return nil
}

// orphan notes a snapshot that could not be removed.
func (m *Manager) orphan(p snapshot.Pending, err error) error {
	m.lock()
	m.orphans[p.Key] = p
	m.unlock()
	m.log.Warn("a snapshot without a record could not be removed; it is tried again later", "key", p.Key, "error", err)
	return fmt.Errorf("remove snapshot %s: %w", p.Key, err)
}

// retryOrphans removes what could not be removed before. What it fails to
// remove now stays noted.
func (m *Manager) retryOrphans(ctx context.Context) {
	m.lock()
	orphans := maps.Clone(m.orphans)
	clear(m.orphans)
	m.unlock()
	for _, key := range slices.Sorted(maps.Keys(orphans)) {
		if p := orphans[key]; p.Kind == snapshot.PendingActive {
			_ = m.discardKey(ctx, key) // it is noted and logged
		} else {
			_ = m.discardPending(context.WithoutCancel(ctx), p)
		}
	}
}

// detachKey is the driver's Detach. When that fails it looks whether the name
// went all the same: the call may have failed after its work was done, and a
// name in the trash that nobody remembers would stay there.
func (m *Manager) detachKey(ctx context.Context, key string) (snapshot.Pending, error) {
	p, err := m.driver.Detach(ctx, key)
	if err == nil || is(err, errdefs.ErrNotFound, errdefs.ErrFailedPrecondition) {
		return p, err
	}
	pending, perr := m.driver.Pending(context.WithoutCancel(ctx))
	if perr != nil {
		m.setLeftover()
		return p, errors.Join(err, perr)
	}
	for _, q := range pending {
		if q.Kind == snapshot.PendingRemoval && q.Key == key {
			return q, nil
		}
	}
	return p, err
}

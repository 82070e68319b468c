package cache

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// Finalize commits the snapshot in the driver under the record's id; a lazy
// record is extracted. A record that is finalized already is left as it is.
// Mounts go on working.
func (r *ImmutableRef) Finalize(ctx context.Context) error {
	m := r.h.m
	e, done, err := r.h.beginChange()
	if err != nil {
		return err
	}
	defer done()
	_, err = m.finalize(ctx, e)
	return err
}

// finalize brings the record of e, which the caller uses, to finalized.
func (m *Manager) finalize(ctx context.Context, e *entry) (*Record, error) {
	switch rec := m.current(e); rec.State {
	case metadata.Finalized:
		return rec, nil
	case metadata.Lazy:
		err := m.ground(ctx, e)
		return m.current(e), err
	}
	release, err := m.drive(ctx, e, "finalize")
	if err != nil {
		return nil, err
	}
	defer release()

	rec := m.current(e)
	switch rec.State {
	case metadata.Finalized:
		return rec, nil
	case metadata.Committed:
	default:
		return nil, fmt.Errorf("record %s is %s, commit it first: %w", short(e.id), rec.State, errdefs.ErrFailedPrecondition)
	}
	if holders, busy, err := testHold(m.root, e.id, false); err != nil {
		return nil, err
	} else if busy {
		return nil, &LockedError{ID: e.id, Holders: holders}
	}
	if err := m.commitInDriver(ctx, e.id, rec.Key); err != nil {
		return nil, fmt.Errorf("finalize record %s: %w", short(e.id), fullDisk(err))
	}
	rec, err = m.swap(ctx, e)
	if err != nil {
		return nil, fmt.Errorf("finalize record %s: %w", short(e.id), fullDisk(err))
	}
	return rec, nil
}

// commitInDriver gives the snapshot its final name, unless an earlier attempt
// got that far.
func (m *Manager) commitInDriver(ctx context.Context, id ID, key string) error {
	if done, err := m.awaitsSwap(ctx, id); err != nil || done {
		return err
	}
	if err := m.noForeignWriter(ctx, id, key); err != nil {
		return err
	}
	if err := m.marks.setDirty(); err != nil {
		return err
	}
	if err := m.cleanUpper(ctx, id, key); err != nil {
		return fmt.Errorf("clean the layer: %w", err)
	}
	err := m.driver.Commit(ctx, string(id), key)
	if err != nil {
		// The call may have failed after its work was done.
		m.setUnswapped(id, false)
		done, serr := m.awaitsSwap(context.WithoutCancel(ctx), id)
		if serr != nil || !done {
			return errors.Join(err, serr)
		}
	}
	m.setUnswapped(id, true)
	return nil
}

// awaitsSwap says whether the snapshot of a committed record has its final
// name already, because a finalize went no further. The driver is asked only
// if an error left it open.
func (m *Manager) awaitsSwap(ctx context.Context, id ID) (bool, error) {
	m.lock()
	certain, there := m.unswapped[id]
	m.unlock()
	if !there || certain {
		return there, nil
	}
	st, err := m.driver.Stat(ctx, string(id))
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return false, err
	}
	if err == nil && st.Kind == snapshots.KindCommitted {
		m.setUnswapped(id, true)
		return true, nil
	}
	m.lock()
	defer m.unlock()
	delete(m.unswapped, id)
	return false, nil
}

func (m *Manager) setUnswapped(id ID, certain bool) {
	m.lock()
	defer m.unlock()
	m.unswapped[id] = certain
}

// swap writes that the snapshot has its final name. The driver's half cannot
// be taken back, so this one is done even if the caller has gone.
func (m *Manager) swap(ctx context.Context, e *entry) (*Record, error) {
	raw, err := m.isRaw(context.WithoutCancel(ctx), string(e.id))
	if err != nil {
		return nil, err
	}
	rec, err := m.change(context.WithoutCancel(ctx), e, func(_ *metadata.Tx, edit *Edit) error {
		finalized(edit.rec, raw)
		return nil
	})
	if err != nil {
		return nil, err
	}
	m.syncer.committed()
	m.sizer.add(e.id)
	m.lock()
	delete(m.unswapped, e.id)
	delete(m.written, rec.Was)
	m.unlock()
	return rec, nil
}

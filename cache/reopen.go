package cache

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// FileList is the attachment that lists a layer's files. It describes one
// content, so a reopen drops it.
const FileList = "filelist"

// ReopenOptions go into the transaction of a reopen.
type ReopenOptions struct {
	// Edit changes what callers attach to the record, for example clears
	// values that describe the present content. It may run several times. It
	// is not called for a mutable record that is merely continued.
	Edit func(*Edit) error
}

// GetMutable gives the writer's handle on a record.
//
// A mutable record that nobody holds is continued under its id. A committed
// record that nobody holds and that has no child is reopened: in one
// transaction a new record takes over its snapshot, values, indexes and
// attachments, and the old id, with its aliases, is gone for good. Until it is
// committed again the new record is retained and interrupted.
//
// Errors: NotFound; ErrLocked, which names the holders; FailedPrecondition for
// a record that has children, is finalized, or is lazy: make a child of it.
func (m *Manager) GetMutable(ctx context.Context, id ID) (*MutableRef, error) {
	return m.reopen(ctx, id, ReopenOptions{})
}

// GetMutableWith is GetMutable with options for the case of a reopen.
func (m *Manager) GetMutableWith(ctx context.Context, id ID, o ReopenOptions) (*MutableRef, error) {
	return m.reopen(ctx, id, o)
}

func (m *Manager) reopen(ctx context.Context, id ID, o ReopenOptions) (*MutableRef, error) {
	end, err := m.beginChange()
	if err != nil {
		return nil, err
	}
	defer end()
	ref, err := m.getMutable(ctx, id, o, nil)
	if err != nil {
		return nil, fmt.Errorf("open record %s for writing: %w", short(id), err)
	}
	return ref, nil
}

// getMutable continues or reopens id. mine is the caller's own hold on it.
func (m *Manager) getMutable(ctx context.Context, id ID, o ReopenOptions, mine *Hold) (*MutableRef, error) {
	e, err := m.find(ctx, id, nil)
	if err != nil {
		return nil, err
	}
	defer m.drop(e)
	release, err := m.drive(ctx, e, "reopen")
	if err != nil {
		return nil, err
	}
	defer release()

	// The record may have left while we waited for the token.
	rec, err := m.read(ctx, e.id)
	if err != nil {
		return nil, err
	}
	switch rec.State {
	case metadata.Mutable, metadata.Committed:
	case metadata.Finalized:
		return nil, fmt.Errorf("it is finalized, make a new record with it as parent: %w", errdefs.ErrFailedPrecondition)
	default:
		return nil, fmt.Errorf("it is %s, make a new record with it as parent: %w", rec.State, errdefs.ErrFailedPrecondition)
	}
	if mine == nil {
		if holders, busy, err := testHold(m.root, e.id, true); err != nil {
			return nil, err
		} else if busy {
			return nil, &LockedError{ID: e.id, Holders: holders}
		}
	}
	unswapped, err := m.awaitsSwap(ctx, e.id)
	if err != nil {
		return nil, err
	}
	if unswapped {
		if _, err := m.swap(ctx, e); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("it is finalized, make a new record with it as parent: %w", errdefs.ErrFailedPrecondition)
	}

	m.lock()
	leave, err := m.leaveLocked(e)
	if err == nil && rec.State == metadata.Mutable {
		// Nobody holds it: continue it under its id.
		e.leaving = nil
		m.publishLocked(e, rec)
		e.recorded = true
		defer m.unlock()
		return &MutableRef{h: m.handleLocked(e, HolderMutable, callerOf(1))}, nil
	}
	m.unlock()
	if err != nil {
		return nil, err
	}
	gone := false
	defer func() { leave(gone) }() // also if o.Edit panics
	id = m.store.NewID()
	ne, done := m.announce(id)
	defer done()
	blobs := m.blobs.intentsFor([]*Record{rec})
	next, err := m.replace(ctx, e.id, id, o)
	if !is(err, metadata.ErrUnknownOutcome) {
		m.blobs.drop(ctx, blobs)
	}
	if err != nil {
		return nil, err
	}
	gone = true
	m.lock()
	defer m.unlock()
	ne.rec, ne.recorded = next, true
	return &MutableRef{h: m.handleLocked(ne, HolderMutable, callerOf(1))}, nil
}

// replace is the transaction of a reopen.
func (m *Manager) replace(ctx context.Context, old, id ID, o ReopenOptions) (*Record, error) {
	var next *Record
	err := m.store.Update(ctx, func(tx *metadata.Tx) error {
		if n := tx.ChildCount(old); n > 0 {
			return fmt.Errorf("it has children (%s), make a new record with it as parent: %w", joinIDs(some(tx.Children(old))), errdefs.ErrFailedPrecondition)
		}
		rec, err := tx.Get(old)
		if err != nil {
			return err
		}
		if rec.State != metadata.Committed || rec.ID != old {
			return fmt.Errorf("it is %s now: %w", rec.State, errdefs.ErrFailedPrecondition)
		}
		next = rec
		next.ID, next.Revision, next.State = id, 0, metadata.Mutable
		next.Aliases = nil
		next.Retain, next.RetainAfter, next.Interrupted = true, rec.Retain, true
		// What described the old tree describes nothing any more.
		next.Size, next.Durable, next.Verified = metadata.SizeUnknown, false, false
		next.Blobs, next.DiffID, next.ChainID, next.ImageRefs = nil, "", "", nil
		edit := Edit{rec: next, attach: map[string][]byte{FileList: nil}}
		if o.Edit != nil {
			if err := o.Edit(&edit); err != nil {
				return err
			}
		}
		if err := validate(next); err != nil {
			return err
		}
		if err := tx.Replace(old, next); err != nil {
			return err
		}
		if err := m.unconfirmTree(&Attachments{tx: tx, id: next.ID}); err != nil {
			return err
		}
		return edit.writeAttachments(tx)
	})
	if err != nil {
		return nil, err
	}
	next.Revision = 1
	return next, nil
}

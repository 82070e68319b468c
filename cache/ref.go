package cache

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// ImmutableRef is a handle on a record whose snapshot nobody changes. Release
// it when done.
type ImmutableRef struct{ h *handle }

// MutableRef is the only handle on a record that its owner may write to. It
// ends with Commit, Release or Detach.
type MutableRef struct{ h *handle }

// ID is the record's id.
func (r *ImmutableRef) ID() ID { return r.h.id }

// ID is the record's id. Commit keeps it.
func (r *MutableRef) ID() ID { return r.h.id }

// Record is a copy of what is known of the record now.
func (r *ImmutableRef) Record() *Record { return r.h.record() }

// Record is a copy of what is known of the record now, which for one that is
// neither retained nor committed is in memory only.
func (r *MutableRef) Record() *Record { return r.h.record() }

// record copies deeply, so that callers may do with it what they like.
func (h *handle) record() *Record {
	h.m.lock()
	rec := h.e.rec
	h.m.unlock()
	return rec.Clone()
}

// current is the published record of an entry that the caller uses.
func (m *Manager) current(e *entry) *Record {
	m.lock()
	defer m.unlock()
	return e.rec
}

// Clone gives another handle on the same record, to be released on its own.
func (r *ImmutableRef) Clone() (*ImmutableRef, error) {
	m := r.h.m
	m.lock()
	defer m.unlock()
	if err := r.h.aliveLocked(); err != nil {
		return nil, err
	}
	h := m.handleLocked(r.h.e, HolderImmutable, callerOf(1))
	h.noTouch = r.h.noTouch
	return &ImmutableRef{h: h}, nil
}

// Release gives the handle back. It does no I/O: the use is counted in memory
// and written with a later transaction. Releasing again does nothing.
func (r *ImmutableRef) Release(context.Context) error {
	m := r.h.m
	m.lock()
	defer m.unlock()
	m.releaseLocked(r.h)
	return nil
}

// Release gives the handle back. A retained record stays mutable and can be
// continued by GetMutable; any other is removed together with its snapshot,
// which must not be mounted any more. Releasing again, or after Commit, does
// nothing.
func (r *MutableRef) Release(ctx context.Context) error {
	m := r.h.m
	e := r.h.e
	m.lock()
	if r.h.released || m.closed {
		m.unlock()
		return nil
	}
	if e.recorded {
		dies := e.rec.State == metadata.Mutable && !e.rec.Retain
		if dies && m.pool.mounted(e.id) {
			m.unlock()
			return stillMounted(e.id)
		}
		m.releaseLocked(r.h)
		m.unlock()
		if !dies {
			return nil
		}
		out, err := m.Remove(context.WithoutCancel(ctx), e.id)
		for _, r := range out {
			err = errors.Join(err, r.Err)
		}
		return err
	}
	e.lives++
	m.running.Add(1)
	m.unlock()
	defer m.running.Done()
	defer m.drop(e)
	return m.discardMutable(ctx, r.h)
}

func stillMounted(id ID) error {
	return fmt.Errorf("record %s is mounted: unmount it before the release: %w", short(id), errdefs.ErrFailedPrecondition)
}

// discardMutable removes the snapshot of a mutable without a record.
func (m *Manager) discardMutable(ctx context.Context, h *handle) error {
	e := h.e
	// Whoever gives up must not leave the snapshot behind: go on when the
	// caller's context has ended.
	ctx = context.WithoutCancel(ctx)
	release, err := m.drive(ctx, e, "release")
	if err != nil {
		return err
	}
	defer release()
	m.lock()
	if h.released || e.recorded {
		m.releaseLocked(h)
		m.unlock()
		return nil
	}
	if m.pool.mounted(e.id) {
		m.unlock()
		return stillMounted(e.id)
	}
	key := e.rec.Key
	m.dropHandleLocked(h)
	m.unlock()

	err = m.discardKey(ctx, key)
	m.lock()
	defer m.unlock()
	for _, p := range e.parents {
		m.unuseLocked(p)
	}
	e.parents, e.attachments = nil, nil
	delete(m.written, key)
	m.forgetLocked(e)
	return err
}

// releaseLocked drops h and counts a use of the record with the last handle.
func (m *Manager) releaseLocked(h *handle) {
	m.assertLocked()
	if h.released {
		return
	}
	e := h.e
	e.touched = e.touched || !h.noTouch
	if m.dropHandleLocked(h) && e.touched {
		e.touched = false
		if !m.closed && !m.readOnly {
			m.store.Touch(e.id, m.now())
		}
	}
}

// change applies fn to the stored record of e in one transaction and publishes
// the outcome. fn may run several times.
func (m *Manager) change(ctx context.Context, e *entry, fn func(*metadata.Tx, *Edit) error) (*Record, error) {
	var out *Record
	err := m.store.Update(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Get(e.id)
		if err != nil {
			return err
		}
		edit := Edit{rec: rec, attach: map[string][]byte{}}
		if err := fn(tx, &edit); err != nil {
			return err
		}
		if err := edit.writeAttachments(tx); err != nil {
			return err
		}
		rec.Revision, err = tx.Put(rec)
		out = rec
		return err
	})
	if err != nil {
		return nil, err
	}
	m.lock()
	defer m.unlock()
	m.publishLocked(e, out)
	return out, nil
}

// finalized turns a record into one whose snapshot has its final name.
func finalized(rec *Record, raw bool) {
	rec.State = metadata.Finalized
	rec.Was, rec.Key = rec.Key, string(rec.ID)
	// The driver may give up what it needs for writable snapshots only.
	rec.Size = metadata.SizeUnknown
	rec.Raw = raw
}

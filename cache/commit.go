package cache

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// CommitOptions go into the transaction of a commit.
type CommitOptions struct {
	// Cost is what it took to make the content.
	Cost time.Duration
	// Edit changes what callers attach to the record. It may run several
	// times.
	Edit func(*Edit) error
	// Take names values that move from the record's parent to the record, for
	// a key that always names the newest of a line. A value that the parent
	// does not have is left as it is.
	Take []string
}

// Commit freezes the snapshot: the record becomes committed under the same id
// and r is consumed. It is one transaction; nothing is copied and the driver is
// not asked. With a writable mount of this manager still there, or a writer
// of another process, it fails and r stays usable.
func (r *MutableRef) Commit(ctx context.Context) (*ImmutableRef, error) {
	return r.commit(ctx, CommitOptions{})
}

// CommitWith is Commit with changes that go into the same transaction.
func (r *MutableRef) CommitWith(ctx context.Context, o CommitOptions) (*ImmutableRef, error) {
	return r.commit(ctx, o)
}

func (r *MutableRef) commit(ctx context.Context, o CommitOptions) (*ImmutableRef, error) {
	m := r.h.m
	e, done, err := r.h.beginChange()
	if err != nil {
		return nil, err
	}
	defer done()
	release, err := m.drive(ctx, e, "commit")
	if err != nil {
		return nil, err
	}
	defer release()

	m.lock()
	err = r.h.aliveLocked() // another Commit may have had the token before
	rec, recorded, attachments := e.rec, e.recorded, e.attachments
	m.unlock()
	if err != nil {
		return nil, err
	}
	if m.pool.writable(e.id) {
		return nil, fmt.Errorf("record %s is mounted writable: unmount it before the commit: %w", short(e.id), errdefs.ErrFailedPrecondition)
	}
	if err := m.noForeignWriter(ctx, e.id, rec.Key); err != nil {
		return nil, err
	}

	var parent *Record
	freeze := func(tx *metadata.Tx, edit *Edit) (err error) {
		rec := edit.rec
		if parent, err = takeValues(tx, edit, o.Take); err != nil {
			return err
		}
		if o.Edit != nil {
			if err := o.Edit(edit); err != nil {
				return err
			}
		}
		if o.Cost > 0 {
			rec.Cost = o.Cost
		}
		rec.State = metadata.Committed
		rec.Size = metadata.SizeUnknown
		rec.Durable = false
		if rec.Interrupted {
			rec.Interrupted, rec.Retain, rec.RetainAfter = false, rec.RetainAfter, false
		}
		return validate(rec)
	}
	if recorded {
		rec, err = m.change(ctx, e, func(tx *metadata.Tx, edit *Edit) error {
			if err := freeze(tx, edit); err != nil {
				return err
			}
			return m.doubtTree(tx, edit)
		})
	} else {
		edit := newEdit(rec, attachments)
		rec = edit.rec
		err = m.create(ctx, edit, freeze)
	}
	if err != nil {
		return nil, fmt.Errorf("commit record %s: %w", short(e.id), err)
	}

	m.syncer.committed()
	m.sizer.add(e.id)
	m.collector.poke()
	m.lock()
	defer m.unlock()
	m.publishLocked(e, rec)
	if pe := m.entries[parentID(parent)]; pe != nil && pe.rec != nil {
		m.publishLocked(pe, parent)
	}
	m.recordedLocked(e)
	m.dropHandleLocked(r.h)
	return &ImmutableRef{h: m.handleLocked(e, HolderImmutable, callerOf(1))}, nil
}

// takeValues moves values from the parent of the record that is edited, and
// gives the parent as it was stored, or nil.
func takeValues(tx *metadata.Tx, edit *Edit, names []string) (*Record, error) {
	if len(names) == 0 || len(edit.rec.Parents) != 1 {
		return nil, nil
	}
	parent, err := tx.Get(edit.rec.Parents[0])
	if err != nil {
		return nil, err
	}
	from := Edit{rec: parent}
	for _, v := range slices.Clone(parent.Values) {
		if !slices.Contains(names, v.Name) {
			continue
		}
		if err := edit.SetValue(v); err != nil {
			return nil, err
		}
		from.ClearValue(v.Name)
	}
	parent.Revision, err = tx.Put(parent)
	return parent, err
}

func parentID(parent *Record) ID {
	if parent == nil {
		return ""
	}
	return parent.ID
}

// recordedLocked notes that e has a record now: its row protects the parents
// from here on, and the attachments are in the store.
func (m *Manager) recordedLocked(e *entry) {
	m.assertLocked()
	e.recorded, e.attachments = true, nil
	for _, p := range e.parents {
		m.unuseLocked(p)
	}
	e.parents = nil
}

// noForeignWriter fails if a mount somewhere still has key as its writable
// layer. It asks the kernel only when a process other than this one may have
// written.
func (m *Manager) noForeignWriter(ctx context.Context, id ID, key string) error {
	m.lock()
	_, mine := m.written[key]
	m.unlock()
	if mine {
		return nil
	}
	busy, err := m.driver.InUse(ctx, key)
	if err != nil {
		return fmt.Errorf("look for a writer of record %s: %w", short(id), err)
	}
	if busy {
		return &LockedError{ID: id, Holders: []Holder{{Kind: HolderWriter}}}
	}
	return nil
}

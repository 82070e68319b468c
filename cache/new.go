package cache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// NewOptions describe a new mutable record.
type NewOptions struct {
	// Type is the record type that policies select by, e.g. "regular" or
	// "exec.cachemount"; empty means regular.
	Type        string
	Description string
	Labels      map[string]string
	Values      []Value
	// Retain writes the record at once: it outlives its handle, and Search
	// finds it.
	Retain bool
	// KeepOnPowerCut keeps a retained mutable whose data may not have
	// reached the disk when the machine went down. It suits directories
	// whose users check what they read.
	KeepOnPowerCut bool
}

// TypeRegular is the type of a record that was made without one.
const TypeRegular = "regular"

// activeKey is the driver's name of the snapshot that was made for id. It is
// never equal to a record id, which the snapshot is committed under.
func activeKey(id ID) string { return string(id) + activeSuffix }

// madeFor is the id that the snapshot of this driver key was made for.
func madeFor(key string) ID { return ID(strings.TrimSuffix(key, activeSuffix)) }

const activeSuffix = "-w"

// New makes a writable snapshot over parent, or an empty one if parent is nil.
// The parent's handle stays the caller's; a parent that is committed is
// finalized first. Without Retain nothing is written to the store: only the
// snapshot's directory exists until Commit.
func (m *Manager) New(ctx context.Context, parent *ImmutableRef, o NewOptions) (*MutableRef, error) {
	end, err := m.beginChange()
	if err != nil {
		return nil, err
	}
	defer end()

	rec := &Record{
		State:       metadata.Mutable,
		Op:          metadata.Base,
		Retain:      o.Retain,
		Type:        o.Type,
		Description: o.Description,
		Labels:      maps.Clone(o.Labels),
		Created:     m.now(),
		Size:        metadata.SizeUnknown,
	}
	if rec.Type == "" {
		rec.Type = TypeRegular
	}
	if o.KeepOnPowerCut {
		rec.OnPowerCut = metadata.Keep
	}
	edit := Edit{rec: rec}
	for _, v := range o.Values {
		if err := edit.SetValue(v); err != nil {
			return nil, err
		}
	}
	if err := validate(rec); err != nil {
		return nil, err
	}

	var pe *entry
	parentKey := ""
	if parent != nil {
		if parent.h.m != m {
			return nil, fmt.Errorf("parent %s belongs to another cache: %w", short(parent.ID()), errdefs.ErrInvalidArgument)
		}
		var done func()
		if pe, done, err = parent.h.use(); err != nil {
			return nil, err
		}
		defer done()
		if err := m.requireDepth(ctx, pe); err != nil {
			return nil, err
		}
		prec, err := m.finalize(ctx, pe)
		if err != nil {
			return nil, fmt.Errorf("finalize the parent: %w", err)
		}
		if err := m.mountable(ctx, pe); err != nil {
			return nil, fmt.Errorf("extract what the parent is made of: %w", err)
		}
		rec.Op, rec.Parents, parentKey = metadata.Layer, []ID{prec.ID}, prec.Key
	}

	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	rec.ID = m.store.NewID()
	rec.Key = activeKey(rec.ID)
	e, done := m.announce(rec.ID)
	defer done()
	if err := m.marks.setDirty(); err != nil {
		return nil, err
	}
	if _, err := m.driver.Prepare(ctx, rec.Key, parentKey); err != nil {
		// A failed Prepare may have left its name: ask for its removal.
		return nil, errors.Join(fmt.Errorf("prepare a snapshot over %q: %w", parentKey, fullDisk(err)), m.discardKey(ctx, rec.Key))
	}
	if o.Retain {
		if err := m.create(ctx, &edit, nil); err != nil {
			return nil, errors.Join(fmt.Errorf("record the new snapshot: %w", err), m.discardKey(ctx, rec.Key))
		}
	}

	m.lock()
	defer m.unlock()
	e.rec, e.recorded, e.grounded, e.depth = rec, o.Retain, true, 1
	if pe != nil {
		if e.depth = 0; pe.depth > 0 {
			e.depth = pe.depth + 1
		}
	}
	if pe != nil && !o.Retain {
		m.useLocked(pe)
		e.parents = append(e.parents, pe)
	}
	m.written[rec.Key] = struct{}{}
	h := m.handleLocked(e, HolderMutable, callerOf(1))
	h.noTouch = true // to be made is no use
	m.collector.poke()
	return &MutableRef{h: h}, nil
}

// requireDepth refuses a parent on which one more layer could be written, but
// never mounted again once it is committed.
func (m *Manager) requireDepth(ctx context.Context, e *entry) error {
	most := m.info.MaxDepth
	if most == 0 {
		return nil
	}
	m.lock()
	depth := e.depth
	m.unlock()
	if depth == 0 {
		list, err := m.layers(ctx, e)
		if err != nil {
			return fmt.Errorf("count the layers of the parent: %w", err)
		}
		depth = len(list)
		m.lock()
		e.depth = depth
		m.unlock()
	}
	if depth >= most {
		return fmt.Errorf("parent %s has %d layers, as many as one mount can stack: %w", short(e.id), depth, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// created publishes a record that was just written for the first time, so that
// its first handle does not read it back. e is that of announce, and nobody
// writes to rec any more.
func (m *Manager) created(e *entry, rec *Record) {
	rec.Revision = 1
	m.lock()
	defer m.unlock()
	e.recorded = true
	m.publishLocked(e, rec)
}

// create writes the first transaction of a record that was edited in memory.
// fn, if not nil, completes the edit in that transaction. It must come to the
// same result when it runs again.
func (m *Manager) create(ctx context.Context, edit *Edit, fn func(*metadata.Tx, *Edit) error) error {
	err := m.store.Update(ctx, func(tx *metadata.Tx) error {
		if fn != nil {
			if err := fn(tx, edit); err != nil {
				return err
			}
		}
		if err := tx.Create(edit.rec); err != nil {
			return err
		}
		return edit.writeAttachments(tx)
	})
	if err == nil {
		edit.rec.Revision = 1
	}
	return err
}

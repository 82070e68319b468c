package cache

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// Edit is what callers may change of a record. All changes made in one call of
// Edit go into one transaction.
type Edit struct {
	rec    *Record
	attach map[string][]byte // nil means delete
	// detach are prefixes of stored attachments that go.
	detach []string
}

// newEdit begins to edit a record that is in memory only.
func newEdit(rec *Record, attachments map[string][]byte) *Edit {
	e := &Edit{rec: rec.Clone(), attach: maps.Clone(attachments)}
	if e.attach == nil {
		e.attach = map[string][]byte{}
	}
	return e
}

// SetValue sets the value of that name, replacing its former data and index
// entry.
func (e *Edit) SetValue(v Value) error {
	if v.Name == "" {
		return fmt.Errorf("a value needs a name: %w", errdefs.ErrInvalidArgument)
	}
	if len(v.Index) > metadata.MaxIndexLen {
		return fmt.Errorf("index key of value %q has %d bytes, more than %d: %w", v.Name, len(v.Index), metadata.MaxIndexLen, errdefs.ErrInvalidArgument)
	}
	for i := range e.rec.Values {
		if e.rec.Values[i].Name == v.Name {
			e.rec.Values[i] = v
			return nil
		}
	}
	e.rec.Values = append(e.rec.Values, v)
	return nil
}

// ClearValue removes the value of that name and its index entry.
func (e *Edit) ClearValue(name string) {
	e.rec.Values = slices.DeleteFunc(e.rec.Values, func(v Value) bool { return v.Name == name })
}

// SetLabel sets a label; an empty value removes it.
func (e *Edit) SetLabel(name, value string) {
	if value == "" {
		delete(e.rec.Labels, name)
		return
	}
	if e.rec.Labels == nil {
		e.rec.Labels = map[string]string{}
	}
	e.rec.Labels[name] = value
}

// SetDescription sets the text that people read.
func (e *Edit) SetDescription(text string) { e.rec.Description = text }

// SetType sets the record type, TypeRegular if t is empty.
func (e *Edit) SetType(t string) { e.rec.Type = cmp.Or(t, TypeRegular) }

// SetRetain says whether the record outlives its last handle. While a reopened
// record is written to it is retained in any case; what is set here holds from
// its Commit on.
func (e *Edit) SetRetain(retain bool) {
	if e.rec.Interrupted {
		e.rec.RetainAfter = retain
		return
	}
	e.rec.Retain = retain
}

// Attach stores data under that name; nil removes it. Attachments move with
// the record when it is reopened.
func (e *Edit) Attach(name string, data []byte) error {
	if name == "" || len(name) > metadata.MaxNameLen {
		return fmt.Errorf("an attachment has a name of 1 to %d bytes, not of %d: %w", metadata.MaxNameLen, len(name), errdefs.ErrInvalidArgument)
	}
	e.attach[name] = data
	return nil
}

// DetachAll removes all attachments whose names begin with prefix. Those that
// are attached later in the same edit stay.
func (e *Edit) DetachAll(prefix string) {
	maps.DeleteFunc(e.attach, func(name string, _ []byte) bool { return strings.HasPrefix(name, prefix) })
	e.detach = append(e.detach, prefix)
}

func (e *Edit) writeAttachments(tx *metadata.Tx) error {
	stored := Attachments{tx: tx, id: e.rec.ID}
	for _, prefix := range e.detach {
		if err := stored.DeleteAll(prefix); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(e.attach)) {
		var err error
		if data := e.attach[name]; data == nil {
			err = stored.Delete(name)
		} else {
			err = stored.Set(name, data)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// validate refuses a record that callers filled with what cannot be stored.
func validate(rec *Record) error {
	const most = 64 << 10
	if n := len(rec.Type); n > metadata.MaxNameLen {
		return fmt.Errorf("the type has %d bytes, at most %d are allowed: %w", n, metadata.MaxNameLen, errdefs.ErrInvalidArgument)
	}
	if n := len(rec.Description); n > most {
		return fmt.Errorf("the description has %d bytes, at most %d are allowed: %w", n, most, errdefs.ErrInvalidArgument)
	}
	if _, ok := rec.Labels[""]; ok {
		return fmt.Errorf("a label needs a name: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// Edit changes what callers attach to the record, in one transaction. fn may
// run several times and must change nothing but the Edit.
func (r *ImmutableRef) Edit(ctx context.Context, fn func(*Edit) error) error {
	return r.h.edit(ctx, fn)
}

// Edit changes what callers attach to the record. As long as the record is in
// memory only this costs no transaction; setting retain writes it.
func (r *MutableRef) Edit(ctx context.Context, fn func(*Edit) error) error {
	return r.h.edit(ctx, fn)
}

func (h *handle) edit(ctx context.Context, fn func(*Edit) error) error {
	m := h.m
	e, done, err := h.beginChange()
	if err != nil {
		return err
	}
	defer done()

	m.lock()
	recorded := e.recorded
	m.unlock()
	if !recorded {
		// Only its one owner can be here, together with a Commit or a
		// Release of the same handle.
		release, err := m.drive(ctx, e, "edit")
		if err != nil {
			return err
		}
		defer release()
		if recorded, err = m.editInMemory(ctx, h, fn); !recorded || err != nil {
			return err
		}
	}
	_, err = m.change(ctx, e, func(_ *metadata.Tx, edit *Edit) error {
		if err := fn(edit); err != nil {
			return err
		}
		return validate(edit.rec)
	})
	if err != nil {
		return fmt.Errorf("edit record %s: %w", short(e.id), err)
	}
	return nil
}

// editInMemory edits a mutable without a record, and writes its record if it
// is to be retained from now on. It says whether the record turned out to be
// in the store already.
func (m *Manager) editInMemory(ctx context.Context, h *handle, fn func(*Edit) error) (recorded bool, err error) {
	e := h.e
	m.lock()
	err = h.aliveLocked()
	rec, attachments, recorded := e.rec, e.attachments, e.recorded
	m.unlock()
	if err != nil || recorded {
		return recorded, err
	}
	edit := newEdit(rec, attachments)
	if err := fn(edit); err != nil {
		return false, err
	}
	if err := validate(edit.rec); err != nil {
		return false, err
	}
	for name, data := range edit.attach {
		if data == nil {
			delete(edit.attach, name)
		}
	}
	if edit.rec.Retain {
		if err := m.create(ctx, edit, nil); err != nil {
			return false, fmt.Errorf("record %s: %w", short(e.id), err)
		}
	}
	m.lock()
	defer m.unlock()
	e.rec, e.attachments = edit.rec, edit.attach
	if edit.rec.Retain {
		m.recordedLocked(e)
	}
	return false, nil
}

// SetValue is Edit of one value.
func (r *ImmutableRef) SetValue(ctx context.Context, v Value) error {
	return r.h.edit(ctx, func(e *Edit) error { return e.SetValue(v) })
}

// SetValue is Edit of one value.
func (r *MutableRef) SetValue(ctx context.Context, v Value) error {
	return r.h.edit(ctx, func(e *Edit) error { return e.SetValue(v) })
}

// Values are the record's values, as copies.
func (r *ImmutableRef) Values() []Value { return r.h.record().Values }

// Values are the record's values, as copies.
func (r *MutableRef) Values() []Value { return r.h.record().Values }

// Attach stores data under that name; nil removes it.
func (r *ImmutableRef) Attach(ctx context.Context, name string, data []byte) error {
	return r.h.edit(ctx, func(e *Edit) error { return e.Attach(name, data) })
}

// Attach stores data under that name; nil removes it.
func (r *MutableRef) Attach(ctx context.Context, name string, data []byte) error {
	return r.h.edit(ctx, func(e *Edit) error { return e.Attach(name, data) })
}

// Attachment is the data of that name, or NotFound. Damaged data are DataLoss.
func (r *ImmutableRef) Attachment(ctx context.Context, name string) ([]byte, error) {
	return r.h.attachment(ctx, name)
}

// Attachment is the data of that name, or NotFound. Damaged data are DataLoss.
func (r *MutableRef) Attachment(ctx context.Context, name string) ([]byte, error) {
	return r.h.attachment(ctx, name)
}

func (h *handle) attachment(ctx context.Context, name string) ([]byte, error) {
	e, done, err := h.use()
	if err != nil {
		return nil, err
	}
	defer done()
	h.m.lock()
	recorded, data := e.recorded, e.attachments[name]
	h.m.unlock()
	if !recorded {
		if data == nil {
			return nil, fmt.Errorf("attachment %q of record %s: %w", name, short(e.id), errdefs.ErrNotFound)
		}
		return slices.Clone(data), nil
	}
	return h.m.Attachment(ctx, e.id, name)
}

// Attachment reads data that is attached to a record, without a handle.
func (m *Manager) Attachment(ctx context.Context, id ID, name string) (data []byte, err error) {
	err = m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		data, err = tx.Attachment(id, name)
		return err
	})
	return data, err
}

package metadata

import (
	"fmt"
	"iter"

	"github.com/containerd/errdefs"
)

// Attachments are opaque data of a record: hash trees, file lists, logs. They
// are read and written on their own, survive every rewrite of the record, and
// go or move with it.

// Attachment returns the bytes of an attachment. Errors: not found for the
// record or the name; ErrDamaged if the bytes are not what was written.
func (tx *Tx) Attachment(id ID, name string) ([]byte, error) {
	r, err := tx.stored(id)
	if err != nil {
		return nil, err
	}
	missing := fmt.Errorf("attachment %q of record %q: %w", name, id, errdefs.ErrNotFound)
	if name == "" || len(name) > MaxNameLen {
		return nil, missing
	}
	key := attachmentKey(r.row, name)
	v, ok, err := tx.get(bucketAttachment, key)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, missing
	}
	data, err := unframe(key, v)
	if err != nil {
		return nil, &DamagedError{Bucket: bucketAttachment, ID: id, Key: name, Reason: err.Error()}
	}
	return data, nil
}

// SetAttachment writes an attachment, over a former one of that name. The
// record's revision stays. Errors: not found; invalid argument for an empty
// or too long name.
func (tx *Tx) SetAttachment(id ID, name string, data []byte) error {
	if name == "" || len(name) > MaxNameLen {
		return invalid("record %q: attachment name of %d bytes, 1 to %d are allowed", id, len(name), MaxNameLen)
	}
	r, err := tx.stored(id)
	if err != nil {
		return err
	}
	tx.creates = true
	key := attachmentKey(r.row, name)
	return tx.put(bucketAttachment, key, frame(key, data))
}

// DeleteAttachment removes an attachment. Errors: not found, for the record
// and for the name.
func (tx *Tx) DeleteAttachment(id ID, name string) error {
	r, err := tx.stored(id)
	if err != nil {
		return err
	}
	if name != "" && len(name) <= MaxNameLen {
		key := attachmentKey(r.row, name)
		ok, err := tx.has(bucketAttachment, key)
		if err != nil {
			return err
		}
		if ok {
			return tx.remove(bucketAttachment, key)
		}
	}
	return fmt.Errorf("attachment %q of record %q: %w", name, id, errdefs.ErrNotFound)
}

// Attachments yields the names of a record's attachments, sorted, and the
// sizes of their data in bytes. It is empty for a record that does not
// exist or cannot be read.
func (tx *Tx) Attachments(id ID) iter.Seq2[string, int64] {
	return func(yield func(string, int64) bool) {
		r, err := tx.stored(id)
		if err != nil {
			return
		}
		for k, v := range tx.scan(bucketAttachment, attachmentKey(r.row, "")) {
			_, name, ok := splitAttachment(k)
			if ok && v != nil && !yield(name, int64(max(0, len(v)-frameHeader))) {
				return
			}
		}
	}
}

func (tx *Tx) removeAttachments(row ID) error {
	for k, v := range tx.scan(bucketAttachment, attachmentKey(row, "")) {
		if v == nil {
			continue
		}
		if err := tx.remove(bucketAttachment, k); err != nil {
			return err
		}
	}
	return tx.err
}

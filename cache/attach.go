package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// Attachments below TreePrefix are the stored hash tree of a record (packages
// contenthash and checksum). They describe one content: see Options.Unconfirm.
const (
	TreePrefix = "contenthash/"
	TreeIndex  = TreePrefix + "index"
)

// Attachments are those of one record, within one transaction.
type Attachments struct {
	tx *metadata.Tx
	id ID
}

// Get is the data of that name, or NotFound. Damaged data are DataLoss.
func (a *Attachments) Get(name string) ([]byte, error) { return a.tx.Attachment(a.id, name) }

// Set stores data under that name, over what was there.
func (a *Attachments) Set(name string, data []byte) error {
	return a.tx.SetAttachment(a.id, name, data)
}

// replace is Set for data that may be there already.
func (a *Attachments) replace(name string, data []byte) error {
	if now, err := a.Get(name); err == nil && bytes.Equal(now, data) {
		return nil
	}
	return a.Set(name, data)
}

// Delete removes the data of that name, if there are any.
func (a *Attachments) Delete(name string) error {
	if err := a.tx.DeleteAttachment(a.id, name); !errors.Is(err, errdefs.ErrNotFound) {
		return err
	}
	return nil
}

// Names are the names that begin with prefix, sorted, and the sizes of their
// data in bytes.
func (a *Attachments) Names(prefix string) iter.Seq2[string, int64] {
	return func(yield func(string, int64) bool) {
		for name, size := range a.tx.Attachments(a.id) {
			if strings.HasPrefix(name, prefix) && !yield(name, size) {
				return
			}
		}
	}
}

// DeleteAll removes all data whose names begin with prefix.
func (a *Attachments) DeleteAll(prefix string) error {
	var names []string // nothing is removed while the names are read
	for name := range a.Names(prefix) {
		names = append(names, name)
	}
	for _, name := range names {
		if err := a.Delete(name); err != nil {
			return err
		}
	}
	return nil
}

// EditAttachments changes attachments of a record that is not mutable, and
// nothing else: its revision stays, so what is being found out about it in the
// background still counts. It suits what describes the content, for the id
// names one content only: no handle is needed, and a record that was reopened
// or removed meanwhile is NotFound. A mutable one is FailedPrecondition. fn may
// run several times; nothing is written if it fails.
func (m *Manager) EditAttachments(ctx context.Context, id ID, fn func(*Attachments) error) error {
	end, err := m.beginChange()
	if err != nil {
		return err
	}
	defer end()
	err = m.store.Update(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Get(id)
		if err != nil {
			return err
		}
		if rec.State == metadata.Mutable {
			return fmt.Errorf("it is mutable: %w", errdefs.ErrFailedPrecondition)
		}
		return fn(&Attachments{tx: tx, id: rec.ID})
	})
	if err != nil {
		return fmt.Errorf("edit attachments of record %s: %w", short(id), err)
	}
	return nil
}

// ViewAttachments reads attachments of a record in one transaction, so that
// they fit together.
func (m *Manager) ViewAttachments(ctx context.Context, id ID, fn func(*Attachments) error) error {
	end, err := m.begin()
	if err != nil {
		return err
	}
	defer end()
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		rec, err := tx.Get(id)
		if err != nil {
			return err
		}
		return fn(&Attachments{tx: tx, id: rec.ID})
	})
	if err != nil {
		return fmt.Errorf("attachments of record %s: %w", short(id), err)
	}
	return nil
}

// doubtTree makes the stored hash tree of a mutable record unconfirmed at its
// commit, unless the commit brings one of its own: whoever wrote to the files
// may have told nobody. After a reopen it is so already; a mutable that was
// imported may have another.
func (m *Manager) doubtTree(tx *metadata.Tx, edit *Edit) error {
	if _, told := edit.attach[TreeIndex]; told {
		return nil
	}
	return m.unconfirmTree(&Attachments{tx: tx, id: edit.rec.ID})
}

// unconfirmTree makes a stored hash tree say that a writer may change what it
// describes. One that cannot be used goes.
func (m *Manager) unconfirmTree(a *Attachments) error {
	if m.unconfirm != nil {
		index, err := a.Get(TreeIndex)
		if err == nil {
			index, err = m.unconfirm(index)
		}
		if err == nil && index != nil {
			return a.replace(TreeIndex, index)
		}
		if err != nil && !is(err, errdefs.ErrNotFound, errdefs.ErrDataLoss) {
			return err
		}
		if is(err, errdefs.ErrDataLoss) {
			m.log.Warn("stored content hashes are damaged; they are dropped and computed anew when they are wanted", "record", a.id, "error", err)
		}
	}
	return a.DeleteAll(TreePrefix)
}

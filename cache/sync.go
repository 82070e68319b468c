package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/metadata"
)

// Unsynced is a list of records whose data may not have reached the disk, as
// they were at one moment. Sync it, then hand it to MarkSynced.
type Unsynced struct {
	list []revision
	sync func(context.Context) error
	done bool
	// err is why the data must be taken as lost.
	err error
}

// revision names one state of a record: what was learnt about it is void when
// the record has moved on.
type revision struct {
	id  ID
	rev uint64
}

// Done says whether Sync came to an end, be it a bad one: MarkSynced is due.
func (u *Unsynced) Done() bool { return u.done }

// Len is the number of records on the list.
func (u *Unsynced) Len() int { return len(u.list) }

// Unsynced takes the list of records that are committed or finalized and not
// durable yet.
func (m *Manager) Unsynced(ctx context.Context) (*Unsynced, error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	u := &Unsynced{sync: m.driver.Sync}
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		for id := range tx.Unsettled() {
			rec, err := tx.Get(id)
			if err != nil {
				return err
			}
			// A durable record is on the list when a rename is to be synced.
			if rec.State != metadata.Mutable && rec.State != metadata.Lazy && (!rec.Durable || rec.Was != "") {
				u.list = append(u.list, revision{id, rec.Revision})
			}
		}
		return nil
	})
	if err == nil && m.ownDriver && len(u.list) > 0 {
		u.sync, err = syncAlone(filepath.Join(m.root, "snapshots"))
	}
	if err != nil {
		return nil, fmt.Errorf("list what is not synced: %w", err)
	}
	return u, nil
}

// Sync writes the data of the listed records to the disk. It needs neither the
// store nor the manager that made the list to be open. If the disk fails, the
// data must be taken as lost: hand the list to MarkSynced all the same, which
// then says so in the store.
func (u *Unsynced) Sync(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if u.err == nil && !u.done && len(u.list) > 0 {
		// Once begun it is not cancelled: that would look like a failure.
		if err := u.sync(context.WithoutCancel(ctx)); err != nil {
			u.err = fmt.Errorf("sync snapshots: %w", err)
		}
	}
	u.done = true
	return u.err
}

// syncAlone syncs the file system of dir, also when the driver, which has a
// descriptor of its own for that, is closed by then. The descriptor is opened
// now: the kernel reports to it what goes wrong from here on.
func syncAlone(dir string) (func(context.Context) error, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	return func(context.Context) error {
		if err := unix.Syncfs(int(f.Fd())); err != nil {
			return errors.Join(&os.PathError{Op: "syncfs", Path: dir, Err: err}, f.Close())
		}
		return f.Close()
	}, nil
}

// MarkSynced writes that the records of a list that was synced are durable.
// Those that changed since stay unmarked. It says how many were marked.
func (m *Manager) MarkSynced(ctx context.Context, u *Unsynced) (int, error) {
	end, err := m.beginChange()
	if err != nil {
		return 0, err
	}
	defer end()
	if !u.done {
		return 0, fmt.Errorf("the list was not synced: %w", errdefs.ErrFailedPrecondition)
	}
	if u.err != nil {
		return 0, m.syncFailed(ctx, u.err)
	}
	if len(u.list) == 0 {
		return 0, nil
	}
	var marked []*Record
	err = m.store.Update(ctx, func(tx *metadata.Tx) error {
		marked = marked[:0]
		for _, r := range u.list {
			rec, err := tx.Get(r.id)
			if is(err, errdefs.ErrNotFound) || err == nil && (rec.ID != r.id || rec.Revision != r.rev) {
				continue
			}
			if err != nil {
				return err
			}
			rec.Durable = true
			if rec.State == metadata.Finalized {
				rec.Was = "" // the rename is on the disk, too
			}
			if err = tx.Mark(rec); err != nil {
				return err
			}
			marked = append(marked, rec)
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("mark what was synced: %w", err)
	}
	m.publishMarks(marked, func(rec, marked *Record) { rec.Durable, rec.Was = true, marked.Was })
	return len(marked), nil
}

// Sync makes everything that is committed now survive a power cut, and says
// for how many records that was news. One sync serves them all.
func (m *Manager) Sync(ctx context.Context) (int, error) {
	u, err := m.Unsynced(ctx)
	if err != nil {
		return 0, err
	}
	if err := u.Sync(ctx); err != nil && u.err == nil {
		return 0, err
	}
	return m.MarkSynced(ctx, u)
}

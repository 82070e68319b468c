package cache

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// Cache directories are what builds mount for tools that keep a cache of their
// own: retained mutable records without a parent, found by the id that builds
// call them by. They are never committed, and power cuts leave them as they are.

// TypeCacheMount is the record type of cache directories.
const TypeCacheMount = "exec.cachemount"

// valueDirectory is the value that holds the id of a cache directory. Name and
// index are BuildKit's, so that directories which were migrated are found.
const valueDirectory = "cache-dir"

// DirectoryIndex is the index key that finds the cache directories of id.
func DirectoryIndex(id string) string { return valueDirectory + ":" + id }

// releasedIndex finds those that go when nobody uses them any more.
const releasedIndex = "cache-dir.removed:"

// DirectoryOptions are those of a new cache directory that builds call id.
func DirectoryOptions(id string) NewOptions {
	return NewOptions{
		Type: TypeCacheMount, Description: "cache directory " + id, Retain: true, KeepOnPowerCut: true,
		Values: []Value{{Name: valueDirectory, Data: []byte(id), Index: DirectoryIndex(id)}},
	}
}

// directoryOf is the id that builds call a record by, empty if it is no cache
// directory.
func directoryOf(rec *Record) string {
	for _, v := range rec.Values {
		if v.Name == valueDirectory {
			id, ok := strings.CutPrefix(v.Index, DirectoryIndex(""))
			if !ok {
				id = strings.TrimPrefix(v.Index, releasedIndex)
			}
			return id
		}
	}
	return ""
}

// HoldDirectory holds a retained mutable record without a parent for work that
// goes on after Close, and gives the directory of its tree, which is there as
// long as the hold is: alone if exclusive, else beside others who hold it so,
// all of whom write to one directory. Nothing is mounted.
//
// Errors: NotFound; ErrLocked, which names the holders, and so whom to wait
// for; FailedPrecondition for other records. A committed one is made mutable
// again by GetMutable first.
func (m *Manager) HoldDirectory(ctx context.Context, id ID, exclusive bool) (hold *Hold, dir string, err error) {
	end, err := m.beginChange()
	if err != nil {
		return nil, "", err
	}
	defer end()
	if hold, dir, err = m.holdDirectory(ctx, id, exclusive); err != nil {
		return nil, "", fmt.Errorf("hold directory %s: %w", short(id), err)
	}
	return hold, dir, nil
}

func (m *Manager) holdDirectory(ctx context.Context, id ID, exclusive bool) (*Hold, string, error) {
	e, err := m.find(ctx, id, nil)
	if err != nil {
		return nil, "", err
	}
	defer m.drop(e)
	release, err := m.drive(ctx, e, "hold")
	if err != nil {
		return nil, "", err
	}
	defer release()
	rec, err := m.read(ctx, e.id) // it may have left while we waited
	if err != nil {
		return nil, "", err
	}
	if rec.State != metadata.Mutable || len(rec.Parents) > 0 {
		return nil, "", fmt.Errorf("it is %s and has %d parents: %w", rec.State, len(rec.Parents), errdefs.ErrFailedPrecondition)
	}
	m.lock()
	holders := m.holdersLocked(e)
	m.unlock()
	if len(holders) > 0 {
		return nil, "", &LockedError{ID: e.id, Holders: holders}
	}
	mounts, err := m.driver.Mounts(ctx, rec.Key)
	if err != nil {
		return nil, "", err
	}
	if len(mounts) != 1 || mounts[0].Type != "bind" {
		return nil, "", fmt.Errorf("the driver keeps it in no directory: %w", errdefs.ErrFailedPrecondition)
	}
	hold, err := takeHold(m.root, e.id, exclusive, m.command, m.now())
	if err != nil {
		return nil, "", err
	}
	m.store.Touch(e.id, m.now())
	m.lock()
	defer m.unlock()
	delete(m.written, rec.Key) // others may write in it now
	return hold, mounts[0].Source, nil
}

// RemoveWhenReleased removes a cache directory now, or takes it away from those
// who look for it and leaves it to whoever uses it: it goes with
// RemoveReleased. gone says which.
func (m *Manager) RemoveWhenReleased(ctx context.Context, id ID) (gone bool, err error) {
	end, err := m.beginChange()
	if err != nil {
		return false, err
	}
	defer end()
	out := m.remove(ctx, []ID{id}, nil)
	if out[0].Err == nil || !errors.Is(out[0].Err, ErrLocked) {
		return out[0].Err == nil, out[0].Err
	}
	e, err := m.find(ctx, id, nil)
	if err != nil {
		return false, err
	}
	defer m.drop(e)
	_, err = m.change(ctx, e, func(_ *metadata.Tx, edit *Edit) error {
		name := directoryOf(edit.rec)
		if name == "" {
			return fmt.Errorf("it is no cache directory: %w", errdefs.ErrFailedPrecondition)
		}
		return edit.SetValue(Value{Name: valueDirectory, Data: []byte(name), Index: releasedIndex + name})
	})
	if err != nil {
		return false, fmt.Errorf("remove record %s when it is released: %w", short(id), err)
	}
	return false, nil
}

// RemoveReleased removes the cache directories that RemoveWhenReleased left to
// their users and that nobody uses any more. Whoever gives a directory back
// calls it when it has the store open next; it costs a look into the index
// where there are none.
func (m *Manager) RemoveReleased(ctx context.Context) ([]Removed, error) {
	end, err := m.beginChange()
	if err != nil {
		return nil, err
	}
	defer end()
	found, err := m.SearchPrefix(ctx, releasedIndex)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	var out []Removed
	for _, f := range found {
		// Each for itself: what is still in use must not keep the others.
		r := m.remove(ctx, []ID{f.ID}, nil)[0]
		if !errors.Is(r.Err, ErrLocked) && !errors.Is(r.Err, errdefs.ErrNotFound) {
			out = append(out, r)
		}
	}
	return out, nil
}

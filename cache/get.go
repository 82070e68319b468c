package cache

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// GetOptions say how Get looks a record up.
type GetOptions struct {
	// NoUpdate keeps this use out of the record's last-used time and count.
	NoUpdate bool
}

// Get gives a handle on the record of id, which may be an alias. It writes
// nothing. A record that does not exist is NotFound, a mutable one
// FailedPrecondition, or ErrLocked while somebody writes to it.
func (m *Manager) Get(ctx context.Context, id ID, o GetOptions) (*ImmutableRef, error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	return m.get(ctx, id, o, callerOf(1))
}

// get is Get for a call that came from somewhere else: others may ask who holds
// the record as soon as the handle is there.
func (m *Manager) get(ctx context.Context, id ID, o GetOptions, from caller) (*ImmutableRef, error) {
	var h *handle
	e, err := m.find(ctx, id, func(e *entry) error {
		if e.rec.State == metadata.Mutable {
			for h := range e.handles {
				if h.kind == HolderMutable {
					return &LockedError{ID: e.id, Holders: m.holdersLocked(e)}
				}
			}
			if !e.recorded {
				return fmt.Errorf("it was given up: %w", errdefs.ErrNotFound)
			}
			return fmt.Errorf("it is mutable, commit it first: %w", errdefs.ErrFailedPrecondition)
		}
		h = m.handleLocked(e, HolderImmutable, from)
		h.noTouch = o.NoUpdate
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("get record %s: %w", short(id), err)
	}
	m.drop(e)
	return &ImmutableRef{h: h}, nil
}

// Lookup is the record of id, by id or alias, without a handle: it can be gone
// the moment after. A mutable that is in memory only is not found.
func (m *Manager) Lookup(ctx context.Context, id ID) (*Record, error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	rec, err := m.read(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("look up record %s: %w", short(id), err)
	}
	return rec, nil
}

// Search lists the ids of the records that a value declares under exactly this
// index key, sorted. A record may be gone the moment after.
func (m *Manager) Search(ctx context.Context, key string) (ids []ID, err error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		for id := range tx.ByIndex(key) {
			ids = append(ids, id)
		}
		return nil
	})
	slices.Sort(ids)
	return ids, err
}

// Match is one record found by SearchPrefix.
type Match struct {
	Key string
	ID  ID
}

// SearchPrefix lists all index entries whose key begins with prefix, sorted by
// key, then id.
func (m *Manager) SearchPrefix(ctx context.Context, prefix string) (found []Match, err error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		for key, id := range tx.ByIndexPrefix(prefix) {
			found = append(found, Match{Key: key, ID: id})
		}
		return nil
	})
	slices.SortFunc(found, func(a, b Match) int {
		if a.Key != b.Key {
			return cmpString(a.Key, b.Key)
		}
		return cmpString(string(a.ID), string(b.ID))
	})
	return found, err
}

// Resolve finds the one record whose id, or alias, is or begins with prefix.
// None is NotFound, several are InvalidArgument with some of them named.
func (m *Manager) Resolve(ctx context.Context, prefix string) (id ID, err error) {
	end, err := m.begin()
	if err != nil {
		return "", err
	}
	defer end()
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		if id, err = tx.Resolve(ID(prefix)); err == nil || !is(err, errdefs.ErrNotFound) {
			return err
		}
		var found []ID
		for id := range tx.ByIDPrefix(prefix) {
			if found = append(found, id); len(found) > 3 {
				break
			}
		}
		switch len(found) {
		case 0:
			return fmt.Errorf("no record %s: %w", short(ID(prefix)), errdefs.ErrNotFound)
		case 1:
			id = found[0]
			return nil
		}
		return fmt.Errorf("%s is the beginning of several ids (%s, ...): %w", short(ID(prefix)), joinIDs(found[:2]), errdefs.ErrInvalidArgument)
	})
	return id, err
}

// Children lists the records that have id as a parent, sorted.
func (m *Manager) Children(ctx context.Context, id ID) (ids []ID, err error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		ids = slices.Collect(tx.Children(id))
		return nil
	})
	return ids, err
}

// Refs lists who holds the record of id: handles and mounts of this process
// with the place that acquired them, and processes that work in the snapshot
// on their own.
func (m *Manager) Refs(id ID) []Holder {
	var out []Holder
	m.lock()
	if e := m.entries[id]; e != nil {
		out = m.holdersLocked(e)
	}
	m.unlock()
	if holders, busy, err := testHold(m.root, id, true); err == nil && busy {
		out = append(out, holders...)
	}
	return out
}

package cache

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/metadata"
)

// ground makes sure that the record of e, which the caller uses, and all that
// its tree is made of have their snapshots: lazy ones are extracted, those below
// first. Ancestors stay without a handle: the rows of their children keep them.
func (m *Manager) ground(ctx context.Context, e *entry) error {
	lazy, err := m.lazyBelow(ctx, e)
	if err == nil {
		err = m.extractAll(ctx, e, lazy)
	}
	return err
}

// mountable makes sure that the tree of e can be mounted. A snapshot that is
// there may need less than what it was made of, of which some can be lazy: that
// of a merge which a migration took over stands alone, as does every whole tree.
func (m *Manager) mountable(ctx context.Context, e *entry) error {
	lazy, err := m.lazyBelow(ctx, e)
	if err != nil || len(lazy) == 0 {
		return err
	}
	if rec := m.current(e); rec.State != metadata.Lazy {
		if ok, err := m.stands(ctx, rec.Key); ok || err != nil {
			return err
		}
	}
	return m.extractAll(ctx, e, lazy)
}

// stands says whether the driver has the snapshot key, and all that it mounts it
// over.
func (m *Manager) stands(ctx context.Context, key string) (bool, error) {
	names := []string{key}
	if s, ok := m.driver.Stacker(); ok {
		list, err := s.Layers(ctx, key)
		if is(err, errdefs.ErrNotFound) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("list what snapshot %s is mounted over: %w", key, err)
		}
		for _, l := range list {
			names = append(names, l.Name)
		}
	}
	for _, name := range names {
		if _, err := m.driver.Stat(ctx, name); is(err, errdefs.ErrNotFound) {
			return false, nil
		} else if err != nil {
			return false, fmt.Errorf("look for snapshot %s: %w", name, err)
		}
	}
	return true, nil
}

// lazyBelow lists the lazy records among that of e and what it is made of.
func (m *Manager) lazyBelow(ctx context.Context, e *entry) (lazy []*Record, err error) {
	m.lock()
	rec, grounded := e.rec, e.grounded
	m.unlock()
	if grounded {
		return nil, nil
	}
	err = m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		lazy, err = m.newGround(tx).lazyBelow(rec)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list what record %s is made of: %w", short(e.id), err)
	}
	if len(lazy) == 0 {
		m.setGrounded(e)
	}
	return lazy, nil
}

// setGrounded notes that the record of e has all it needs. What has a snapshot stays
// so for as long as the cache is open.
func (m *Manager) setGrounded(e *entry) {
	m.lock()
	defer m.unlock()
	e.grounded = e.rec.State != metadata.Lazy
}

// extractAll extracts what lazyBelow listed for e.
func (m *Manager) extractAll(ctx context.Context, e *entry, lazy []*Record) error {
	if len(lazy) > 0 && m.readOnly {
		return fmt.Errorf("record %s has to be extracted, and store %s is open read-only: %w", short(e.id), m.root, errdefs.ErrFailedPrecondition)
	}
	if err := m.requireBlobs(ctx, lazy); err != nil {
		return err
	}
	for _, rec := range lazy {
		if err := m.extract(ctx, rec.ID); err != nil {
			return err
		}
	}
	m.setGrounded(e)
	return nil
}

// requireBlobs fails if the blobs of some lazy layers cannot be had, or are known
// to hold others, before anything is done.
func (m *Manager) requireBlobs(ctx context.Context, lazy []*Record) error {
	var missing []digest.Digest
	for _, rec := range lazy {
		if rec.Op == metadata.Merge || rec.Op == metadata.Diff {
			continue
		}
		_, ok, err := m.blobs.source(ctx, rec)
		if err != nil {
			return err
		}
		if !ok {
			list, wrong := candidates(rec)
			switch {
			case len(list) > 0:
				missing = append(missing, list[0].Digest)
			case wrong != nil:
				return fmt.Errorf("record %s has no other blob: %w", short(rec.ID), wrong)
			default:
				missing = append(missing, "")
			}
		}
	}
	if len(missing) > 0 {
		return &MissingBlobsError{Digests: missing}
	}
	return nil
}

// grounds finds what has to have a snapshot before a record can be mounted.
type grounds struct {
	*lister
	seen map[ID]bool
	// trees says that the driver keeps whole trees: then the layer of a diff
	// is known by its inputs only.
	trees bool
}

func (m *Manager) newGround(tx *metadata.Tx) *grounds {
	_, stacks := m.driver.Stacker()
	return &grounds{lister: newLister(tx), seen: map[ID]bool{}, trees: !stacks}
}

// lazyBelow lists the lazy records among rec and what it needs, each after
// what it needs itself.
func (g *grounds) lazyBelow(rec *Record) (lazy []*Record, err error) {
	err = g.below(rec, func(rec *Record) {
		if rec.State == metadata.Lazy {
			lazy = append(lazy, rec)
		}
	})
	return lazy, err
}

// allBelow lists rec and what it needs, each after what it needs itself.
func (g *grounds) allBelow(rec *Record) (ids []ID, err error) {
	err = g.below(rec, func(rec *Record) { ids = append(ids, rec.ID) })
	return ids, err
}

func (g *grounds) below(rec *Record, each func(*Record)) error {
	type visit struct {
		rec  *Record
		done bool // what it needs is on the stack above it, or listed
	}
	stack := []visit{{rec: rec}}
	for len(stack) > 0 {
		top := &stack[len(stack)-1]
		if top.done || g.seen[top.rec.ID] {
			if top.done {
				each(top.rec)
			}
			stack = stack[:len(stack)-1]
			continue
		}
		top.done = true
		g.seen[top.rec.ID] = true
		ids, err := g.needs(top.rec)
		if err != nil {
			return err
		}
		// What waits further down in the stack may be needed here first.
		for _, id := range ids {
			if g.seen[id] {
				continue
			}
			below, err := g.tx.Get(id)
			if err != nil {
				return err
			}
			stack = append(stack, visit{rec: below})
		}
	}
	return nil
}

// needs lists the records whose snapshots a record's own is made of, or is
// mounted over.
func (g *grounds) needs(rec *Record) ([]ID, error) {
	if rec.Op != metadata.Merge && rec.Op != metadata.Diff {
		return rec.Parents, nil
	}
	list, err := g.of(rec)
	if err != nil {
		return nil, err
	}
	if len(list) == 1 && list[0] == rec.ID {
		if rec.State == metadata.Lazy || g.trees {
			return rec.Parents, nil // they are compared
		}
		return nil, nil // it has a layer of its own
	}
	return list, nil
}

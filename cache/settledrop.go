package cache

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// dropDoomed removes the doomed records with all their descendants, leaf
// first. A family in which a living process works is left alone.
func (s *settling) dropDoomed(ctx context.Context) error {
	var order []metadata.ID
	seen := map[metadata.ID]bool{}
	for _, id := range slices.Sorted(maps.Keys(s.doomed)) {
		why := s.doomed[id]
		family, err := s.family(ctx, id)
		if err != nil {
			return err
		}
		if at := s.heldIn(family); at != "" {
			s.leave("a record is broken but a process works in it", "id", id, "held", at, "reason", why)
			continue
		}
		s.m.log.Warn("settled: record dropped", "id", id, "reason", why, "descendants", len(family)-1)
		for _, member := range family {
			if !seen[member] {
				seen[member] = true
				order = append(order, member)
			}
		}
	}
	return s.dropAll(ctx, order)
}

func (s *settling) heldIn(family []metadata.ID) metadata.ID {
	for _, id := range family {
		if s.held(id) {
			return id
		}
	}
	return ""
}

// family is id and its descendants, each after its own descendants.
func (s *settling) family(ctx context.Context, id metadata.ID) (out []metadata.ID, err error) {
	err = s.m.store.View(ctx, func(tx *metadata.Tx) error {
		out = descendants(tx, id)
		return nil
	})
	return out, err
}

// descendants lists id and all below it, each after its own children. It keeps
// its own stack: chains are as long as users make them.
func descendants(tx *metadata.Tx, id metadata.ID) (order []metadata.ID) {
	type visit struct {
		id   metadata.ID
		seen bool // its children are on the stack above it, or done
	}
	stack := []visit{{id: id}}
	known := map[metadata.ID]bool{id: true}
	for len(stack) > 0 {
		top := &stack[len(stack)-1]
		if top.seen {
			order = append(order, top.id)
			stack = stack[:len(stack)-1]
			continue
		}
		top.seen = true
		for child := range tx.Children(top.id) {
			if !known[child] {
				known[child] = true
				stack = append(stack, visit{id: child})
			}
		}
	}
	return order
}

// dropAll removes records, given leaf first, with whatever names their
// snapshots have: names first into the trash, then the records in one
// transaction, then the bytes.
func (s *settling) dropAll(ctx context.Context, ids []metadata.ID) error {
	if len(ids) == 0 {
		return nil
	}
	m := s.m
	trash := map[metadata.ID][]snapshot.Pending{}
	kept := map[metadata.ID]error{}
	var going []*Record
	for _, id := range ids {
		rec, err := m.readToDrop(ctx, id)
		if err != nil {
			return err
		}
		going = append(going, rec)
		for _, key := range driverKeys(rec) {
			p, err := m.detachKey(ctx, key)
			switch {
			case is(err, errdefs.ErrNotFound):
			case is(err, errdefs.ErrFailedPrecondition):
				kept[id] = err
			case err != nil:
				return err
			default:
				delete(s.active, key)
				trash[id] = append(trash[id], p)
			}
		}
	}
	// settleBlobs looks later whether other records name them.
	m.blobs.intentsFor(going)
	var refused map[metadata.ID]error
	err := m.store.Update(ctx, func(tx *metadata.Tx) error {
		refused = maps.Clone(kept)
		for _, id := range ids {
			if refused[id] != nil {
				continue
			}
			err := tx.Delete(id)
			switch {
			case is(err, errdefs.ErrFailedPrecondition):
				refused[id] = err
			case is(err, errdefs.ErrDataLoss):
				_, err = tx.Quarantine(id)
				fallthrough
			default:
				if err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, id := range slices.Backward(ids) {
		for _, p := range trash[id] {
			if refused[id] == nil {
				s.discard(ctx, p)
			} else if err := m.driver.Restore(ctx, p); err != nil {
				return err
			}
		}
		if refused[id] != nil {
			s.leave("a record is broken but has children that are in use", "id", id, "error", refused[id])
		}
	}
	return nil
}

// readToDrop reads a record; of one that is damaged it guesses the names in the
// driver.
func (m *Manager) readToDrop(ctx context.Context, id metadata.ID) (*Record, error) {
	rec, err := m.read(ctx, id)
	if is(err, errdefs.ErrDataLoss) {
		return &metadata.Record{ID: id, Key: activeKey(id)}, nil
	}
	return rec, err
}

// dropUnrecorded removes names that no record names: active ones always, in
// another boot committed ones, too.
func (s *settling) dropUnrecorded(ctx context.Context) error {
	m := s.m
	var names []string
	for key := range s.active {
		names = append(names, key)
	}
	if !s.sameBoot {
		committed, err := m.driver.Committed(ctx)
		if err != nil {
			return err
		}
		names = append(names, committed...)
	}
	var orphans []string
	err := m.store.View(ctx, func(tx *metadata.Tx) error {
		for _, key := range names {
			_, err := tx.ByKey(key)
			if errors.Is(err, errdefs.ErrNotFound) && !s.named(tx, key) {
				orphans = append(orphans, key)
			} else if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.refused, err = s.dropNames(ctx, orphans)
	return err
}

// copiedFrom is the record whose layer's cleaned copy may have this key.
func copiedFrom(key string) (metadata.ID, bool) {
	id, ok := strings.CutSuffix(key, cleanSuffix)
	return metadata.ID(id), ok
}

// dropCopies removes, in another boot, the cleaned copies of layers that nobody
// needs: they may not have reached the disk, and are made again.
func (s *settling) dropCopies(ctx context.Context) error {
	if s.sameBoot {
		return nil
	}
	committed, err := s.m.driver.Committed(ctx)
	if err != nil {
		return err
	}
	var copies []string
	for _, key := range committed {
		if _, ok := copiedFrom(key); ok {
			if _, err := s.owner(ctx, key); is(err, errdefs.ErrNotFound) {
				copies = append(copies, key)
			} else if err != nil {
				return err
			}
		}
	}
	// One that a merge stacks, whose data is on the disk, is refused.
	_, err = s.dropNames(ctx, copies)
	return err
}

// owner is the record that names a driver key.
func (s *settling) owner(ctx context.Context, key string) (id metadata.ID, err error) {
	err = s.m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		id, err = tx.ByKey(key)
		return err
	})
	return id, err
}

// dropRefused tries again what had children that were doomed.
func (s *settling) dropRefused(ctx context.Context) error {
	kept, err := s.dropNames(ctx, s.refused)
	if len(kept) > 0 {
		s.leave("snapshots without a record have children that are in use", "keys", kept)
	}
	return err
}

// named says whether key is the final name of a record whose Finalize is
// about to be finished, belongs to a living process, or is a cleaned copy of a
// layer, which comes later.
func (s *settling) named(tx *metadata.Tx, key string) bool {
	if id, ok := copiedFrom(key); ok {
		if _, err := tx.Get(id); err == nil {
			return true
		}
	}
	rec, err := tx.Get(metadata.ID(key))
	if err == nil && rec.State == metadata.Committed && string(rec.ID) == key {
		return true
	}
	return s.held(madeFor(key))
}

// dropNames removes names without a record. A parent goes after its children,
// which the driver knows: what it refuses is tried again as long as others go,
// and returned then.
func (s *settling) dropNames(ctx context.Context, names []string) (kept []string, err error) {
	m := s.m
	for {
		kept = nil
		for _, key := range names {
			p, err := m.detachKey(ctx, key)
			switch {
			case is(err, errdefs.ErrNotFound):
			case is(err, errdefs.ErrFailedPrecondition):
				kept = append(kept, key)
			case err != nil:
				return nil, err
			default:
				m.log.Info("settled: snapshot without a record removed", "key", key)
				delete(s.active, key)
				s.discard(ctx, p)
			}
		}
		if len(kept) == len(names) {
			return kept, nil
		}
		names = kept
	}
}

package cache

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// settling compares the driver's names with the records after an end that was
// not clean. The names say what was under way, the records what is true:
//
//	found                                       done
//	a name that a living process holds          left alone
//	removal, record without children            record removed, then the bytes
//	removal, record with a child                the name goes back
//	removal, no record                          the bytes go
//	active name that no record names            removed
//	mutable or committed, active there          kept
//	committed, committed under the record's id  the Finalize is finished
//	finalized, only the former name is there    renamed again
//	lazy, committed under the record's id       same boot: left for the next
//	                                            Extract; else removed
//	finalized, nothing there                    lazy again if a blob is here or
//	                                            it is a merge or a diff, else
//	                                            dropped with its descendants
//	any other, nothing there                    dropped with its descendants
//	intent of a blob that no record names       blob and intent removed
//	unfinished blob of ours                     removed
//
// In another boot data that was not synced may be gone although its names are
// there, so unsynced records are dropped first, and all names are compared
// with all records.
type settling struct {
	m        *Manager
	sameBoot bool
	active   map[string]snapshot.Pending
	removals []snapshot.Pending
	// suspects are records to judge although they do not say so themselves.
	suspects []metadata.ID
	// doomed are records to drop, with the reason for the log.
	doomed map[metadata.ID]string
	// again are records that lost their snapshot and can make it again.
	again map[metadata.ID]string
	// refused are names without a record that have children.
	refused []string
	// fixes are records whose snapshot has its final name already.
	fixes []metadata.ID
	// undone says that something was left as it is, so that the next open
	// has to settle again.
	undone bool
}

func (m *Manager) settle(ctx context.Context, meta metadata.Meta, sameBoot bool) error {
	if err := m.marks.setDirty(); err != nil {
		return err
	}
	held := func(name string) bool { return holdFileBusy(m.root, name) }
	if err := m.pool.cleanStale(held); err != nil {
		m.log.Warn("stale mounts could not be cleaned", "error", err)
	}
	if err := dropStaleHolds(m.root); err != nil {
		m.log.Warn("stale holds could not be cleaned", "error", err)
	}
	s := &settling{m: m, sameBoot: sameBoot, doomed: map[metadata.ID]string{}, again: map[metadata.ID]string{}}
	for _, step := range []func(context.Context) error{
		s.readNames, s.settleRemovals, s.judgeRecords, s.makeLazy,
		s.dropUnrecorded, s.dropDoomed, s.dropRefused, s.dropCopies, s.settleBlobs,
	} {
		if err := step(ctx); err != nil {
			return fmt.Errorf("settle the store: %w", err)
		}
	}
	return s.finish(ctx, meta)
}

// held says whether a living process works in the snapshot made for id.
func (s *settling) held(id metadata.ID) bool {
	_, busy, err := testHold(s.m.root, id, true)
	return busy || err != nil
}

func (s *settling) readNames(ctx context.Context) error {
	if err := s.m.driver.Settle(ctx); err != nil {
		return err
	}
	return s.readPending(ctx)
}

func (s *settling) readPending(ctx context.Context) error {
	pending, err := s.m.driver.Pending(ctx)
	if err != nil {
		return err
	}
	s.active, s.removals = map[string]snapshot.Pending{}, nil
	for _, p := range pending {
		if p.Kind == snapshot.PendingActive {
			s.active[p.Key] = p
		} else {
			s.removals = append(s.removals, p)
		}
	}
	return nil
}

// settleRemovals finishes removals, or takes them back.
func (s *settling) settleRemovals(ctx context.Context) error {
	m := s.m
	var discard []snapshot.Pending
	restored := false
	for _, p := range s.removals {
		var owner metadata.ID
		var children int
		err := m.store.View(ctx, func(tx *metadata.Tx) (err error) {
			owner, err = tx.ByKey(p.Key)
			if err == nil {
				children = tx.ChildCount(owner)
			}
			return err
		})
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return err
		}
		if owner != "" && (children > 0 || s.held(owner)) {
			if err := m.driver.Restore(ctx, p); is(err, errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrFailedPrecondition) {
				// It has no place to go back to: the record is judged by
				// what is there.
				s.leave("a removal cannot be taken back", "id", owner, "key", p.Key, "error", err)
				s.suspects = append(s.suspects, owner)
			} else if err != nil {
				return err
			}
			restored = true
			continue
		}
		if owner != "" {
			m.log.Info("settled: removal finished", "id", owner, "key", p.Key)
			if rec, err := m.read(ctx, owner); err == nil {
				m.blobs.intentsFor([]*Record{rec})
			}
			if err := m.store.Update(ctx, func(tx *metadata.Tx) error { return tx.Delete(owner) }); err != nil {
				return err
			}
		}
		discard = append(discard, p)
	}
	for _, p := range discard {
		s.discard(ctx, p)
	}
	if restored {
		return s.readPending(ctx)
	}
	return nil
}

// discard deletes bytes that nothing needs. That they cannot be deleted is no
// reason not to open.
func (s *settling) discard(ctx context.Context, p snapshot.Pending) {
	if err := s.m.driver.Discard(ctx, p); err != nil {
		s.leave("the bytes of a removed snapshot cannot be deleted", "key", p.Key, "error", err)
	}
}

// leave notes what could not be settled.
func (s *settling) leave(what string, args ...any) {
	s.undone = true
	s.m.log.Warn(what, args...)
}

// judgeRecords looks at each record whose name or data may be wrong: in the
// same boot those that say so of themselves, in another one all.
func (s *settling) judgeRecords(ctx context.Context) error {
	var records []*metadata.Record
	err := s.m.store.View(ctx, func(tx *metadata.Tx) error {
		if s.sameBoot {
			ids := slices.Collect(tx.Unsettled())
			for _, id := range append(ids, s.suspects...) {
				rec, err := tx.Get(id)
				if err != nil {
					s.m.log.Warn("record cannot be read", "id", id, "error", err)
					continue
				}
				records = append(records, rec)
			}
			return nil
		}
		for rec, err := range tx.Records() {
			if err != nil {
				s.m.log.Warn("record cannot be read", "error", err)
				continue
			}
			records = append(records, rec)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, rec := range records {
		if rec.State == metadata.Lazy {
			continue
		}
		if !s.sameBoot && lostByPowerCut(rec) {
			if err := s.lost(ctx, rec, "its data was not synced before the machine went down"); err != nil {
				return err
			}
			continue
		}
		if err := s.judge(ctx, rec); err != nil {
			return err
		}
	}
	return nil
}

// lostByPowerCut says whether the record's data may not have reached the disk.
func lostByPowerCut(rec *metadata.Record) bool {
	if rec.State == metadata.Mutable {
		return rec.OnPowerCut == metadata.Drop
	}
	return rec.State != metadata.Lazy && !rec.Durable
}

func (s *settling) judge(ctx context.Context, rec *metadata.Record) error {
	m := s.m
	if rec.State != metadata.Finalized {
		if _, ok := s.active[rec.Key]; ok {
			return s.judgeActive(ctx, rec)
		}
	}
	if rec.State == metadata.Mutable {
		s.doomed[rec.ID] = "its snapshot is gone"
		return nil
	}
	st, err := m.driver.Stat(ctx, string(rec.ID))
	switch {
	case is(err, errdefs.ErrDataLoss):
		s.doomed[rec.ID] = "its snapshot is damaged"
		return nil
	case err != nil && !is(err, errdefs.ErrNotFound):
		return err
	case err == nil && st.Kind == snapshots.KindCommitted:
		if rec.State == metadata.Committed {
			m.log.Info("settled: finalize finished", "id", rec.ID)
			s.fixes = append(s.fixes, rec.ID)
		}
		return nil
	}
	if _, ok := s.active[rec.Was]; ok && rec.State == metadata.Finalized {
		m.log.Info("settled: lost rename repeated", "id", rec.ID)
		err := m.driver.Commit(ctx, string(rec.ID), rec.Was)
		if is(err, errdefs.ErrDataLoss) {
			s.doomed[rec.ID] = "its snapshot is damaged"
			return nil
		}
		if err == nil {
			delete(s.active, rec.Was)
		}
		return err
	}
	if rec.State == metadata.Finalized && rec.Key != string(rec.ID) {
		// Adopted under a name of its own.
		if _, err := m.driver.Stat(ctx, rec.Key); err == nil || !errors.Is(err, errdefs.ErrNotFound) {
			return err
		}
	}
	return s.lost(ctx, rec, "its snapshot is gone")
}

// judgeActive looks at what a power cut left of a snapshot that has its name:
// the driver may not know any more what it wrote down about it.
func (s *settling) judgeActive(ctx context.Context, rec *metadata.Record) error {
	if s.sameBoot {
		return nil
	}
	_, err := s.m.driver.Stat(ctx, rec.Key)
	if is(err, errdefs.ErrDataLoss) {
		s.doomed[rec.ID] = "its snapshot is damaged"
		return nil
	}
	return err
}

// finish writes what was found in one transaction, and last the boot id, so
// that a settling that is cut off starts over.
func (s *settling) finish(ctx context.Context, meta metadata.Meta) error {
	m := s.m
	if s.undone {
		m.setLeftover()
	} else {
		meta.BootID = m.bootID
	}
	meta.Driver, meta.Attributes = m.info.Name, m.info.Attributes
	if s.sameBoot && len(s.fixes) == 0 {
		return nil
	}
	raw := map[metadata.ID]bool{}
	for _, id := range s.fixes {
		var err error
		if raw[id], err = m.isRaw(ctx, string(id)); err != nil && !is(err, errdefs.ErrNotFound) {
			return fmt.Errorf("settle record %s: %w", short(id), err)
		}
	}
	err := m.store.Update(ctx, func(tx *metadata.Tx) error {
		for _, id := range s.fixes {
			rec, err := tx.Get(id)
			if is(err, errdefs.ErrNotFound) {
				continue // dropped with an ancestor
			}
			if err != nil {
				return err
			}
			finalized(rec, raw[id])
			if _, err := tx.Put(rec); err != nil {
				return err
			}
		}
		return tx.SetMeta(meta)
	})
	if err != nil {
		return fmt.Errorf("settle the store: %w", err)
	}
	return nil
}

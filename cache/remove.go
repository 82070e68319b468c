package cache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// Removed is the outcome for one record that Remove was asked for.
type Removed struct {
	ID ID
	// Freed is what its snapshot occupied, and blobs that went with it, in
	// bytes; 0 if Err is set.
	Freed int64
	// Err says why the record is still there: NotFound, ErrLocked, or
	// FailedPrecondition with its children listed.
	Err error
}

// Remove removes records for good, with their snapshots. Children go before
// their parents whatever the order of ids; a record that is held or has other
// children stays, the rest goes. All share one transaction. The space is free
// when Remove returns.
func (m *Manager) Remove(ctx context.Context, ids ...ID) ([]Removed, error) {
	end, err := m.beginChange()
	if err != nil {
		return nil, err
	}
	defer end()
	return m.remove(ctx, ids, nil), nil
}

// planned is what a plan knows of a victim, which must still be true.
type planned struct {
	revision uint64
	size     int64
}

// remove is one removal of many records. With plan it waits for nobody: what
// somebody drives to another state is taken for held.
func (m *Manager) remove(ctx context.Context, ids []ID, plan map[ID]planned) []Removed {
	r := &removal{m: m, plan: plan, victims: map[ID]*victim{}, failed: map[ID]error{}}
	out := make([]Removed, len(ids))
	for i, id := range ids {
		out[i].ID = id
	}
	defer r.letGo()
	m.retryOrphans(ctx)
	r.take(ctx, ids)
	order := r.order(ctx)
	r.inBackground(func() { r.detach(ctx, order) })
	r.commit(ctx, order)
	r.inBackground(func() { r.discard(ctx, order) })
	for i := range out {
		id := r.names[out[i].ID]
		if err := r.failed[id]; err != nil {
			out[i].Err = fmt.Errorf("remove record %s: %w", short(out[i].ID), err)
		} else {
			out[i].Freed = r.victims[id].size
		}
	}
	return out
}

// removal is one call of Remove.
type removal struct {
	m *Manager
	// plan, if not nil, has all victims.
	plan    map[ID]planned
	victims map[ID]*victim
	failed  map[ID]error
	// names maps the ids that were asked for to those of the records.
	names map[ID]ID
}

// inBackground runs a part of a removal that consists of system calls. Nobody
// waits for those of a prune. The transaction is no such part: others may be in
// it.
func (r *removal) inBackground(f func()) {
	if r.plan == nil {
		f()
	} else {
		aside(f)
	}
}

type victim struct {
	e       *entry
	rec     *Record
	size    int64
	trash   []snapshot.Pending
	gone    bool
	release func()
	leave   func(gone bool)
}

// take finds the records and takes their tokens, in sorted order, so that two
// removals cannot wait for each other.
func (r *removal) take(ctx context.Context, ids []ID) {
	m := r.m
	r.names = map[ID]ID{}
	for _, id := range ids {
		e, err := m.find(ctx, id, nil)
		if err != nil {
			r.names[id] = id
			r.failed[id] = err
			continue
		}
		r.names[id] = e.id
		if r.victims[e.id] != nil {
			m.drop(e)
			continue
		}
		r.victims[e.id] = &victim{e: e}
	}
	for _, id := range slices.Sorted(maps.Keys(r.victims)) {
		if err := r.hold(ctx, r.victims[id]); err != nil {
			r.failed[id] = err
		}
	}
}

// hold makes sure that nobody holds v, and that nobody will.
func (r *removal) hold(ctx context.Context, v *victim) (err error) {
	m := r.m
	if err := r.drive(ctx, v); err != nil {
		return err
	}
	rec, err := m.read(ctx, v.e.id)
	if err != nil {
		return err
	}
	if p, ok := r.plan[v.e.id]; ok && p.revision != rec.Revision {
		return fmt.Errorf("it has revision %d, not %d as in the plan: %w", rec.Revision, p.revision, errdefs.ErrFailedPrecondition)
	}
	v.rec = rec
	if holders, busy, err := testHold(m.root, v.e.id, true); err != nil {
		return err
	} else if busy {
		return &LockedError{ID: v.e.id, Holders: holders}
	}
	if v.rec.State != metadata.Finalized && v.rec.Key != "" {
		if err := m.noForeignWriter(ctx, v.e.id, v.rec.Key); err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return err
		}
	}
	m.lock()
	defer m.unlock()
	v.leave, err = m.leaveLocked(v.e)
	return err
}

// drive takes the victim's token.
func (r *removal) drive(ctx context.Context, v *victim) (err error) {
	if r.plan == nil {
		v.release, err = r.m.drive(ctx, v.e, "removal")
		return err
	}
	var ok bool
	if v.release, ok = r.m.tryDrive(v.e, "removal"); ok {
		return nil
	}
	r.m.lock()
	defer r.m.unlock()
	return &LockedError{ID: v.e.id, Holders: []Holder{{Kind: HolderOperation, Command: v.e.driving, Since: v.e.since}}}
}

// order sorts the victims leaf first and refuses those that have a child which
// stays.
func (r *removal) order(ctx context.Context) (order []ID) {
	// inside counts a victim's children among the victims that are not in
	// order yet.
	inside := map[ID]int{}
	for id, v := range r.victims {
		if v.rec == nil {
			continue // it is not there, or could not be read
		}
		inside[id] += 0
		for _, p := range v.rec.Parents {
			inside[p]++
		}
	}
	var ready []ID
	for id, n := range inside {
		if n == 0 && r.known(id) {
			ready = append(ready, id)
		}
	}
	slices.Sort(ready)
	err := r.m.store.View(ctx, func(tx *metadata.Tx) error {
		for len(ready) > 0 {
			id := ready[0]
			ready = ready[1:]
			if r.failed[id] == nil {
				if stay := r.staying(tx, id); len(stay) > 0 {
					r.failed[id] = fmt.Errorf("it has children (%s): %w", joinIDs(stay), errdefs.ErrFailedPrecondition)
				} else {
					order = append(order, id)
				}
			}
			for _, p := range r.victims[id].rec.Parents {
				if inside[p]--; inside[p] == 0 && r.known(p) {
					ready = append(ready, p)
				}
			}
		}
		return nil
	})
	if err != nil {
		r.failAll(slices.Collect(maps.Keys(r.victims)), err)
		return nil
	}
	return order
}

// known says whether id is a victim whose record was read.
func (r *removal) known(id ID) bool { return r.victims[id] != nil && r.victims[id].rec != nil }

// staying lists children of id that do not go with it.
func (r *removal) staying(tx *metadata.Tx, id ID) (out []ID) {
	for child := range tx.Children(id) {
		if r.victims[child] == nil || r.failed[child] != nil {
			if out = append(out, child); len(out) == 5 {
				return out
			}
		}
	}
	return out
}

func (r *removal) failAll(ids []ID, err error) {
	for _, id := range ids {
		if r.failed[id] == nil {
			r.failed[id] = err
		}
	}
}

// detach takes the snapshots' names away: this is where a removal begins to
// be visible on the disk.
func (r *removal) detach(ctx context.Context, order []ID) {
	m := r.m
	if len(order) == 0 {
		return
	}
	if err := m.marks.setDirty(); err != nil {
		r.failAll(order, err)
		return
	}
	for _, id := range order {
		v := r.victims[id]
		v.size = r.sizeOf(ctx, v)
		if err := ctx.Err(); err != nil {
			r.failed[id] = context.Cause(ctx)
			continue
		}
		for _, key := range driverKeys(v.rec) {
			p, err := m.detachKey(ctx, key)
			if err == nil {
				v.trash = append(v.trash, p)
			} else if !errors.Is(err, errdefs.ErrNotFound) {
				r.failed[id] = err
				break
			}
		}
	}
}

// sizeOf is what the removal of a victim frees. A size that cannot be had is
// no reason to keep a record.
func (r *removal) sizeOf(ctx context.Context, v *victim) int64 {
	if p, ok := r.plan[v.e.id]; ok {
		return p.size
	}
	if v.rec.Size != metadata.SizeUnknown || v.rec.Key == "" {
		return max(v.rec.Size, 0)
	}
	size, err := r.m.sizeOf(ctx, v.rec)
	if err != nil {
		return 0
	}
	return size
}

// commit removes the records, and gives the names back to those that turn out
// to be needed.
func (r *removal) commit(ctx context.Context, order []ID) {
	// What was begun is ended: the names are away already.
	ctx = context.WithoutCancel(ctx)
	blobs := r.m.blobs.intentsFor(r.records(order))
	var refused map[ID]error
	err := errNothingToDo
	if slices.ContainsFunc(order, func(id ID) bool { return r.failed[id] == nil }) {
		err = r.m.store.Update(ctx, func(tx *metadata.Tx) error {
			refused = map[ID]error{}
			for _, id := range order {
				if r.failed[id] != nil {
					continue
				}
				err := tx.Delete(id)
				if errors.Is(err, errdefs.ErrFailedPrecondition) {
					refused[id] = err
				} else if err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		r.failAll(order, err)
	}
	if errors.Is(err, metadata.ErrUnknownOutcome) {
		// The names stay in the trash: whatever the next open reads, it
		// ends what was begun here.
		r.m.setLeftover()
		return
	}
	maps.Copy(r.failed, refused)
	freed := r.m.blobs.drop(ctx, blobs)
	r.forget(order)
	// Parents go back before their children.
	for _, id := range slices.Backward(order) {
		v := r.victims[id]
		if v.gone = r.failed[id] == nil; v.gone {
			// Who waits for the outcome need not wait for the bytes.
			v.leave(true)
			v.leave = nil
			for _, b := range v.rec.Blobs {
				v.size += freed[b.Digest]
				delete(freed, b.Digest)
			}
			continue
		}
		for _, p := range v.trash {
			if err := r.m.driver.Restore(ctx, p); err != nil {
				r.failed[id] = errors.Join(r.failed[id], err)
				r.m.setLeftover()
			}
		}
		v.trash = nil
	}
}

// forget drops what is noted of the snapshots of records that are gone.
func (r *removal) forget(order []ID) {
	r.m.lock()
	defer r.m.unlock()
	for _, id := range order {
		if r.failed[id] == nil {
			delete(r.m.written, r.victims[id].rec.Key)
			delete(r.m.unswapped, id)
		}
	}
}

// records are those of the victims that are about to go.
func (r *removal) records(order []ID) (recs []*Record) {
	for _, id := range order {
		if r.failed[id] == nil {
			recs = append(recs, r.victims[id].rec)
		}
	}
	return recs
}

var errNothingToDo = errors.New("no record is left to remove")

// discard frees the space.
func (r *removal) discard(ctx context.Context, order []ID) {
	ctx = context.WithoutCancel(ctx)
	m := r.m
	for _, id := range order {
		v := r.victims[id]
		if !v.gone {
			continue
		}
		for _, p := range v.trash {
			if m.discardPending(ctx, p) != nil {
				v.size = 0 // the record is gone, its bytes go later
			}
		}
	}
}

// letGo tells those who waited how it ended.
func (r *removal) letGo() {
	for _, v := range r.victims {
		if v.leave != nil {
			v.leave(false)
		}
		if v.release != nil {
			v.release()
		}
		r.m.drop(v.e)
	}
}

func (m *Manager) setLeftover() {
	m.lock()
	defer m.unlock()
	m.leftover = true
}

// driverKeys are the names that belong to a record: those that its snapshot may
// have, and that of the cleaned copy of its layer.
func driverKeys(rec *Record) []string {
	keys := snapshotKeys(rec)
	if rec.Raw {
		keys = append(keys, cleanKey(rec.ID))
	}
	return keys
}

// snapshotKeys are the names that the snapshot of a record may have: besides
// the one that the record says, the former one and the one that a finalize
// gives, which a crash can leave.
func snapshotKeys(rec *Record) (keys []string) {
	for _, key := range []string{rec.Key, rec.Was, string(rec.ID)} {
		if key != "" && !slices.Contains(keys, key) {
			keys = append(keys, key)
		}
	}
	return keys
}

package metadata

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"
)

// use is what Touch gathered for one record.
type use struct {
	count uint64
	last  time.Time
}

func (u use) plus(o use) use {
	if o.last.After(u.last) {
		u.last = o.last
	}
	u.count += o.count
	return u
}

// uses holds what waits to be written. The mutex is a leaf: nothing is called
// under it.
type uses struct {
	mu sync.Mutex
	// gathered is what came in since the last transaction took it.
	gathered map[ID]use
	// flying is what a transaction is about to commit, which is readable
	// from transaction flyingTx on.
	flying   map[ID]use
	flyingTx uint64
	// wake tells the flusher that gathered is no longer empty.
	wake chan struct{}
}

func newUses() *uses { return &uses{gathered: map[ID]use{}, wake: make(chan struct{}, 1)} }

func (u *uses) add(id ID, one use) {
	u.mu.Lock()
	u.gathered[id] = u.gathered[id].plus(one)
	u.mu.Unlock()
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

func (u *uses) waiting() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.gathered)
}

// take hands what was gathered to the transaction that will commit it.
func (u *uses) take(tx uint64) map[ID]use {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.flying, u.flyingTx, u.gathered = u.gathered, tx, map[ID]use{}
	return u.flying
}

// land ends the flight. What was not written waits again.
func (u *uses) land(written bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !written {
		for id, f := range u.flying {
			u.gathered[id] = u.gathered[id].plus(f)
		}
	}
	u.flying = nil
}

// addPending adds to a record what the transaction that it was read in does
// not show yet.
func (u *uses) addPending(r *Record, tx uint64) {
	u.mu.Lock()
	p := u.gathered[r.ID]
	if tx < u.flyingTx {
		p = p.plus(u.flying[r.ID])
	}
	u.mu.Unlock()
	r.addUse(p)
}

func (r *Record) addUse(u use) {
	r.UsageCount += u.count
	if u.last.After(r.LastUsed) {
		r.LastUsed = time.Unix(u.last.Unix(), int64(u.last.Nanosecond())).UTC()
	}
}

// Touch notes one use of a record: UsageCount grows by one, and LastUsed is
// moved to at if that is later. It does no I/O; the note rides on the next
// transaction, is written after the flush interval, by Flush and by Close,
// and shows in Get at once. It changes no revision. An id without a record
// is ignored when its turn comes, and so is a Touch of a store that is
// closed or read-only.
func (s *Store) Touch(id ID, at time.Time) {
	if s.opts.ReadOnly || s.usable() != nil || validateID("record id", id) != nil {
		return
	}
	s.uses.add(id, use{count: 1, last: at})
}

// Flush writes what Touch gathered. It costs one transaction, none if there
// is nothing.
func (s *Store) Flush(ctx context.Context) error {
	if s.opts.ReadOnly {
		return nil
	}
	if err := s.usable(); err != nil {
		return err
	}
	if s.uses.waiting() == 0 {
		return nil
	}
	return s.join(ctx, &call{ctx: ctx, fn: func(*Tx) error { return nil }, flush: true})
}

// applyUses writes the gathered uses. A record that is gone or damaged is
// passed over: its uses say nothing any more.
func (tx *Tx) applyUses() error {
	taken := tx.store.uses.take(tx.serial())
	for _, id := range slices.Sorted(maps.Keys(taken)) {
		r, err := tx.load(id)
		if tx.err != nil {
			return tx.err
		}
		if err != nil || r == nil {
			continue
		}
		r.addUse(taken[id])
		if err := tx.rewrite(r); err != nil {
			return err
		}
	}
	return nil
}

// flusher writes gathered uses some time after the first of them came in. A
// flush that fails is tried again an interval later; its error is in Stats.
func (s *Store) flusher(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.uses.wake:
		}
		timer := time.NewTimer(s.opts.FlushInterval)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		if err := s.Flush(ctx); err != nil {
			s.flushFailed(err)
			select {
			case s.uses.wake <- struct{}{}:
			default:
			}
		}
	}
}

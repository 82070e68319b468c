package cache

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// entry is a record that somebody in this process is concerned with. It lives
// in the manager's table as long as anybody refers to it.
type entry struct {
	// Fixed when made.
	id    metadata.ID
	token chan struct{} // one slot: full while somebody drives a transition

	// Guarded by Manager.mu.

	// rec is the newest state that was published here, nil if nobody read it
	// yet. It is replaced, never written to.
	rec *metadata.Record
	// recorded is false for a mutable that exists in memory and in the
	// driver only. Its attachments wait here for the Commit.
	recorded    bool
	attachments map[string][]byte
	handles     map[*handle]struct{}
	// uses counts operations, mounts and unrecorded children that need the
	// snapshot to stay. lives counts whoever merely needs the entry to stay
	// in the table, such as those who wait for the token.
	uses, lives int
	// driving says what the owner of the token does, and since when.
	driving string
	since   time.Time
	// leaving is not nil while a removal or a reopen is under way, and is
	// closed when its outcome is known.
	leaving chan struct{}
	// touched says that a handle whose use counts was released since the
	// last time there were none.
	touched bool
	// parents are the entries whose uses an unrecorded mutable counts in.
	parents []*entry
}

// handle is what a MutableRef and an ImmutableRef have in common.
type handle struct {
	m       *Manager
	e       *entry
	id      metadata.ID
	kind    HolderKind
	noTouch bool
	since   time.Time
	pcs     [6]uintptr

	// Guarded by Manager.mu.
	released bool
}

// site is the first caller outside this package.
func (h *handle) site() string {
	frames := runtime.CallersFrames(h.pcs[:])
	for {
		f, more := frames.Next()
		if !strings.HasPrefix(f.Function, thisPackage) && f.File != "" || !more {
			return fmt.Sprintf("%s:%d", f.File, f.Line)
		}
	}
}

const thisPackage = "github.com/lamina-build/lamina/cache."

// lock takes mu. It exists so that all lock sites are found by one name.
func (m *Manager) lock()   { m.mu.Lock() }
func (m *Manager) unlock() { m.mu.Unlock() }

// entryLocked finds or makes the entry of id and counts a life on it.
func (m *Manager) entryLocked(id metadata.ID) *entry {
	m.assertLocked()
	e := m.entries[id]
	if e == nil {
		e = &entry{
			id:      id,
			token:   make(chan struct{}, 1),
			handles: map[*handle]struct{}{},
		}
		m.entries[id] = e
	}
	e.lives++
	return e
}

// dropLocked takes one life back and forgets the entry when it was the last.
func (m *Manager) dropLocked(e *entry) {
	m.assertLocked()
	e.lives--
	if e.lives == 0 && m.entries[e.id] == e {
		delete(m.entries, e.id)
	}
}

// useLocked counts a use, which is a life, too.
func (m *Manager) useLocked(e *entry) {
	m.assertLocked()
	e.uses++
	e.lives++
}

func (m *Manager) unuseLocked(e *entry) {
	m.assertLocked()
	e.uses--
	m.dropLocked(e)
}

func (m *Manager) unuse(e *entry) {
	m.lock()
	defer m.unlock()
	m.unuseLocked(e)
}

// handleLocked adds a handle to e.
func (m *Manager) handleLocked(e *entry, kind HolderKind) *handle {
	m.assertLocked()
	h := &handle{m: m, e: e, id: e.id, kind: kind, since: m.now()}
	runtime.Callers(3, h.pcs[:]) // from whoever called our caller
	e.handles[h] = struct{}{}
	e.lives++
	return h
}

// dropHandleLocked takes h off its entry. It says whether h was the last.
func (m *Manager) dropHandleLocked(h *handle) (last bool) {
	m.assertLocked()
	h.released = true
	delete(h.e.handles, h)
	last = len(h.e.handles) == 0
	m.dropLocked(h.e)
	return last
}

// use pins the snapshot of a live handle for one operation; done unpins it.
func (h *handle) use() (e *entry, done func(), err error) {
	m := h.m
	m.lock()
	defer m.unlock()
	if err := h.aliveLocked(); err != nil {
		return nil, nil, err
	}
	m.useLocked(h.e)
	return h.e, func() { m.unuse(h.e) }, nil
}

func (h *handle) aliveLocked() error {
	if h.m.closed {
		return errClosed
	}
	if h.released {
		return fmt.Errorf("handle on record %s was released: %w", short(h.id), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// drive takes the transition token of e, which the caller keeps alive, and
// says what for. It waits no longer than ctx.
func (m *Manager) drive(ctx context.Context, e *entry, what string) (done func(), err error) {
	select {
	case e.token <- struct{}{}:
	default:
		select {
		case e.token <- struct{}{}:
		case <-ctx.Done():
			m.lock()
			by, since := e.driving, e.since
			m.unlock()
			return nil, fmt.Errorf("%s of record %s waited for its %s (since %s): %w",
				what, short(e.id), by, since.Format(time.RFC3339), context.Cause(ctx))
		}
	}
	m.lock()
	e.driving, e.since = what, m.now()
	m.unlock()
	return func() {
		m.lock()
		e.driving = ""
		m.unlock()
		<-e.token
	}, nil
}

// publishLocked makes rec the state that others see, unless a newer one is
// already there: transactions of several callers may be published in another
// order than they were committed in.
func (m *Manager) publishLocked(e *entry, rec *metadata.Record) {
	m.assertLocked()
	if e.rec == nil || rec.Revision >= e.rec.Revision {
		e.rec = rec
	}
}

// leaveLocked begins a removal or a reopen of e, for which nobody may hold or
// use it.
func (m *Manager) leaveLocked(e *entry) (done func(gone bool), err error) {
	m.assertLocked()
	if holders := m.holdersLocked(e); len(holders) > 0 {
		return nil, &LockedError{ID: e.id, Holders: holders}
	}
	ch := make(chan struct{})
	e.leaving = ch
	return func(gone bool) {
		m.lock()
		defer m.unlock()
		e.leaving = nil
		if gone {
			e.rec = nil
			if m.entries[e.id] == e {
				delete(m.entries, e.id)
			}
		}
		close(ch)
	}, nil
}

// holdersLocked lists whoever in this process keeps e.
func (m *Manager) holdersLocked(e *entry) []Holder {
	m.assertLocked()
	var out []Holder
	for h := range e.handles {
		out = append(out, Holder{Kind: h.kind, Site: h.site(), Since: h.since})
	}
	if e.uses > 0 && len(out) == 0 {
		out = append(out, Holder{Kind: HolderOperation, Command: e.driving, Since: e.since})
	}
	return out
}

// pin finds the live record of id, by id or alias, and counts a use on its
// entry, which unuse takes back.
func (m *Manager) pin(ctx context.Context, id metadata.ID) (*entry, error) {
	return m.find(ctx, id, true)
}

// find is pin, or, without use, counts only a life on the entry: for a removal
// and a reopen, in whose way a use would be. It waits for a removal or a reopen
// that is under way.
func (m *Manager) find(ctx context.Context, id metadata.ID, use bool) (*entry, error) {
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		e, leaving, err := m.tryFind(ctx, id, use)
		if err != nil {
			return nil, err
		}
		if leaving != nil {
			select {
			case <-leaving:
				continue
			case <-ctx.Done():
				return nil, fmt.Errorf("record %s is being removed or reopened: %w", short(id), context.Cause(ctx))
			}
		}
		if e.id == id {
			return e, nil
		}
		id = e.id // it was an alias: go on with the record itself
	}
}

// tryFind is one round of find. An alias gives an entry that only names the
// id to go on with.
func (m *Manager) tryFind(ctx context.Context, id metadata.ID, use bool) (*entry, <-chan struct{}, error) {
	m.lock()
	if m.closed {
		m.unlock()
		return nil, nil, errClosed
	}
	e := m.entryLocked(id)
	if ch := e.leaving; ch != nil {
		m.dropLocked(e)
		m.unlock()
		return nil, ch, nil
	}
	if use {
		e.uses++
	}
	loaded := e.rec != nil
	m.unlock()
	if loaded {
		return e, nil, nil
	}
	rec, err := m.read(ctx, id)
	m.lock()
	defer m.unlock()
	if err == nil && rec.ID == id {
		e.recorded = true
		m.publishLocked(e, rec)
		return e, nil, nil
	}
	if use {
		e.uses--
	}
	m.dropLocked(e)
	if err != nil {
		return nil, nil, err
	}
	return &entry{id: rec.ID}, nil, nil
}

// read gets a record from the store.
func (m *Manager) read(ctx context.Context, id metadata.ID) (*metadata.Record, error) {
	var rec *metadata.Record
	err := m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		rec, err = tx.Get(id)
		return err
	})
	return rec, err
}

// drop takes one life back.
func (m *Manager) drop(e *entry) {
	m.lock()
	defer m.unlock()
	m.dropLocked(e)
}

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
	// snapshot to stay; mounts are those of them that Refs lists. lives
	// counts whoever merely needs the entry to stay in the table, such as
	// those who wait for the token.
	uses, lives int
	mounts      map[*Mount]struct{}
	// driving says what the owner of the token does, and since when.
	driving string
	since   time.Time
	// leaving is not nil while a removal or a reopen is under way, and is
	// closed when its outcome is known.
	leaving chan struct{}
	// gone says that the record has left: the entry is no longer in the
	// table, and rec is what was known last.
	gone bool
	// touched says that a handle whose use counts was released since the
	// last time there were none.
	touched bool
	// layers is the layer list, nil if nobody computed it yet.
	layers []ID
	// depth is the length of that list, 0 if nobody counted yet.
	depth int
	// grounded says that the record and all that it is made of have their
	// snapshots.
	grounded bool
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
	caller  caller

	// Guarded by Manager.mu.
	released bool
}

// caller remembers who called this package. Finding out the line is left to
// whoever asks.
type caller struct {
	pcs [6]uintptr
	n   int
}

// callerOf skips this many of the functions that lead here.
func callerOf(skip int) (c caller) {
	c.n = runtime.Callers(skip+2, c.pcs[:])
	return c
}

// site is the first caller outside this package.
func (c *caller) site() string {
	frames := runtime.CallersFrames(c.pcs[:c.n])
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
			mounts:  map[*Mount]struct{}{},
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
	m.assertCounts(e)
	if e.lives == 0 && m.entries[e.id] == e {
		delete(m.entries, e.id)
	}
}

// forgetLocked takes e, whose record has left, out of the table. Those who
// still refer to it see that it is gone.
func (m *Manager) forgetLocked(e *entry) {
	m.assertLocked()
	e.gone = true
	if m.entries[e.id] == e {
		delete(m.entries, e.id)
	}
}

// useLocked counts a use, which is a life, too.
func (m *Manager) useLocked(e *entry) {
	m.assertLocked()
	e.uses++
	e.lives++
}

// announce makes the entry of a record that is about to be written, in use
// until done: from its transaction on others see the record, and nobody may
// remove or reopen it before it has its first handle.
func (m *Manager) announce(id metadata.ID) (e *entry, done func()) {
	m.lock()
	defer m.unlock()
	e = m.entryLocked(id)
	e.uses++ // with the life that entryLocked counted
	return e, func() { m.unuse(e) }
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

// handleLocked adds a handle to e, which from asked for.
func (m *Manager) handleLocked(e *entry, kind HolderKind, from caller) *handle {
	m.assertLocked()
	h := &handle{m: m, e: e, id: e.id, kind: kind, since: m.now(), caller: from}
	e.handles[h] = struct{}{}
	e.lives++
	return h
}

// dropHandleLocked takes h off its entry, unless that was done before: a
// Release may come while a Commit of the same handle is under way. It says
// whether h was the last.
func (m *Manager) dropHandleLocked(h *handle) (last bool) {
	m.assertLocked()
	if h.released {
		return false
	}
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

// begin is Manager.begin and use in one, for the methods of handles.
func (h *handle) begin() (e *entry, done func(), err error) { return h.useIn(h.m.begin) }

// beginChange is begin for those that change the store.
func (h *handle) beginChange() (e *entry, done func(), err error) { return h.useIn(h.m.beginChange) }

func (h *handle) useIn(begin func() (end func(), err error)) (e *entry, done func(), err error) {
	end, err := begin()
	if err != nil {
		return nil, nil, err
	}
	e, unuse, err := h.use()
	if err != nil {
		end()
		return nil, nil, err
	}
	return e, func() { unuse(); end() }, nil
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
	return m.driving(e, what), nil
}

// tryDrive is drive for those who do not wait.
func (m *Manager) tryDrive(e *entry, what string) (done func(), ok bool) {
	select {
	case e.token <- struct{}{}:
	default:
		return nil, false
	}
	return m.driving(e, what), true
}

// driving notes what the owner of the token of e does, until done.
func (m *Manager) driving(e *entry, what string) (done func()) {
	m.lock()
	e.driving, e.since = what, m.now()
	m.unlock()
	return func() {
		m.lock()
		e.driving = ""
		m.unlock()
		<-e.token
	}
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
// use it. The caller has the token. done ends it and may be called once.
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
			m.forgetLocked(e)
		}
		close(ch)
	}, nil
}

// holdersLocked lists whoever in this process keeps e.
func (m *Manager) holdersLocked(e *entry) []Holder {
	m.assertLocked()
	var out []Holder
	for h := range e.handles {
		out = append(out, Holder{Kind: h.kind, Site: h.caller.site(), Since: h.since})
	}
	for t := range e.mounts {
		out = append(out, Holder{Kind: HolderMount, Site: t.caller.site(), Since: t.since})
	}
	if e.uses > 0 && len(out) == 0 {
		out = append(out, Holder{Kind: HolderOperation, Command: e.driving, Since: e.since})
	}
	return out
}

// find gives the entry of the live record of id, by id or alias, and counts a
// life on it, which drop takes back. It waits for a removal or a reopen that is
// under way. got, if not nil, is called under mu while none is, so that a
// handle it adds is on a record that stays; its error is find's.
func (m *Manager) find(ctx context.Context, id metadata.ID, got func(*entry) error) (*entry, error) {
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		e, next, err := m.tryFind(ctx, id, got)
		if err != nil || e != nil {
			return e, err
		}
		id = next.id
		if next.after == nil {
			continue
		}
		select {
		case <-next.after:
		case <-ctx.Done():
			return nil, fmt.Errorf("record %s is being removed or reopened: %w", short(id), context.Cause(ctx))
		}
	}
}

// nextTry says where find has to go on, and after what.
type nextTry struct {
	id    metadata.ID
	after <-chan struct{}
}

// tryFind is one round of find. Without an entry and an error it says how to
// go on: an alias leads to the record itself.
func (m *Manager) tryFind(ctx context.Context, id metadata.ID, got func(*entry) error) (_ *entry, next nextTry, err error) {
	m.lock()
	defer m.unlock()
	if m.closed {
		return nil, next, errClosed
	}
	e := m.entryLocked(id)
	keep := false
	defer func() {
		if !keep {
			m.dropLocked(e)
		}
	}()
	if e.rec == nil && e.leaving == nil {
		m.unlock()
		rec, err := m.read(ctx, id)
		m.lock()
		if err != nil {
			return nil, next, err
		}
		if rec.ID != id {
			return nil, nextTry{id: rec.ID}, nil
		}
		if !e.gone {
			e.recorded = true
			m.publishLocked(e, rec)
		}
	}
	if e.gone || e.leaving != nil {
		return nil, nextTry{id: id, after: e.leaving}, nil
	}
	if got != nil {
		if err := got(e); err != nil {
			return nil, next, err
		}
	}
	keep = true
	return e, next, nil
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

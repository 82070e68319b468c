package metadata

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
)

// Group commit. A transaction costs two syncs, whatever it holds. So updates
// that are asked for at the same time share one: the first caller leads and
// runs what is there, and what comes while it runs; while its transaction is
// synced the others queue, and the first of them leads next, with all of them.
// Nobody waits for more to come: a caller alone leads at once, in its own
// goroutine.

// maxGroup is how many calls share a transaction before it is closed to those
// that come while the others run.
const maxGroup = 256

// phase is where a call is on its way. It moves under queue.mu.
type phase uint8

const (
	queued  phase = iota // may still leave
	leading              // has been asked to lead
	taken                // a leader has it and will settle it
	settled              // err and panicked are final
)

// call is one Update.
type call struct {
	ctx   context.Context
	fn    func(*Tx) error
	flush bool // gathered uses are to be written even if nothing else is
	close bool // the last call of a store
	// alone, if set, runs instead of fn while nobody writes, in no
	// transaction of the store.
	alone func() error

	wake  chan struct{} // has room for one; sent at leading and at settled
	phase phase

	err      error
	panicked any // what fn panicked with, else nil
}

// queue holds the calls that wait. The mutex is a leaf, never held across
// I/O.
type queue struct {
	mu      sync.Mutex
	waiting []*call
	busy    bool // somebody leads, or has been asked to
	closed  bool // no further calls
}

// Update runs fn in a transaction that writes, and returns nil once that is
// on the disk. Updates of several goroutines share a transaction; each of
// them is in it wholly or, when its fn returns an error, not at all, and the
// others do not notice. For that fn may run several times, the last time
// counts: it must not keep what an earlier run told it, and it must not
// change anything but through tx. It must not call the store itself. It may
// run in another goroutine than the caller's; a panic is the caller's.
//
// An error means that nothing has changed, on disk and in memory, and that
// the same call may be made again. The exception is ErrUnknownOutcome. When
// ctx ends before fn was taken into a transaction, Update returns its cause;
// after that it waits for the outcome. A full disk is resource exhausted,
// with the errno in the chain.
func (s *Store) Update(ctx context.Context, fn func(*Tx) error) error {
	if s.opts.ReadOnly {
		return ErrReadOnly
	}
	return s.join(ctx, &call{ctx: ctx, fn: fn})
}

// join brings a call into a transaction and waits for its outcome.
func (s *Store) join(ctx context.Context, c *call) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if err := s.usable(); err != nil {
		return err
	}
	c.wake = make(chan struct{}, 1)
	lead, err := s.queue.join(c)
	if err != nil {
		return err
	}
	if !lead {
		select {
		case <-c.wake:
		case <-ctx.Done():
			if s.queue.leave(c) {
				return context.Cause(ctx)
			}
			<-c.wake
		}
		lead = s.queue.asked(c)
	}
	if lead {
		s.lead(c)
	}
	if c.panicked != nil {
		panic(c.panicked)
	}
	return c.err
}

// lastCall writes what is left and refuses all calls behind it.
func (s *Store) lastCall() error {
	if s.usable() != nil {
		// Whoever met the failure has been told.
		return nil
	}
	ctx := context.Background()
	return s.join(ctx, &call{ctx: ctx, fn: func(*Tx) error { return nil }, flush: true, close: true})
}

// join adds a call, and says whether its caller has to lead.
func (q *queue) join(c *call) (lead bool, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return false, ErrClosed
	}
	q.closed = c.close
	q.waiting = append(q.waiting, c)
	if q.busy {
		return false, nil
	}
	q.busy = true
	c.phase = leading
	return true, nil
}

func (q *queue) asked(c *call) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return c.phase == leading
}

// leave takes a call out that nobody has taken. One that was asked to lead
// asks the next.
func (q *queue) leave(c *call) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if c.phase != queued && c.phase != leading {
		return false
	}
	q.waiting = slices.DeleteFunc(q.waiting, func(w *call) bool { return w == c })
	if c.phase == leading {
		q.passOnLocked()
	}
	c.phase = settled
	return true
}

// take gives the leader all that waits.
func (q *queue) take() []*call {
	return q.takeOf(func(*call) bool { return true })
}

// takeOf is take of some.
func (q *queue) takeOf(which func(*call) bool) (batch []*call) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var others []*call
	for _, c := range q.waiting {
		if !which(c) {
			others = append(others, c)
			continue
		}
		c.phase = taken
		batch = append(batch, c)
	}
	q.waiting = others
	return batch
}

// passOn ends a lead. Calls that the leader could not finish go first.
func (q *queue) passOn(unfinished []*call) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, c := range unfinished {
		c.phase = queued
	}
	q.waiting = append(unfinished, q.waiting...)
	q.passOnLocked()
}

func (q *queue) passOnLocked() {
	q.busy = len(q.waiting) > 0
	if q.busy {
		next := q.waiting[0]
		next.phase = leading
		next.wake <- struct{}{}
	}
}

func (q *queue) settle(c *call, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	c.err, c.phase = err, settled
	select {
	case c.wake <- struct{}{}:
	default: // the leader's own call, nobody waits
	}
}

// leader is one turn of leading.
type leader struct {
	s       *Store
	own     *call   // the call whose goroutine this is
	batch   []*call // share the next transaction
	rest    []*call // run after it
	current *call   // whose function runs
	tx      *Tx
	full    bool // nobody else is to share it
}

// lead runs all that waits. A function that ends the goroutine
// (runtime.Goexit, as a failing test does) or a Step that panics must not
// take the others with it.
func (s *Store) lead(own *call) {
	l := &leader{s: s, own: own, batch: s.queue.take()}
	finished := false
	defer func() {
		if !finished {
			l.abandon()
		}
		s.queue.passOn(append(l.batch, l.rest...))
	}()
	l.run(true)
	finished = true
}

// abandon leaves the calls that are not settled to the next leader, but for
// the one that ended the goroutine, and the one that was the goroutine's.
func (l *leader) abandon() {
	if l.tx != nil {
		l.tx.rollback()
		l.s.uses.land(false)
	}
	err := fmt.Errorf("update function ended its goroutine: %w", errdefs.ErrAborted)
	for _, c := range []*call{l.current, l.own} {
		if c != nil {
			l.drop(c, err)
		}
	}
}

// drop settles a call and takes it out of the batch.
func (l *leader) drop(c *call, err error) {
	is := func(b *call) bool { return b == c }
	l.batch = slices.DeleteFunc(l.batch, is)
	l.rest = slices.DeleteFunc(l.rest, is)
	l.s.queue.settle(c, err)
}

func (l *leader) dropAll(err error) {
	for len(l.batch) > 0 {
		l.drop(l.batch[0], err)
	}
}

// run settles the whole batch. Uses ride along if withUses says so.
func (l *leader) run(withUses bool) {
	for _, c := range slices.Clone(l.batch) {
		if c.alone != nil {
			l.current = c
			err := c.alone()
			l.current = nil
			l.drop(c, err)
		}
	}
	if !slices.ContainsFunc(l.batch, func(c *call) bool { return !c.flush }) && !l.s.finalWork(l.batch) {
		l.dropAll(nil)
	}
	for len(l.batch) > 0 {
		again, err := l.attempt(withUses)
		if again {
			continue
		}
		if err == nil {
			l.dropAll(nil)
			return
		}
		// What is too much together may fit alone: a removal must not fail
		// for the size of its neighbour, nor for uses that ride along.
		rode := withUses && l.s.uses.waiting() > 0 && !l.batch[0].flush
		if outOfSpace(err) && (len(l.batch) > 1 || rode) {
			l.each()
		} else {
			l.dropAll(err)
		}
		return
	}
}

// each runs the calls of the batch one by one.
func (l *leader) each() {
	l.full = true
	l.rest = append(l.batch, l.rest...)
	l.batch = nil
	for len(l.rest) > 0 {
		c := l.rest[0]
		l.batch, l.rest = []*call{c}, l.rest[1:]
		l.run(c.flush)
	}
}

// attempt runs the functions of the batch in one transaction. It asks for
// another attempt after it dropped a call whose function failed.
func (l *leader) attempt(withUses bool) (again bool, err error) {
	tx, err := l.s.beginWrite()
	if err != nil {
		return false, err
	}
	l.tx = tx
	again, write := l.runFunctions(tx)
	if write {
		err = l.s.finish(tx, l.batch, withUses)
	} else {
		tx.rollback()
	}
	l.tx = nil
	return again, err
}

// runFunctions says whether the transaction is worth a commit.
func (l *leader) runFunctions(tx *Tx) (again, write bool) {
	flush := false
	for i := 0; i < len(l.batch) || l.more(); {
		c, writes := l.batch[i], tx.writes
		err := l.call(tx, c)
		if err == nil {
			flush = flush || c.flush
			i++
			continue
		}
		l.drop(c, err)
		if tx.err != nil || tx.writes != writes {
			// bbolt has no savepoints: the others run again without it.
			return true, false
		}
	}
	return false, tx.writes > 0 || (flush && l.s.finalWork(l.batch))
}

// more takes in who came while the functions ran, so that a burst of calls is
// one transaction, and not the first of them and then all others. It does not
// ask the scheduler to let others come: where something else keeps all
// processors busy, the leader got its turn again after 20 to 60 ms, measured
// with an update that took 0.7 ms.
func (l *leader) more() bool {
	if l.full || len(l.batch) >= maxGroup {
		return false
	}
	late := l.s.queue.takeOf(func(c *call) bool { return c.alone == nil })
	l.batch = append(l.batch, late...)
	return len(late) > 0
}

// call runs one function. Its transaction may fail although it returns nil,
// for what it did not look at.
func (l *leader) call(tx *Tx, c *call) (err error) {
	if err := context.Cause(c.ctx); err != nil {
		return err
	}
	l.current = c
	defer func() {
		if p := recover(); p != nil {
			c.panicked = p
			err = fmt.Errorf("update function panicked: %v\n%s", p, debug.Stack())
			l.current = nil
		}
	}()
	err = c.fn(tx)
	l.current = nil
	if err == nil {
		err = tx.err
	}
	return err
}

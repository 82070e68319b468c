package metadata

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// bbolt's file never becomes shorter. When most of its pages are free, what is
// in it is copied into a new one that takes the name. Readers stay where they
// are, in the old file, until they end. Writers go on, too, while a state that
// is read is copied and synced; then, in a turn of its own, compaction writes
// what has changed since and swaps the files. Killed at any step it leaves
// either the old file, with a rest beside it that the next Open or compaction
// removes, or the new one, complete. The new file is locked before it has the
// name, so that the store is never free in between.
const (
	// compactPages is the size, in pages, from which on a file is worth it:
	// 768 KiB, and 512 KiB at Close, when nobody waits for the next commit.
	// What is gained below that is less than growing ahead takes.
	compactPages, compactPagesAtClose = 192, 128
	// compactPercent is how much of a file is in use, in percent, if it is to
	// be left alone. With what the file has ahead it stays below four times
	// what is in use, and a copy costs less than the writes that led to it.
	compactPercent, compactPercentAtClose = 40, 50
	// compactBatch is what is copied in one transaction, in bytes: memory.
	compactBatch = 1 << 20
	// compactBackoff is how many transactions a compaction that failed is
	// not tried again for.
	compactBackoff = 1000
	// compactFill is how full pages of the new file are. Records are mostly
	// added behind all others; some room spares the next updates a split.
	compactFill = 0.9
)

func compactFile(path string) string { return path + ".compact" }

// wasteful says whether so much of the file is free that compaction is due.
func (h *handle) wasteful(used int64, closing bool) bool {
	least, percent := int64(compactPages), int64(compactPercent)
	if closing {
		least, percent = compactPagesAtClose, compactPercentAtClose
	}
	if used < least {
		return false
	}
	st := h.db.Stats()
	return (used-int64(st.FreePageN+st.PendingPageN))*100 < used*percent
}

// compactSoon starts a compaction if one is due. It is called by a leader that
// has committed.
func (s *Store) compactSoon(used int64) {
	n := s.transactions.Load()
	if n < s.compactAt {
		return
	}
	if !s.now.Load().wasteful(used, false) {
		return
	}
	s.compactAt = n + compactBackoff
	s.background.Go(func() { s.compactUnasked(false) })
}

// usedPages is the number of pages up to the last one in use.
func (h *handle) usedPages() int64 {
	m, err := newestMeta(h.file)
	if err != nil {
		return 0
	}
	return int64(m.used)
}

// compactLast compacts before Close.
func (s *Store) compactLast() {
	if h := s.now.Load(); s.usable() == nil && h.wasteful(h.usedPages(), true) {
		s.compactUnasked(true)
	}
}

func (s *Store) compactUnasked(closing bool) {
	// It belongs to the store, whose Close waits for it.
	err := s.compactIf(context.Background(), func(h *handle) bool { return h.wasteful(h.usedPages(), closing) })
	if err == nil || errors.Is(err, ErrClosed) {
		s.compactErr.Store(nil)
		return
	}
	s.compactErr.Store(&err)
}

// Compact writes the file anew without its free pages, and returns when the
// new one has taken its place. It blocks no reader; updates wait for its last
// part only. It happens by itself after a transaction when less than 40 percent
// of a file of 768 KiB or more is in use, and at Close when less than half of
// one of 512 KiB is. It needs free space of the size
// of what is in use; without it the error is resource exhausted, and nothing
// has changed. ErrDamaged is the error of a file with a page that cannot be
// read, which Repair is for.
func (s *Store) Compact(ctx context.Context) error {
	if s.opts.ReadOnly {
		return ErrReadOnly
	}
	return s.compactIf(ctx, func(*handle) bool { return true })
}

func (s *Store) compactIf(ctx context.Context, due func(*handle) bool) error {
	select {
	case s.compacting <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-s.compacting }()
	if err := s.usable(); err != nil {
		return err
	}
	if !due(s.now.Load()) {
		return nil
	}
	c := &compaction{s: s, ctx: ctx, path: compactFile(s.path)}
	if err := c.run(); err != nil {
		return ioError("compact", errors.Join(err, c.discard()))
	}
	s.compactions.Add(1)
	return nil
}

// compaction is one run.
type compaction struct {
	s    *Store
	ctx  context.Context
	path string
	file *os.File
	db   *bolt.DB
	// swapped says that the new file has the name.
	swapped bool
}

func (c *compaction) run() error {
	before, err := c.s.begin(false)
	if err != nil {
		return err
	}
	defer before.rollback()
	if err := c.create(before.handle.pageSize); err != nil {
		return err
	}
	seen, err := c.copyAll(before)
	if err != nil {
		return err
	}
	if err := c.step("compact data"); err != nil {
		return err
	}
	if err := c.db.Sync(); err != nil {
		return err
	}
	return c.s.join(c.ctx, &call{ctx: c.ctx, fn: func(*Tx) error { return nil }, alone: func() error {
		return c.finish(before, seen)
	}})
}

func (c *compaction) step(name string) error {
	if err := context.Cause(c.ctx); err != nil {
		return err
	}
	return c.s.opts.Step(name)
}

// create makes the new file and locks it.
func (c *compaction) create(pageSize int64) error {
	if err := c.step("compact file"); err != nil {
		return err
	}
	if err := removeIfThere(c.path); err != nil {
		return err
	}
	var err error
	if c.file, err = os.OpenFile(c.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return err
	}
	writeInPlace(c.file)
	if err := unix.Flock(int(c.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("lock %s: %w", c.path, err)
	}
	c.db, err = openBoltFresh(c.file, c.s.opts, int(pageSize))
	return err
}

// copyAll copies a state, and returns the pages that it consists of.
func (c *compaction) copyAll(from *Tx) (seen []bool, err error) {
	names, err := from.rootKeys()
	if err != nil {
		return nil, err
	}
	w := newPageWalk(from.tree)
	if err := from.guard("copy", "pages", func() error { w.run(); return nil }); err != nil {
		return nil, err
	}
	if len(w.damaged) > 0 {
		return nil, w.damaged[0]
	}
	b := &batchWriter{db: c.db, before: func() error { return c.step("compact copy") }}
	defer b.rollback()
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if err := b.bucket(name); err != nil {
			return nil, err
		}
		cur := from.cursor(name)
		for k, v, ok := cur.seek(nil); ok; k, v, ok = cur.next() {
			if v == nil {
				continue // a nested bucket, which is not ours
			}
			if err := b.put(name, k, v); err != nil {
				return nil, err
			}
		}
		if cur.err != nil {
			return nil, cur.err
		}
	}
	return w.reached, b.commit()
}

// finish brings the new file up to date and lets it take over. No writer runs.
func (c *compaction) finish(before *Tx, seen []bool) error {
	now, err := c.s.begin(false)
	if err != nil {
		return err
	}
	defer now.rollback()
	c.db.NoSync, c.db.NoGrowSync, c.db.NoFreelistSync = false, false, false
	if err := c.catchUp(before, now, seen); err != nil {
		return err
	}
	if err := c.step("compact rename"); err != nil {
		return err
	}
	if err := os.Rename(c.path, c.s.path); err != nil {
		return err
	}
	c.swapped = true
	err = c.s.opts.Step("compact sync")
	if err == nil {
		err = syncDir(filepath.Dir(c.s.path))
	}
	if err != nil {
		// The old file may turn up again after a power cut, without what is
		// written from now on.
		return c.s.breakDown(fmt.Errorf("%w: %w", ErrUnknownOutcome, ioError("compact", err)))
	}
	c.swap(now.handle)
	return nil
}

// swap gives the store the new file.
func (c *compaction) swap(old *handle) {
	s := c.s
	setGrowth(c.db, s.opts)
	s.now.Store(newHandle(c.file, c.db, old.pageSize, old.generation+1))
	s.freelistStored = true
	s.compactAt = 0
	s.retiredMu.Lock()
	s.retired = slices.DeleteFunc(append(s.retired, old), func(h *handle) bool {
		select {
		case <-h.closed:
			return h.err == nil
		default:
			return false
		}
	})
	s.retiredMu.Unlock()
	old.retire()
}

// catchUp writes what has changed between two states, in one transaction.
// Pages never change while they can be read, so what the states share need
// not be looked at.
func (c *compaction) catchUp(before, now *Tx, seen []bool) error {
	tx, err := c.db.Begin(true)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // after a commit it does nothing
	err = now.guard("copy", "pages", func() error {
		names, err := now.rootKeys()
		if err != nil {
			return err
		}
		for name := range names {
			if err := catchUpBucket(tx, before.tree, now.tree, name, seen); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := c.step("compact commit"); err != nil {
		return err
	}
	return tx.Commit()
}

func catchUpBucket(tx *bolt.Tx, before, now *tree, name string, seen []bool) error {
	nb, ok, err := now.bucket(name)
	if err != nil || !ok {
		return err
	}
	ob, had, err := before.bucket(name)
	if err != nil {
		return err
	}
	shared := map[uint64]bool{}
	rows := map[string][]byte{}
	err = now.leaves(nb, func(id uint64) bool {
		same := id < uint64(len(seen)) && seen[id]
		if same {
			shared[id] = true
		}
		return same
	}, func(p *page) {
		for i := range p.count {
			if v, nested := p.value(i); !nested {
				rows[string(p.key(i))] = v
			}
		}
	})
	if err != nil {
		return err
	}
	b, err := tx.CreateBucketIfNotExists([]byte(name))
	if err != nil {
		return err
	}
	b.FillPercent = compactFill
	if had {
		var gone [][]byte
		err = before.leaves(ob, func(id uint64) bool { return shared[id] }, func(p *page) {
			for i := range p.count {
				if _, stays := rows[string(p.key(i))]; !stays {
					gone = append(gone, p.key(i))
				}
			}
		})
		for _, k := range gone {
			err = errors.Join(err, b.Delete(k))
		}
	}
	for _, k := range slices.Sorted(maps.Keys(rows)) {
		err = errors.Join(err, b.Put([]byte(k), rows[k]))
	}
	return errors.Join(err, b.SetSequence(nb.sequence))
}

// discard takes the new file away after a failure.
func (c *compaction) discard() error {
	if c.swapped {
		if c.db != nil {
			return c.db.Close()
		}
		return nil
	}
	var err error
	if c.file != nil {
		err = os.Remove(c.path)
	}
	if c.db != nil {
		err = errors.Join(err, c.db.Close())
	}
	if c.file != nil {
		err = errors.Join(err, closeFile(c.file))
	}
	return err
}

// batchWriter fills a fresh file in transactions of bounded size.
type batchWriter struct {
	db     *bolt.DB
	before func() error // of each commit
	tx     *bolt.Tx
	bytes  int
}

func (b *batchWriter) begin() (err error) {
	if b.tx == nil {
		b.tx, err = b.db.Begin(true)
	}
	return err
}

func (b *batchWriter) bucket(name string) error {
	if err := b.begin(); err != nil {
		return err
	}
	_, err := b.tx.CreateBucketIfNotExists([]byte(name))
	return err
}

func (b *batchWriter) put(bucket string, k, v []byte) error {
	if err := b.begin(); err != nil {
		return err
	}
	into := b.tx.Bucket([]byte(bucket))
	into.FillPercent = compactFill
	if err := into.Put(k, v); err != nil {
		return err
	}
	if b.bytes += len(k) + len(v); b.bytes < compactBatch {
		return nil
	}
	return b.commit()
}

func (b *batchWriter) commit() error {
	if b.tx == nil {
		return nil
	}
	if err := b.before(); err != nil {
		return err
	}
	tx := b.tx
	b.tx, b.bytes = nil, 0
	return tx.Commit()
}

func (b *batchWriter) rollback() {
	if b.tx != nil {
		_ = b.tx.Rollback() // it has not been committed, so it cannot fail
	}
}

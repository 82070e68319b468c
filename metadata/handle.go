package metadata

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	bolt "go.etcd.io/bbolt"
)

// handle is the file that a store works on. Compaction gives the store another
// one; transactions that read the former file finish there, and the last of
// them closes it.
type handle struct {
	// Fixed.
	file *os.File
	db   *bolt.DB
	// pageSize is bbolt's, in bytes.
	pageSize int64
	// generation grows by one from each file of a store to the next.
	generation uint64

	// free are the pages that were free when the file was opened, nil once
	// a transaction is about to use them. A damaged branch that leads to one
	// would show what was there before: a state of long ago, and whole.
	free atomic.Pointer[map[uint64]struct{}]

	checked checkedPages
	roots   knownRoots
	// trees are those of transactions that have ended, for the room in them.
	trees sync.Pool

	mu sync.Mutex
	// Guarded by mu.
	users   int
	retired bool
	// closed is closed when a retired file is; err is then how that ended.
	closed chan struct{}
	err    error
}

func newHandle(f *os.File, db *bolt.DB, pageSize int64, generation uint64) *handle {
	return &handle{file: f, db: db, pageSize: pageSize, generation: generation, closed: make(chan struct{})}
}

// use keeps the file open. It says no once the file is no longer the store's.
func (h *handle) use() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.retired {
		return false
	}
	h.users++
	return true
}

// drop ends one use.
func (h *handle) drop() {
	h.mu.Lock()
	h.users--
	last := h.retired && h.users == 0
	h.mu.Unlock()
	if last {
		h.close()
	}
}

// retire has the file closed as soon as nobody uses it any more.
func (h *handle) retire() {
	h.mu.Lock()
	h.retired = true
	unused := h.users == 0
	h.mu.Unlock()
	if unused {
		h.close()
	}
}

func (h *handle) close() {
	if err := h.db.Close(); err != nil {
		h.err = fmt.Errorf("close the file before compaction: %w", err)
	}
	close(h.closed)
}

// handle is the file that is the store's now, kept open until drop.
func (s *Store) handle() *handle {
	for {
		if h := s.now.Load(); h.use() {
			return h
		}
	}
}

// waitRetired waits until the former files are closed.
func (s *Store) waitRetired() error {
	s.retiredMu.Lock()
	list := s.retired
	s.retired = nil
	s.retiredMu.Unlock()
	var errs []error
	for _, h := range list {
		<-h.closed
		errs = append(errs, h.err)
	}
	return errors.Join(errs...)
}

// serial orders the transactions of a store, over all its files.
func (tx *Tx) serial() uint64 { return tx.handle.generation<<40 | uint64(tx.tx.ID()) }

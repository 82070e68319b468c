package metadata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

const (
	// defaultLockTimeout is long enough for a command that has the store
	// open for the moments of a transaction, and short enough for a person.
	defaultLockTimeout = time.Second
	// defaultFlushInterval bounds the uses that a kill can lose.
	defaultFlushInterval = 30 * time.Second
	// freelistTxs is the number of transactions after which the free pages
	// are no longer stored with each of them, which makes commits 20 to 25
	// percent cheaper, but costs one more transaction at Close. A short
	// command stays below it and never pays that one.
	freelistTxs = 32
	// mapSize is the address space that the file is mapped into. A file
	// that outgrows it is mapped anew, for which a writer waits until no
	// reader is left; address space costs nothing.
	mapSize = 1 << 30
)

// Options say how to open a store. The zero value is good for a daemon.
type Options struct {
	// ReadOnly opens an existing file and writes nothing, neither to it nor
	// beside it; it works on a read-only file system. Several readers have
	// a store open at the same time, but none beside a writer.
	ReadOnly bool
	// LockTimeout is how long Open waits for others that have the file: 0
	// means one second, a negative one means not at all.
	LockTimeout time.Duration
	// OnWait, if set, is called once when Open has waited for a second, with
	// the one that it waits for.
	OnWait func(Holder)
	// FlushInterval is after what time gathered uses are written when no
	// transaction took them along: 0 means 30 seconds, a negative one means
	// only by Flush and Close.
	FlushInterval time.Duration
	// Command says what this process does, to others that wait for it. The
	// default is its command line.
	Command string
	// Now is the clock for ids and the store's creation time; nil is
	// time.Now.
	Now func() time.Time
	// MaxSize, if positive, is the size in bytes that the file may not
	// outgrow; a transaction that needs more is refused as resource
	// exhausted.
	MaxSize int
	// Step, if set, is called before each durable step with the step's
	// name, and what it returns fails the step as if the disk had. It lets
	// tests stop at each point and fail each one. Steps: "create file",
	// "create rename", "create sync", "tx begin", "tx commit", "close
	// commit", and those of a compaction: "compact file", "compact copy" (each
	// part), "compact data", "compact commit", "compact rename", "compact
	// sync"; and of Repair: "repair file", "repair copy" (each part), "repair
	// data", "repair keep", "repair rename", "repair sync".
	Step func(name string) error
}

func (o Options) withDefaults() Options {
	if o.LockTimeout == 0 {
		o.LockTimeout = defaultLockTimeout
	}
	if o.FlushInterval == 0 {
		o.FlushInterval = defaultFlushInterval
	}
	if o.Command == "" {
		o.Command = strings.Join(os.Args, " ")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Step == nil {
		o.Step = func(string) error { return nil }
	}
	return o
}

// Store is an open record store. All methods may be called by several
// goroutines at once.
type Store struct {
	// Fixed after Open.
	path string
	opts Options
	ids  *ids
	uses *uses

	// now is the file that the store is in. Only compaction changes it, as
	// a leader does.
	now atomic.Pointer[handle]
	// compacting has room for the one compaction that runs.
	compacting chan struct{}
	// background are the compactions that nobody waits for but Close.
	background sync.WaitGroup

	retiredMu sync.Mutex
	// retired are former files, guarded by retiredMu.
	retired []*handle

	stopFlusher func()
	closing     sync.Once
	closeErr    error

	queue queue

	// Guarded by leading: only the leader of a group touches them.
	freelistStored bool
	room           room
	// compactAt is the number of transactions before which none is compacted
	// for, after a compaction that failed.
	compactAt uint64

	// wedged says that bbolt kept one of its locks when it failed, so that
	// its Close would never return.
	wedged       atomic.Bool
	broken       atomic.Pointer[brokenError]
	transactions atomic.Uint64
	updates      atomic.Uint64
	flushErr     atomic.Pointer[error]
	compactions  atomic.Uint64
	compactErr   atomic.Pointer[error]
}

// brokenError is why a store refuses everything.
type brokenError struct{ err error }

// Open opens the store at path, and makes one if there is none, unless it is
// to be read only. The file appears whole or not at all. Opening reads a few
// pages, however many records there are, and after a clean Close it writes
// nothing but the holder's name, in the file PATH.holder.
//
// Errors: *LockedError if others have the store for too long; ErrForeign if
// the file is not a store; ErrNewerSchema; ErrDamaged; not found if there is
// no store to read. In each of these cases the file is as it was.
func Open(ctx context.Context, path string, o Options) (*Store, error) {
	o = o.withDefaults()
	f, err := acquire(ctx, path, o)
	if err != nil {
		return nil, err
	}
	s, err := openLocked(path, f, o)
	if err != nil {
		return nil, errors.Join(err, closeFile(f))
	}
	if !o.ReadOnly {
		// What somebody left who was killed while compacting or repairing.
		// One that cannot be removed costs space, and is in nobody's way.
		_ = removeIfThere(compactFile(path))
		_ = removeIfThere(repairFile(path))
		writeHolder(path, Holder{PID: os.Getpid(), Command: printableCommand(o.Command), Since: time.Now()})
		s.startFlusher()
	}
	return s, nil
}

// openLocked opens a file that this process has the lock of. If it fails,
// the file is still open, or closed by bbolt.
func openLocked(path string, f *os.File, o Options) (*Store, error) {
	m, err := inspect(f, o.ReadOnly)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	db, err := openBolt(f, o)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	s := &Store{
		path: path, opts: o, uses: newUses(), compacting: make(chan struct{}, 1),
		freelistStored: m.freelist != boltNoFreelist,
	}
	h := newHandle(f, db, int64(m.pageSize), 0)
	h.free.Store(freeSet(f, m))
	s.now.Store(h)
	var greatest uint64
	err = s.view(func(tx *Tx) error {
		if err := checkSchema(tx); err != nil {
			return err
		}
		greatest, err = tx.sequence(bucketRecord)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, err), s.release())
	}
	s.ids = newIDs(o.Now, greatest)
	return s, nil
}

// openBolt lets bbolt map the file. The free pages are read if the last one
// who wrote stored them, and no transaction is made for it.
func openBolt(f *os.File, o Options) (db *bolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = recovered("open", p)
		}
	}()
	db, err = bolt.Open(f.Name(), 0o600, &bolt.Options{
		ReadOnly:       o.ReadOnly,
		Timeout:        time.Millisecond,
		NoFreelistSync: true,
		// An array gives out the lowest free pages first, so that those of one
		// transaction lie side by side and reach the disk in few writes; the
		// map scatters them, and a commit takes half as long again. What it
		// costs to keep the array grows with the free pages, which compaction
		// bounds.
		FreelistType:    bolt.FreelistArrayType,
		InitialMmapSize: mapSize,
		MaxSize:         o.MaxSize,
		OpenFile:        func(string, int, os.FileMode) (*os.File, error) { return f, nil },
	})
	if err != nil {
		return nil, ioError("bbolt", err)
	}
	setGrowth(db, o)
	return db, nil
}

// openBoltFresh makes a database in an empty file. Nothing is synced until the
// caller says so.
func openBoltFresh(f *os.File, o Options, pageSize int) (*bolt.DB, error) {
	db, err := bolt.Open(f.Name(), 0o600, &bolt.Options{
		Timeout: time.Millisecond, PageSize: pageSize, FreelistType: bolt.FreelistArrayType,
		NoSync: true, NoGrowSync: true, NoFreelistSync: true,
		InitialMmapSize: mapSize, MaxSize: o.MaxSize,
		OpenFile: func(string, int, os.FileMode) (*os.File, error) { return f, nil },
	})
	if err != nil {
		return nil, ioError("bbolt", err)
	}
	db.AllocSize = 0 // until it is in use, it is no longer than it has to be
	return db, nil
}

func setGrowth(db *bolt.DB, o Options) {
	db.AllocSize = growStep
	if o.MaxSize > 0 {
		db.AllocSize = 0 // bbolt would want room for one step more
	}
}

// checkSchema tells our files from others, and those that we understand.
func checkSchema(tx *Tx) error {
	if ok, err := tx.has(bucketMeta, []byte(keySchema)); err != nil || !ok {
		if err == nil {
			err = ErrForeign
		}
		return err
	}
	schema, err := tx.schema()
	if err != nil {
		return err
	}
	if schema > SchemaVersion {
		return fmt.Errorf("schema %d, this version knows %d: %w", schema, SchemaVersion, ErrNewerSchema)
	}
	_, err = tx.Meta()
	return err
}

func (s *Store) startFlusher() {
	if s.opts.FlushInterval < 0 {
		s.stopFlusher = func() {}
		return
	}
	// The flusher lives as long as the store, not as long as the call of
	// Open, whose context may end before.
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.flusher(ctx)
	}()
	s.stopFlusher = func() {
		cancel()
		<-ended
	}
}

// usable says whether the store takes calls.
func (s *Store) usable() error {
	if b := s.broken.Load(); b != nil {
		return b.err
	}
	return nil
}

// breakDown makes the store refuse everything from now on.
func (s *Store) breakDown(err error) error {
	s.broken.CompareAndSwap(nil, &brokenError{err: err})
	return s.usable()
}

// View runs fn in a transaction that reads. It sees the store as it is at its
// begin, however long it takes; fn must not call Update, which may wait for
// it. A damaged page makes it fail with ErrDamaged, not the process.
func (s *Store) View(ctx context.Context, fn func(*Tx) error) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if err := s.usable(); err != nil {
		return err
	}
	return s.view(fn)
}

func (s *Store) view(fn func(*Tx) error) error {
	tx, err := s.begin(false)
	if err != nil {
		return err
	}
	defer tx.rollback()
	if err := fn(tx); err != nil {
		return err
	}
	return tx.err
}

// begin starts a transaction of bbolt. Panicking in there it keeps its locks.
func (s *Store) begin(writable bool) (tx *Tx, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			s.wedged.Store(true)
			err = s.breakDown(recovered("begin", p))
		}
	}()
	h := s.handle()
	defer func() {
		if tx == nil {
			h.drop()
		}
	}()
	b, err := h.db.Begin(writable)
	if errors.Is(err, berrors.ErrDatabaseNotOpen) {
		return nil, ErrClosed
	}
	if err != nil {
		return nil, ioError("begin transaction", err)
	}
	return newTx(s, h, b), nil
}

// rollback ends a transaction that nothing becomes of. It may be called
// after a commit.
func (tx *Tx) rollback() {
	defer tx.end()
	defer func() {
		if p := recover(); p != nil {
			tx.store.wedged.Store(true)
			_ = tx.store.breakDown(recovered("roll back", p))
		}
	}()
	// The only error is that the transaction has ended, which is the aim.
	_ = tx.tx.Rollback()
}

// end gives back what the transaction kept open.
func (tx *Tx) end() {
	if !tx.done {
		tx.done = true
		if !tx.writable { // of one that wrote, its size is asked for later
			tx.handle.trees.Put(tx.tree.forget())
		}
		tx.handle.drop()
	}
}

// Close waits for transactions that run, writes gathered uses and closes the
// file. It stores the list of free pages, if that was not done with the last
// transaction, so that the next Open need not look for them. Uses that could
// not be written are an error, of class resource exhausted on a full disk;
// the file is closed all the same. Calls after the first return what that
// one returned.
func (s *Store) Close() error {
	s.closing.Do(func() {
		if !s.opts.ReadOnly {
			s.stopFlusher()
			s.compactLast()
			s.closeErr = s.lastCall()
			s.background.Wait()
			s.closeErr = errors.Join(s.closeErr, s.waitRetired())
			s.seal()
		}
		s.breakDown(ErrClosed) //nolint:errcheck // what it returns is for callers of others
		if !s.opts.ReadOnly && !s.wedged.Load() {
			clearHolder(s.path) // as long as the lock is held
		}
		s.closeErr = errors.Join(s.closeErr, s.release())
	})
	return s.closeErr
}

// release gives the file back, and with it the lock.
func (s *Store) release() error {
	h := s.now.Load()
	if s.wedged.Load() {
		return closeFile(h.file)
	}
	if err := h.db.Close(); err != nil {
		return fmt.Errorf("close %s: %w", s.path, err)
	}
	return nil
}

// seal gives back space and spares the next Open a look at all pages. It is a help only, so there
// is nothing to say if it cannot be written.
func (s *Store) seal() {
	if s.usable() == nil {
		s.trim()
		_ = writeSeal(s.now.Load().file)
	}
}

// closeFile unlocks and closes a file that bbolt may have closed already. A
// memory map that bbolt left behind when it panicked keeps the lock, hence
// the unlocking.
func closeFile(f *os.File) error {
	if c, err := f.SyscallConn(); err == nil {
		_ = c.Control(func(fd uintptr) { _ = unix.Flock(int(fd), unix.LOCK_UN) })
	}
	if err := f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Stats are counts since Open and sizes of now.
type Stats struct {
	// Transactions is the number of write transactions that were committed.
	Transactions uint64
	// Updates is the number of functions whose effect they hold.
	Updates uint64
	// WaitingUses is the number of records with uses that are not written.
	WaitingUses int
	// FileBytes is the length of the file, UsedBytes what is in use of it,
	// with free pages between, and FreeBytes the size of those.
	FileBytes, UsedBytes, FreeBytes int64
	// FlushError is why the last flush by the timer failed, nil if it did
	// not.
	FlushError error
	// Compactions is the number of times that the file was written anew
	// since Open, and CompactError is why the last try failed that nobody
	// asked for, nil if it did not.
	Compactions  uint64
	CompactError error
}

// Stats returns the figures of the store. Sizes are zero once it is closed.
func (s *Store) Stats() Stats {
	st := Stats{
		Transactions: s.transactions.Load(),
		Updates:      s.updates.Load(),
		WaitingUses:  s.uses.waiting(),
	}
	if e := s.flushErr.Load(); e != nil {
		st.FlushError = *e
	}
	if e := s.compactErr.Load(); e != nil {
		st.CompactError = *e
	}
	st.Compactions = s.compactions.Load()
	if s.usable() != nil {
		return st
	}
	if info, err := os.Stat(s.path); err == nil {
		st.FileBytes = info.Size()
	}
	if err := s.view(func(tx *Tx) error {
		return tx.guard("size", "file", func() error {
			st.UsedBytes = tx.tx.Size()
			if !s.opts.ReadOnly {
				st.FreeBytes = int64(tx.handle.db.Stats().FreeAlloc)
			}
			return nil
		})
	}); err != nil {
		st.UsedBytes, st.FreeBytes = 0, 0
	}
	return st
}

func (s *Store) flushFailed(err error) {
	if errors.Is(err, context.Canceled) || errdefs.IsCanceled(err) {
		return
	}
	s.flushErr.Store(&err)
}

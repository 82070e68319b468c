package cache

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/metadata"
)

// Hold keeps a record for a process that works in its snapshot while it does
// not have the store open: a file lock, which the kernel drops when the
// process dies. Whoever opens the store meanwhile counts the record as in use.
// All methods are safe for concurrent use.
//
// It is an open file description lock: unlike flock it can be asked for
// without being taken, so those who look never stand in each other's way, and
// unlike a classic record lock it belongs to the open file, not to the process.
type Hold struct {
	id        ID
	path      string
	exclusive bool

	mu   sync.Mutex
	file *os.File
}

// holdText is what a line of the hold file says of a holder, a hint for people.
type holdText struct {
	PID     int       `json:"pid"`
	Command string    `json:"command"`
	Since   time.Time `json:"since"`
}

// ID is the id of the record that is held.
func (h *Hold) ID() ID { return h.id }

// Exclusive says whether the hold is for writing.
func (h *Hold) Exclusive() bool { return h.exclusive }

// Release gives the hold up. Releasing twice is harmless.
func (h *Hold) Release() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file == nil {
		return nil
	}
	f := h.file
	h.file = nil
	return leaveHold(f, h.path)
}

// leaveHold gives up what f has locked, and unlinks the file if nobody else has
// its name. The locks go first and are asked for after: of two who leave at
// once, each would else find the other, and the file would stay.
func leaveHold(f *os.File, path string) error {
	var errs []error
	unlock := func(at int64) {
		_, err := lockByte(f, at, unix.F_UNLCK)
		errs = append(errs, err)
	}
	unlock(holdByte)
	unlock(nameByte)
	alone, err := lockByte(f, nameByte, unix.F_WRLCK)
	errs = append(errs, err)
	// Only the file that is locked: somebody may have unlinked it and made
	// another.
	if alone && sameFile(f, path) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	// Closing would do, were it not for children that are just being
	// forked: until their exec they have the file, too.
	unlock(nameByte)
	return errors.Join(append(errs, f.Close())...)
}

// held says whether h was not released.
func (h *Hold) held() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.file != nil
}

// The two bytes of a hold file that are locked; they need not exist.
const (
	// holdByte is the hold itself, shared or exclusive.
	holdByte = 0
	// nameByte is locked shared by each holder and whoever is about to
	// become one. Who has it exclusively may unlink the file. It is a lock
	// of its own, so that one who gives up his hold is never taken for a
	// writer.
	nameByte = 1
)

// lockByte changes the lock on a byte of f without waiting. It says whether it
// got it.
func lockByte(f *os.File, at int64, how int16) (bool, error) {
	l := unix.Flock_t{Type: how, Whence: io.SeekStart, Start: at, Len: 1}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	return true, nil
}

// locked says whether the lock on a byte of f could not be had now, without
// taking it.
func locked(f *os.File, at int64, how int16) (bool, error) {
	l := unix.Flock_t{Type: how, Whence: io.SeekStart, Start: at, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		return false, &os.PathError{Op: "look at the lock of", Path: f.Name(), Err: err}
	}
	return l.Type != unix.F_UNLCK, nil
}

func holdPath(root string, id ID) string {
	return filepath.Join(root, "holds", fileName(id))
}

// takeHold locks the hold file of id without waiting. It must be called while
// this process has the store open.
func takeHold(root string, id ID, exclusive bool, command string, now time.Time) (*Hold, error) {
	path := holdPath(root, id)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, fmt.Errorf("hold record %s: %w", short(id), classify(err))
		}
		named, err := lockByte(f, nameByte, unix.F_RDLCK)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if !named || !sameFile(f, path) {
			// The last holder is just unlinking it, or has done so.
			if err := f.Close(); err != nil {
				return nil, err
			}
			runtime.Gosched()
			continue
		}
		how := int16(unix.F_RDLCK)
		if exclusive {
			how = unix.F_WRLCK
		}
		got, err := lockByte(f, holdByte, how)
		if err == nil && !got {
			err = &LockedError{ID: id, Holders: readHolders(f)}
		}
		if err != nil {
			// Who held it may have left meanwhile, and left the name to us.
			return nil, errors.Join(err, leaveHold(f, path))
		}
		if exclusive {
			_ = f.Truncate(0) // what others wrote who were killed
		}
		if text, err := json.Marshal(holdText{PID: os.Getpid(), Command: clip(command), Since: now}); err == nil {
			// Best effort: the lock is the truth, the text a hint.
			_, _ = f.Write(append(text, '\n'))
		}
		return &Hold{id: id, path: path, exclusive: exclusive, file: f}, nil
	}
}

// testHold says whether another process holds id in a way that excludes this
// use: any hold excludes a writer, only an exclusive one a reader. It makes no
// file and takes no lock: while this process has the store open, no file means
// nobody.
func testHold(root string, id ID, write bool) (holders []Holder, busy bool, err error) {
	f, err := os.OpenFile(holdPath(root, id), os.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look for holders of record %s: %w", short(id), err)
	}
	defer f.Close()
	how := int16(unix.F_RDLCK)
	if write {
		how = unix.F_WRLCK
	}
	if busy, err = locked(f, holdByte, how); err != nil || !busy {
		return nil, false, err
	}
	return readHolders(f), true, nil
}

// AwaitHold waits until no other process holds the record of id in the store
// below root in a way that excludes this use, or ctx ends. The store must not
// be open in this process: the others need it in order to finish.
func AwaitHold(ctx context.Context, root string, id ID, write bool) error {
	// A lock that is waited for cannot be given up when ctx ends; asking
	// again costs two system calls.
	pause := 5 * time.Millisecond
	for {
		_, busy, err := testHold(root, id, write)
		if err != nil || !busy {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
			pause = min(pause*2, 100*time.Millisecond)
		}
	}
}

// foreignHolds says whether any process holds any record.
func foreignHolds(root string) bool {
	names, err := os.ReadDir(filepath.Join(root, "holds"))
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	for _, n := range names {
		if holdFileBusy(root, n.Name()) {
			return true
		}
	}
	return false
}

// holdFileBusy says whether any process has the hold file of that name. What
// cannot be looked at is taken for busy.
func holdFileBusy(root, name string) bool {
	f, err := os.Open(filepath.Join(root, "holds", name))
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	busy, err := locked(f, holdByte, unix.F_WRLCK)
	return busy || err != nil
}

// dropStaleHolds unlinks the hold files that nobody has locked. The caller has
// the store open alone.
func dropStaleHolds(root string) error {
	names, err := os.ReadDir(filepath.Join(root, "holds"))
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		if holdFileBusy(root, n.Name()) {
			continue
		}
		// It stays free: who wants it must have the store open.
		err := os.Remove(filepath.Join(root, "holds", n.Name()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// readHolders reads who wrote into a hold file that is locked, leaving out
// those who have died since: there is at least one, known or not. Of a process
// that holds it twice, or once more, the last line counts.
func readHolders(f *os.File) (holders []Holder) {
	data, err := io.ReadAll(io.NewSectionReader(f, 0, 64<<10))
	for line := range bytes.Lines(data) {
		var text holdText
		if err != nil || json.Unmarshal(line, &text) != nil || text.PID <= 0 || errors.Is(unix.Kill(text.PID, 0), unix.ESRCH) {
			continue
		}
		holders = slices.DeleteFunc(holders, func(h Holder) bool { return h.PID == text.PID })
		holders = append(holders, Holder{Kind: HolderProcess, PID: text.PID, Command: text.Command, Since: text.Since})
	}
	if len(holders) == 0 {
		holders = []Holder{{Kind: HolderProcess}}
	}
	return holders
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

// clip keeps what is shown of a command line short.
func clip(s string) string {
	const most = 200
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "..."
	}
	return s
}

// Detach turns the handle into a Hold, so that the snapshot can be worked in
// after Close. The record must be retained. Mounts of the record outlive the
// manager, too. Attach gives the handle back.
func (r *MutableRef) Detach(ctx context.Context) (*Hold, error) {
	h := r.h
	h.m.lock()
	recorded := h.e.recorded
	h.m.unlock()
	if !recorded {
		return nil, fmt.Errorf("record %s is in memory only, retain it first: %w", short(h.id), errdefs.ErrFailedPrecondition)
	}
	return h.detach(ctx, true)
}

// Detach turns the handle into a Hold, so that the snapshot can be read after
// Close. Mounts of the record outlive the manager, too.
func (r *ImmutableRef) Detach(ctx context.Context) (*Hold, error) {
	return r.h.detach(ctx, false)
}

func (h *handle) detach(_ context.Context, exclusive bool) (*Hold, error) {
	m := h.m
	e, done, err := h.begin()
	if err != nil {
		return nil, err
	}
	defer done()
	hold, err := takeHold(m.root, e.id, exclusive, m.command, m.now())
	if err != nil {
		return nil, err
	}
	m.pool.detach(e.id)
	m.lock()
	defer m.unlock()
	// From here on others may write in it, such as the hold's children.
	delete(m.written, e.rec.Key)
	h.noTouch = h.noTouch || exclusive // the use ends with the handle that Attach gives
	m.releaseLocked(h)
	return hold, nil
}

// Attach gives the writer's handle on the mutable record that hold, which must
// be exclusive, was taken on. The hold stays taken until its own Release.
func (m *Manager) Attach(ctx context.Context, hold *Hold) (*MutableRef, error) {
	end, err := m.beginChange()
	if err != nil {
		return nil, err
	}
	defer end()
	switch {
	case !hold.exclusive:
		return nil, fmt.Errorf("hold on record %s is for reading: %w", short(hold.id), errdefs.ErrInvalidArgument)
	case hold.path != holdPath(m.root, hold.id):
		return nil, fmt.Errorf("hold on record %s is of another store: %w", short(hold.id), errdefs.ErrInvalidArgument)
	case !hold.held():
		return nil, fmt.Errorf("hold on record %s was released: %w", short(hold.id), errdefs.ErrFailedPrecondition)
	}
	rec, err := m.read(ctx, hold.id)
	if err == nil && rec.State != metadata.Mutable {
		err = fmt.Errorf("it is %s: %w", rec.State, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("attach to record %s: %w", short(hold.id), err)
	}
	return m.getMutable(ctx, hold.id, ReopenOptions{}, hold)
}

// heldByProcess says whether a living process works under this driver key.
func (m *Manager) heldByProcess(key string) bool {
	_, busy, err := testHold(m.root, madeFor(key), true)
	return busy || err != nil
}

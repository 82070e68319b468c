package cachemount

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// queue is a place among those who want one cache directory. The file of the
// queue holds the last number that was drawn; byte 0 is locked by whoever draws
// or leaves, byte n by the one with number n, until his turn is over.
type queue struct {
	file   *os.File
	number int64
}

const doorByte = 0

// pollShortest and pollLongest bound the pauses of one who waits. A lock that
// is waited for cannot be given up when a context ends; asking again costs a
// system call. The order does not depend on who asks first.
const (
	pollShortest = 2 * time.Millisecond
	pollLongest  = 50 * time.Millisecond
)

// queuePath is the file of the queue for an id in the store below root.
func queuePath(root, id string) string {
	sum := sha256.Sum256([]byte(id))
	return filepath.Join(root, "queues", hex.EncodeToString(sum[:16]))
}

// join draws a number.
func join(ctx context.Context, root, id string) (*queue, error) {
	path := queuePath(root, id)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, fmt.Errorf("queue for cache directory %q: %w", id, err)
		}
		q := &queue{file: f}
		again, err := q.draw(ctx, path)
		if err == nil && !again {
			return q, nil
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("queue for cache directory %q: %w", id, err)
		}
	}
}

// draw takes the next number, unless somebody has unlinked the file meanwhile.
func (q *queue) draw(ctx context.Context, path string) (again bool, err error) {
	closeDoor, err := q.door(ctx)
	if err != nil {
		return false, err
	}
	defer closeDoor()
	if !sameFile(q.file, path) {
		return true, nil
	}
	var last [8]byte
	if _, err := q.file.ReadAt(last[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	n := int64(binary.BigEndian.Uint64(last[:])) + 1
	if n < 1 || n == math.MaxInt64 {
		n = 1 // damaged: a number that is locked is passed over below
	}
	for {
		got, err := setLock(q.file, n, 1, unix.F_WRLCK)
		if err != nil {
			return false, err
		}
		if got {
			break
		}
		n++
	}
	q.number = n
	binary.BigEndian.PutUint64(last[:], uint64(n))
	_, err = q.file.WriteAt(last[:], 0)
	return false, err
}

// door waits for byte 0, which others have for a few system calls only.
func (q *queue) door(ctx context.Context) (leave func(), err error) {
	for pause := pollShortest; ; pause = min(2*pause, pollLongest) {
		got, err := setLock(q.file, doorByte, 1, unix.F_WRLCK)
		if err != nil {
			return nil, err
		}
		if got {
			// Closing the file unlocks it, too, if this should fail.
			return func() { _, _ = setLock(q.file, doorByte, 1, unix.F_UNLCK) }, nil
		}
		if err := sleep(ctx, pause); err != nil {
			return nil, err
		}
	}
}

// first says whether nobody is before q.
func (q *queue) first() (bool, error) {
	if q.number == 1 {
		return true, nil
	}
	busy, err := isLocked(q.file, 1, q.number-1)
	return !busy, err
}

// turn waits until nobody is before q.
func (q *queue) turn(ctx context.Context) error {
	for pause := pollShortest; ; pause = min(2*pause, pollLongest) {
		first, err := q.first()
		if err != nil || first {
			return err
		}
		if err := sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// leave gives the place up. The last one takes the file along.
func (q *queue) leave() error {
	var errs []error
	if _, err := setLock(q.file, q.number, 1, unix.F_UNLCK); err != nil {
		errs = append(errs, err)
	}
	if got, err := setLock(q.file, doorByte, 1, unix.F_WRLCK); err == nil && got {
		if busy, err := isLocked(q.file, 1, math.MaxInt64-1); err == nil && !busy && sameFile(q.file, q.file.Name()) {
			if err := os.Remove(q.file.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(append(errs, q.file.Close())...)
}

// waiting says whether anybody is in the queue for id.
func waiting(root, id string) (bool, error) {
	f, err := os.Open(queuePath(root, id))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	return isLocked(f, 1, math.MaxInt64-1)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// setLock changes the open file description's lock on bytes of f without
// waiting, and says whether it could.
func setLock(f *os.File, at, n int64, how int16) (bool, error) {
	l := unix.Flock_t{Type: how, Whence: io.SeekStart, Start: at, Len: n}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return false, nil
	}
	if err != nil {
		return false, &os.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	return true, nil
}

// isLocked says whether another open file has any of these bytes locked.
func isLocked(f *os.File, at, n int64) (bool, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: at, Len: n}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		return false, &os.PathError{Op: "look at the locks of", Path: f.Name(), Err: err}
	}
	return l.Type != unix.F_UNLCK, nil
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(path)
	return err == nil && os.SameFile(a, b)
}

package metadata

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	berrors "go.etcd.io/bbolt/errors"
)

// Sentinels of the store. Each of them also answers to the errdefs class that
// it wraps.
var (
	// ErrLocked says that another opener has the file. The error in the
	// chain is a *LockedError, which names it.
	ErrLocked = fmt.Errorf("store is locked: %w", errdefs.ErrUnavailable)
	// ErrForeign says that a file is not a store of this package: no bbolt
	// file at all, or somebody else's.
	ErrForeign = fmt.Errorf("not a lamina store: %w", errdefs.ErrFailedPrecondition)
	// ErrNewerSchema says that a newer version wrote the store. It has been
	// left as it was.
	ErrNewerSchema = fmt.Errorf("store has a newer schema: %w", errdefs.ErrFailedPrecondition)
	// ErrDamaged says that bytes on the disk are not what the store wrote.
	ErrDamaged = fmt.Errorf("damaged: %w", errdefs.ErrDataLoss)
	// ErrUnknownOutcome says that a transaction failed so late that its
	// result may be readable or not. The store refuses everything after it;
	// a new Open reads the truth.
	ErrUnknownOutcome = fmt.Errorf("outcome of a transaction is unknown, open the store again: %w", errdefs.ErrUnavailable)
	// ErrClosed says that the store was closed.
	ErrClosed = fmt.Errorf("store is closed: %w", errdefs.ErrUnavailable)
	// ErrReadOnly says that a write was asked of a store that was opened
	// read-only.
	ErrReadOnly = fmt.Errorf("store is open read-only: %w", errdefs.ErrFailedPrecondition)
)

// LockedError is the error of an Open that waited in vain. It is ErrLocked.
type LockedError struct {
	// Path is the store's file.
	Path string
	// Holder is who has it, as far as that is known.
	Holder Holder
}

func (e *LockedError) Error() string {
	return fmt.Sprintf("%s is open in %s", e.Path, e.Holder)
}

// Unwrap makes the error ErrLocked and errdefs.ErrUnavailable.
func (e *LockedError) Unwrap() error { return ErrLocked }

// Holder says which process has a store open. It is a hint: the process
// wrote it about itself.
type Holder struct {
	// PID is 0 when the holder is not known.
	PID int
	// Command is what the process says it does.
	Command string
	// Since is when it opened the store.
	Since time.Time
	// Readers says that the file is open read-only, by one process or more;
	// readers do not write who they are.
	Readers bool
}

func (h Holder) String() string {
	switch {
	case h.Readers:
		return "a reading process"
	case h.PID == 0:
		return "an unknown process"
	}
	return fmt.Sprintf("pid %d (%s) since %s", h.PID, h.Command, h.Since.Format(time.RFC3339))
}

// DamagedError names the row that could not be read. It is ErrDamaged.
type DamagedError struct {
	// Bucket is where the row is.
	Bucket string
	// ID is the record that it belongs to, empty if that is not known.
	ID ID
	// Key is the row's key.
	Key string
	// Reason is what was found.
	Reason string
}

func (e *DamagedError) Error() string {
	if e.ID != "" && e.Bucket == bucketRecord {
		return fmt.Sprintf("record %q is damaged: %s", e.ID, e.Reason)
	}
	if e.ID != "" {
		return fmt.Sprintf("%s of record %q is damaged: %s", e.Bucket, e.ID, e.Reason)
	}
	if e.Key == "" {
		return fmt.Sprintf("%s is damaged: %s", e.Bucket, e.Reason)
	}
	return fmt.Sprintf("%s %q is damaged: %s", e.Bucket, e.Key, e.Reason)
}

// Unwrap makes the error ErrDamaged and errdefs.ErrDataLoss.
func (e *DamagedError) Unwrap() error { return ErrDamaged }

// ioError adds the class to an error that the file or bbolt returned, with
// the errno kept in the chain.
func ioError(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case outOfSpace(err):
		return fmt.Errorf("%s: %w: %w", what, err, errdefs.ErrResourceExhausted)
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return fmt.Errorf("%s: %w: %w", what, err, errdefs.ErrPermissionDenied)
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%s: %w: %w", what, err, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// outOfSpace tells the errors of a full disk, a used-up quota and a file at
// its limit. bbolt hides the errno when it grows its file, so that its text
// must do there.
func outOfSpace(err error) bool {
	if errors.Is(err, berrors.ErrMaxSizeReached) || errors.Is(err, errdefs.ErrResourceExhausted) {
		return true
	}
	for _, no := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(err, no) || strings.HasSuffix(err.Error(), no.Error()) {
			return true
		}
	}
	return false
}

// recovered turns a panic of bbolt or a fault in its memory map into an
// error: both mean that a page is not what it should be.
func recovered(what string, p any) error {
	return &DamagedError{Bucket: "database page", Reason: fmt.Sprintf("%s: %v", what, p)}
}

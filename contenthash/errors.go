package contenthash

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ErrChanged says that files changed again and again while they were read, so
// that there is no digest of any one state. It is an errdefs.ErrUnavailable:
// asking again may succeed.
var ErrChanged = fmt.Errorf("changes while it is read: %w", errdefs.ErrUnavailable)

// pathError tells what was done to which path; its chain has the errno and the
// errdefs class.
type pathError struct {
	op, path   string
	err, class error
}

func (e *pathError) Error() string {
	return e.op + " " + strconv.Quote("/"+e.path) + ": " + e.err.Error()
}

func (e *pathError) Unwrap() []error {
	if e.class == nil {
		return []error{e.err}
	}
	return []error{e.err, e.class}
}

// failed is the error of op on path, or nil.
func failed(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return &pathError{op: op, path: path, err: err, class: classOf(err)}
}

func classOf(err error) error {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return nil
	}
	switch errno {
	case unix.ENOENT:
		return errdefs.ErrNotFound
	case unix.EACCES, unix.EPERM:
		return errdefs.ErrPermissionDenied
	case unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG:
		return errdefs.ErrInvalidArgument
	case unix.EMFILE, unix.ENFILE, unix.ENOMEM:
		return errdefs.ErrResourceExhausted
	case unix.EIO:
		return errdefs.ErrDataLoss
	default:
		return errdefs.ErrUnknown
	}
}

// moved says that what was at a path a moment ago is not there any more, or is
// of another type.
func moved(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) ||
		errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ESTALE)
}

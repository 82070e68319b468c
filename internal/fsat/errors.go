package fsat

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// pathError says what was done to which path. Its chain holds the errno and
// its errdefs class; the text shows the errno alone, since the two read the
// same.
type pathError struct {
	op, path string
	err      error
	class    error
}

func (e *pathError) Error() string {
	return e.op + " " + strconv.Quote(e.path) + ": " + e.err.Error()
}

func (e *pathError) Unwrap() []error {
	if e.class == nil {
		return []error{e.err}
	}
	return []error{e.err, e.class}
}

// Error tells what failed on which path, with the errdefs class of the errno.
// The path is quoted: names may hold control bytes. nil stays nil.
func Error(op, path string, err error) error {
	if err == nil {
		return nil
	}
	if path == "" {
		path = "."
	}
	return &pathError{op: op, path: path, err: err, class: classOf(err)}
}

// Refuse is an error of class for path in the same form as Error.
func Refuse(class error, path, format string, args ...any) error {
	return &pathError{op: "use", path: path, err: fmt.Errorf(format, args...), class: class}
}

func classOf(err error) error {
	var errno unix.Errno
	if !errors.As(err, &errno) {
		return nil
	}
	switch errno {
	case unix.ENOENT:
		return errdefs.ErrNotFound
	case unix.EACCES, unix.EPERM, unix.EROFS:
		return errdefs.ErrPermissionDenied
	case unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG, unix.EISDIR:
		return errdefs.ErrInvalidArgument
	case unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EFBIG, unix.EMLINK:
		return errdefs.ErrResourceExhausted
	case unix.EEXIST:
		return errdefs.ErrAlreadyExists
	case unix.EBUSY, unix.ETXTBSY:
		return errdefs.ErrUnavailable
	case unix.EIO:
		return errdefs.ErrDataLoss
	default:
		return errdefs.ErrUnknown
	}
}

// Absent says that nothing can be at a path: the name is not there, or
// something on the way is no directory or is a link.
func Absent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

package buildkit

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// Sentinels of Open and Workers; each answers to an errdefs class, too.
var (
	// ErrNotBuildKit says that a directory holds no state of BuildKit.
	ErrNotBuildKit = fmt.Errorf("no state of BuildKit: %w", errdefs.ErrNotFound)
	// ErrNewer says that a newer BuildKit, or another program, wrote what this
	// version does not know.
	ErrNewer = fmt.Errorf("layout is newer than this version knows: %w", errdefs.ErrFailedPrecondition)
	// ErrUnsupported says that the state of a worker cannot be taken over.
	ErrUnsupported = fmt.Errorf("cannot be taken over: %w", errdefs.ErrNotImplemented)
	// ErrIncomplete says that a file is missing without which the others say
	// too little.
	ErrIncomplete = fmt.Errorf("state is incomplete: %w", errdefs.ErrDataLoss)
)

// LockedError says that somebody has a database open: mostly the daemon that
// runs. It is metadata.ErrLocked.
type LockedError struct {
	// Path is what is locked.
	Path string
	// PID is 0 and Command empty if the holder is not known.
	PID     int
	Command string
}

// Error names the holder and says what to do.
func (e *LockedError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("%s is in use by an unknown process: stop the daemon first", e.Path)
	}
	return fmt.Sprintf("%s is in use by pid %d (%s): stop it first", e.Path, e.PID, e.Command)
}

// Unwrap makes the error metadata.ErrLocked and errdefs.ErrUnavailable.
func (e *LockedError) Unwrap() error { return metadata.ErrLocked }

// classified is an error of the system with its class.
type classified struct{ err, class error }

func (e *classified) Error() string   { return e.err.Error() }
func (e *classified) Unwrap() []error { return []error{e.err, e.class} }

// classify gives an error of the system its class.
func classify(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return &classified{err, errdefs.ErrNotFound}
	case errors.Is(err, fs.ErrPermission):
		return &classified{err, errdefs.ErrPermissionDenied}
	case errors.Is(err, syscall.EIO):
		return &classified{err, errdefs.ErrDataLoss}
	}
	return err
}

// advise says what to do about a file that is damaged or missing.
func advise(err error) error {
	if !errors.Is(err, errdefs.ErrDataLoss) {
		return err
	}
	return fmt.Errorf("%w; restore it from a backup, or move the worker's directory away to begin with an empty cache", err)
}

// printable keeps what comes from files from changing a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}

package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/internal/fsat"
)

// EntryError is what is wrong with one entry of a layer, or what failed while
// it was applied or written. Its chain has an errdefs class and the errno, if
// there is one: ResourceExhausted for a full disk and for a limit,
// PermissionDenied, InvalidArgument for what no layer may hold.
type EntryError struct {
	// Name is the entry's name as the layer has it.
	Name string
	Err  error
}

func (e *EntryError) Error() string {
	return "layer entry " + strconv.Quote(e.Name) + ": " + e.Err.Error()
}

func (e *EntryError) Unwrap() error { return e.Err }

// entryError names the entry; an error that names one already stays.
func entryError(name string, err error) error {
	if err == nil {
		return nil
	}
	var e *EntryError // escapes: not on the way of each entry that is fine
	if errors.As(err, &e) {
		return err
	}
	return &EntryError{Name: name, Err: err}
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func exhausted(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrResourceExhausted)...)
}

// failed adds what was done and the class of the errno.
func failed(op, path string, err error) error { return fsat.Error(op, path, err) }

// badArchive gives an error of reading the archive its class. What the
// stream's own reader returned is left as it is.
func badArchive(s *stream, err error) error {
	if err == nil {
		return nil
	}
	if serr := s.failure(); serr != nil {
		return serr
	}
	switch {
	case errors.Is(err, tar.ErrHeader), errors.Is(err, tar.ErrFieldTooLong), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, tar.ErrInsecurePath),
		strings.HasPrefix(err.Error(), "archive/tar: "): // those of sparse files have no names
		return fmt.Errorf("read tar: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("read tar: %w", err)
}

func impossible(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrFailedPrecondition)...)
}

// errRedirect is for directories of a layer that show another one than that of
// their name, and files that hold only attributes. Such a layer can be mounted
// over its own parents alone.
var errRedirect = impossible("the layer has redirect or metacopy attributes of overlayfs")

package contenthash

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// ErrChanged says that files changed again and again while they were read, so
// that there is no digest of any one state. It is an errdefs.ErrUnavailable:
// asking again may succeed.
var ErrChanged = fmt.Errorf("changes while it is read: %w", errdefs.ErrUnavailable)

// failed is the error of op on path, or nil; its chain has the errno and its
// errdefs class.
func failed(op, path string, err error) error { return fsat.Error(op, "/"+path, err) }

// moved says that what was at a path a moment ago is not there any more, or is
// of another type.
func moved(err error) bool {
	return fsat.Absent(err) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ESTALE)
}

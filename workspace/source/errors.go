package source

import (
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/internal/fsat"
)

// ErrChanged is in the chain of a ChangedError. Its class is Aborted: the same
// work from a new scan may succeed.
var ErrChanged = fmt.Errorf("changed while it was read: %w", errdefs.ErrAborted)

// ChangedError says that a file of the source changed during a scan or between
// the scan and its copy. Scan again; what was copied so far is not copied anew.
type ChangedError struct {
	// Path is relative to the source.
	Path string
}

func (e *ChangedError) Error() string {
	return "source file " + strconv.Quote(e.Path) + " changed while it was read"
}

// Unwrap gives ErrChanged.
func (e *ChangedError) Unwrap() error { return ErrChanged }

// openSource opens the directory that a caller names as source.
func openSource(dir string) (*fsat.Root, error) {
	root, err := fsat.OpenRoot(dir)
	if err != nil {
		return nil, fsat.Error("open source directory", dir, err)
	}
	return root, nil
}

package overlayfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// RemoveVolatileMark removes the mark that a volatile mount leaves in its
// work directory, even after a clean unmount, and because of which the kernel
// refuses the next mount. A work directory without a mark, or one that was
// never mounted, is left as it is.
//
// The mark warns that the upper directory may miss data after a power cut.
// Who removes it knows better: the machine has not been restarted since, or a
// sync of the file system has succeeded. No mount may have work in use.
func RemoveVolatileMark(work string) error {
	inner := filepath.Join(work, "work")
	// The kernel makes this directory with mode 000, which keeps an ordinary
	// user out of it.
	if err := os.Chmod(inner, 0o700); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("remove volatile mark: %w", err)
	}
	// Only this one: other names in incompat stand for features that the
	// kernel rightly refuses.
	mark := filepath.Join(inner, "incompat", "volatile")
	if err := os.RemoveAll(mark); err != nil {
		return fmt.Errorf("remove volatile mark: %w", err)
	}
	return nil
}

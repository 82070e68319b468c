package overlayfs

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// MaxLayers is how many lower layers the kernel takes in one mount
// (OVL_MAX_STACK in fs/overlayfs); one more is refused.
const MaxLayers = 500

// Mount describes one overlay mount.
type Mount struct {
	// Lower are the lower directories, topmost first. A writable mount needs
	// at least one, a read-only one at least two (Upper counts, see
	// ReadOnly), and no directory may be in the stack twice.
	Lower []string
	// Upper takes the changes, and Work is the kernel's scratch directory
	// beside it, on the same file system. Both are empty for a read-only
	// mount. An Upper must not be in two mounts at once: the kernel only
	// warns about it, and what the second one shows is undefined.
	Upper, Work string
	// UserXattr keeps the overlay's marks in user.* instead of trusted.*
	// attributes, which is all that an ordinary user may write. Layers made
	// with one class must not be mounted with the other: deleted files would
	// come back.
	UserXattr bool
	// Volatile leaves out all syncs of the upper file system, above all the
	// one on unmounting. The kernel then refuses to mount Work again until
	// [RemoveVolatileMark].
	Volatile bool
	// Follow shows directories that were renamed from a lower layer
	// (redirect) and files whose content is a lower layer's (metacopy), which
	// mounts with other options have made. A writable mount makes such marks,
	// too. Without it the former look empty and the latter cannot be read.
	// With UserXattr the kernel knows neither.
	Follow bool
	// ReadOnly makes the mount refuse every change with EROFS. Upper, where
	// it is set, is then the topmost lower directory, and Work is not used.
	ReadOnly bool
}

// Mount mounts the stack on the existing directory target.
//
// The directories are handed to the kernel as descriptors, so neither the
// length of a path nor a comma, colon or backslash in it matters, and a
// directory that is renamed meanwhile is still the one that was meant. Where
// the kernel takes no descriptors (before 6.13) the classic mount call is
// used, with the same result.
//
// A layer directory that does not exist is errdefs.ErrNotFound; a target that
// does not exist, a stack that the kernel never mounts and a wrong
// combination of fields are errdefs.ErrInvalidArgument; a kernel without
// overlayfs is errdefs.ErrNotImplemented; a missing privilege is
// errdefs.ErrPermissionDenied. The kernel's errno and what it logged are part
// of the error. After an error nothing is mounted.
func (m Mount) Mount(target string) error {
	return m.mountWith(target, byDescriptor, classic)
}

// A method is one way to ask the kernel for a mount. It returns an error that
// wraps errNoMethod when the kernel does not know that way.
type method func(l *layers, m Mount, target int) error

var errNoMethod = errors.New("not supported by this kernel")

func (m Mount) mountWith(target string, methods ...method) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("mount overlay on %q (%d lower): %w", target, len(m.Lower), err)
		}
	}()
	m, err = m.normal()
	if err != nil {
		return err
	}
	dst, err := openDir(target)
	if err != nil {
		return fmt.Errorf("target: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer unix.Close(dst)
	l, err := m.open()
	if err != nil {
		return err
	}
	defer l.close()

	var tried []error
	for _, try := range methods {
		err := try(l, m, dst)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errNoMethod):
			tried = append(tried, err)
			continue
		case tried != nil:
			// What the kernel lacked is text only: the last error decides.
			err = fmt.Errorf("%w (without descriptors, because: %s)", err, errors.Join(tried...).Error())
		}
		return withClass(err)
	}
	return withClass(errors.Join(tried...))
}

// normal checks the fields and folds Upper into Lower for read-only mounts.
func (m Mount) normal() (Mount, error) {
	invalid := func(format string, args ...any) (Mount, error) {
		return m, fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	if m.ReadOnly && m.Upper != "" {
		m.Lower = append([]string{m.Upper}, m.Lower...)
		m.Upper, m.Work = "", ""
	}
	switch {
	case (m.Upper == "") != (m.Work == ""):
		return invalid("upper %q and work %q belong together", m.Upper, m.Work)
	case m.Upper == "" && m.Volatile:
		return invalid("a read-only mount cannot be volatile")
	case m.Upper == "" && len(m.Lower) < 2:
		return invalid("a read-only mount needs two lower layers, have %d", len(m.Lower))
	case len(m.Lower) < 1:
		return invalid("a mount needs a lower layer")
	case len(m.Lower) > MaxLayers:
		return invalid("%d lower layers: the kernel's limit is %d", len(m.Lower), MaxLayers)
	}
	m.ReadOnly = m.Upper == ""
	return m, nil
}

// layers are descriptors of the directories of a mount; -1 is none.
type layers struct {
	lower       []int
	upper, work int
}

func (m Mount) open() (*layers, error) {
	l := &layers{upper: -1, work: -1}
	open := func(what, path string, fd *int) (err error) {
		if *fd, err = openDir(path); err != nil {
			err = fmt.Errorf("%s: %w", what, err)
			if errors.Is(err, unix.ENOENT) {
				err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
			}
		}
		return err
	}
	for i, path := range m.Lower {
		l.lower = append(l.lower, -1)
		if err := open("lower layer", path, &l.lower[i]); err != nil {
			l.close()
			return nil, err
		}
	}
	if m.Upper != "" {
		err := open("upper", m.Upper, &l.upper)
		if err == nil {
			err = open("work", m.Work, &l.work)
		}
		if err != nil {
			l.close()
			return nil, err
		}
	}
	return l, nil
}

func (l *layers) close() {
	for _, fd := range append(l.lower, l.upper, l.work) {
		if fd >= 0 {
			_ = unix.Close(fd) // O_PATH: nothing to lose
		}
	}
}

// openDir opens a directory as a mere place (O_PATH), which needs no
// permission on the directory itself.
func openDir(path string) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return -1, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return fd, nil
	}
}

// withClass adds the errdefs class to an error that carries only an errno.
func withClass(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	case errors.Is(err, errNoMethod), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotImplemented)
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("a layer is in the stack twice: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

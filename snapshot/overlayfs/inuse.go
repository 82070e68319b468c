package overlayfs

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// InUse says whether the directory upper is the upper layer of an overlay
// mount right now, in whatever mount namespace of this kernel, and whoever
// mounted it. It mounts nothing and leaves nothing behind.
//
// It asks for a mount that cannot succeed. With index=on the kernel claims
// upper before it looks at the work directory: EBUSY is the answer for one
// that is claimed already. Otherwise the work directory, which lies on
// another file system, is refused with EINVAL. EINVAL also means an option
// that the kernel does not know, so [Try] sees both answers once, before a
// driver relies on them.
//
// The answer is true only of mounts that were made while no probe ran: one
// that is made at that moment succeeds but never claims its upper, and later
// probes call it free. The caller keeps mounts and probes of one directory
// apart. Of two mounts with one upper, only the first is seen.
//
// A mount namespace that was made while the directory was mounted holds a copy
// of the mount, and unmounting it elsewhere does not always reach that copy.
// The directory is in use then until that namespace ends, too. So mount where
// nobody else makes namespaces: in a mount namespace of one's own.
//
// Needs CAP_SYS_ADMIN in the user namespace of the caller's mount namespace;
// without it the error is errdefs.ErrPermissionDenied. A directory that does
// not exist is errdefs.ErrNotFound.
func InUse(upper string) (bool, error) {
	dir, err := openDir(upper)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		return false, fmt.Errorf("probe upper: %w", err)
	}
	defer unix.Close(dir)
	scratch, err := detachedTmpfs()
	if err != nil {
		return false, fmt.Errorf("probe upper %q: %w", upper, withClass(err))
	}
	defer unix.Close(scratch)
	busy, err := probe(dir, scratch)
	if err != nil {
		return false, fmt.Errorf("probe upper %q: %w", upper, withClass(err))
	}
	return busy, nil
}

// probe asks for an overlay mount of upper with its work directory and its
// lower layer on scratch, which is another file system.
func probe(upper, scratch int) (bool, error) {
	c, err := newContext("overlay")
	if err != nil {
		return false, err
	}
	defer c.close()
	// Paths rather than descriptors: kernels before 6.13 take them too.
	for _, s := range []setting{
		{"lowerdir", descriptorPath(scratch)},
		{"upperdir", descriptorPath(upper)},
		{"workdir", descriptorPath(scratch)},
		{"index", "on"},
	} {
		if err := c.set(s.key, s.value); err != nil {
			return false, err
		}
	}
	err = c.create()
	switch {
	case errors.Is(err, unix.EBUSY):
		return true, nil
	case errors.Is(err, unix.EINVAL):
		return false, nil
	case err == nil:
		// The context is dropped unmounted, so nothing is left, but then
		// upper was not judged the way the probe relies on.
		return false, errors.New("the kernel accepted a work directory on another file system")
	}
	return false, err
}

func descriptorPath(fd int) string { return fmt.Sprintf("%s/%d", descriptors, fd) }

// detachedTmpfs returns a descriptor of the root of an empty file system that
// is mounted nowhere and is gone when the descriptor is closed.
func detachedTmpfs() (int, error) {
	c, err := newContext("tmpfs")
	if err != nil {
		return -1, err
	}
	defer c.close()
	return c.mount(unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOSUID)
}

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// native keeps in fs the whole tree: a copy of the parent's with the changes.
type native struct{ *tree }

var _ backend = (*native)(nil)

func (n *native) check(string) error { return nil }

func (n *native) describe(_ string, s *state) error {
	s.Clean = false // a tree, and no layer
	return nil
}

func (n *native) rebase() error {
	return fmt.Errorf("a copying driver cannot put a parent below a snapshot: %w", errdefs.ErrNotImplemented)
}

func (n *native) fill(ctx context.Context, path, from string, view bool) error {
	dir := below(path, "fs")
	switch {
	case view && from != "":
		return nil // shows the parent's
	case from != "":
		return copyTree(ctx, dir, from)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	return likeRoot(dir, "")
}

func (n *native) whole(e entry, s state) (string, bool) {
	if s.View && s.Parent != "" {
		e = entry{dirCommitted, encodeKey(string(s.Parent))}
	}
	return below(n.at(e), "fs"), true
}

func (n *native) mounts(e entry, s state, _ string) ([]mount.Mount, error) {
	dir, _ := n.whole(e, s)
	return bindMount(dir, s.View), nil
}

func (n *native) mount(e entry, s state, target string, readOnly bool) error {
	dir, _ := n.whole(e, s)
	err := bind(dir, target, readOnly)
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
	}
	return asNotFound(err)
}

func (n *native) examine(string, *state) error { return nil }

func (n *native) inUse(entry, state) (bool, error) { return false, nil }

func (n *native) tidy(string, bool) (bool, error) { return false, nil }

// bind mounts a directory at a second place.
func bind(source, target string, readOnly bool) error {
	err := bindByDescriptor(source, target, readOnly)
	if errors.Is(err, unix.ENOSYS) {
		err = bindClassic(source, target, readOnly)
	}
	if err != nil {
		return &os.LinkError{Op: "bind mount", Old: source, New: target, Err: err}
	}
	return nil
}

// bindByDescriptor makes the mount read-only before it can be seen. Flags
// that a user namespace locks stay as they are.
func bindByDescriptor(source, target string, readOnly bool) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if readOnly {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return err
		}
	}
	return unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// bindClassic is for kernels before 5.12.
func bindClassic(source, target string, readOnly bool) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil || !readOnly {
		return err
	}
	var st unix.Statfs_t
	err := unix.Statfs(target, &st)
	if err == nil {
		// What a user namespace locks must be asked for again. These flags
		// have the same values in statfs and in mount.
		const kept = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME
		flags := uintptr(st.Flags) & kept
		if st.Flags&unix.ST_RELATIME != 0 {
			flags |= unix.MS_RELATIME
		}
		err = unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|flags, "")
	}
	if err != nil {
		err = errors.Join(err, unix.Unmount(target, unix.MNT_DETACH))
	}
	return err
}

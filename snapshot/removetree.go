package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// errNoLink is what reading something else as a symbolic link gives.
var errNoLink error = unix.EINVAL

// removeTree deletes path and everything below it. It never follows a
// symbolic link. Directories that their owner may not enter, such as
// overlayfs's work/work with mode 000, are opened up first. What does not
// exist is no error.
func removeTree(path string) error {
	// os.RemoveAll goes down by descriptors (openat, unlinkat).
	err := os.RemoveAll(path)
	if err == nil || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	if openErr := openUp(unix.AT_FDCWD, path); openErr != nil {
		return errors.Join(err, openErr)
	}
	return os.RemoveAll(path)
}

// openUp gives the owner all permissions on the directories of a tree.
func openUp(parent int, name string) error {
	const flags = unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	place, err := unix.Openat(parent, name, flags|unix.O_PATH, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(place)
	var st unix.Stat_t
	if err := unix.Fstat(place, &st); err != nil {
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&0o700 != 0o700 {
		// By the descriptor: a name could have become a link meanwhile.
		if err := os.Chmod(fmt.Sprintf("/proc/self/fd/%d", place), 0o700); err != nil {
			return &os.PathError{Op: "chmod", Path: name, Err: errors.Unwrap(err)}
		}
	}
	fd, err := unix.Openat(place, ".", flags|unix.O_RDONLY, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	dir := os.NewFile(uintptr(fd), name)
	defer dir.Close()
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := openUp(fd, e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

package snapshot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// errNoLink is what reading something else as a symbolic link gives.
var errNoLink error = unix.EINVAL

// removeTree deletes path and everything below it. It never follows a
// symbolic link. Directories that their owner may not enter, such as
// overlayfs's work/work with mode 000, are opened up first. What does not
// exist is no error.
func removeTree(path string) error {
	return new(remover).tree(path)
}

// remover deletes trees. System calls are all that a removal costs, so none is
// made in vain: os.RemoveAll tries three for each directory before it opens it.
type remover struct {
	buf   []byte          // scratch space for lists
	lists [][]fsat.Dirent // of the directories above, and of this one
}

// tree is removeTree.
func (r *remover) tree(path string) error {
	err := r.remove(unix.AT_FDCWD, path, 0)
	if err == nil || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	if openErr := openUp(unix.AT_FDCWD, path); openErr != nil {
		return errors.Join(err, openErr)
	}
	return r.remove(unix.AT_FDCWD, path, 0)
}

// remove deletes a name in the directory parent, and what lies below it.
func (r *remover) remove(parent int, name string, level int) error {
	fd, err := openDir(parent, name)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return unlink(parent, name, 0)
	case err != nil:
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	err = r.removeDir(parent, fd, name, level)
	return errors.Join(err, os.NewSyscallError("close", unix.Close(fd)))
}

// removeDir deletes the directory that is open as fd.
func (r *remover) removeDir(parent, fd int, name string, level int) error {
	for {
		n, err := r.empty(fd, level)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		err = unlink(parent, name, unix.AT_REMOVEDIR)
		if n == 0 || !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
			return err
		}
		// Others may add names, and not every file system lists all of a
		// directory that loses names meanwhile.
		if _, err := unix.Seek(fd, 0, io.SeekStart); err != nil {
			return &os.PathError{Op: "seek", Path: name, Err: err}
		}
	}
}

// empty deletes what is in a directory, and says how many names it found.
func (r *remover) empty(fd, level int) (n int, err error) {
	if r.buf == nil {
		r.buf = make([]byte, 8192)
	}
	if level == len(r.lists) {
		r.lists = append(r.lists, nil)
	}
	list, err := fsat.Dirents(fd, r.buf, r.lists[level][:0])
	r.lists[level] = list
	// Not there: somebody else has removed the directory.
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return 0, os.NewSyscallError("getdents64", err)
	}
	for _, d := range list {
		if d.Type == unix.DT_DIR || d.Type == unix.DT_UNKNOWN {
			err = r.remove(fd, d.Name, level+1)
		} else {
			err = unlink(fd, d.Name, 0)
		}
		if err != nil {
			return 0, err
		}
	}
	return len(list), nil
}

// openDir opens a directory for reading, never through a link.
func openDir(parent int, name string) (int, error) {
	return retry(func() (int, error) {
		return unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
}

// unlink deletes one name, if it is there.
func unlink(parent int, name string, flags int) error {
	_, err := retry(func() (int, error) { return 0, unix.Unlinkat(parent, name, flags) })
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return &os.PathError{Op: "unlinkat", Path: name, Err: err}
}

// retry calls again what a signal interrupted.
func retry(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
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

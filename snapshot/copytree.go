package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

// copyTree copies the tree of the directory from to the new directory to:
// contents (shared where the file system can, holes kept), hard links, modes,
// owners, extended attributes and times. Symbolic links are copied, never
// followed. What it made stays when it fails.
func copyTree(ctx context.Context, to, from string) error {
	c := &copier{ctx: ctx, links: map[inodeID]string{}, clones: true}
	return c.tree(to, from)
}

// linkTree is copyTree with hard links in place of the files, wherever there
// can be one more. It says how many names each of these files has in the tree.
func linkTree(ctx context.Context, to, from string) (names map[inodeID]int, err error) {
	c := &copier{ctx: ctx, links: map[inodeID]string{}, clones: true, names: map[inodeID]int{}}
	return c.names, c.tree(to, from)
}

// copyRoot gives the empty directory to the mode, owner, times and extended
// attributes of from. Overlay marks stay behind: they tell how that layer
// lies over its own parent.
func copyRoot(to, from string) error {
	src, err := openPlace(unix.AT_FDCWD, from, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := openPlace(unix.AT_FDCWD, to, unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer dst.Close()
	st, err := stat(src)
	if err != nil {
		return err
	}
	return copyAttributes(src, dst, st, withoutMarks)
}

func withoutMarks(name string) (string, bool) {
	return name, !strings.HasPrefix(name, "trusted.overlay.") && !strings.HasPrefix(name, "user.overlay.")
}

type inodeID struct{ dev, ino uint64 }

// A copier goes down two trees by descriptors, so that no length of a path
// and no link in a path matters.
type copier struct {
	ctx    context.Context
	root   *os.File           // the top of the copy
	links  map[inodeID]string // where the copy has files with several names
	clones bool               // until the file system says that it cannot
	// names makes hard links of files, and counts them by inode.
	names map[inodeID]int
}

func (c *copier) tree(to, from string) error {
	src, err := openPlace(unix.AT_FDCWD, from, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer src.Close()
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	if c.root, err = openPlace(unix.AT_FDCWD, to, unix.O_DIRECTORY|unix.O_NOFOLLOW); err != nil {
		return err
	}
	defer c.root.Close()
	return c.directory(src, c.root, "")
}

// openPlace opens a name as a mere place (O_PATH).
func openPlace(dir int, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(dir, name, flags|unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// procPath is a path that leads to the very file of a descriptor, even a
// symbolic link, for system calls that know only paths.
func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func stat(f *os.File) (st unix.Stat_t, err error) {
	if err = unix.Fstat(int(f.Fd()), &st); err != nil {
		err = &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return st, err
}

// directory copies what is in src to dst, at rel below the top, and then its
// attributes: the times last, as each new entry changes them.
func (c *copier) directory(src, dst *os.File, rel string) (err error) {
	st, err := stat(src)
	if err != nil {
		return err
	}
	list, closed, err := openReadable(src, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	// What lies in it can be reached only as long as it is open.
	defer func() { err = errors.Join(err, closed()) }()
	names, err := list.Readdirnames(-1)
	if err := errors.Join(err, list.Close()); err != nil {
		return err
	}
	for _, name := range names {
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		if err := c.entry(src, dst, rel, name); err != nil {
			return fmt.Errorf("copy %q: %w", filepath.Join(rel, name), err)
		}
	}
	return copyAttributes(src, dst, st, nil)
}

func (c *copier) entry(srcDir, dstDir *os.File, rel, name string) error {
	src, err := openPlace(int(srcDir.Fd()), name, unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer src.Close()
	st, err := stat(src)
	if err != nil {
		return err
	}
	rel = filepath.Join(rel, name)
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	id := inodeID{st.Dev, st.Ino}
	if !isDir && st.Nlink > 1 {
		if first, ok := c.links[id]; ok {
			if c.names[id] > 0 {
				c.names[id]++
			}
			return unix.Linkat(int(c.root.Fd()), first, int(dstDir.Fd()), name, 0)
		}
		c.links[id] = rel
	}
	if linked, err := c.link(srcDir, dstDir, name, &st); err != nil || linked {
		return err
	}
	if err := c.create(src, int(dstDir.Fd()), name, st); err != nil {
		return err
	}
	dst, err := openPlace(int(dstDir.Fd()), name, unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer dst.Close()
	if isDir {
		return c.directory(src, dst, rel)
	}
	return copyAttributes(src, dst, st, nil)
}

// link makes a hard link in place of a copy, if it is to and can.
func (c *copier) link(srcDir, dstDir *os.File, name string, st *unix.Stat_t) (bool, error) {
	if c.names == nil || st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return false, nil
	}
	err := unix.Linkat(int(srcDir.Fd()), name, int(dstDir.Fd()), name, 0)
	switch {
	case err == nil:
		c.names[inodeID{st.Dev, st.Ino}]++
		return true, nil
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EMLINK), errors.Is(err, unix.EPERM):
		return false, nil // another file system, a full inode, or not ours
	}
	return false, &os.LinkError{Op: "link", Old: name, New: name, Err: err}
}

// create makes the file with its content.
func (c *copier) create(src *os.File, dir int, name string, st unix.Stat_t) error {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return unix.Mkdirat(dir, name, 0o700)
	case unix.S_IFREG:
		return c.file(src, dir, name, st.Size)
	case unix.S_IFLNK:
		target, err := readLink(src)
		if err != nil {
			return err
		}
		return unix.Symlinkat(target, dir, name)
	}
	return unix.Mknodat(dir, name, st.Mode&^0o7777|0o600, int(st.Rdev))
}

// file copies a regular file: as a clone that shares its blocks, or else the
// ranges that hold data.
func (c *copier) file(place *os.File, dir int, name string, size int64) error {
	src, closed, err := openReadable(place, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	if err := closed(); err != nil {
		return err
	}
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	dst := os.NewFile(uintptr(fd), name)
	err = c.content(dst, src, size)
	return errors.Join(err, dst.Close())
}

func (c *copier) content(dst, src *os.File, size int64) error {
	if size == 0 {
		return nil
	}
	if c.clones {
		err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
		if err == nil {
			return nil
		}
		if !unsupported(err) {
			return os.NewSyscallError("ioctl FICLONE", err)
		}
		c.clones = false
	}
	// The length alone makes what is not written a hole.
	if err := dst.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		start, end, err := nextData(src, at, size)
		if err != nil {
			return err
		}
		if err := copyRange(dst, src, start, end); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// maxRange bounds one step, in bytes, so that a cancelled context is seen.
const maxRange = 64 << 20

// nextData is the next range with data at or after at.
func nextData(f *os.File, at, size int64) (start, end int64, err error) {
	start, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size, nil
	}
	if unsupported(err) {
		return at, min(at+maxRange, size), nil
	}
	if err == nil {
		end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	}
	if err != nil {
		return 0, 0, os.NewSyscallError("lseek", err)
	}
	return start, min(end, size, start+maxRange), nil
}

func copyRange(dst, src *os.File, start, end int64) error {
	from, to := start, start
	for from < end {
		n, err := unix.CopyFileRange(int(src.Fd()), &from, int(dst.Fd()), &to, int(end-from), 0)
		if unsupported(err) {
			return copyBytes(dst, src, from, end)
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("copy_file_range", err)
		}
		if err == nil && n == 0 {
			return io.ErrUnexpectedEOF
		}
	}
	return nil
}

func copyBytes(dst, src *os.File, start, end int64) error {
	_, err := io.CopyN(io.NewOffsetWriter(dst, start), io.NewSectionReader(src, start, end-start), end-start)
	return err
}

// unsupported says whether an error means that this file system, or these
// two, cannot do it in this way.
func unsupported(err error) bool {
	for _, e := range []error{unix.EOPNOTSUPP, unix.ENOSYS, unix.EXDEV, unix.EINVAL, unix.ENOTTY} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// openReadable opens what a place descriptor stands for. One that its own
// mode keeps its owner from reading is opened up until closed is called.
func openReadable(place *os.File, flags int) (f *os.File, closed func() error, err error) {
	path := procPath(place)
	open := func() error {
		fd, err := unix.Open(path, flags|unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: place.Name(), Err: err}
		}
		f = os.NewFile(uintptr(fd), place.Name())
		return nil
	}
	closed = func() error { return nil }
	st, err := stat(place)
	if err != nil {
		return nil, nil, err
	}
	shut := st.Mode&0o500 != 0o500 && flags&unix.O_DIRECTORY != 0 && os.Geteuid() != 0
	if err = open(); err == nil && !shut || err != nil && !errors.Is(err, unix.EACCES) {
		return f, closed, err
	}
	if chmodErr := unix.Chmod(path, st.Mode&0o7777|0o500); chmodErr != nil {
		return f, closed, err // not the owner: the first answer stands
	}
	closed = func() error { return unix.Chmod(path, st.Mode&0o7777) }
	if err != nil {
		err = open()
	}
	if err != nil {
		err = errors.Join(err, closed())
	}
	return f, closed, err
}

// readLink reads the symbolic link that a place descriptor stands for.
func readLink(place *os.File) (string, error) {
	for size := 256; ; size *= 2 {
		buf := make([]byte, size)
		n, err := unix.Readlinkat(int(place.Fd()), "", buf)
		if err != nil {
			return "", &os.PathError{Op: "readlink", Path: place.Name(), Err: err}
		}
		if n < size {
			return string(buf[:n]), nil
		}
	}
}

// copyAttributes copies owner, mode and times, as st has them, and extended
// attributes, under other names if rename is not nil and but for those for which
// it says no, in an order in which none undoes another:
// changing the owner takes set-id bits and capabilities away, a mode may keep
// an ordinary user from setting attributes, and everything changes times.
func copyAttributes(src, dst *os.File, st unix.Stat_t, rename func(string) (string, bool)) error {
	if err := unix.Fchownat(int(dst.Fd()), "", int(st.Uid), int(st.Gid), unix.AT_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "chown", Path: dst.Name(), Err: err}
	}
	if err := copyXattrs(src, dst, rename); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		if err := unix.Chmod(procPath(dst), st.Mode&0o7777); err != nil {
			return &os.PathError{Op: "chmod", Path: dst.Name(), Err: err}
		}
	}
	return setTimes(dst, st)
}

// setTimes sets the times through the place's own descriptor where the kernel
// can (5.8), or else through /proc, which symbolic links do not allow.
func setTimes(f *os.File, st unix.Stat_t) error {
	times := []unix.Timespec{st.Atim, st.Mtim}
	err := unix.UtimesNanoAt(int(f.Fd()), "", times, unix.AT_EMPTY_PATH)
	if errors.Is(err, unix.EINVAL) {
		err = unix.UtimesNanoAt(unix.AT_FDCWD, procPath(f), times, 0)
	}
	if err != nil {
		return &os.PathError{Op: "utimensat", Path: f.Name(), Err: err}
	}
	return nil
}

// copyXattrs copies the extended attributes. A security attribute that only
// the system may set is left to it.
func copyXattrs(src, dst *os.File, rename func(string) (string, bool)) error {
	from, to := procPath(src), procPath(dst)
	names, err := sysx.Listxattr(from)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "listxattr", Path: src.Name(), Err: err}
	}
	for _, name := range names {
		as, ok := name, true
		if rename != nil {
			as, ok = rename(name)
		}
		if !ok {
			continue
		}
		value, err := sysx.Getxattr(from, name)
		if err == nil {
			err = unix.Setxattr(to, as, value, 0)
		}
		if errors.Is(err, unix.EPERM) && strings.HasPrefix(name, "security.") {
			continue
		}
		if err != nil {
			return fmt.Errorf("attribute %s: %w", name, &os.PathError{Op: "copy", Path: src.Name(), Err: err})
		}
	}
	return nil
}

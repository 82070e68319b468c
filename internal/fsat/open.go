// Package fsat works on files below a directory by descriptors, so that a
// directory that somebody swaps for a symbolic link meanwhile can never lead
// a reader or a writer out of the tree. It also holds the few operations that
// copying a file faithfully needs: its data with holes, its attributes, its
// times.
//
// Functions take and return plain descriptors, because these calls are made
// once per file of a tree and an os.File costs more than the call itself. The
// caller closes what it is given.
package fsat

import (
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxPath is how long a path one system call takes (PATH_MAX less its NUL).
// Longer ones are opened in steps.
const maxPath = 4095

// Root is an open directory below which paths are resolved. It is safe for
// concurrent use until Close.
type Root struct {
	fd int
	// stepwise is set when openat2 is not there (before Linux 5.6, or
	// forbidden by a seccomp filter that does not know it).
	stepwise atomic.Bool
}

// OpenRoot opens dir, which may be reached through symbolic links: the caller
// chose it. Everything below it is resolved without following any.
func OpenRoot(dir string) (*Root, error) {
	fd, err := openat(unix.AT_FDCWD, dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	return &Root{fd: fd}, nil
}

// RootAt is a Root for a directory that is open already. Whoever opened it
// closes it, after the last use of the Root.
func RootAt(fd int) *Root { return &Root{fd: fd} }

// Fd is the descriptor of the directory itself.
func (r *Root) Fd() int { return r.fd }

// Close closes the directory.
func (r *Root) Close() error { return unix.Close(r.fd) }

// Open opens path, relative and slash separated, below the root. No symbolic
// link is followed, neither on the way (ELOOP or ENOTDIR) nor at the end
// (ELOOP, or the link itself with O_PATH). The empty path is the root.
// The descriptor is closed on exec. Callers that do not know what they open
// add O_NONBLOCK, or a FIFO would make them wait.
func (r *Root) Open(path string, flags int, perm uint32) (int, error) {
	flags |= unix.O_NOFOLLOW
	if path == "" {
		return openat(r.fd, ".", flags, perm)
	}
	at := r.fd
	for len(path) > maxPath {
		cut := strings.LastIndexByte(path[:maxPath], '/')
		if cut <= 0 {
			break // one name that is too long: the kernel says so
		}
		next, err := r.open(at, path[:cut], unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		closeStep(at, r.fd)
		if err != nil {
			return -1, err
		}
		at, path = next, path[cut+1:]
	}
	fd, err := r.open(at, path, flags, perm)
	closeStep(at, r.fd)
	return fd, err
}

// OpenDir opens the directory path for use as the place of other calls; it
// needs no right to read the directory.
func (r *Root) OpenDir(path string) (int, error) {
	return r.Open(path, unix.O_PATH|unix.O_DIRECTORY, 0)
}

func (r *Root) open(at int, path string, flags int, perm uint32) (int, error) {
	if !strings.Contains(path, "/") {
		return openat(at, path, flags, perm)
	}
	if !r.stepwise.Load() {
		how := unix.OpenHow{
			Flags:   uint64(flags | unix.O_CLOEXEC),
			Mode:    uint64(perm),
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		}
		for {
			fd, err := unix.Openat2(at, path, &how)
			switch err {
			case unix.EINTR, unix.EAGAIN:
				continue
			case unix.ENOSYS, unix.EPERM:
				r.stepwise.Store(true)
			case unix.EXDEV:
				// A directory on the way was moved out of the root meanwhile,
				// so nothing is at this path any more.
				return -1, unix.ENOENT
			default:
				return fd, err
			}
			break
		}
	}
	return openSteps(at, path, flags, perm)
}

// openSteps opens path name by name, never following a link.
func openSteps(at int, path string, flags int, perm uint32) (int, error) {
	start := at
	for {
		name, rest, more := strings.Cut(path, "/")
		if !more {
			fd, err := openat(at, name, flags, perm)
			closeStep(at, start)
			return fd, err
		}
		next, err := openat(at, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		closeStep(at, start)
		if err != nil {
			return -1, err
		}
		at, path = next, rest
	}
}

// closeStep closes a descriptor of a step on the way; the start belongs to
// somebody else. Closing an O_PATH descriptor has no error worth telling.
func closeStep(fd, start int) {
	if fd != start {
		_ = unix.Close(fd)
	}
}

// OpenAt opens one name in the directory at without following a link.
func OpenAt(at int, name string, flags int, perm uint32) (int, error) {
	return openat(at, name, flags|unix.O_NOFOLLOW, perm)
}

func openat(at int, path string, flags int, perm uint32) (int, error) {
	for {
		fd, err := unix.Openat(at, path, flags|unix.O_CLOEXEC, perm)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// Close closes a descriptor that was only read from or that only names a
// place, where an error of close says nothing.
func Close(fd int) { _ = unix.Close(fd) }

// Lstat is fstatat that does not follow a link.
func Lstat(at int, name string, st *unix.Stat_t) error {
	for {
		err := unix.Fstatat(at, name, st, unix.AT_SYMLINK_NOFOLLOW)
		if err != unix.EINTR {
			return err
		}
	}
}

// Fstat looks at an open file, one opened with O_PATH too.
func Fstat(fd int, st *unix.Stat_t) error {
	for {
		err := unix.Fstat(fd, st)
		if err != unix.EINTR {
			return err
		}
	}
}

// Readlink reads the target of the link name, or with an empty name of the
// link that the O_PATH descriptor at is.
func Readlink(at int, name string) (string, error) {
	for size := 256; ; size *= 2 {
		buf := make([]byte, size)
		n, err := unix.Readlinkat(at, name, buf)
		if err == unix.EINTR {
			size /= 2
			continue
		}
		if err != nil {
			return "", err
		}
		if n < size {
			return string(buf[:n]), nil
		}
	}
}

// ForReading are the flags to open what was a regular file a moment ago: it
// never waits and has no effect if it is a FIFO or a terminal by now.
const ForReading = unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY

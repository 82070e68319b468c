package contenthash

import (
	"errors"
	"io/fs"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// This file has the system calls. Every name is resolved from a descriptor
// below the root without following a link, so that a directory that somebody
// swaps for a link meanwhile leads nowhere.

// maxStep is how long a path one call takes (PATH_MAX less its NUL).
const maxStep = 4095

// rootDir is an open directory that is the root of a tree.
type rootDir struct{ fd int }

// openDir opens a directory below the root for reading; the empty path is the
// root. The caller closes it.
func (r rootDir) openDir(path string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	if path == "" {
		return openat(r.fd, ".", flags)
	}
	if len(path) <= maxStep {
		fd, err := openBeneath(r.fd, path, flags)
		if !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
			return fd, err
		}
	}
	return openSteps(r.fd, path, flags)
}

func openBeneath(at int, path string, flags uint64) (int, error) {
	how := unix.OpenHow{
		Flags:   flags,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(at, path, &how)
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

// openSteps opens name by name: for paths that are too long, and where openat2
// is not there or is forbidden by a filter that does not know it.
func openSteps(at int, path string, flags int) (int, error) {
	start := at
	for more := true; more; {
		var name string
		name, path, more = strings.Cut(path, "/")
		step := unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
		if !more {
			step = flags
		}
		next, err := openat(at, name, step)
		if at != start {
			_ = unix.Close(at)
		}
		if err != nil {
			return -1, err
		}
		at = next
	}
	return at, nil
}

func openat(at int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(at, name, flags|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// lstat looks at a name in the directory at.
func lstat(at int, name string, st *unix.Stat_t) error {
	for {
		err := unix.Fstatat(at, name, st, unix.AT_SYMLINK_NOFOLLOW)
		if err != unix.EINTR {
			return err
		}
	}
}

func fstat(fd int, st *unix.Stat_t) error {
	for {
		err := unix.Fstat(fd, st)
		if err != unix.EINTR {
			return err
		}
	}
}

func readlink(at int, name string) (string, error) {
	for size := 256; ; size *= 4 {
		buf := make([]byte, size)
		n, err := unix.Readlinkat(at, name, buf)
		if err != nil {
			return "", err
		}
		if n < size {
			return string(buf[:n]), nil
		}
	}
}

// dirent is a name in a directory with the type that the directory gives.
type dirent struct {
	name string
	kind kind
}

// list reads the names in a directory, without "." and "..", in no order.
func list(fd int, buf []byte) ([]dirent, error) {
	if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
		return nil, err
	}
	var out []dirent
	for {
		n, err := unix.Getdents(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n <= 0 {
			return out, nil
		}
		if out, err = appendDirents(out, buf[:n]); err != nil {
			return nil, err
		}
	}
}

// appendDirents takes apart what getdents64 gives: inode and offset of eight
// bytes, the record's length in two, the type in one, the name up to a NUL.
func appendDirents(out []dirent, buf []byte) ([]dirent, error) {
	const head = 19
	for len(buf) > 0 {
		if len(buf) < head {
			return nil, unix.EIO
		}
		size := int(nativeUint16(buf[16:]))
		if size < head || size > len(buf) {
			return nil, unix.EIO
		}
		name := buf[head:size]
		if i := strings.IndexByte(string(name), 0); i >= 0 {
			name = name[:i]
		}
		if s := string(name); s != "." && s != ".." && s != "" {
			out = append(out, dirent{name: s, kind: kindOfDirent(buf[18])})
		}
		buf = buf[size:]
	}
	return out, nil
}

func kindOfDirent(t byte) kind {
	switch t {
	case unix.DT_REG:
		return kindFile
	case unix.DT_DIR:
		return kindDir
	case unix.DT_LNK:
		return kindSymlink
	case unix.DT_FIFO, unix.DT_SOCK, unix.DT_CHR, unix.DT_BLK:
		return kindSpecial
	default:
		return kindUnknown
	}
}

func kindOf(mode uint32) kind {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return kindFile
	case unix.S_IFDIR:
		return kindDir
	case unix.S_IFLNK:
		return kindSymlink
	default:
		return kindSpecial
	}
}

// place names a file for the calls on extended attributes: an open one, or
// with a name an entry of the open directory. The latter goes through /proc,
// where the name at the end is not followed.
type place struct {
	fd   int
	name string
}

func (p place) proc() string {
	return "/proc/self/fd/" + strconv.Itoa(p.fd) + "/" + p.name
}

func (p place) list(buf []byte) (int, error) {
	if p.name == "" {
		return unix.Flistxattr(p.fd, buf)
	}
	return unix.Llistxattr(p.proc(), buf)
}

func (p place) get(name string, buf []byte) (int, error) {
	if p.name == "" {
		return unix.Fgetxattr(p.fd, name, buf)
	}
	return unix.Lgetxattr(p.proc(), name, buf)
}

// xattrs reads the attributes that count. scratch is used for the list.
func (p place) xattrs(scratch []byte) ([]Xattr, error) {
	names, err := grow(scratch, p.list)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil, nil // this file system has none
	}
	if err != nil || len(names) == 0 {
		return nil, err
	}
	var out []Xattr
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if !countedXattr(name) {
			continue
		}
		value, err := grow(nil, func(buf []byte) (int, error) { return p.get(name, buf) })
		if errors.Is(err, unix.ENODATA) {
			continue // removed meanwhile; the ctime tells
		}
		if err != nil {
			return nil, err
		}
		out = append(out, Xattr{Name: name, Value: value})
	}
	return out, nil
}

// grow calls read with larger buffers until the answer fits. The kernel's
// limit is 64 KiB, for a list as for a value.
func grow(buf []byte, read func([]byte) (int, error)) ([]byte, error) {
	if len(buf) == 0 {
		buf = make([]byte, 256)
	}
	for {
		n, err := read(buf)
		switch {
		case err == nil:
			return buf[:n], nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ERANGE) && len(buf) < 1<<20:
			buf = make([]byte, 4*len(buf))
		default:
			return nil, err
		}
	}
}

// statOf takes from stat data what recognizes an unchanged file.
func statOf(st *unix.Stat_t) Stat {
	return Stat{
		Ino:   st.Ino,
		Ctime: st.Ctim.Nano(),
		Mtime: st.Mtim.Nano(),
		Size:  st.Size,
	}
}

// StatOf takes the data by which an unchanged file is recognized from what
// os.Lstat or (*os.File).Stat gave; the zero Stat if there are none.
func StatOf(fi fs.FileInfo) Stat {
	st, ok := fi.Sys().(*syscallStat)
	if !ok {
		return Stat{}
	}
	return Stat{Ino: st.Ino, Ctime: st.Ctim.Nano(), Mtime: st.Mtim.Nano(), Size: st.Size}
}

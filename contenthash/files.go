package contenthash

import (
	"errors"
	"io/fs"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// files makes all system calls on the files of a snapshot. Every name is
// resolved from a descriptor below the root without following a link, so that a
// directory that somebody swaps for a link meanwhile leads nowhere.
type files struct {
	// fault, if set, is asked before each call, and its error is the call's:
	// so tests see what happens when any one of them fails.
	fault func(call string) error
}

func (f files) before(call string) error {
	if f.fault == nil {
		return nil
	}
	return f.fault(call)
}

// openDir opens a directory below the root for reading; the empty path is the
// root. The caller closes it.
func (f files) openDir(root *fsat.Root, path string) (int, error) {
	if err := f.before("open"); err != nil {
		return -1, err
	}
	return root.Open(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
}

// openAt opens a name in the directory at.
func (f files) openAt(at int, name string, flags int) (int, error) {
	if err := f.before("open"); err != nil {
		return -1, err
	}
	return fsat.OpenAt(at, name, flags, 0)
}

// lstat looks at a name in the directory at.
func (f files) lstat(at int, name string, st *unix.Stat_t) error {
	if err := f.before("stat"); err != nil {
		return err
	}
	return fsat.Lstat(at, name, st)
}

func (f files) fstat(fd int, st *unix.Stat_t) error {
	if err := f.before("stat"); err != nil {
		return err
	}
	return fsat.Fstat(fd, st)
}

func (f files) readlink(at int, name string) (string, error) {
	if err := f.before("readlink"); err != nil {
		return "", err
	}
	return fsat.Readlink(at, name)
}

// errShort, from fault, lets a read give one byte.
const errShort = shortRead("short read")

type shortRead string

func (e shortRead) Error() string { return string(e) }

func (f files) pread(fd int, buf []byte, pos int64) (int, error) {
	if err := f.before("read"); errors.Is(err, errShort) {
		buf = buf[:1]
	} else if err != nil {
		return 0, err
	}
	return fsat.Pread(fd, buf, pos)
}

// xattrs reads the attributes that count, of a name in the directory at or,
// without one, of the open file at.
func (f files) xattrs(at int, name string, scratch []byte) ([]Xattr, error) {
	if err := f.before("xattr"); err != nil {
		return nil, err
	}
	return fsat.XattrsAt(at, name, scratch, countedXattr)
}

// xattr reads one attribute of such a file.
func (f files) xattr(at int, name, attribute string) ([]byte, error) {
	if err := f.before("xattr"); err != nil {
		return nil, err
	}
	return fsat.GetXattrAt(at, name, attribute)
}

// dirent is a name in a directory with the type that the directory gives.
type dirent struct {
	name string
	kind kind
}

// list reads all names in an open directory, in no order, also if it was read
// before.
func (f files) list(fd int, buf []byte) ([]dirent, error) {
	if err := f.before("getdents"); err != nil {
		return nil, err
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
		return nil, err
	}
	names, err := fsat.Dirents(fd, buf, nil)
	out := make([]dirent, len(names))
	for i, e := range names {
		out[i] = dirent{name: e.Name, kind: kindOfDirent(e.Type)}
	}
	return out, err
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
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return Stat{}
	}
	return Stat{Ino: st.Ino, Ctime: st.Ctim.Nano(), Mtime: st.Mtim.Nano(), Size: st.Size}
}

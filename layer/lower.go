package layer

import (
	"errors"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// lowerStack is what layer directories show when they are stacked, without a
// mount. It is opened when it is first asked.
type lowerStack struct {
	paths []string // topmost first
	marks string
	fds   []int
}

func (l *lowerStack) open() error {
	if l.fds != nil {
		return nil
	}
	l.fds = []int{}
	for _, p := range l.paths {
		fd, err := fsat.OpenAt(unix.AT_FDCWD, p, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			l.close()
			return failed("open lower layer", p, err)
		}
		l.fds = append(l.fds, fd)
	}
	return nil
}

func (l *lowerStack) close() {
	for _, fd := range l.fds {
		fsat.Close(fd)
	}
	l.fds = nil
}

// found is what a name shows; the caller closes fds.
type found struct {
	st unix.Stat_t
	// fds are the directories that make it up, topmost first, or the one file,
	// opened as mere places.
	fds []int
	// in is the directory that a file lies in, as it was handed in.
	in int
}

func (f *found) close() {
	if f == nil {
		return
	}
	for _, fd := range f.fds {
		fsat.Close(fd)
	}
}

func (f *found) isDir() bool { return f != nil && f.st.Mode&unix.S_IFMT == unix.S_IFDIR }

// lookup finds the path p, following no link; nil is nothing.
func (l *lowerStack) lookup(p string) (*found, error) {
	if len(l.paths) == 0 {
		return nil, nil
	}
	if err := l.open(); err != nil {
		return nil, err
	}
	top := &found{fds: l.fds}
	at := top
	for name := range strings.SplitSeq(p, "/") {
		next, err := l.child(at.fds, name)
		if at != top {
			at.close()
		}
		if err != nil {
			return nil, failed("look in lower layers for", p, err)
		}
		if next == nil {
			return nil, nil
		}
		at = next
	}
	return at, nil
}

// child is what the stacked directories fds show as name.
func (l *lowerStack) child(fds []int, name string) (*found, error) {
	var out *found
	fail := func(err error) (*found, error) {
		if out != nil {
			out.close()
		}
		return nil, err
	}
	for _, fd := range fds {
		var st unix.Stat_t
		err := fsat.Lstat(fd, name, &st)
		if fsat.Absent(err) {
			continue
		}
		if err != nil {
			return fail(err)
		}
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		if !isDir {
			hides, err := l.hides(fd, name, &st)
			if err != nil {
				return fail(err)
			}
			if hides || out != nil {
				break
			}
		}
		child, err := fsat.OpenAt(fd, name, unix.O_PATH, 0)
		if err != nil {
			return fail(err)
		}
		if out == nil {
			out = &found{st: st, in: fd}
		}
		out.fds = append(out.fds, child)
		if !isDir {
			break
		}
		opaque, err := l.dirMarks(child)
		if err != nil {
			return fail(err)
		}
		if opaque {
			break
		}
	}
	return out, nil
}

// hides says that a file of a layer is a whiteout, in either form.
func (l *lowerStack) hides(dirFd int, name string, st *unix.Stat_t) (bool, error) {
	if isWhiteout(st) {
		return true, nil
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != 0 {
		return false, nil
	}
	return xattrWhiteout(dirFd, name, l.marks)
}

// xattrWhiteout says that an empty file is a whiteout in the form of an
// attribute. Its directory has to say that it holds such.
func xattrWhiteout(dirFd int, name, marks string) (bool, error) {
	mark, err := readMark(fsat.ProcPath(dirFd), marks+"opaque")
	if err != nil || mark != "x" {
		return false, err
	}
	_, err = unix.Lgetxattr(fsat.ProcPath(dirFd)+"/"+name, marks+"whiteout", nil)
	return err == nil, ignoreNoAttr(err)
}

// dirMarks says whether a directory of a layer is opaque. One that shows
// another than the one of its name cannot be looked through.
func (l *lowerStack) dirMarks(fd int) (opaque bool, err error) {
	redirect, err := readMark(fsat.ProcPath(fd), l.marks+"redirect")
	if err != nil {
		return false, err
	}
	if redirect != "" {
		return false, errRedirect
	}
	mark, err := readMark(fsat.ProcPath(fd), l.marks+"opaque")
	return mark == "y", err
}

// readMark reads a short attribute; one that is not there is empty.
func readMark(p, name string) (string, error) {
	var buf [256]byte
	n, err := unix.Getxattr(p, name, buf[:])
	if errors.Is(err, unix.ERANGE) {
		return "too long", nil
	}
	if err != nil {
		return "", ignoreNoAttr(err)
	}
	return string(buf[:n]), nil
}

func ignoreNoAttr(err error) error {
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

// directory is what the directory p below has for attributes; nil if there is
// none.
func (l *lowerStack) directory(p string) (*attributes, error) {
	f, err := l.lookup(p)
	if err != nil || f == nil {
		return nil, err
	}
	defer f.close()
	if !f.isDir() {
		return nil, nil
	}
	w, err := attributesOf(f.fds[0], true, &f.st)
	if err != nil {
		return nil, failed("read attributes in lower layer of", p, err)
	}
	return w, nil
}

// attributesOf reads what a layer may carry of the attributes of an open file;
// isPath is set for one opened with O_PATH.
func attributesOf(fd int, isPath bool, st *unix.Stat_t) (*attributes, error) {
	w := &attributes{mode: st.Mode & 0o7777, uid: st.Uid, gid: st.Gid, atime: st.Atim, mtime: st.Mtim}
	var err error
	w.xattrs, err = carriedXattrs(fd, isPath, "")
	return w, err
}

// carriedXattrs reads the extended attributes of an open file that a layer may
// carry, sorted by name. With marks set a file that overlayfs says to look for
// elsewhere is errRedirect.
func carriedXattrs(fd int, isPath bool, marks string) ([]fsat.Xattr, error) {
	names, err := fsat.XattrNames(fd, isPath)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	var out []fsat.Xattr
	for _, name := range names {
		if marks != "" && (name == marks+"metacopy" || name == marks+"redirect") {
			return nil, errRedirect
		}
		// An equals sign ends a name in a PAX record.
		if !carried(name) || strings.Contains(name, "=") {
			continue
		}
		value, err := fsat.GetXattr(fd, isPath, name)
		if err != nil {
			return nil, err
		}
		out = append(out, fsat.Xattr{Name: name, Value: value})
	}
	return out, nil
}

// rootNames are the names in the top directories of all layers.
func (l *lowerStack) rootNames(buf []byte) ([]string, error) {
	if len(l.paths) == 0 {
		return nil, nil
	}
	if err := l.open(); err != nil {
		return nil, err
	}
	all := map[string]struct{}{}
	for i, at := range l.fds {
		names, err := namesIn(at, buf)
		if err != nil {
			return nil, failed("read lower layer", l.paths[i], err)
		}
		for _, n := range names {
			all[n] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(all)), nil
}

// namesIn reads the names in the directory that a descriptor of whatever kind
// names.
func namesIn(at int, buf []byte) ([]string, error) {
	fd, err := fsat.OpenAt(at, ".", openDirFlags, 0)
	if err != nil {
		return nil, err
	}
	defer fsat.Close(fd)
	return fsat.Names(fd, buf, nil)
}

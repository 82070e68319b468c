package layer

import (
	"context"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

func (u Upper) write(e *emitter) error {
	if err := u.Form.checkUpper(); err != nil {
		return err
	}
	fd, err := unix.Open(u.Dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return failed("open layer", u.Dir, err)
	}
	defer fsat.Close(fd)
	w := &upperWriter{e: e, marks: u.Form.marks(), lower: lowerStack{paths: u.Parents, marks: u.Form.marks()}}
	w.compare = newComparer(e)
	e.marks = w.marks
	if err := w.lower.open(); err != nil {
		return err
	}
	defer w.lower.close()
	marks, err := w.read(fd)
	if err != nil {
		return failed("read attributes of", "", err)
	}
	below := &found{fds: w.lower.fds}
	if marks.opaque {
		if err := e.opaque(""); err != nil {
			return err
		}
		below = nil
	}
	return w.entries(fd, "", marks, below)
}

type upperWriter struct {
	e       *emitter
	marks   string
	lower   lowerStack
	compare *comparer
}

// marks are what overlayfs has noted on a file of a layer.
type marks struct {
	opaque    bool // shows nothing of what is below
	whiteouts bool // holds whiteouts in the form of attributes
}

// read reads the marks of an open file.
func (w *upperWriter) read(fd int) (m marks, err error) {
	names, err := fsat.XattrNames(fd, false)
	if err != nil {
		return m, err
	}
	for _, name := range names {
		switch name {
		case w.marks + "redirect", w.marks + "metacopy":
			return m, errRedirect
		case w.marks + "opaque":
			value, err := fsat.GetXattr(fd, false, name)
			if err != nil {
				return m, err
			}
			m.opaque, m.whiteouts = string(value) == "y", string(value) == "x"
		}
	}
	return m, nil
}

// child is an entry of a directory of the layer.
type child struct {
	name string
	st   unix.Stat_t
}

// known says whether it is known what lies below.
func (w *upperWriter) known() bool { return len(w.lower.paths) > 0 }

// entries writes what is in the directory path. below is what it is merged
// with, nil if that is nothing.
func (w *upperWriter) entries(fd int, path string, m marks, below *found) error {
	if w.e.ctx.Err() != nil {
		return context.Cause(w.e.ctx)
	}
	names, err := fsat.Names(fd, w.e.buf[:32<<10], nil)
	if err != nil {
		return failed("read directory", path, err)
	}
	slices.Sort(names)
	var files []child
	for _, name := range names {
		c := child{name: name}
		if err := fsat.Lstat(fd, name, &c.st); err != nil {
			return failed("stat", join(path, name), err)
		}
		hides, err := w.hides(fd, &c, m)
		if err == nil && hides && below != nil {
			err = w.whiteout(path, &c, below)
		}
		if err != nil {
			return entryError(join(path, name), err)
		}
		if !hides {
			files = append(files, c)
		}
	}
	for i := range files {
		c, p := &files[i], join(path, files[i].name)
		if c.st.Mode&unix.S_IFMT == unix.S_IFDIR {
			err = w.directory(fd, c.name, p, below)
		} else {
			err = w.file(fd, c, p, below)
		}
		if err != nil {
			return entryError(p, err)
		}
	}
	return nil
}

// hides says whether an entry is a whiteout, or a socket: of one the layer can
// only say that what was there is gone.
func (w *upperWriter) hides(fd int, c *child, m marks) (bool, error) {
	switch c.st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		return c.st.Rdev == 0, nil
	case unix.S_IFREG:
		if !m.whiteouts || c.st.Size != 0 {
			return false, nil
		}
		_, err := unix.Lgetxattr(fsat.ProcPath(fd)+"/"+c.name, w.marks+"whiteout", nil)
		return err == nil, ignoreNoAttr(err)
	case unix.S_IFSOCK:
		w.e.out.Sockets++
		return true, nil
	}
	return false, nil
}

// whiteout writes one, unless a socket has taken the place of no file.
func (w *upperWriter) whiteout(path string, c *child, below *found) error {
	if c.st.Mode&unix.S_IFMT == unix.S_IFSOCK && w.known() {
		f, err := w.lower.child(below.fds, c.name)
		f.close()
		if err != nil || f == nil {
			return err
		}
	}
	return w.e.whiteout(path, c.name)
}

// file writes a file, unless it is a copy of the one below that nothing has
// been done to in the end.
func (w *upperWriter) file(at int, c *child, p string, below *found) error {
	if below != nil && w.known() && c.st.Nlink == 1 {
		_, err := unix.Lgetxattr(fsat.ProcPath(at)+"/"+c.name, w.marks+"origin", nil)
		if err := ignoreNoAttr(err); err != nil {
			return failed("read attributes of", p, err)
		}
		if err == nil {
			same, err := w.sameBelow(at, c, below)
			if err != nil || same {
				return err
			}
		}
	}
	return w.e.file(at, c.name, p, &c.st)
}

func (w *upperWriter) sameBelow(at int, c *child, below *found) (bool, error) {
	f, err := w.lower.child(below.fds, c.name)
	if err != nil || f == nil {
		return false, err
	}
	defer f.close()
	// One of several names: the copy has parted from the others.
	if f.isDir() || f.st.Nlink > 1 {
		return false, nil
	}
	return w.compare.sameFile(f.in, at, c.name, &f.st, &c.st)
}

func (w *upperWriter) directory(at int, name, p string, around *found) error {
	if err := checkName(name); err != nil {
		return err
	}
	fd, err := fsat.OpenAt(at, name, openDirFlags, 0)
	if err != nil {
		return failed("open directory", p, err)
	}
	defer fsat.Close(fd)
	m, err := w.read(fd)
	if err != nil {
		return failed("read attributes of", p, err)
	}
	w.e.enter(fd, p)
	defer w.e.leave()
	below, same := around, false
	if around != nil && w.known() {
		if below, err = w.lower.child(around.fds, name); err != nil {
			return failed("look in lower layers for", p, err)
		}
		defer below.close()
		if !below.isDir() {
			below = nil
		} else if same, err = sameDir(fd, below.fds[0]); err != nil {
			return failed("compare directory", p, err)
		}
	}
	if !same {
		if err := w.e.directories(); err != nil {
			return err
		}
	}
	if m.opaque && below != nil {
		if err := w.e.opaque(p); err != nil {
			return err
		}
		below = nil
	}
	return w.entries(fd, p, m, below)
}

// sameDir says that two open directories have the same attributes.
func sameDir(a, b int) (bool, error) {
	x, err := dirAttributes(a)
	if err != nil {
		return false, err
	}
	y, err := dirAttributes(b)
	if err != nil {
		return false, err
	}
	return x.sameAs(y), nil
}

func dirAttributes(fd int) (*attributes, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	return attributesOf(fd, true, &st)
}

// sameAs compares all but the times.
func (w *attributes) sameAs(o *attributes) bool {
	return w.mode == o.mode && w.uid == o.uid && w.gid == o.gid && fsat.EqualXattrs(w.xattrs, o.xattrs)
}

package layer

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// special applies an entry whose name has ".wh." in it, unless that stands
// inside of a name and so means nothing.
func (a *applier) special(up, base string) (done bool, err error) {
	for name := range strings.SplitSeq(up, "/") {
		if strings.HasPrefix(name, metaPrefix) {
			return true, nil
		}
		if strings.HasPrefix(name, whiteoutPrefix) {
			return true, invalid("names with the prefix %q are reserved for whiteouts", whiteoutPrefix)
		}
	}
	switch {
	case base == opaqueName:
		return true, a.opaque(up)
	case strings.HasPrefix(base, metaPrefix):
		return true, nil // aufs's own files
	case !strings.HasPrefix(base, whiteoutPrefix):
		return false, nil
	}
	hidden := base[len(whiteoutPrefix):]
	if hidden == "" || hidden == "." || hidden == ".." {
		return true, invalid("a whiteout of no file")
	}
	return true, a.whiteout(up, hidden)
}

// whiteout hides what the layers below have at name. What this layer itself
// has there stays, in whichever order the two come.
func (a *applier) whiteout(up, name string) error {
	at, err := a.parent(up)
	if err != nil {
		return err
	}
	p := join(at.path, name)
	if !a.overlay() {
		return a.removeLower(at, name, p)
	}
	if at.opaque {
		return nil
	}
	err = unix.Mknodat(at.fd, name, unix.S_IFCHR, 0)
	if err == nil {
		at.changed = true
		return a.setOrigin(at)
	}
	if !errors.Is(err, unix.EEXIST) {
		return failed("make whiteout", p, err)
	}
	var st unix.Stat_t
	if err := fsat.Lstat(at.fd, name, &st); err != nil {
		return failed("stat", p, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil // a whiteout, or a file that hides as much
	}
	d, err := a.find(p)
	if err != nil {
		return err
	}
	return a.setOpaque(d)
}

// removeLower removes from a tree what is at name but not of this layer.
func (a *applier) removeLower(at *dir, name, p string) error {
	if a.mine == nil {
		return nil
	}
	if !a.own(p) {
		return a.clear(at, name)
	}
	var st unix.Stat_t
	if err := fsat.Lstat(at.fd, name, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return failed("stat", p, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	return a.prune(p)
}

// opaque hides everything that the layers below have in a directory.
func (a *applier) opaque(up string) error {
	d, err := a.parent(up)
	if err != nil {
		return err
	}
	switch {
	case !a.overlay():
		return a.prune(d.path)
	case d.path == "":
		return a.opaqueRoot(d)
	}
	return a.setOpaque(d)
}

// prune removes from a directory of a tree all that is not of this layer.
func (a *applier) prune(p string) error {
	if a.mine == nil || a.own(p+"\x00") {
		return nil // nothing can have come back since
	}
	d, err := a.find(p)
	if err != nil {
		return err
	}
	a.mark(p + "\x00")
	fd, err := fsat.OpenAt(d.fd, ".", openDirFlags, 0)
	if err != nil {
		return failed("open directory", p, err)
	}
	names, err := fsat.Names(fd, a.buf[:32<<10], nil)
	fsat.Close(fd)
	if err != nil {
		return failed("read directory", p, err)
	}
	var deeper []string
	for _, name := range names {
		child := join(p, name)
		if !a.own(child) {
			if err := a.clear(d, name); err != nil {
				return err
			}
			continue
		}
		var st unix.Stat_t
		if err := fsat.Lstat(d.fd, name, &st); err != nil {
			return failed("stat", child, err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			deeper = append(deeper, child)
		}
	}
	// d may be closed by now to make room for others.
	for _, child := range deeper {
		if err := a.prune(child); err != nil {
			return err
		}
	}
	return nil
}

// opaqueRoot hides the whole of the layers below. The kernel does not look for
// the mark on the top of a layer (tried on 6.18), so each name is hidden. The
// mark is for whoever writes the layer again.
func (a *applier) opaqueRoot(d *dir) error {
	if err := a.setOpaque(d); err != nil {
		return err
	}
	names, err := a.lower.rootNames(a.buf[:32<<10])
	if err != nil {
		return err
	}
	for _, name := range names {
		err := unix.Mknodat(d.fd, name, unix.S_IFCHR, 0)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return failed("make whiteout", name, err)
		}
		if err == nil {
			if err := a.setOrigin(d); err != nil {
				return err
			}
			d.changed = true
			continue
		}
		var st unix.Stat_t
		if err := fsat.Lstat(d.fd, name, &st); err != nil {
			return failed("stat", name, err)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			own, err := a.find(name)
			if err != nil {
				return err
			}
			if err := a.setOpaque(own); err != nil {
				return err
			}
		}
	}
	return nil
}

// setOpaque marks a directory of an upper one as hiding all below.
func (a *applier) setOpaque(d *dir) error {
	if d.opaque {
		return nil
	}
	if err := unix.Fsetxattr(d.fd, a.o.Form.marks()+"opaque", []byte("y"), 0); err != nil {
		return failed("mark as opaque directory", d.path, err)
	}
	d.opaque, d.fresh = true, true
	for _, o := range a.dirs.open {
		if below(o.path, d.path) {
			o.fresh = true
		}
	}
	return nil
}

// setOrigin marks a directory that holds a whiteout. Without the mark, which
// may be empty, the kernel takes a directory that no other layer has for one
// without whiteouts, and lists the name.
func (a *applier) setOrigin(d *dir) error {
	if d.origin {
		return nil
	}
	if err := unix.Fsetxattr(d.fd, a.o.Form.marks()+"origin", nil, 0); err != nil {
		return failed("mark directory of whiteouts", d.path, err)
	}
	d.origin = true
	return nil
}

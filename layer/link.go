package layer

import (
	"archive/tar"
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// pendingLink is a hard link to a file that has not come yet.
type pendingLink struct{ name, target string }

// link makes a hard link. The target is the file that the tree shows under its
// name at this moment, or if there is none, at the end of the archive. The
// attributes of the entry do not count: they are the file's.
func (a *applier) link(up, base string, h *tar.Header) error {
	if len(h.Linkname) > a.o.Limits.NameBytes {
		return invalid("the target's name is longer than %d bytes", a.o.Limits.NameBytes)
	}
	target := clean(h.Linkname)
	if target == "" {
		return invalid("a hard link to the root")
	}
	at, err := a.parent(up)
	if err != nil {
		return err
	}
	a.dirs.pinned = at
	defer func() { a.dirs.pinned = nil }()
	from, name, err := a.linkTarget(target)
	if errors.Is(err, unix.ENOENT) {
		a.later = append(a.later, pendingLink{h.Name, target})
		return nil
	}
	if err != nil {
		return err
	}
	return a.linkTo(at, base, from, name)
}

// linkTarget finds the file to link to. One of the layers below becomes one of
// this layer: in an upper directory it is copied up, as the kernel would.
func (a *applier) linkTarget(target string) (*dir, string, error) {
	up, name := split(target)
	var m *missing
	from, err := a.find(up)
	if errors.As(err, &m) {
		m.path = join(m.path, name)
	}
	if err == nil {
		var st unix.Stat_t
		err = fsat.Lstat(from.fd, name, &st)
		switch {
		case errors.Is(err, unix.ENOENT):
			err = &missing{from, join(from.path, name)}
		case err != nil:
			return nil, "", failed("stat", target, err)
		case st.Mode&unix.S_IFMT == unix.S_IFDIR:
			return nil, "", invalid("a hard link to the directory %q", target)
		case a.overlay() && isWhiteout(&st):
			err = unix.ENOENT
		default:
			a.markAll(join(from.path, name))
			return from, name, nil
		}
	}
	if !errors.As(err, &m) || !a.overlay() || m.at.fresh {
		return nil, "", err
	}
	p := clean(m.path)
	f, err := a.lower.lookup(p)
	if err != nil {
		return nil, "", err
	}
	if f == nil {
		return nil, "", unix.ENOENT
	}
	defer f.close()
	if f.isDir() {
		return nil, "", invalid("a hard link to the directory %q", target)
	}
	return a.copyUp(p, f)
}

// linkTo links base in at to an existing file.
func (a *applier) linkTo(at *dir, base string, from *dir, name string) error {
	link := func() error { return unix.Linkat(from.fd, name, at.fd, base, 0) }
	if at == from && base == name {
		return nil // a link to itself is there already
	}
	err := link()
	if errors.Is(err, unix.EEXIST) {
		// Two names of one file stay as they are; and clearing what holds the
		// target would take the target away.
		var x, y unix.Stat_t
		if err := errors.Join(fsat.Lstat(at.fd, base, &x), fsat.Lstat(from.fd, name, &y)); err != nil {
			return failed("stat", join(at.path, base), err)
		}
		p := join(at.path, base)
		switch {
		case x.Dev == y.Dev && x.Ino == y.Ino:
			a.markIn(at, base)
			return nil
		case below(join(from.path, name), p):
			return invalid("a hard link to %q in its own place", join(from.path, name))
		}
	}
	return a.make(at, base, link)
}

// linkLater makes the links whose targets came after them.
func (a *applier) linkLater() error {
	for _, l := range a.later {
		if a.ctx.Err() != nil {
			return context.Cause(a.ctx)
		}
		if err := a.linkOneLater(l); err != nil {
			return entryError(l.name, err)
		}
	}
	return nil
}

func (a *applier) linkOneLater(l pendingLink) error {
	up, base := split(clean(l.name))
	at, err := a.parent(up)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = fsat.Lstat(at.fd, base, &st)
	if err == nil && a.own(join(at.path, base)) && !(a.overlay() && isWhiteout(&st)) {
		return nil // a later entry took the name
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return failed("stat", join(at.path, base), err)
	}
	a.dirs.pinned = at
	defer func() { a.dirs.pinned = nil }()
	from, name, err := a.linkTarget(l.target)
	if errors.Is(err, unix.ENOENT) {
		return invalid("a hard link to %q, which does not exist", l.target)
	}
	if err != nil {
		return err
	}
	return a.linkTo(at, base, from, name)
}

// copyUp makes a copy in the upper directory of the file f, which lies at p
// below it, with all of its attributes.
func (a *applier) copyUp(p string, f *found) (*dir, string, error) {
	if err := a.count(); err != nil {
		return nil, "", err
	}
	up, base := split(p)
	at, err := a.parent(up)
	if err != nil {
		return nil, "", err
	}
	want, err := attributesOf(f.fds[0], true, &f.st)
	if err != nil {
		return nil, "", failed("read attributes in lower layer of", p, err)
	}
	if a.o.Owners == OwnersCaller {
		want.uid, want.gid = a.euid, a.egid
	}
	switch f.st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return at, base, a.copyUpFile(at, base, f, want)
	case unix.S_IFLNK:
		target, err := fsat.Readlink(f.fds[0], "")
		if err != nil {
			return nil, "", failed("read link in lower layer", p, err)
		}
		err = a.make(at, base, func() error { return unix.Symlinkat(target, at.fd, base) })
		if err != nil {
			return nil, "", err
		}
		return at, base, a.setNodeAttributes(at, base, want, true)
	default:
		err := a.make(at, base, func() error {
			return unix.Mknodat(at.fd, base, f.st.Mode&unix.S_IFMT|want.mode&0o777, int(f.st.Rdev))
		})
		if err != nil {
			return nil, "", err
		}
		return at, base, a.setNodeAttributes(at, base, want, false)
	}
}

func (a *applier) copyUpFile(at *dir, base string, f *found, want *attributes) (err error) {
	p := join(at.path, base)
	if f.st.Size > a.o.Limits.EntryBytes {
		return exhausted("%q has %d bytes, where %d are allowed", p, f.st.Size, a.o.Limits.EntryBytes)
	}
	if a.out.Bytes += f.st.Size; a.out.Bytes > a.o.Limits.Bytes {
		return exhausted("the layer's files have more than %d bytes", a.o.Limits.Bytes)
	}
	// The descriptor names the file without opening it.
	src, err := unix.Open(fsat.ProcPath(f.fds[0]), fsat.ForReading|unix.O_CLOEXEC, 0)
	if err != nil {
		return failed("open in lower layer", p, err)
	}
	defer fsat.Close(src)
	fd, err := fsat.OpenAt(at.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return failed("make", p, err)
	}
	defer func() {
		if cerr := unix.Close(fd); cerr != nil && err == nil {
			err = failed("write", p, cerr)
		}
	}()
	at.changed = true
	if err := a.copier.Copy(a.ctx, fd, src, f.st.Size, nil); err != nil {
		if a.ctx.Err() != nil {
			return context.Cause(a.ctx)
		}
		return failed("copy up", p, err)
	}
	return a.setFileAttributes(at, base, fd, 0o600, want)
}

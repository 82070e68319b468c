package layer

import (
	"errors"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

const (
	// maxOpen is how many directories are kept open. Archives list a directory
	// and then what is in it, so a few would do; more serve those that do not.
	maxOpen = 128
	// maxHops is how many symbolic links one name may lead through, as in the
	// kernel.
	maxHops = 40
)

// dir is an open directory below the root that entries are made in. Making
// them changes its time, so the time it is to have is set when it is closed.
type dir struct {
	path string // canonical, "" is the root
	fd   int

	uid, gid uint32
	mode     uint32 // as it is now
	want     uint32 // as it is to be; an ordinary user works with more rights
	atime    unix.Timespec
	mtime    unix.Timespec
	changed  bool // the times have to be set

	inherits bool // what is made here gets attributes of it
	origin   bool // marked as a directory that holds whiteouts
	opaque   bool // marked as hiding all below
	fresh    bool // shows nothing of the layers below: it or one above is opaque
	isNew    bool // made by the call that returned it
	marked   bool // noted as the layer's, with those above

	newer, older *dir
}

// dirs are the open directories, by path, and in the order of their last use.
type dirs struct {
	open           map[string]*dir
	newest, oldest *dir
	pinned         *dir // is not closed, whatever else is opened
}

func (c *dirs) unlink(d *dir) {
	if d.newer != nil {
		d.newer.older = d.older
	} else if c.newest == d {
		c.newest = d.older
	}
	if d.older != nil {
		d.older.newer = d.newer
	} else if c.oldest == d {
		c.oldest = d.newer
	}
	d.newer, d.older = nil, nil
}

func (c *dirs) front(d *dir) {
	if c.newest == d {
		return
	}
	c.unlink(d)
	d.older = c.newest
	if c.newest != nil {
		c.newest.newer = d
	}
	c.newest = d
	if c.oldest == nil {
		c.oldest = d
	}
}

// get returns an open directory and counts that as use of it.
func (c *dirs) get(p string) *dir {
	if c.newest != nil && c.newest.path == p {
		return c.newest
	}
	d := c.open[p]
	if d != nil {
		c.front(d)
	}
	return d
}

// add enters an open directory, closing the one that was used longest ago. The
// root, which every walk starts from, and what keep is stay.
func (c *dirs) add(d, keep *dir) error {
	c.open[d.path] = d
	c.front(d)
	if len(c.open) <= maxOpen {
		return nil
	}
	for old := c.oldest; old != nil; old = old.newer {
		if old != d && old != keep && old != c.pinned && old.path != "" {
			return c.letGo(old)
		}
	}
	return nil
}

// letGo gives a directory its times and mode and closes it.
func (c *dirs) letGo(d *dir) error {
	delete(c.open, d.path)
	c.unlink(d)
	err := d.settle()
	fsat.Close(d.fd)
	return err
}

func (d *dir) settle() error {
	if d.mode != d.want {
		if err := unix.Fchmod(d.fd, d.want); err != nil {
			return failed("set mode of directory", d.path, err)
		}
		d.mode = d.want
	}
	if d.changed {
		if err := setTimes(d.fd, &[2]unix.Timespec{d.atime, d.mtime}); err != nil {
			return failed("set times of directory", d.path, err)
		}
		d.changed = false
	}
	return nil
}

// forget closes the directories at and below p, which are no more.
func (c *dirs) forget(p string) {
	for _, d := range c.open {
		if d.path == p || below(d.path, p) {
			delete(c.open, d.path)
			c.unlink(d)
			fsat.Close(d.fd)
		}
	}
}

// closeAll settles all directories, or with settle unset only closes them.
func (c *dirs) closeAll(settle bool) error {
	var errs []error
	for _, d := range c.open {
		if settle {
			errs = append(errs, d.settle())
		}
		fsat.Close(d.fd)
	}
	*c = dirs{}
	return errors.Join(errs...)
}

func below(p, dir string) bool {
	return len(p) > len(dir) && strings.HasPrefix(p, dir) && (dir == "" || p[len(dir)] == '/')
}

// join is the path of name in the directory dir.
func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// clean is a name of the archive as a path below the root. As for every
// engine, the root is its own parent. The root is "".
func clean(name string) string {
	if plainName(name) {
		return name
	}
	return path.Clean("/" + name)[1:]
}

// plainName says that clean would change nothing.
func plainName(name string) bool {
	start := 0
	for i := 0; i <= len(name); i++ {
		if i < len(name) && name[i] != '/' {
			continue
		}
		if n := name[start:i]; n == "" || n == "." || n == ".." {
			return false
		}
		start = i + 1
	}
	return true
}

func split(p string) (dir, base string) {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i], p[i+1:]
	}
	return "", p
}

// parent opens the directory p, for making something in it. Directories on the
// way that are missing are made. A symbolic link that this layer made is
// followed, inside the tree, as if its root were /; anything else in the way
// that lies below the layer gives way to a directory, since that is what the
// layer stacked over it would show.
func (a *applier) parent(p string) (*dir, error) {
	d, err := a.walk(p, true)
	if err == nil && !d.marked {
		// All on the way are the layer's, also what a search had opened.
		a.markAll(d.path)
		d.marked = true
	}
	return d, err
}

// find is parent for looking only. What is not in the tree is *missing, unless
// the layer itself hides what is below: then it is ENOENT.
func (a *applier) find(p string) (*dir, error) { return a.walk(p, false) }

// missing is a path that the directory that is written has nothing at.
type missing struct {
	at   *dir
	path string // canonical as far as at goes
}

func (m *missing) Error() string { return unix.ENOENT.Error() }
func (m *missing) Unwrap() error { return unix.ENOENT }

func (a *applier) walk(p string, create bool) (*dir, error) {
	if d := a.dirs.get(p); d != nil {
		return d, nil
	}
	// Nearest open directory above.
	up := p
	var d *dir
	for d == nil {
		up, _ = split(up)
		d = a.dirs.get(up)
	}
	rest := strings.TrimPrefix(p[len(up):], "/")
	for hops := 0; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		switch name {
		case "", ".":
			continue
		case "..":
			up, _ := split(d.path)
			var err error
			if d, err = a.walk(up, create); err != nil {
				return nil, err
			}
			continue
		}
		next, target, err := a.step(d, name, create)
		if err == errMissing { //nolint:errorlint // it is never wrapped
			return nil, &missing{d, strings.TrimSuffix(join(d.path, name)+"/"+rest, "/")}
		}
		if err != nil {
			return nil, err
		}
		if next != nil {
			d = next
			continue
		}
		if hops++; hops > maxHops {
			return nil, failed("follow link", join(d.path, name), unix.ELOOP)
		}
		if len(target)+len(rest) > 1<<20 {
			return nil, failed("follow link", join(d.path, name), unix.ENAMETOOLONG)
		}
		rest = target + "/" + rest
		if strings.HasPrefix(target, "/") {
			d = a.dirs.get("")
		}
	}
	return d, nil
}

var errMissing = errors.New("missing")

// step opens the directory name in d, or returns the target of the symbolic
// link that this layer made there.
func (a *applier) step(d *dir, name string, create bool) (next *dir, target string, err error) {
	p := join(d.path, name)
	if next := a.dirs.get(p); next != nil {
		return next, "", nil
	}
	next, err = a.openDir(d, name)
	switch {
	case err == nil:
		return next, "", nil
	case errors.Is(err, unix.ENOENT):
		if !create {
			return nil, "", errMissing
		}
		next, err := a.makeImplied(d, name, false)
		return next, "", err
	case !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP):
		return nil, "", failed("open directory", p, err)
	}
	target, kind, err := a.inTheWay(d, name)
	switch {
	case err != nil || target != "":
		return nil, target, err
	case !create:
		return nil, "", unix.ENOENT
	case kind == ownFile:
		return nil, "", invalid("%q is no directory", p)
	}
	if err := a.clear(d, name); err != nil {
		return nil, "", err
	}
	next, err = a.makeImplied(d, name, kind == whiteout)
	return next, "", err
}

// what is in the way of a directory.
type obstacle int

const (
	lowerFile obstacle = iota // of the layers below
	whiteout
	ownFile // of this layer
)

// inTheWay looks at what is no directory; target is set for a symbolic link of
// this layer.
func (a *applier) inTheWay(d *dir, name string) (target string, kind obstacle, err error) {
	p := join(d.path, name)
	var st unix.Stat_t
	if err := fsat.Lstat(d.fd, name, &st); err != nil {
		return "", 0, failed("stat", p, err)
	}
	switch {
	case a.overlay() && isWhiteout(&st):
		return "", whiteout, nil
	case !a.own(p):
		return "", lowerFile, nil
	case st.Mode&unix.S_IFMT != unix.S_IFLNK:
		return "", ownFile, nil
	}
	target, err = fsat.Readlink(d.fd, name)
	if err != nil {
		return "", 0, failed("read link", p, err)
	}
	return target, ownFile, nil
}

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

const openDirFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW

// openDir opens what is a directory already.
func (a *applier) openDir(at *dir, name string) (*dir, error) {
	fd, err := fsat.OpenAt(at.fd, name, openDirFlags, 0)
	want := noMode
	if errors.Is(err, unix.EACCES) && !a.root {
		fd, want, err = openLocked(at, name)
	}
	if err != nil {
		return nil, err
	}
	d := &dir{path: join(at.path, name), fd: fd}
	if err := a.adopt(d, want); err != nil {
		fsat.Close(fd)
		return nil, err
	}
	d.fresh = at.fresh || d.opaque
	return d, a.dirs.add(d, at)
}

// openLocked opens a directory that its owner may not read, and returns the
// mode that it had.
func openLocked(at *dir, name string) (fd int, mode uint32, err error) {
	var st unix.Stat_t
	if err := fsat.Lstat(at.fd, name, &st); err != nil {
		return -1, noMode, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return -1, noMode, unix.ENOTDIR
	}
	if err := fsat.Chmod(at.fd, name, st.Mode&0o7777|0o700); err != nil {
		return -1, noMode, err
	}
	fd, err = fsat.OpenAt(at.fd, name, openDirFlags, 0)
	return fd, st.Mode & 0o7777, err
}

// adopt learns how an existing directory is, which is how it is to be again
// when everything has been made in it. want is the mode that it had before it
// was opened up, if it was.
func (a *applier) adopt(d *dir, want uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return failed("stat directory", d.path, err)
	}
	d.uid, d.gid, d.mode = st.Uid, st.Gid, st.Mode&0o7777
	d.want, d.atime, d.mtime = d.mode, st.Atim, st.Mtim
	if want != noMode {
		d.want = want
	}
	if !a.root && d.mode&0o700 != 0o700 {
		if err := unix.Fchmod(d.fd, d.mode|0o700); err != nil {
			return failed("open up directory", d.path, err)
		}
		d.mode |= 0o700
	}
	n, err := unix.Fgetxattr(d.fd, aclDefault, nil)
	d.inherits = d.mode&unix.S_ISGID != 0 || err == nil && n > 0
	if a.overlay() {
		var mark [1]byte
		n, err := unix.Fgetxattr(d.fd, a.o.Form.marks()+"opaque", mark[:])
		d.opaque = err == nil && n == 1 && mark[0] == 'y'
	}
	return nil
}

// noMode stands for no mode in a field that holds one.
const noMode = ^uint32(0)

// makeDir makes a directory that is not there. Its attributes are still to be
// set; until they are it is the caller's alone.
func (a *applier) makeDir(at *dir, name string, mode uint32) (*dir, error) {
	p := join(at.path, name)
	if err := unix.Mkdirat(at.fd, name, mode&0o1777|a.atLeast); err != nil {
		return nil, err
	}
	at.changed = true
	fd, err := fsat.OpenAt(at.fd, name, openDirFlags, 0)
	if err != nil {
		return nil, failed("open directory", p, err)
	}
	d := &dir{
		path: p, fd: fd, isNew: true, changed: true, fresh: at.fresh,
		uid: a.euid, gid: a.egid, mode: mode&0o1777 | a.atLeast,
	}
	d.want = d.mode
	if at.inherits || !a.exactModes || at.gid != a.egid {
		if at.inherits {
			if err := dropACLs(fd); err != nil {
				fsat.Close(fd)
				return nil, failed("remove inherited attributes of", p, err)
			}
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			fsat.Close(fd)
			return nil, failed("stat directory", p, err)
		}
		d.uid, d.gid, d.mode = st.Uid, st.Gid, st.Mode&0o7777
	}
	a.mark(p)
	return d, a.dirs.add(d, at)
}

// makeImplied makes a directory that the layer has an entry in and none for.
// It looks as the one below does, if there is one.
// hidden says that the layer hides that one.
func (a *applier) makeImplied(at *dir, name string, hidden bool) (*dir, error) {
	if err := a.count(); err != nil {
		return nil, err
	}
	d, err := a.makeDir(at, name, 0o755)
	if err != nil {
		return nil, failed("make directory", join(at.path, name), err)
	}
	want := attributes{mode: 0o755, uid: a.euid, gid: a.egid}
	if hidden {
		if err := a.setOpaque(d); err != nil {
			return nil, err
		}
	} else if a.overlay() && !d.fresh {
		below, err := a.lower.directory(d.path)
		if err != nil {
			return nil, err
		}
		if below != nil {
			want = *below
		}
	}
	return d, a.setDirAttributes(d, &want)
}

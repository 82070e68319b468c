package layer

import (
	"bytes"
	"context"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

func (t Trees) write(e *emitter) error {
	upper, err := unix.Open(t.Upper, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return failed("open tree", t.Upper, err)
	}
	defer fsat.Close(upper)
	lower := -1
	if t.Lower != "" {
		lower, err = unix.Open(t.Lower, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return failed("open tree", t.Lower, err)
		}
		defer fsat.Close(lower)
	}
	c := newComparer(e)
	top := &node{dir: true}
	if err := c.directory(lower, upper, "", top); err != nil {
		return err
	}
	c.groups()
	top.reach()
	return c.emit(upper, "", top)
}

// node is a file of the upper tree that has an entry in the layer, or may have
// one yet.
type node struct {
	name      string
	dir       bool
	changed   bool // has an entry
	deep      bool // or something in it has
	gone      []string
	children  []*node
	lowerFile inode // what it is in the lower tree, if it is unchanged
}

// reach finds the directories that something in has an entry.
func (n *node) reach() bool {
	n.deep = n.changed || len(n.gone) > 0
	for _, c := range n.children {
		n.deep = c.reach() || n.deep
	}
	return n.deep
}

// comparer finds what differs between two trees.
type comparer struct {
	e *emitter
	// Files with several names in either tree, in the order of the walk: by
	// what they are in the upper tree, and those unchanged by what they are
	// in the lower one.
	upper, lower map[inode][]*node
	other        []byte
}

func newComparer(e *emitter) *comparer {
	return &comparer{e: e, upper: map[inode][]*node{}, lower: map[inode][]*node{}, other: make([]byte, 64<<10)}
}

// directory compares two open directories; lower is -1 where there is none. It
// adds to n what is in the upper one.
func (c *comparer) directory(lower, upper int, path string, n *node) error {
	if c.e.ctx.Err() != nil {
		return context.Cause(c.e.ctx)
	}
	ours, err := c.names(upper, path)
	if err != nil {
		return err
	}
	var theirs []string
	if lower >= 0 {
		if theirs, err = c.names(lower, path); err != nil {
			return err
		}
	}
	for len(ours) > 0 || len(theirs) > 0 {
		switch {
		case len(ours) == 0 || len(theirs) > 0 && theirs[0] < ours[0]:
			n.gone = append(n.gone, theirs[0])
			theirs = theirs[1:]
		case len(theirs) == 0 || ours[0] < theirs[0]:
			if err := c.child(-1, upper, path, ours[0], n); err != nil {
				return entryError(join(path, ours[0]), err)
			}
			ours = ours[1:]
		default:
			if err := c.child(lower, upper, path, ours[0], n); err != nil {
				return entryError(join(path, ours[0]), err)
			}
			ours, theirs = ours[1:], theirs[1:]
		}
	}
	return nil
}

func (c *comparer) names(fd int, path string) ([]string, error) {
	names, err := fsat.Names(fd, c.e.buf[:32<<10], nil)
	if err != nil {
		return nil, failed("read directory", path, err)
	}
	slices.Sort(names)
	return names, nil
}

// child compares what two directories have as name.
func (c *comparer) child(lower, upper int, path, name string, n *node) error {
	var ust, lst unix.Stat_t
	if err := fsat.Lstat(upper, name, &ust); err != nil {
		return failed("stat", join(path, name), err)
	}
	if lower >= 0 {
		if err := fsat.Lstat(lower, name, &lst); err != nil {
			return failed("stat", join(path, name), err)
		}
	}
	kind := ust.Mode & unix.S_IFMT
	switch {
	case kind == unix.S_IFSOCK:
		c.e.out.Sockets++
		if lower >= 0 && lst.Mode&unix.S_IFMT != unix.S_IFSOCK {
			n.gone = append(n.gone, name)
		}
		return nil
	case kind == unix.S_IFDIR:
		return c.subdirectory(lower, upper, path, name, lst.Mode&unix.S_IFMT == unix.S_IFDIR, n)
	}
	same := false
	if lower >= 0 && lst.Mode&unix.S_IFMT == kind {
		var err error
		if same, err = c.sameFile(lower, upper, name, &lst, &ust); err != nil {
			return err
		}
	}
	f := &node{name: name, changed: !same}
	if same {
		f.lowerFile = inodeOf(&lst)
	}
	if !same || ust.Nlink > 1 || lst.Nlink > 1 {
		n.children = append(n.children, f)
	}
	if ust.Nlink > 1 || same && lst.Nlink > 1 {
		c.upper[inodeOf(&ust)] = append(c.upper[inodeOf(&ust)], f)
	}
	if same && (ust.Nlink > 1 || lst.Nlink > 1) {
		c.lower[f.lowerFile] = append(c.lower[f.lowerFile], f)
	}
	return nil
}

func (c *comparer) subdirectory(lower, upper int, path, name string, both bool, n *node) error {
	p := join(path, name)
	fd, err := fsat.OpenAt(upper, name, openDirFlags, 0)
	if err != nil {
		return failed("open directory", p, err)
	}
	defer fsat.Close(fd)
	d := &node{name: name, dir: true, changed: true}
	other := -1
	if both {
		if other, err = fsat.OpenAt(lower, name, openDirFlags, 0); err != nil {
			return failed("open directory", p, err)
		}
		defer fsat.Close(other)
		same, err := sameDir(fd, other)
		if err != nil {
			return failed("compare directory", p, err)
		}
		d.changed = !same
	}
	if err := c.directory(other, fd, p, d); err != nil {
		return err
	}
	if d.changed || len(d.gone) > 0 || len(d.children) > 0 {
		n.children = append(n.children, d)
	}
	return nil
}

// sameFile compares two files of one type that are no directories.
func (c *comparer) sameFile(lower, upper int, name string, lst, ust *unix.Stat_t) (bool, error) {
	if lst.Dev == ust.Dev && lst.Ino == ust.Ino && lst.Ctim == ust.Ctim {
		return true, nil
	}
	if lst.Mode != ust.Mode || lst.Uid != ust.Uid || lst.Gid != ust.Gid ||
		lst.Rdev != ust.Rdev || lst.Size != ust.Size || lst.Mtim != ust.Mtim {
		return false, nil
	}
	kind := ust.Mode & unix.S_IFMT
	flags := unix.O_PATH
	if kind == unix.S_IFREG {
		flags = fsat.ForReading
	}
	u, err := fsat.OpenAt(upper, name, flags, 0)
	if err != nil {
		return false, failed("open", name, err)
	}
	defer fsat.Close(u)
	l, err := fsat.OpenAt(lower, name, flags, 0)
	if err != nil {
		return false, failed("open", name, err)
	}
	defer fsat.Close(l)
	ux, err := carriedXattrs(u, flags == unix.O_PATH, "")
	if err != nil {
		return false, failed("read attributes of", name, err)
	}
	lx, err := carriedXattrs(l, flags == unix.O_PATH, "")
	if err != nil {
		return false, failed("read attributes of", name, err)
	}
	if !fsat.EqualXattrs(ux, lx) {
		return false, nil
	}
	switch kind {
	case unix.S_IFLNK:
		a, err := fsat.Readlink(u, "")
		if err != nil {
			return false, failed("read link", name, err)
		}
		b, err := fsat.Readlink(l, "")
		return a == b, failed("read link", name, err)
	case unix.S_IFREG:
		return c.sameContent(l, u, ust.Size)
	}
	return true, nil
}

func (c *comparer) sameContent(l, u int, size int64) (bool, error) {
	for pos := int64(0); pos < size; {
		if c.e.ctx.Err() != nil {
			return false, context.Cause(c.e.ctx)
		}
		n, err := fsat.Pread(u, c.e.buf[:len(c.other)], pos)
		if err != nil {
			return false, failed("read", "", err)
		}
		if n == 0 {
			return false, errChanged
		}
		for at := 0; at < n; {
			m, err := fsat.Pread(l, c.other[at:n], pos+int64(at))
			if err != nil {
				return false, failed("read", "", err)
			}
			if m == 0 {
				return false, errChanged
			}
			at += m
		}
		if !bytes.Equal(c.e.buf[:n], c.other[:n]) {
			return false, nil
		}
		pos += int64(n)
	}
	return true, nil
}

// groups makes entries of unchanged files whose names belong together in
// another way than in the lower tree: applying the layer has to give the upper
// tree's links.
func (c *comparer) groups() {
	whole := func(group []*node) bool {
		return slices.ContainsFunc(group, func(n *node) bool { return n.changed || n.lowerFile != group[0].lowerFile })
	}
	of := map[*node]*node{} // the first of its group in the upper tree
	for _, group := range c.upper {
		all := whole(group)
		for _, n := range group {
			n.changed = n.changed || all
			of[n] = group[0]
		}
	}
	for _, group := range c.lower {
		// Of what is one file below and several here, one may stay.
		var stays *node
		for _, n := range group {
			if n.changed {
				continue
			}
			if stays == nil {
				stays = of[n]
			}
			n.changed = of[n] != stays
		}
	}
}

// emit writes what is in the directory path that has changed.
func (c *comparer) emit(fd int, path string, n *node) error {
	for _, name := range n.gone {
		if err := c.e.whiteout(path, name); err != nil {
			return entryError(join(path, name), err)
		}
	}
	for _, f := range n.children {
		if !f.deep {
			continue
		}
		p := join(path, f.name)
		if !f.dir {
			var st unix.Stat_t
			if err := fsat.Lstat(fd, f.name, &st); err != nil {
				return entryError(p, failed("stat", p, err))
			}
			if err := c.e.file(fd, f.name, p, &st); err != nil {
				return err
			}
			continue
		}
		if err := c.emitDir(fd, p, f); err != nil {
			return entryError(p, err)
		}
	}
	return nil
}

func (c *comparer) emitDir(at int, p string, f *node) error {
	if err := checkName(f.name); err != nil {
		return err
	}
	fd, err := fsat.OpenAt(at, f.name, openDirFlags, 0)
	if err != nil {
		return failed("open directory", p, err)
	}
	defer fsat.Close(fd)
	c.e.enter(fd, p)
	defer c.e.leave()
	if f.changed {
		if err := c.e.directories(); err != nil {
			return err
		}
	}
	return c.emit(fd, p, f)
}

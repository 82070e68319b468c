package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

// sameStat says whether two files, or directories, have the same owner and
// mode, and files the same size, device and time. What tells more only about
// the place where they lie does not count: inode numbers, links, blocks, and
// the times of directories, which change with each entry that comes and goes.
func sameStat(a, b *unix.Stat_t) bool {
	if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid {
		return false
	}
	switch a.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return true
	case unix.S_IFCHR, unix.S_IFBLK:
		if a.Rdev != b.Rdev {
			return false
		}
	}
	return a.Size == b.Size && a.Mtim == b.Mtim
}

// sameXattrs compares what mounts show of the extended attributes.
func sameXattrs(ma, mb marks, a, b *os.File) (bool, error) {
	xa, err := xattrs(ma, a)
	if err != nil {
		return false, err
	}
	xb, err := xattrs(mb, b)
	if err != nil {
		return false, err
	}
	return maps.Equal(xa, xb), nil
}

// xattrs are the extended attributes of a place, by the names that mounts show.
func xattrs(m marks, f *os.File) (map[string]string, error) {
	path := procPath(f)
	names, err := sysx.Listxattr(path)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "listxattr", Path: f.Name(), Err: err}
	}
	var out map[string]string
	for _, name := range names {
		shown, ok := m.shown(name)
		if !ok {
			continue
		}
		value, err := sysx.Getxattr(path, name)
		if errors.Is(err, unix.ENODATA) {
			continue // a name that others must not read
		}
		if err != nil {
			return nil, fmt.Errorf("attribute %s: %w", name, &os.PathError{Op: "getxattr", Path: f.Name(), Err: err})
		}
		if out == nil {
			out = map[string]string{}
		}
		out[shown] = string(value)
	}
	return out, nil
}

// A comparer compares files and directories for one call.
type comparer struct {
	ctx context.Context //nolint:containedctx // of the one call that the comparer lives for
	// names says how many names some files have in their tree, as their count
	// of links includes names elsewhere.
	names map[inodeID]int
}

// links is how many names a file has in its tree.
func (c *comparer) links(st *unix.Stat_t) int {
	if n, ok := c.names[inodeID{st.Dev, st.Ino}]; ok {
		return n
	}
	return int(st.Nlink)
}

// sameFile says whether two files of which sameStat is true, but no
// directories, are the same in all that a tree shows of them but hard links.
func (c *comparer) sameFile(ma, mb marks, a, b *os.File, st *unix.Stat_t) (bool, error) {
	if same, err := sameXattrs(ma, mb, a, b); err != nil || !same {
		return false, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		ta, err := readLink(a)
		if err != nil {
			return false, err
		}
		tb, err := readLink(b)
		return ta == tb, err
	case unix.S_IFREG:
		return sameContent(c.ctx, a, b, st.Size)
	}
	return true, nil
}

// sameContent compares the bytes of two files of one size.
func sameContent(ctx context.Context, a, b *os.File, size int64) (same bool, err error) {
	if size == 0 {
		return true, nil
	}
	var files [2]*os.File
	for i, place := range []*os.File{a, b} {
		f, shut, err := openReadable(place, 0)
		if err != nil {
			return false, err
		}
		defer f.Close()
		if err := shut(); err != nil {
			return false, err
		}
		files[i] = f
	}
	const chunk = 64 << 10
	bufs := [2][]byte{make([]byte, min(size, chunk)), make([]byte, min(size, chunk))}
	for at := int64(0); at < size; at += chunk {
		if err := context.Cause(ctx); err != nil {
			return false, err
		}
		n := min(size-at, chunk)
		for i, f := range files {
			if _, err := f.ReadAt(bufs[i][:n], at); err != nil && !errors.Is(err, io.EOF) {
				return false, err
			}
		}
		if !bytes.Equal(bufs[0][:n], bufs[1][:n]) {
			return false, nil
		}
	}
	return true, nil
}

// sameTree says whether two directories hold the same, where no file of the
// first has several names. Stats are compared before contents, as they tell
// nearly always.
func (c *comparer) sameTree(u, v *union) (bool, error) {
	for _, deep := range []bool{false, true} {
		if same, err := c.sameBelow(u, v, deep); err != nil || !same {
			return false, err
		}
	}
	return true, nil
}

func (c *comparer) sameBelow(u, v *union, deep bool) (bool, error) {
	us, err := u.list()
	if err != nil {
		return false, err
	}
	vs, err := v.list()
	if err != nil || len(us) != len(vs) {
		return false, err
	}
	for i := range us {
		if err := context.Cause(c.ctx); err != nil {
			return false, err
		}
		if us[i].name != vs[i].name || !sameStat(&us[i].st, &vs[i].st) {
			return false, nil
		}
		same, err := c.sameFound(u, v, &us[i], &vs[i], deep)
		if err != nil || !same {
			return false, err
		}
	}
	return true, nil
}

func (c *comparer) sameFound(u, v *union, f, g *found, deep bool) (same bool, err error) {
	if f.isDir() {
		us, err := u.sub(f)
		if err != nil {
			return false, err
		}
		defer func() { err = errors.Join(err, us.close()) }()
		vs, err := v.sub(g)
		if err != nil {
			return false, err
		}
		defer func() { err = errors.Join(err, vs.close()) }()
		if deep {
			if same, err := sameXattrs(u.marks, v.marks, us.top(), vs.top()); err != nil || !same {
				return false, err
			}
		}
		return c.sameBelow(us, vs, deep)
	}
	if c.links(&f.st) > 1 {
		return false, nil
	}
	if !deep {
		return true, nil
	}
	return c.sameFiles(u, v, f, g)
}

// sameFiles is sameFile for what two unions show.
func (c *comparer) sameFiles(u, v *union, f, g *found) (bool, error) {
	a, err := u.place(f)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := v.place(g)
	if err != nil {
		return false, err
	}
	defer b.Close()
	return c.sameFile(u.marks, v.marks, a, b, &f.st)
}

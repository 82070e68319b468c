// Package treetar writes a directory tree as a tar archive that depends on the
// tree alone: entries sorted by the bytes of their names, PAX headers with
// times in nanoseconds, numeric owners, extended attributes and ACLs, hard
// links; no access times, no names of users.
//
// The same tree gives the same bytes, whoever writes them and when. What an
// archive cannot hold does not come along: holes, which are written as zeros,
// sockets, and extended attributes with an equals sign in their name. The
// directory itself is no entry, only what is in it.
package treetar

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// Options of Write.
type Options struct {
	// Progress, if not nil, is called after each piece of a file with the
	// bytes of files written so far.
	Progress func(bytes int64)
}

// Stats say what was written.
type Stats struct {
	Entries int64
	// Bytes is the content of all files, in bytes.
	Bytes int64
	// Sockets is how many were left out.
	Sockets int64
}

// Write writes what lies at name in the tree of root to w. Symbolic links on
// the way to name are followed inside of root, as if it were /; links below it
// are entries. A name that is a file gives an archive of that file alone.
//
// Errors: NotFound for a name that does not exist; those of w; a file that
// changed its size meanwhile is Aborted.
func Write(ctx context.Context, w io.Writer, root, name string, o Options) (Stats, error) {
	top, err := pathrs.OpenInRoot(root, "/"+name)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return Stats{}, fmt.Errorf("there is no %q in the tree: %w", name, errdefs.ErrNotFound)
		}
		return Stats{}, fmt.Errorf("open %q in the tree: %w", name, err)
	}
	defer top.Close()
	t := &writer{ctx: ctx, tar: tar.NewWriter(w), o: o, links: map[inode]string{}, root: os.Geteuid() == 0, buf: make([]byte, 1<<20)}
	fd := int(top.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Stats{}, fmt.Errorf("stat %q: %w", name, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = t.directory(fd, "")
	} else {
		err = t.entry(fd, path.Base(path.Clean("/"+name)), &st)
	}
	if err == nil {
		err = t.tar.Close()
	}
	return t.stats, err
}

type inode struct{ dev, ino uint64 }

type writer struct {
	ctx   context.Context
	tar   *tar.Writer
	o     Options
	links map[inode]string // first names of files with several
	root  bool
	stats Stats
	buf   []byte
}

// directory writes what is in the directory that the O_PATH descriptor names.
func (t *writer) directory(at int, name string) error {
	fd, err := fsat.OpenAt(at, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return wrap("open", name, err)
	}
	defer fsat.Close(fd)
	names, err := fsat.Names(fd, t.buf, nil)
	if err != nil {
		return wrap("read", name, err)
	}
	slices.Sort(names)
	for _, n := range names {
		if t.ctx.Err() != nil {
			return context.Cause(t.ctx)
		}
		if err := t.child(fd, n, path.Join(name, n)); err != nil {
			return err
		}
	}
	return nil
}

func (t *writer) child(at int, base, name string) error {
	fd, err := fsat.OpenAt(at, base, unix.O_PATH, 0)
	if err != nil {
		return wrap("open", name, err)
	}
	defer fsat.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return wrap("stat", name, err)
	}
	if err := t.entry(fd, name, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return t.directory(fd, name)
	}
	return nil
}

// entry writes one file, of whatever type, that fd names.
func (t *writer) entry(fd int, name string, st *unix.Stat_t) error {
	h := &tar.Header{
		Format:  tar.FormatPAX,
		Name:    name,
		Mode:    int64(st.Mode & 0o7777),
		Uid:     int(st.Uid),
		Gid:     int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()),
	}
	id := inode{st.Dev, st.Ino}
	content := false
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
		content = true
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case unix.S_IFLNK:
		target, err := fsat.Readlink(fd, "")
		if err != nil {
			return wrap("read link", name, err)
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, target
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	default:
		t.stats.Sockets++
		return nil
	}
	if first, ok := t.links[id]; ok {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		content = false
	} else {
		if h.Typeflag != tar.TypeDir && st.Nlink > 1 {
			t.links[id] = name
		}
		if err := t.attributes(fd, h); err != nil {
			return wrap("read extended attributes of", name, err)
		}
	}
	if err := t.tar.WriteHeader(h); err != nil {
		return wrap("write header of", name, err)
	}
	t.stats.Entries++
	if content && h.Size > 0 {
		return t.content(fd, name, h.Size)
	}
	return nil
}

func (t *writer) attributes(fd int, h *tar.Header) error {
	xattrs, err := fsat.Xattrs(fd, true, t.root)
	if err != nil || len(xattrs) == 0 {
		return err
	}
	h.PAXRecords = map[string]string{}
	for _, x := range xattrs {
		if strings.Contains(x.Name, "=") {
			continue // the end of a name in a PAX record
		}
		h.PAXRecords["SCHILY.xattr."+x.Name] = string(x.Value)
	}
	return nil
}

// content writes the bytes of a file.
func (t *writer) content(fd int, name string, size int64) error {
	// The descriptor names the file without opening it; this opens the same
	// file, whatever its name leads to by now.
	f, err := os.Open(fsat.ProcPath(fd))
	if err != nil {
		return wrap("open", name, err)
	}
	defer f.Close()
	for left := size; left > 0; {
		if t.ctx.Err() != nil {
			return context.Cause(t.ctx)
		}
		n, err := io.ReadFull(f, t.buf[:min(left, int64(len(t.buf)))])
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return fmt.Errorf("%q became shorter while it was read: %w", name, errdefs.ErrAborted)
		}
		if err != nil {
			return wrap("read", name, err)
		}
		if _, err := t.tar.Write(t.buf[:n]); err != nil {
			return wrap("write", name, err)
		}
		left -= int64(n)
		t.stats.Bytes += int64(n)
		if t.o.Progress != nil {
			t.o.Progress(t.stats.Bytes)
		}
	}
	return nil
}

func wrap(what, name string, err error) error {
	if name == "" {
		name = "."
	}
	return fmt.Errorf("%s %q: %w", what, name, err)
}

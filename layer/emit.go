package layer

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

type inode struct{ dev, ino uint64 }

func inodeOf(st *unix.Stat_t) inode { return inode{st.Dev, st.Ino} }

// emitter writes entries. Those of one directory come in the order of the
// bytes of their names, whiteouts first, and after the directory; what is in a
// directory comes before the next entry beside it.
type emitter struct {
	ctx   context.Context //nolint:containedctx // of the one call that the emitter lives for
	tar   *tar.Writer
	o     WriteOptions
	marks string           // how overlayfs's attributes begin in a layer; empty for trees
	links map[inode]string // first names of files with several
	out   Written
	buf   []byte
	// above are the directories that the entry to come lies in and that have
	// no entry yet: they get one with the first in them.
	above []pendingDir
}

type pendingDir struct {
	fd      int
	path    string
	written bool
}

func newEmitter(ctx context.Context, w io.Writer, o WriteOptions) *emitter {
	return &emitter{ctx: ctx, tar: tar.NewWriter(w), o: o, links: map[inode]string{}, buf: make([]byte, chunkSize)}
}

// enter says that what comes lies in the directory path, which fd is open to
// read; leave ends that.
func (e *emitter) enter(fd int, path string) {
	e.above = append(e.above, pendingDir{fd: fd, path: path})
}

func (e *emitter) leave() { e.above = e.above[:len(e.above)-1] }

// directories writes the entries of the directories that lie above.
func (e *emitter) directories() error {
	for i := range e.above {
		d := &e.above[i]
		if d.written {
			continue
		}
		d.written = true
		var st unix.Stat_t
		if err := unix.Fstat(d.fd, &st); err != nil {
			return failed("stat", d.path, err)
		}
		h := &tar.Header{Typeflag: tar.TypeDir, Name: d.path + "/"}
		if err := e.fill(h, d.fd, false, &st); err != nil {
			return failed("read attributes of", d.path, err)
		}
		if err := e.header(h); err != nil {
			return err
		}
	}
	return nil
}

// whiteout writes that name is not in the directory any more.
func (e *emitter) whiteout(dir, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	return e.hiding(dir, whiteoutPrefix+name)
}

// opaque writes that nothing of what was in the directory is.
func (e *emitter) opaque(dir string) error { return e.hiding(dir, opaqueName) }

func (e *emitter) hiding(dir, name string) error {
	if err := e.directories(); err != nil {
		return err
	}
	return e.header(&tar.Header{Typeflag: tar.TypeReg, Name: join(dir, name), ModTime: time.Unix(0, 0)})
}

// checkName refuses names that would be read as whiteouts.
func checkName(name string) error {
	if strings.HasPrefix(name, whiteoutPrefix) {
		return impossible("a layer cannot hold a file whose name begins with %q", whiteoutPrefix)
	}
	return nil
}

func (e *emitter) header(h *tar.Header) error {
	h.Format = tar.FormatPAX
	if err := e.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	e.out.Entries++
	return nil
}

// fill gives a header the attributes of a file.
func (e *emitter) fill(h *tar.Header, fd int, isPath bool, st *unix.Stat_t) error {
	h.Mode, h.Uid, h.Gid = int64(st.Mode&0o7777), int(st.Uid), int(st.Gid)
	h.ModTime = time.Unix(st.Mtim.Unix())
	if e.o.SourceDateEpoch != nil && h.ModTime.After(*e.o.SourceDateEpoch) {
		h.ModTime = *e.o.SourceDateEpoch
	}
	if !e.o.Nanoseconds {
		h.ModTime = time.Unix(h.ModTime.Unix(), 0)
	}
	xattrs, err := carriedXattrs(fd, isPath, e.marks)
	if err != nil {
		return err
	}
	for _, x := range xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrRecord+x.Name] = string(x.Value)
	}
	return nil
}

// file writes the entry of a file that is no directory: name in the directory
// that at is open for, p as the layer has it.
func (e *emitter) file(at int, name, p string, st *unix.Stat_t) (err error) {
	if err := checkName(name); err != nil {
		return entryError(p, err)
	}
	kind := st.Mode & unix.S_IFMT
	flags := unix.O_PATH
	if kind == unix.S_IFREG {
		flags = fsat.ForReading
	}
	fd, err := fsat.OpenAt(at, name, flags, 0)
	if err != nil {
		return entryError(p, failed("open", p, err))
	}
	defer fsat.Close(fd)
	h := &tar.Header{Name: p}
	switch kind {
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = fsat.Readlink(fd, ""); err != nil {
			return entryError(p, failed("read link", p, err))
		}
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if kind == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	default:
		return entryError(p, impossible("a layer cannot hold a file of type %#o", kind))
	}
	if st.Nlink > 1 {
		if first, ok := e.links[inodeOf(st)]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			e.links[inodeOf(st)] = p
		}
	}
	// Of links, too: some engines set owners by each entry, which takes
	// capabilities away from the file.
	if err := e.fill(h, fd, flags == unix.O_PATH, st); err != nil {
		return entryError(p, failed("read attributes of", p, err))
	}
	if err := e.directories(); err != nil {
		return entryError(p, err)
	}
	if err := e.header(h); err != nil {
		return entryError(p, err)
	}
	if h.Typeflag == tar.TypeReg {
		return entryError(p, e.content(fd, st))
	}
	return nil
}

// content writes the bytes of an open file.
func (e *emitter) content(fd int, st *unix.Stat_t) error {
	for pos := int64(0); pos < st.Size; {
		if e.ctx.Err() != nil {
			return context.Cause(e.ctx)
		}
		n, err := fsat.Pread(fd, e.buf[:min(st.Size-pos, int64(len(e.buf)))], pos)
		if err != nil {
			return failed("read", "", err)
		}
		if n == 0 {
			return errChanged
		}
		if _, err := e.tar.Write(e.buf[:n]); err != nil {
			return err
		}
		pos += int64(n)
	}
	e.out.Bytes += st.Size
	var now unix.Stat_t
	if err := unix.Fstat(fd, &now); err != nil {
		return err
	}
	if now.Ino != st.Ino || now.Size != st.Size || now.Mtim != st.Mtim {
		return errChanged
	}
	return nil
}

var errChanged = fmt.Errorf("the file changed while it was written: %w", errdefs.ErrAborted)

package layer

import (
	"archive/tar"
	"errors"
	"io"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// file makes a regular file.
func (a *applier) file(up, base string, h *tar.Header) error {
	want, err := a.attributes(h)
	if err != nil {
		return err
	}
	if h.Size > a.o.Limits.EntryBytes {
		return exhausted("%d bytes, where %d are allowed", h.Size, a.o.Limits.EntryBytes)
	}
	if a.out.Bytes += h.Size; a.out.Bytes > a.o.Limits.Bytes {
		return exhausted("the layer's files have more than %d bytes", a.o.Limits.Bytes)
	}
	at, err := a.parent(up)
	if err != nil {
		return err
	}
	mode := want.mode & 0o777
	if !a.root && len(want.xattrs) > 0 {
		mode |= 0o600 // an attribute needs the right to write
	}
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL
	fd, err := fsat.OpenAt(at.fd, base, flags, mode)
	if errors.Is(err, unix.EEXIST) {
		if err := a.clear(at, base); err != nil {
			return err
		}
		fd, err = fsat.OpenAt(at.fd, base, flags, mode)
	}
	if err != nil {
		return failed("make", join(at.path, base), err)
	}
	at.changed = true
	a.markIn(at, base)
	if a.behind.takes(at, h, want) {
		return a.behind.add(at, base, fd, mode, h, want)
	}
	err = a.content(at, base, fd, h)
	if err == nil {
		err = a.setFileAttributes(at, base, fd, mode, want)
	}
	if cerr := unix.Close(fd); cerr != nil && err == nil {
		err = failed("write", join(at.path, base), cerr)
	}
	return err
}

// isSparse says that the entry has holes.
func isSparse(h *tar.Header) bool {
	sparse := h.Typeflag == tar.TypeGNUSparse
	for key := range h.PAXRecords {
		sparse = sparse || strings.HasPrefix(key, "GNU.sparse.")
	}
	return sparse
}

// content writes what the entry holds.
func (a *applier) content(at *dir, base string, fd int, h *tar.Header) error {
	sparse := isSparse(h)
	for pos := int64(0); pos < h.Size; {
		if pos > 0 && a.ctx.Err() != nil {
			return a.ctx.Err()
		}
		buf := a.buf[:min(h.Size-pos, int64(len(a.buf)))]
		if _, err := io.ReadFull(a.tar, buf); err != nil {
			return unexpected(a.stream, err)
		}
		write := writeAll
		if sparse {
			write = writeData
		}
		if err := write(fd, buf, pos); err != nil {
			return failed("write", join(at.path, base), err)
		}
		pos += int64(len(buf))
	}
	if sparse {
		if err := unix.Ftruncate(fd, h.Size); err != nil {
			return failed("write", join(at.path, base), err)
		}
	}
	return nil
}

// writeAll writes buf, which follows what was written before.
func writeAll(fd int, buf []byte, _ int64) error {
	for len(buf) > 0 {
		n, err := unix.Write(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		buf = buf[n:]
	}
	return nil
}

// hole is what a zero-filled stretch has to have to become one: a block of the
// usual size, so that nothing is lost where there are no smaller holes.
const hole = 4096

var zeros [hole]byte

// writeData writes the blocks of buf that are not zero.
func writeData(fd int, buf []byte, pos int64) error {
	isHole := func(b []byte) bool { return string(b) == string(zeros[:len(b)]) }
	for len(buf) > 0 {
		n := min(hole, len(buf))
		if isHole(buf[:n]) {
			buf, pos = buf[n:], pos+int64(n)
			continue
		}
		for n < len(buf) && !isHole(buf[n:min(n+hole, len(buf))]) {
			n = min(n+hole, len(buf))
		}
		if _, err := unix.Seek(fd, pos, unix.SEEK_SET); err != nil {
			return err
		}
		if err := writeAll(fd, buf[:n], pos); err != nil {
			return err
		}
		buf, pos = buf[n:], pos+int64(n)
	}
	return nil
}

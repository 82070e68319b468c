package fsat

import (
	"context"
	"errors"
	"io"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// copyChunk bounds one copy_file_range, so that a cancelled context and
	// the progress display never wait long.
	copyChunk = 8 << 20
	// bufferSize is for plain reads and writes; larger ones are no faster.
	bufferSize = 128 << 10
	// smallFile is where one read and one write beat the calls that ask the
	// kernel to share or move extents.
	smallFile = 16 << 10
)

// Copier copies file data by the cheapest way that the file systems offer:
// sharing extents (FICLONE), copy_file_range, or reading and writing. It
// remembers what did not work. It is safe for concurrent use.
type Copier struct {
	noClone, noRange atomic.Bool
}

// Copy copies size bytes of src into the empty file dst and keeps holes. A
// source that was cut off meanwhile is io.ErrUnexpectedEOF or reads as zeros,
// as a hole does: the caller compares its stat data before and after. report,
// if not nil, is told how many more bytes are done.
func (c *Copier) Copy(ctx context.Context, dst, src int, size int64, report func(int64)) error {
	if report == nil {
		report = func(int64) {}
	}
	if size == 0 {
		return nil
	}
	if size > smallFile && c.clone(dst, src) {
		report(size)
		return nil
	}
	if size <= smallFile {
		// Holes of a few blocks are not worth two seeks per file: they are
		// written as the zeros that they read as.
		return c.segment(ctx, dst, src, 0, size, report)
	}
	var pos, done int64
	for pos < size {
		start, end, err := nextData(src, pos, size)
		if err != nil {
			return err
		}
		report(start - pos)
		if start < end {
			if err := c.segment(ctx, dst, src, start, end, report); err != nil {
				return err
			}
			done = end
		}
		pos = end
	}
	if done < size {
		return unix.Ftruncate(dst, size)
	}
	return nil
}

// clone shares the extents of src with dst, if both are on one file system
// that can.
func (c *Copier) clone(dst, src int) bool {
	if c.noClone.Load() {
		return false
	}
	err := unix.IoctlFileClone(dst, src)
	if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENOSYS) {
		c.noClone.Store(true)
	}
	return err == nil
}

// nextData finds the next run of data at or after pos. Without one, start and
// end are size. A file system that knows no holes has one run.
func nextData(fd int, pos, size int64) (start, end int64, err error) {
	start, err = unix.Seek(fd, pos, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return size, size, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return pos, size, nil
	case err != nil:
		return 0, 0, err
	}
	end, err = unix.Seek(fd, start, unix.SEEK_HOLE)
	if err != nil && !errors.Is(err, unix.ENXIO) {
		return 0, 0, err
	}
	if err != nil {
		end = size // cut off meanwhile: the read will find out
	}
	return min(start, size), min(end, size), nil
}

func (c *Copier) segment(ctx context.Context, dst, src int, pos, end int64, report func(int64)) error {
	for pos < end && end-pos > smallFile && !c.noRange.Load() {
		if err := ctx.Err(); err != nil {
			return err
		}
		in, out := pos, pos
		n, err := unix.CopyFileRange(src, &in, dst, &out, int(min(end-pos, copyChunk)), 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			// Whatever it minds, plain reads and writes say what is really wrong.
			if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
				c.noRange.Store(true)
			}
			break
		}
		if n == 0 {
			break
		}
		pos += int64(n)
		report(int64(n))
	}
	if pos == end {
		return nil
	}
	buf := make([]byte, min(end-pos, bufferSize))
	for pos < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := Pread(src, buf[:min(end-pos, int64(len(buf)))], pos)
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		if err := pwriteAll(dst, buf[:n], pos); err != nil {
			return err
		}
		pos += int64(n)
		report(int64(n))
	}
	return nil
}

// Pread reads at pos and goes on after a signal; 0 is the end of the file.
func Pread(fd int, buf []byte, pos int64) (int, error) {
	for {
		n, err := unix.Pread(fd, buf, pos)
		if err == unix.EINTR {
			continue
		}
		return max(n, 0), err
	}
}

func pwriteAll(fd int, buf []byte, pos int64) error {
	for len(buf) > 0 {
		n, err := unix.Pwrite(fd, buf, pos)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		buf, pos = buf[n:], pos+int64(n)
	}
	return nil
}

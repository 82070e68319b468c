package layer

import (
	"archive/tar"
	"errors"
	"io"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

const (
	// behindBytes is the size of files that are written behind: nearly all that
	// there are in an image. Larger ones are worth a system call of their own.
	behindBytes = 64 << 10
	// behindFiles are how many may be open and unwritten.
	behindFiles = 32
	// behindWriters bounds the goroutines that write them: making a file takes
	// longer than writing it, and only one makes them.
	behindWriters = 2
)

// behind writes files and gives them their attributes while the applier makes
// the next ones. All that changes or looks at names stays with the applier, in
// the order of the archive; here is only what is done to an open file.
type behind struct {
	a    *applier
	work chan *unfinished
	free chan *unfinished
	wg   sync.WaitGroup
	// failed is the first error.
	failed atomic.Pointer[error]
}

// unfinished is a new regular file that is open and lacks content or
// attributes.
type unfinished struct {
	entry     string // as the archive names it
	dir, base string // where it is
	fd        int
	made      uint32 // the mode that it was made with
	want      *attributes
	owned     bool // it has to be given away
	inherits  bool // it may have attributes of its directory
	data      []byte
}

// startBehind begins to write behind; nil where there is no processor for it.
func (a *applier) startBehind() *behind {
	n := min(runtime.GOMAXPROCS(0)-1, behindWriters)
	if n < 1 {
		return nil
	}
	b := &behind{a: a, work: make(chan *unfinished, behindFiles), free: make(chan *unfinished, behindFiles)}
	for range behindFiles {
		b.free <- &unfinished{}
	}
	for range n {
		b.wg.Go(b.write)
	}
	return b
}

// takes says whether a file can be written behind.
func (b *behind) takes(at *dir, h *tar.Header, want *attributes) bool {
	return b != nil && h.Size <= behindBytes && len(want.xattrs) == 0 && !at.inherits && !isSparse(h)
}

// add takes an open file over, and the content that comes next.
func (b *behind) add(at *dir, base string, fd int, made uint32, h *tar.Header, want *attributes) error {
	u := <-b.free
	if cap(u.data) < int(h.Size) {
		u.data = make([]byte, behindBytes)
	}
	u.data = u.data[:h.Size]
	if _, err := io.ReadFull(b.a.tar, u.data); err != nil {
		fsat.Close(fd)
		b.free <- u
		return unexpected(b.a.stream, err)
	}
	*u = unfinished{
		entry: h.Name, dir: at.path, base: base, fd: fd, made: made,
		want: want, owned: b.a.newOwner(at, want), data: u.data,
	}
	b.work <- u // has room for all that there are
	return nil
}

func (b *behind) write() {
	for u := range b.work {
		if b.failed.Load() == nil {
			err := writeAll(u.fd, u.data, 0)
			if err != nil {
				err = failed("write", join(u.dir, u.base), err)
			} else {
				err = b.a.finish(u)
			}
			if err != nil {
				err = entryError(u.entry, err)
				b.failed.CompareAndSwap(nil, &err)
			}
		}
		if err := unix.Close(u.fd); err != nil {
			err = entryError(u.entry, failed("write", join(u.dir, u.base), err))
			b.failed.CompareAndSwap(nil, &err)
		}
		b.free <- u
	}
}

// err is the first error of a file that was taken over.
func (b *behind) err() error {
	if b == nil {
		return nil
	}
	if err := b.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// end waits until all files are written and closed. It may be called again.
func (b *behind) end() error {
	if b == nil {
		return nil
	}
	if b.work != nil {
		close(b.work)
		b.wg.Wait()
		b.work = nil
	}
	return b.err()
}

// unexpected is an error of a read of an entry's content, which may not end
// early.
func unexpected(s *stream, err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return badArchive(s, err)
}

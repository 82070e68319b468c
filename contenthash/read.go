package contenthash

import (
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// racy says that a change after the moment at, in nanoseconds, could leave the
// stat data as they are.
func racy(s Stat, at int64) bool {
	return s.Ctime > at-int64(fsat.Window(s.Ctime%int64(time.Second)))
}

// facts are what was read of one entry.
type facts struct {
	gone   bool
	kind   kind
	stat   Stat
	racy   bool
	link   *string
	digest *sum
}

func factsOf(st *unix.Stat_t, at int64) facts {
	f := facts{kind: kindOf(st.Mode), stat: statOf(st)}
	f.racy = racy(f.stat, at)
	return f
}

// reader reads entries; every worker has its own.
type reader struct {
	files
	// done is closed when nobody waits for the result any more.
	done <-chan struct{}
	now  func() int64
	hash hash.Hash
	buf  []byte // content, and names of directories
	head []byte // headers
	// ownerless leaves owners out of headers.
	ownerless bool
	attrs     []byte // lists of attributes
	stats     Stats
}

// bufSize holds most files at once; larger ones gain nothing from more.
const bufSize = 128 << 10

func newReader() *reader {
	return &reader{
		hash:  sha256.New(),
		buf:   make([]byte, bufSize),
		head:  make([]byte, 0, 512),
		attrs: make([]byte, 1<<10),
	}
}

// attempts is how often something that changed meanwhile is read again. A file
// that is being appended to all the time is then an error, and not a reason to
// read for ever.
const attempts = 6

// entry reads name in the directory at, of which hint is the likely kind: its
// digest if that is wanted, else its kind, stat data and target.
func (r *reader) entry(at int, name string, hint kind, digest bool) (facts, error) {
	for range attempts {
		var f facts
		var ok bool
		var err error
		if hint == kindFile && digest {
			f, ok, err = r.file(at, name)
		} else {
			f, ok, err = r.look(at, name, digest)
		}
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
			return facts{gone: true}, nil
		case err != nil:
			return facts{}, err
		case ok:
			return f, nil
		}
		hint = f.kind
	}
	return facts{}, ErrChanged
}

// look reads an entry that is not opened. ok is false if it has to be tried
// again, with the kind that it has now.
func (r *reader) look(at int, name string, digest bool) (f facts, ok bool, err error) {
	started := r.now()
	var st, after unix.Stat_t
	r.stats.Stats++
	if err := r.lstat(at, name, &st); err != nil {
		return f, false, err
	}
	f = factsOf(&st, started)
	if f.kind == kindFile && digest {
		return f, false, nil
	}
	if f.kind != kindSymlink && !digest {
		return f, true, nil
	}
	head := r.header(&st)
	if f.kind == kindSymlink {
		if head.link, err = r.readlink(at, name); err != nil {
			return f, false, retryIf(err, unix.EINVAL) // no link any more
		}
		f.link = &head.link
	}
	if digest {
		if head.xattrs, err = r.xattrs(at, name, r.attrs); err != nil {
			return f, false, err
		}
		r.head = head.appendTo(r.head[:0])
		s := sha256.Sum256(r.head)
		f.digest = &s
	}
	if err := r.lstat(at, name, &after); err != nil {
		return f, false, err
	}
	return f, same(&st, &after), nil
}

// header begins the header of a file with its stat data.
func (r *reader) header(st *unix.Stat_t) rawHeader {
	var head rawHeader
	head.of(st)
	if r.ownerless {
		head.uid, head.gid = 0, 0
	}
	return head
}

func retryIf(err, again error) error {
	if errors.Is(err, again) {
		return nil
	}
	return err
}

// same says that nothing of a file changed between two looks.
func same(a, b *unix.Stat_t) bool {
	return statOf(a) == statOf(b) && a.Dev == b.Dev && a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid
}

// file reads what is probably a regular file. It is opened so that nothing
// else blocks or has an effect: a link is not followed, a FIFO does not wait.
func (r *reader) file(at int, name string) (f facts, ok bool, err error) {
	fd, err := r.openAt(at, name, fsat.ForReading)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return f, false, nil // a link or a socket: hint is now unknown
	}
	if err != nil {
		return f, false, err
	}
	defer fsat.Close(fd)
	started := r.now()
	var st, after unix.Stat_t
	if err := r.fstat(fd, &st); err != nil {
		return f, false, err
	}
	f = factsOf(&st, started)
	if f.kind != kindFile {
		return f, false, nil
	}
	head := r.header(&st)
	if head.xattrs, err = r.xattrs(fd, "", r.attrs); err != nil {
		return f, false, err
	}
	r.head = head.appendTo(r.head[:0])
	r.hash.Reset()
	r.hash.Write(r.head)
	n, err := r.content(fd, st.Size)
	if err != nil {
		return f, false, err
	}
	if err := r.fstat(fd, &after); err != nil {
		return f, false, err
	}
	var s sum
	r.hash.Sum(s[:0])
	f.digest = &s
	return f, n == st.Size && same(&st, &after), nil
}

// content hashes what is in a file, up to one byte more than it should have.
func (r *reader) content(fd int, size int64) (int64, error) {
	if size == 0 {
		return 0, nil
	}
	r.stats.FilesRead++
	var total int64
	for total <= size {
		select {
		case <-r.done:
			return total, context.Canceled
		default:
		}
		n, err := r.pread(fd, r.buf, total)
		if err != nil {
			return total, err
		}
		if n == 0 {
			break
		}
		r.hash.Write(r.buf[:n])
		total += int64(n)
		if n < len(r.buf) && total == size {
			break // a short read at the size is the end; the look after tells
		}
	}
	r.stats.BytesRead += uint64(total)
	return total, nil
}

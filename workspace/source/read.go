package source

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/internal/fsat"
)

// readTries is how often a file that changes while it is read is read before
// that is an error: an editor saves once, a running log never ends.
const readTries = 4

// read reads the content and attributes of the files that need it.
func (s *scanner) read(ctx context.Context, t *Tree, tell Progress) error {
	m := &meter{tell: tell}
	for _, i := range s.toRead {
		m.total += t.nodes[i].size
	}
	vanished := make([]bool, len(t.nodes))
	err := runTasks(ctx, s.toRead, func() (func(context.Context, int32, func(int32)) error, error) {
		r := newReader()
		return func(ctx context.Context, i int32, _ func(int32)) error {
			n, path := &t.nodes[i], t.path(i)
			err := s.readFile(ctx, r, n, path, m)
			if errors.Is(err, unix.ENOENT) {
				vanished[i] = true
				return nil
			}
			return err
		}, nil
	})
	if err != nil {
		return err
	}
	lost := false
	for i := range t.nodes {
		if l := t.nodes[i].link; l != int32(i) && t.nodes[i].typ == File {
			// Another name of a file that vanished under its first one may
			// still be there: whoever asks has to look again.
			n, lead := &t.nodes[i], &t.nodes[l]
			if vanished[l] || n.dev != lead.dev || n.ino != lead.ino {
				return &ChangedError{Path: t.path(int32(i))}
			}
			n.sum, n.size, n.mode, n.xattrs = lead.sum, lead.size, lead.mode, lead.xattrs
			n.mtime, n.ctime, n.uid, n.gid = lead.mtime, lead.ctime, lead.uid, lead.gid
		}
		lost = lost || vanished[i]
	}
	if lost {
		t.drop(vanished)
	}
	return nil
}

// drop removes entries that are no directory.
func (t *Tree) drop(gone []bool) {
	at := make([]int32, len(t.nodes))
	kept := t.nodes[:0]
	for i, n := range t.nodes {
		if gone[i] {
			continue
		}
		at[i] = int32(len(kept))
		if n.parent >= 0 {
			n.parent = at[n.parent]
		}
		n.link = at[n.link]
		kept = append(kept, n)
	}
	t.nodes = kept
}

// readFile reads one file and puts what it is at that moment into n.
func (s *scanner) readFile(ctx context.Context, r *reader, n *node, path string, m *meter) error {
	fd, err := s.root.Open(path, fsat.ForReading, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENXIO) {
		return &ChangedError{Path: path} // became a link, a FIFO, a socket
	}
	if err != nil {
		return fsat.Error("open source file", path, err)
	}
	defer fsat.Close(fd)
	for range readTries {
		var before, after unix.Stat_t
		if err := unix.Fstat(fd, &before); err != nil {
			return fsat.Error("stat source file", path, err)
		}
		var now node
		if !now.fill(n.name, &before) || now.typ != File {
			return &ChangedError{Path: path}
		}
		if now.xattrs, err = fsat.Xattrs(fd, false, s.asRoot); err != nil {
			return fsat.Error("read extended attributes of source", path, err)
		}
		size, sum, err := r.sum(ctx, fd, &now, m.add)
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fsat.Error("read source file", path, err)
		}
		if err := unix.Fstat(fd, &after); err != nil {
			return fsat.Error("stat source file", path, err)
		}
		if sameFile(&before, &after) && size == before.Size {
			now.parent, now.link, now.sum = n.parent, n.link, sum
			*n = now
			return nil
		}
	}
	return &ChangedError{Path: path}
}

// sameFile compares all of the stat data that a change of content, attributes
// or mode shows in.
func sameFile(a, b *unix.Stat_t) bool {
	return a.Dev == b.Dev && a.Ino == b.Ino && a.Size == b.Size && a.Mode == b.Mode &&
		a.Mtim == b.Mtim && a.Ctim == b.Ctim && a.Uid == b.Uid && a.Gid == b.Gid
}

// reader hashes files, one at a time.
type reader struct {
	hash *contenthash.Hash
	buf  []byte
}

// readSize is the unit of reading: larger ones are no faster, and between two
// of them a cancelled context is noticed.
const readSize = 128 << 10

func newReader() *reader {
	return &reader{hash: contenthash.NewHash(contenthash.Header{}), buf: make([]byte, readSize)}
}

// sum is the digest that n has if fd holds its content. It reads fd from its
// start to its end, or until there is more than n's size: a file that grows as
// fast as it is read has no end.
func (r *reader) sum(ctx context.Context, fd int, n *node, report func(int64)) (size int64, sum [32]byte, err error) {
	r.hash.Reset(n.header())
	for {
		if size > n.size {
			return size, sum, nil
		}
		if err := ctx.Err(); err != nil {
			return 0, sum, err
		}
		got, err := fsat.Pread(fd, r.buf, size)
		if err != nil {
			return 0, sum, err
		}
		if got == 0 {
			return size, r.hash.Sum(), nil
		}
		_, _ = r.hash.Write(r.buf[:got])
		size += int64(got)
		report(int64(got))
	}
}

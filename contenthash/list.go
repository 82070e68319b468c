package contenthash

import (
	"crypto/sha256"
	"hash"

	"github.com/opencontainers/go-digest"
)

// List computes the digest of a list of entries, as Checksum gives it to a
// question with patterns: for those who know the entries without a Tree. Use by
// one goroutine at a time.
type List struct {
	h   hash.Hash
	buf []byte
}

// listBuffer is how much is gathered before it is hashed.
const listBuffer = 16 << 10

// NewList begins a list.
func NewList() *List {
	return &List{h: sha256.New(), buf: make([]byte, 0, listBuffer+1<<10)}
}

// Add appends an entry with the digest that it has by itself, a directory that
// of its header (see Hash). path has a slash before each name, so the entries of
// the directory that was asked for are "/name"; the empty one is that directory.
// Entries come in the order of a walk: a directory before what is in it, names
// sorted by their bytes.
func (l *List) Add(path string, digest [sha256.Size]byte) {
	from := len(l.buf)
	l.buf = append(l.buf, path...)
	for i := from; i < len(l.buf); i++ {
		if l.buf[i] == '/' {
			l.buf[i] = 0
		}
	}
	if path == "" {
		l.buf = append(l.buf, 0)
	}
	if l.buf = appendDigest(l.buf, &digest); len(l.buf) >= listBuffer {
		l.flush()
	}
}

func (l *List) flush() {
	l.h.Write(l.buf)
	l.buf = l.buf[:0]
}

// Sum is the digest of the list so far, as bytes.
func (l *List) Sum() (s [sha256.Size]byte) {
	l.flush()
	l.h.Sum(s[:0])
	return s
}

// Digest is Sum in the form in which digests are given out.
func (l *List) Digest() digest.Digest { return digestOf(l.Sum()) }

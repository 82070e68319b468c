package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
)

// Foreign reads somebody else's bbolt file with the reader of our own: no
// damage panics, nothing is mapped, written or locked. It is what an import
// reads legacy state with. It belongs to one goroutine at a time.
type Foreign struct {
	f    *os.File
	meta boltMeta
	size int64
	// stale says that a meta page cannot be read.
	stale bool
}

// OpenForeign looks at the meta pages of an open file, which stays the
// caller's. What it reads is the newest state that a meta page tells of.
//
// Errors: ErrForeign if it is no bbolt file; ErrDamaged if it is empty, no
// meta page can be read, or it is shorter than its meta page says.
func OpenForeign(f *os.File) (*Foreign, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("not a regular file: %w", ErrForeign)
	}
	if info.Size() == 0 {
		return nil, fmt.Errorf("file is empty: %w", ErrDamaged)
	}
	m, err := newestMeta(f)
	if err != nil {
		if zero, zerr := startsWithZeros(f); zerr == nil && zero {
			err = fmt.Errorf("no meta page, it begins with zeros: %w", ErrDamaged)
		}
		return nil, err
	}
	if need := int64(m.used) * int64(m.pageSize); m.used > 1<<40 || info.Size() < need {
		return nil, fmt.Errorf("file is cut off: it has %d bytes of %d: %w", info.Size(), need, ErrDamaged)
	}
	foreign := &Foreign{f: f, meta: m, size: info.Size()}
	for page := range int64(2) {
		if _, err := readMeta(f, page*int64(m.pageSize)); err != nil {
			foreign.stale = true
		}
	}
	return foreign, nil
}

// startsWithZeros says whether the place of both meta pages was wiped.
func startsWithZeros(f *os.File) (bool, error) {
	b := make([]byte, 8<<10)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	return len(bytes.Trim(b[:n], "\x00")) == 0, nil
}

// Size is the length of the file in bytes.
func (f *Foreign) Size() int64 { return f.size }

// Transaction is the number of the last transaction that changed the file.
func (f *Foreign) Transaction() uint64 { return f.meta.txid }

// Stale says that one of the two meta pages cannot be read: if it was the
// newer one, what is read is the state before the last transaction.
func (f *Foreign) Stale() bool { return f.stale }

// inMemory is how large a file may be, in bytes, to be read as a whole, which
// spares two system calls for each page. A daemon with 50,000 records has files
// of that size.
const inMemory = 128 << 20

// source reads the file, from memory if it is small.
func (f *Foreign) source() source {
	if f.size > inMemory {
		return fileSource{f.f}
	}
	b := make([]byte, f.size)
	if _, err := f.f.ReadAt(b, 0); err != nil {
		return fileSource{f.f} // page by page one learns which cannot be read
	}
	return mapSource(b)
}

// Root is the bucket that holds the buckets of the top level.
func (f *Foreign) Root() ForeignBucket {
	return ForeignBucket{
		t:    &tree{src: f.source(), pageSize: uint64(f.meta.pageSize), used: f.meta.used},
		root: bucketRoot{page: f.meta.root},
	}
}

// ForeignBucket is a bucket of a Foreign, at any depth.
type ForeignBucket struct {
	t    *tree
	root bucketRoot
}

// ForeignRow is a key with its value, or with the bucket that it names. The
// bytes are the caller's own, until it is done with them.
type ForeignRow struct {
	Key    []byte
	Value  []byte
	Bucket *ForeignBucket
}

// Rows yields the rows in the order of their keys. A part that cannot be read
// comes as an error, which is ErrDamaged, together with the key of the row if
// it is a bucket's own bytes that are damaged, else with no key; the rest
// follows. Any other error is the last.
func (b ForeignBucket) Rows() iter.Seq2[ForeignRow, error] {
	return func(yield func(ForeignRow, error) bool) {
		stopped := false
		t := *b.t
		t.stack, t.passOver = nil, true
		t.passed = func(err error) {
			stopped = stopped || !yield(ForeignRow{}, err)
		}
		c := treeCursor{t: &t, root: b.root}
		for ok, err := c.seek(nil); ; ok, err = c.next() {
			if stopped || err == nil && !ok {
				return
			}
			if err != nil {
				yield(ForeignRow{}, err)
				return
			}
			row, err := b.row(&c)
			if !yield(row, err) {
				return
			}
		}
	}
}

func (b ForeignBucket) row(c *treeCursor) (ForeignRow, error) {
	row := ForeignRow{Key: c.key()}
	v, nested := c.value()
	if !nested {
		row.Value = v
		return row, nil
	}
	below, err := b.below(c.top().p.id, v)
	if err == nil {
		row.Bucket = &below
	}
	return row, err
}

func (b ForeignBucket) below(id uint64, v []byte) (ForeignBucket, error) {
	root, sequence, inline, err := nestedBucket(id, v)
	return ForeignBucket{t: b.t, root: bucketRoot{page: root, inline: inline, sequence: sequence}}, err
}

// Get finds a row; ok is false if there is none, or none that can be named: a
// damaged page on the way is an error.
func (b ForeignBucket) Get(key string) (row ForeignRow, ok bool, err error) {
	c := treeCursor{t: b.t, root: b.root}
	if ok, err = c.seek([]byte(key)); err != nil || !ok || string(c.key()) != key {
		return ForeignRow{}, false, err
	}
	row, err = b.row(&c)
	return row, err == nil, err
}

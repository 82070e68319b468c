package metadata

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"runtime/debug"
	"sort"

	"golang.org/x/sys/unix"
)

// Foreign reads somebody else's bbolt file with the reader of our own: no
// damage panics, nothing is written or locked. It is what an import reads
// legacy state with. It belongs to one goroutine at a time.
type Foreign struct {
	f    *os.File
	meta boltMeta
	size int64
	// stale says that a meta page cannot be read.
	stale bool
	// mapped is the file in memory, once something was read.
	mapped []byte
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

// Read calls read with the bucket that holds the buckets of the top level. The
// file is mapped from then on, until Close: a page that cannot be read, because
// the disk fails or somebody has cut the file, ends read with ErrDamaged.
func (f *Foreign) Read(read func(root ForeignBucket) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = recovered("read", p)
		}
	}()
	return read(ForeignBucket{
		t:    &tree{src: f.source(), pageSize: uint64(f.meta.pageSize), used: f.meta.used},
		root: bucketRoot{page: f.meta.root},
	})
}

// source maps the file, or reads it page by page where that cannot be.
func (f *Foreign) source() source {
	if f.mapped == nil {
		b, err := unix.Mmap(int(f.f.Fd()), 0, int(f.size), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return fileSource{f.f}
		}
		f.mapped = b
	}
	return mapSource(f.mapped)
}

// Close ends the use of all that was read. The file stays open.
func (f *Foreign) Close() error {
	if f.mapped == nil {
		return nil
	}
	b := f.mapped
	f.mapped = nil
	return unix.Munmap(b)
}

// ForeignBucket is a bucket of a Foreign, at any depth.
type ForeignBucket struct {
	t    *tree
	root bucketRoot
}

// ForeignRow is a key with its value, or with the bucket that it names. The
// bytes are those of the file: they are not to be changed, and hold until the
// function that Read called returns.
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
		p, leaf, err := b.leaf()
		if err != nil {
			yield(ForeignRow{}, err)
			return
		}
		if leaf {
			for i := range p.count {
				if !yield(b.row(&p, i)) {
					return
				}
			}
			return
		}
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
			if !yield(b.row(&c.top().p, c.top().i)) {
				return
			}
		}
	}
}

// leaf is the only page of a bucket, as most have, in the value of their key or
// by itself.
func (b ForeignBucket) leaf() (p page, ok bool, err error) {
	if b.root.inline != nil {
		return *b.root.inline, true, nil
	}
	p, err = b.t.page(b.root.page, nil, nil)
	return p, err == nil && !p.isBranch(), err
}

func (b ForeignBucket) row(p *page, i int) (ForeignRow, error) {
	row := ForeignRow{Key: p.key(i)}
	v, nested := p.value(i)
	if !nested {
		row.Value = v
		return row, nil
	}
	below, err := b.below(p.id, v)
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
	p, leaf, err := b.leaf()
	if err != nil {
		return ForeignRow{}, false, err
	}
	if leaf {
		i, found := sort.Find(p.count, func(i int) int { return bytes.Compare([]byte(key), p.key(i)) })
		if !found {
			return ForeignRow{}, false, nil
		}
		row, err = b.row(&p, i)
		return row, err == nil, err
	}
	c := treeCursor{t: b.t, root: b.root}
	if ok, err = c.seek([]byte(key)); err != nil || !ok || string(c.key()) != key {
		return ForeignRow{}, false, err
	}
	row, err = b.row(&c.top().p, c.top().i)
	return row, err == nil, err
}

package metadata

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
)

// bbolt's pages, as far as a reader has to know them: a header of page id,
// flags, count of elements, and number of overflow pages behind it (8, 2, 2,
// 4 bytes), then elements of 16 bytes. A branch element is the position of
// its key, counted from the element, the length of the key and the page below
// (4, 4, 8 bytes). A leaf element is flags, position, length of key and of
// value (4 bytes each); where the flag says so, the value is a bucket: root
// page and sequence (8 bytes each), and, if the root is 0, the bucket's only
// page. A page of free pages has their ids (8 bytes each) behind the header;
// where the count is 65535, the first of them is the count.
//
// bbolt believes its pages. One that leads back to itself makes it recurse
// until the process ends, which no recover can stop. So every page is looked
// at here before bbolt, or anybody, goes by it.
const (
	pageBranch   = 1
	pageLeaf     = 2
	pageMeta     = 4
	pageFreelist = 16
	leafBucket   = 1
	elementSize  = 16
	manyFree     = 0xffff
)

// badPage is a page that cannot be what it should be.
func badPage(id uint64, format string, args ...any) *DamagedError {
	return &DamagedError{Bucket: "database page", Key: fmt.Sprint(id), Reason: fmt.Sprintf(format, args...)}
}

// source gives the bytes of a file: of its memory map, or read.
type source interface {
	bytes(at, n uint64) ([]byte, error)
}

// mapSource is a file in memory. What it gives points into the map.
type mapSource []byte

func (m mapSource) bytes(at, n uint64) ([]byte, error) {
	if at > uint64(len(m)) || n > uint64(len(m))-at {
		return nil, io.ErrUnexpectedEOF
	}
	return m[at : at+n : at+n], nil
}

// fileSource reads.
type fileSource struct{ r io.ReaderAt }

func (f fileSource) bytes(at, n uint64) ([]byte, error) {
	b := make([]byte, n)
	_, err := f.r.ReadAt(b, int64(at))
	return b, err
}

// page is a branch or a leaf whose elements all lie inside of it.
type page struct {
	id    uint64
	flags uint16
	count int
	more  uint64 // pages behind it that belong to it
	b     []byte
}

func (p *page) isBranch() bool { return p.flags == pageBranch }

func (p *page) element(i int) []byte {
	at := boltHeader + i*elementSize
	return p.b[at : at+elementSize]
}

// bounds says where the key of an element is, and how long it and its value
// are.
func (p *page) bounds(i int) (at, klen, vlen uint64) {
	e, el := binary.NativeEndian, p.element(i)
	at = uint64(boltHeader + i*elementSize)
	if p.isBranch() {
		return at + uint64(e.Uint32(el)), uint64(e.Uint32(el[4:])), 0
	}
	return at + uint64(e.Uint32(el[4:])), uint64(e.Uint32(el[8:])), uint64(e.Uint32(el[12:]))
}

func (p *page) key(i int) []byte {
	at, n, _ := p.bounds(i)
	return p.b[at : at+n : at+n]
}

// value is that of a leaf; nested says that it is a bucket.
func (p *page) value(i int) (v []byte, nested bool) {
	at, k, n := p.bounds(i)
	return p.b[at+k : at+k+n : at+k+n], binary.NativeEndian.Uint32(p.element(i))&leafBucket != 0
}

// below is the page that an element of a branch leads to.
func (p *page) below(i int) uint64 { return binary.NativeEndian.Uint64(p.element(i)[8:]) }

// check looks at the elements: that they lie in the page, and that keys grow.
func (p *page) check() error {
	end := uint64(boltHeader + p.count*elementSize)
	if end > uint64(len(p.b)) || p.count == 0 && (p.isBranch() || p.hasTable()) {
		return badPage(p.id, "it has %d elements", p.count)
	}
	var last []byte
	for i := range p.count {
		at, klen, vlen := p.bounds(i)
		// bbolt writes them one right behind the other, and the first behind
		// the table: so a wrong number of elements shows, too.
		if at != end || at+klen+vlen > uint64(len(p.b)) {
			return badPage(p.id, "element %d is from %d to %d", i, at, at+klen+vlen)
		}
		end = at + klen + vlen
		k := p.b[at : at+klen]
		if i > 0 && bytes.Compare(k, last) <= 0 {
			return badPage(p.id, "element %d is out of order", i)
		}
		last = k
	}
	return nil
}

// within says whether the keys are in the range that the page above says. from
// is in the range, to is not, nil is no bound.
func (p *page) within(from, to []byte) error {
	if p.count > 0 && from != nil && bytes.Compare(p.key(0), from) < 0 ||
		p.count > 0 && to != nil && bytes.Compare(p.key(p.count-1), to) >= 0 {
		return badPage(p.id, "its keys are not those that the page above it says")
	}
	return nil
}

// hasTable says whether elements follow the header, whatever that says: bbolt
// fills what it does not use with zeros, and no element is all zeros.
func (p *page) hasTable() bool {
	table := p.b[boltHeader:min(boltHeader+elementSize, len(p.b))]
	return len(bytes.Trim(table, "\x00")) > 0
}

// parse reads the header of a page that lies in b as a whole.
func parse(id uint64, b []byte) page {
	e := binary.NativeEndian
	return page{id: id, flags: e.Uint16(b[8:]), count: int(e.Uint16(b[10:])), b: b}
}

// pagesBehind is how many pages a header says belong to its page.
func pagesBehind(header []byte) uint64 { return uint64(binary.NativeEndian.Uint32(header[12:])) }

// nestedBucket undoes the value of a bucket. A small bucket has its only page
// in there.
func nestedBucket(id uint64, v []byte) (root, sequence uint64, inline *page, err error) {
	if len(v) < 16 {
		return 0, 0, nil, badPage(id, "a bucket has %d bytes", len(v))
	}
	root, sequence = binary.NativeEndian.Uint64(v), binary.NativeEndian.Uint64(v[8:])
	if root != 0 {
		return root, sequence, nil, nil
	}
	if len(v) < 16+boltHeader {
		return 0, 0, nil, badPage(id, "a bucket has %d bytes", len(v))
	}
	p := parse(id, v[16:])
	if p.flags != pageLeaf {
		return 0, 0, nil, badPage(id, "a bucket in it has the flags %#x", p.flags)
	}
	return 0, sequence, &p, p.check()
}

// freePages reads the list of free pages: whose ids grow, lie in the file,
// and are not those of the list itself.
func freePages(src source, m boltMeta) ([]uint64, error) {
	b, err := freelistBytes(src, m)
	if err != nil {
		return nil, err
	}
	e := binary.NativeEndian
	count, at := uint64(e.Uint16(b[10:])), uint64(boltHeader)
	if count == manyFree {
		if len(b) < boltHeader+8 {
			return nil, badPage(m.freelist, "it ends early")
		}
		count, at = e.Uint64(b[at:]), at+8
	}
	if count > (uint64(len(b))-at)/8 {
		return nil, badPage(m.freelist, "it lists %d free pages", count)
	}
	ids := make([]uint64, count)
	own := uint64(len(b)) / uint64(m.pageSize)
	for i := range ids {
		id := e.Uint64(b[at+uint64(i)*8:])
		if id < 2 || id >= m.used || (i > 0 && id <= ids[i-1]) || (id >= m.freelist && id < m.freelist+own) {
			return nil, badPage(m.freelist, "free page %d is out of order", id)
		}
		ids[i] = id
	}
	return ids, nil
}

// freelistBytes are the pages of the list of free pages.
func freelistBytes(src source, m boltMeta) ([]byte, error) {
	size := uint64(m.pageSize)
	b, err := src.bytes(m.freelist*size, boltHeader)
	if err != nil {
		return nil, badPage(m.freelist, "%v", err)
	}
	e := binary.NativeEndian
	more := pagesBehind(b)
	if have := e.Uint64(b); have != m.freelist || e.Uint16(b[8:]) != pageFreelist || m.freelist+more >= m.used {
		return nil, badPage(m.freelist, "it is no list of free pages")
	}
	if b, err = src.bytes(m.freelist*size, (more+1)*size); err != nil {
		return nil, badPage(m.freelist, "%v", err)
	}
	return b, nil
}

// freeSet is freePages as a set, nil if they are not stored or not known.
func freeSet(f *os.File, m boltMeta) *map[uint64]struct{} {
	if m.freelist == boltNoFreelist {
		return nil
	}
	ids, err := freePages(fileSource{f}, m)
	if err != nil {
		return nil
	}
	set := make(map[uint64]struct{}, len(ids))
	for _, id := range ids {
		set[id] = struct{}{}
	}
	return &set
}

package metadata

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// bbolt's pages, as far as a walk has to know them: a header of page id,
// flags, count of elements, and number of overflow pages behind it (8, 2, 2,
// 4 bytes), then elements of 16 bytes. A branch element is the position of
// its key, counted from the element, the length of the key and the page below
// (4, 4, 8 bytes). A leaf element is flags, position, length of key and of
// value (4 bytes each); where the flag says so, the value is a bucket: root
// page and sequence (8 bytes each), and, if the root is 0, the bucket's only
// page.
const (
	pageBranch  = 1
	pageLeaf    = 2
	leafBucket  = 1
	elementSize = 16
)

// walkPages looks at the structure of every page that can be reached, without
// believing any of it: ids, bounds, the order of keys, and that no page is
// reached twice. It reads the whole file.
func walkPages(r io.ReaderAt, m boltMeta) error {
	w := &pageWalk{r: r, m: m, seen: make([]bool, m.used)}
	w.push(subtree{page: m.root})
	for len(w.todo) > 0 && w.err == nil {
		t := w.todo[len(w.todo)-1]
		w.todo = w.todo[:len(w.todo)-1]
		w.page(t)
	}
	return w.err
}

// subtree is a page and the range of the keys in and below it: from is in the
// range, to is not, nil is no bound.
type subtree struct {
	page     uint64
	from, to []byte
}

type pageWalk struct {
	r    io.ReaderAt
	m    boltMeta
	seen []bool
	todo []subtree
	err  error
}

func (w *pageWalk) fail(id uint64, format string, args ...any) {
	if w.err == nil {
		w.err = &DamagedError{Bucket: "database page", Key: fmt.Sprint(id), Reason: fmt.Sprintf(format, args...)}
	}
}

// push marks a page, or reports that it cannot be one.
func (w *pageWalk) push(t subtree) {
	switch {
	case t.page < 2 || t.page >= w.m.used:
		w.fail(t.page, "it lies outside of the file")
	case w.seen[t.page]:
		w.fail(t.page, "it is reached twice")
	default:
		w.seen[t.page] = true
		w.todo = append(w.todo, t)
	}
}

func (w *pageWalk) page(t subtree) {
	header := make([]byte, boltHeader)
	at := int64(t.page) * int64(w.m.pageSize)
	if _, err := w.r.ReadAt(header, at); err != nil {
		w.fail(t.page, "%v", err)
		return
	}
	more := uint64(binary.NativeEndian.Uint32(header[12:]))
	if t.page+more >= w.m.used {
		w.fail(t.page, "it has %d pages behind it", more)
		return
	}
	for o := t.page + 1; o <= t.page+more; o++ {
		if w.seen[o] {
			w.fail(o, "it is reached twice")
			return
		}
		w.seen[o] = true
	}
	if have := binary.NativeEndian.Uint64(header); have != t.page {
		w.fail(t.page, "it says that it is page %d", have)
		return
	}
	b := make([]byte, (more+1)*uint64(w.m.pageSize))
	if _, err := w.r.ReadAt(b, at); err != nil {
		w.fail(t.page, "%v", err)
		return
	}
	w.elements(t, b, false)
}

// elements looks at the elements of a page, or of one inside a value.
func (w *pageWalk) elements(t subtree, b []byte, inline bool) {
	e := binary.NativeEndian
	flags, count := e.Uint16(b[8:]), int(e.Uint16(b[10:]))
	if (flags != pageBranch || inline) && flags != pageLeaf {
		w.fail(t.page, "it has the flags %#x", flags)
		return
	}
	if boltHeader+count*elementSize > len(b) || (flags == pageBranch && count == 0) {
		w.fail(t.page, "it has %d elements", count)
		return
	}
	var last *subtree
	for i := range count {
		at := uint64(boltHeader + i*elementSize)
		el := b[at : at+elementSize]
		pos, klen, vlen := at, uint64(0), uint64(0)
		if flags == pageBranch {
			pos, klen = at+uint64(e.Uint32(el)), uint64(e.Uint32(el[4:]))
		} else {
			pos, klen, vlen = at+uint64(e.Uint32(el[4:])), uint64(e.Uint32(el[8:])), uint64(e.Uint32(el[12:]))
		}
		if end := pos + klen + vlen; end > uint64(len(b)) {
			w.fail(t.page, "element %d ends at %d", i, end)
			return
		}
		key := b[pos : pos+klen]
		if !w.ordered(t, last, i, key) {
			return
		}
		if last != nil {
			last.to = key
			w.pushBranch(flags, *last)
		}
		last = &subtree{from: key, to: t.to}
		if flags == pageBranch {
			last.page = e.Uint64(el[8:])
		} else if e.Uint32(el)&leafBucket != 0 {
			w.bucket(t.page, b[pos+klen:pos+klen+vlen])
		}
	}
	if last != nil {
		w.pushBranch(flags, *last)
	}
}

func (w *pageWalk) pushBranch(flags uint16, t subtree) {
	if flags == pageBranch {
		w.push(t)
	}
}

// ordered says whether a key is where it has to be.
func (w *pageWalk) ordered(t subtree, last *subtree, i int, key []byte) bool {
	switch {
	case t.from != nil && bytes.Compare(key, t.from) < 0,
		t.to != nil && bytes.Compare(key, t.to) >= 0,
		last != nil && bytes.Compare(key, last.from) <= 0:
		w.fail(t.page, "element %d is out of order", i)
		return false
	}
	return true
}

func (w *pageWalk) bucket(id uint64, v []byte) {
	if len(v) < 16 {
		w.fail(id, "a bucket has %d bytes", len(v))
		return
	}
	if root := binary.NativeEndian.Uint64(v); root != 0 {
		w.push(subtree{page: root})
		return
	}
	if len(v) < 16+boltHeader {
		w.fail(id, "a bucket has %d bytes", len(v))
		return
	}
	w.elements(subtree{page: id}, v[16:], true)
}

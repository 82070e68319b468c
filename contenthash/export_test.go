package contenthash

import "time"

// SetPageTarget makes the pages of a tree smaller than usual.
func (t *Tree) SetPageTarget(size int) { t.pageTarget = size }

// SetWorkers sets how many files are read at once.
func (t *Tree) SetWorkers(n int) { t.workers = n }

// SetClock sets the clock that tells which stat data are too young.
func (t *Tree) SetClock(now func() time.Time) { t.now = func() int64 { return now().UnixNano() } }

// FramePage makes a page of a payload.
func FramePage(name string, payload []byte) []byte {
	buf := append(beginPage(nil), payload...)
	endPage(name, buf)
	return buf
}

// FixIndex writes the checksums of pages into an index, as far as that can be
// taken apart.
func FixIndex(index []byte, pages map[string][]byte) {
	if len(index) <= pageHead {
		return
	}
	in := &input{rest: index[pageHead:]}
	if in.byte()&iSum != 0 {
		in.sum()
	}
	for count := in.uvarint(); count > 0 && in.err == nil; count-- {
		name := pageName(in.uvarint())
		if crc := in.bytes(4); crc != nil && len(pages[name]) >= pageHead {
			copy(crc, pages[name][2:pageHead])
		}
		in.uvarint()
		in.bytes(in.uvarint())
	}
	endPage(indexName, index)
}

// SetFault has fault asked before each system call on a file; its error is the
// call's. ErrShort lets a read give one byte.
func (t *Tree) SetFault(fault func(call string) error) { t.fault = fault }

// ErrShort is for SetFault.
const ErrShort = errShort

package contenthash

import (
	"encoding/binary"
	"hash/crc32"
	"strings"
)

// A stored page is
//
//	byte    magic
//	byte    version
//	uint32  CRC-32C over the name of the page and the payload, little endian
//	payload
//
// The payload of the index is
//
//	byte     flags: two bits of trust, legacy, root sum, owners ignored
//	32 bytes digest of the root with all below it, if known
//	uvarint  number of pages, and for each
//	         uvarint number, uint32 CRC of the page,
//	         uvarint shared, uvarint length, bytes: the bound, without the
//	         bytes that it shares with the one before
//
// and that of the other pages
//
//	uvarint  number of entries, and for each
//	         uvarint shared, uvarint length, bytes: the key, likewise
//	         byte    kind, link known, listed, sum known (of directories)
//	         byte    flags: digest, stat, racy, trusted
//	         32 bytes digest
//	         uvarint inode, varint ctime less that of the entry before,
//	         varint mtime less ctime, varint size
//	         uvarint length, bytes: the target of a link
//	         32 bytes digest of the directory with all below it
//
// Keys rise strictly. The digest with all below it is stored only of
// directories that do not reach into the next page, so that a change writes
// one page; the others are summed up again from what is below, without I/O.
const (
	pageMagic   = 0xC4
	pageVersion = 1
	pageHead    = 6
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Bits of the first byte of an entry; the lower three are its kind.
const (
	eKind   = 0x07
	eLink   = 0x08
	eListed = 0x10
	eSum    = 0x20
	eAll    = eKind | eLink | eListed | eSum
)

// Bits of the index's first byte; the lower two are the trust.
const (
	iTrust     = 0x03
	iLegacy    = 0x04
	iSum       = 0x08
	iOwnerless = 0x10
	iAll       = iTrust | iLegacy | iSum | iOwnerless
)

func pageCRC(name string, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum([]byte(name), castagnoli), castagnoli, payload)
}

func beginPage(buf []byte) []byte {
	return append(buf, pageMagic, pageVersion, 0, 0, 0, 0)
}

func endPage(name string, buf []byte) uint32 {
	crc := pageCRC(name, buf[pageHead:])
	binary.LittleEndian.PutUint32(buf[2:], crc)
	return crc
}

// appendKey appends a key without what it shares with the one before.
func appendKey(buf []byte, prev, key string) []byte {
	shared := 0
	for shared < len(prev) && shared < len(key) && prev[shared] == key[shared] {
		shared++
	}
	buf = binary.AppendUvarint(buf, uint64(shared))
	buf = binary.AppendUvarint(buf, uint64(len(key)-shared))
	return append(buf, key[shared:]...)
}

// appendIndex encodes the index. The caller holds mu.
func (t *Tree) appendIndex(buf []byte, trust byte) []byte {
	buf = beginPage(buf)
	flags := trust
	if t.legacy {
		flags |= iLegacy
	}
	if t.ownerless {
		flags |= iOwnerless
	}
	d := t.root.dir
	if d.hasSum {
		flags |= iSum
	}
	buf = append(buf, flags)
	if d.hasSum {
		buf = append(buf, d.sum[:]...)
	}
	buf = binary.AppendUvarint(buf, uint64(len(t.pages.list)))
	bound := ""
	for _, p := range t.pages.list {
		buf = binary.AppendUvarint(buf, p.number)
		buf = binary.LittleEndian.AppendUint32(buf, p.crc)
		buf = appendKey(buf, bound, p.bound)
		bound = p.bound
	}
	endPage(indexName, buf)
	return buf
}

// encodePage encodes entries as the page p, behind which the one with the
// bound hi follows, or with last none.
func (t *Tree) encodePage(p page, entries []*node, hi string, last bool) ([]byte, uint32) {
	buf := beginPage(make([]byte, 0, len(entries)*(entrySize+48)))
	buf = binary.AppendUvarint(buf, uint64(len(entries)))
	prev, ctime := "", int64(0)
	for _, n := range entries {
		key := n.key()
		buf = appendKey(buf, prev, key)
		prev = key
		reachesOn := !last && (key == "" || strings.HasPrefix(hi, key+"\x00"))
		buf, ctime = t.appendNode(buf, n, ctime, !reachesOn || t.legacy)
	}
	crc := endPage(pageName(p.number), buf)
	return buf, crc
}

// appendNode encodes what is known of n apart from its key.
func (t *Tree) appendNode(buf []byte, n *node, ctime int64, withSum bool) ([]byte, int64) {
	n.set(fSaved, t.trusts(n))
	first := byte(n.kind)
	withSum = withSum && n.parent != nil && n.dir != nil && n.dir.hasSum
	if n.link != nil {
		first |= eLink
	}
	if n.dir != nil && n.dir.listed {
		first |= eListed
	}
	if withSum {
		first |= eSum
	}
	buf = append(buf, first, byte(n.flags))
	if n.has(fDigest) {
		buf = append(buf, n.digest[:]...)
	}
	if n.has(fStat) {
		buf = binary.AppendUvarint(buf, n.stat.Ino)
		buf = binary.AppendVarint(buf, n.stat.Ctime-ctime)
		buf = binary.AppendVarint(buf, n.stat.Mtime-n.stat.Ctime)
		buf = binary.AppendVarint(buf, n.stat.Size)
		ctime = n.stat.Ctime
	}
	if n.link != nil {
		buf = binary.AppendUvarint(buf, uint64(len(*n.link)))
		buf = append(buf, *n.link...)
	}
	if withSum {
		buf = append(buf, n.dir.sum[:]...)
	}
	return buf, ctime
}

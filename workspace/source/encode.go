package source

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
)

// The encoded form of a tree:
//
//	"lamsrc"         6 bytes
//	version          1 byte
//	method           1 byte, stored or zstd
//	crc32c           4 bytes, of the body before compression
//	length           uvarint, of the body before compression
//	body
//
// and the body, fixed-size numbers little endian:
//
//	read by root     1 byte
//	started, synced  2 stamps (int64 seconds, uint32 nanoseconds)
//	notes            uvarint count, then path and reason, strings with uvarint length
//	entries          uvarint count, then the entries in path order
//
// An entry is its place (uvarint: how many directories to leave, counted from
// the entry before if that is a directory, else from its directory), its name,
// and the fields that appendNode writes one after the other.
const (
	encodedMagic   = "lamsrc"
	encodedVersion = 2
	// plainVersion had digests of contents alone.
	plainVersion = 1

	methodStored = 0
	methodZstd   = 1

	// maxBody is some six million entries; a body is in memory as a whole.
	maxBody = 1 << 30
	// maxRatio is how much smaller than its body a compressed one may be, so
	// that a small damaged or hostile input cannot ask for much memory. Real
	// trees stay below 10; one that does not is stored.
	maxRatio = 32
	// minEntry is the least that an entry takes in a body: a bound for how
	// many there can be.
	minEntry = 55
)

// Flags of an entry.
const (
	hasCopy = 1 << iota
	copyAsSource
	hasLink
	hasXattrs
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Encode returns the tree in a compact form for Decode. A tree of millions of
// entries that does not fit the form is ResourceExhausted.
func (t *Tree) Encode() ([]byte, error) {
	body := t.appendBody(make([]byte, 0, 1024+128*len(t.nodes)))
	if len(body) > maxBody {
		return nil, fmt.Errorf("encode source tree of %d entries: %w", len(t.nodes), errdefs.ErrResourceExhausted)
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, fmt.Errorf("encode source tree: %w", err)
	}
	defer enc.Close()
	method, packed := byte(methodZstd), enc.EncodeAll(body, make([]byte, 0, len(body)/2))
	if len(body) > maxRatio*len(packed) {
		method, packed = methodStored, body
	}
	out := append(make([]byte, 0, len(packed)+32), encodedMagic...)
	out = append(out, encodedVersion, method)
	out = binary.LittleEndian.AppendUint32(out, crc32.Checksum(body, castagnoli))
	out = binary.AppendUvarint(out, uint64(len(body)))
	return append(out, packed...), nil
}

func (t *Tree) appendBody(b []byte) []byte {
	root := byte(0)
	if t.root {
		root = 1
	}
	b = append(b, root)
	b = appendStamp(appendStamp(b, t.started), t.synced)
	b = binary.AppendUvarint(b, uint64(len(t.notes)))
	for _, n := range t.notes {
		b = appendString(appendString(b, n.Path), n.Reason)
	}
	b = binary.AppendUvarint(b, uint64(len(t.nodes)))
	in := int32(-1) // the directory that the next entry is in unless it leaves it
	for i := range t.nodes {
		n := &t.nodes[i]
		up := uint64(0)
		for ; in != n.parent; in = t.nodes[in].parent {
			up++
		}
		b = appendString(binary.AppendUvarint(b, up), n.name)
		b = t.appendNode(b, int32(i))
		if n.typ == Dir {
			in = int32(i)
		}
	}
	return b
}

func (t *Tree) appendNode(b []byte, i int32) []byte {
	n := &t.nodes[i]
	flags := byte(0)
	if n.copy.set {
		flags |= hasCopy
		if n.copy.mode == n.mode && n.copy.size == n.size && n.copy.mtime == n.mtime {
			flags |= copyAsSource
		}
	}
	if n.link != i {
		flags |= hasLink
	}
	if len(n.xattrs) > 0 {
		flags |= hasXattrs
	}
	b = append(b, byte(n.typ), flags)
	b = binary.LittleEndian.AppendUint16(b, uint16(n.mode))
	b = binary.LittleEndian.AppendUint32(b, n.uid)
	b = binary.LittleEndian.AppendUint32(b, n.gid)
	b = binary.LittleEndian.AppendUint64(b, n.dev)
	b = binary.LittleEndian.AppendUint64(b, n.ino)
	b = appendStamp(appendStamp(b, n.mtime), n.ctime)
	if flags&hasLink != 0 {
		b = binary.AppendUvarint(b, uint64(n.link))
	}
	switch n.typ {
	case File:
		b = binary.AppendUvarint(b, uint64(n.size))
		b = append(b, n.sum[:]...)
	case Symlink:
		b = appendString(b, n.target)
	case CharDevice, BlockDevice:
		b = binary.LittleEndian.AppendUint64(b, n.rdev)
	}
	if flags&hasXattrs != 0 {
		b = binary.AppendUvarint(b, uint64(len(n.xattrs)))
		for _, x := range n.xattrs {
			b = appendString(b, x.Name)
			b = append(binary.AppendUvarint(b, uint64(len(x.Value))), x.Value...)
		}
	}
	if flags&hasCopy != 0 {
		b = appendStamp(b, n.copy.ctime)
		if flags&copyAsSource == 0 {
			b = binary.LittleEndian.AppendUint16(b, uint16(n.copy.mode))
			b = binary.AppendUvarint(b, uint64(n.copy.size))
			b = appendStamp(b, n.copy.mtime)
		}
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendStamp(b []byte, s stamp) []byte {
	b = binary.LittleEndian.AppendUint64(b, uint64(s.sec))
	return binary.LittleEndian.AppendUint32(b, uint32(s.nsec))
}

package source

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"

	"github.com/lamina-build/lamina/internal/fsat"
)

// Decode reads what Encode wrote. Anything else is DataLoss, and a later
// version of the form NotImplemented: go on without a previous tree, which
// costs reading all files, and a file that the source dropped meanwhile stays
// in the workspace. The tree of an earlier version serves as prev and describes
// no source, like an Intent. Memory is bounded by a multiple of len(b). b may be
// changed afterwards.
func Decode(b []byte) (*Tree, error) {
	body, err := unpack(b)
	if err == nil {
		d := decoder{rest: body}
		t := d.tree()
		if d.err == nil {
			if b[len(encodedMagic)] == plainVersion {
				// Its digests are none of ours, so nothing is believed
				// without being read.
				t.started, t.synced = stamp{}, stamp{}
			}
			t.index()
			return t, nil
		}
		err = d.err
	}
	if errors.Is(err, errdefs.ErrNotImplemented) {
		return nil, err
	}
	return nil, fmt.Errorf("stored source tree is damaged: %w: %w", err, errdefs.ErrDataLoss)
}

// unpack returns the body as a string that shares no memory with b.
func unpack(b []byte) (string, error) {
	const header = len(encodedMagic) + 2 + 4
	if len(b) < header || string(b[:len(encodedMagic)]) != encodedMagic {
		return "", errors.New("no such tree begins like this")
	}
	version, method := b[len(encodedMagic)], b[len(encodedMagic)+1]
	if version != encodedVersion && version != plainVersion {
		return "", fmt.Errorf("source tree in form %d, known is %d: %w", version, encodedVersion, errdefs.ErrNotImplemented)
	}
	sum := binary.LittleEndian.Uint32(b[len(encodedMagic)+2:])
	size, n := binary.Uvarint(b[header:])
	if n <= 0 || size > maxBody {
		return "", errors.New("bad length")
	}
	packed := b[header+n:]
	var body []byte
	switch method {
	case methodStored:
		body = append(body, packed...)
	case methodZstd:
		if size > maxRatio*uint64(len(packed)) {
			return "", errors.New("length out of proportion")
		}
		dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxBody), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return "", err
		}
		defer dec.Close()
		if body, err = dec.DecodeAll(packed, make([]byte, 0, size)); err != nil {
			return "", err
		}
	default:
		return "", errors.New("unknown compression")
	}
	if uint64(len(body)) != size {
		return "", errors.New("wrong length")
	}
	if crc32.Checksum(body, castagnoli) != sum {
		return "", errors.New("checksum mismatch")
	}
	return unsafe.String(unsafe.SliceData(body), len(body)), nil
}

// decoder reads a body. After the first error every read gives zero.
type decoder struct {
	rest string
	err  error
}

func (d *decoder) fail(what string) {
	if d.err == nil {
		d.err = errors.New(what)
		d.rest = ""
	}
}

func (d *decoder) take(n uint64) string {
	if n > uint64(len(d.rest)) {
		d.fail("ends early")
		return ""
	}
	s := d.rest[:n]
	d.rest = d.rest[n:]
	return s
}

func (d *decoder) uvarint() uint64 {
	var v uint64
	for shift := 0; shift < 64; shift += 7 {
		s := d.take(1)
		if s == "" {
			return 0
		}
		if shift == 63 && s[0] > 1 || shift > 0 && s[0] == 0 {
			break // too large, or longer than it needs to be
		}
		v |= uint64(s[0]&0x7f) << shift
		if s[0] < 0x80 {
			return v
		}
	}
	d.fail("bad number")
	return 0
}

// fixed reads a number of n bytes.
func (d *decoder) fixed(n int) (v uint64) {
	s := d.take(uint64(n))
	for i := len(s) - 1; i >= 0; i-- {
		v = v<<8 | uint64(s[i])
	}
	return v
}

func (d *decoder) string() string { return d.take(d.uvarint()) }

func (d *decoder) stamp() stamp {
	s := stamp{sec: int64(d.fixed(8)), nsec: int32(d.fixed(4))}
	if s.nsec < 0 || s.nsec >= 1e9 {
		d.fail("bad time")
	}
	return s
}

func (d *decoder) size() int64 {
	v := d.uvarint()
	if v > 1<<63-1 {
		d.fail("bad size")
		return 0
	}
	return int64(v)
}

// count reads how many things of at least size bytes follow.
func (d *decoder) count(size int) int {
	n := d.uvarint()
	if n > uint64(len(d.rest)/size) {
		d.fail("bad count")
		return 0
	}
	return int(n)
}

func (d *decoder) tree() *Tree {
	t := &Tree{}
	switch d.fixed(1) {
	case 0:
	case 1:
		t.root = true
	default:
		d.fail("bad flag")
	}
	t.started, t.synced = d.stamp(), d.stamp()
	for range d.count(2) {
		t.notes = append(t.notes, Note{Path: d.string(), Reason: d.string()})
	}
	count := d.count(minEntry)
	t.nodes = make([]node, 0, count)
	in := int32(-1)
	// last is the name before in each directory that is open.
	last := []string{""}
	for range count {
		for up := d.uvarint(); up > 0; up-- {
			if in < 0 {
				d.fail("entry outside the tree")
				return t
			}
			in = t.nodes[in].parent
			last = last[:len(last)-1]
		}
		i := int32(len(t.nodes))
		n := node{name: d.string(), parent: in, link: i}
		if n.name == "" || n.name == "." || n.name == ".." || strings.ContainsAny(n.name, "/\x00") {
			d.fail("bad name")
		}
		if n.name <= last[len(last)-1] {
			d.fail("names out of order")
		}
		last[len(last)-1] = n.name
		d.node(t, &n)
		if d.err != nil {
			return t
		}
		t.nodes = append(t.nodes, n)
		if n.typ == Dir {
			in = i
			last = append(last, "")
		}
	}
	if d.rest != "" {
		d.fail("goes on after its end")
	}
	return t
}

func (d *decoder) node(t *Tree, n *node) {
	n.typ = Type(d.fixed(1))
	flags := d.fixed(1)
	if flags >= hasXattrs<<1 || flags&hasCopy == 0 && flags&copyAsSource != 0 {
		d.fail("bad flags")
	}
	n.mode = d.mode()
	n.uid, n.gid = uint32(d.fixed(4)), uint32(d.fixed(4))
	n.dev, n.ino = d.fixed(8), d.fixed(8)
	n.mtime, n.ctime = d.stamp(), d.stamp()
	if flags&hasLink != 0 {
		l := d.uvarint()
		if l >= uint64(len(t.nodes)) || t.nodes[l].typ != n.typ || t.nodes[l].link != int32(l) || n.typ == Dir {
			d.fail("bad hard link")
		} else {
			n.link = int32(l)
		}
	}
	switch n.typ {
	case File:
		n.size = d.size()
		copy(n.sum[:], d.take(uint64(len(n.sum))))
	case Symlink:
		n.target = d.string()
		if n.mode != 0o777 || strings.Contains(n.target, "\x00") {
			d.fail("bad link")
		}
	case CharDevice, BlockDevice:
		n.rdev = d.fixed(8)
	case Dir, FIFO:
	default:
		d.fail("bad type")
	}
	if flags&hasXattrs != 0 {
		d.xattrs(n)
	}
	if flags&hasCopy != 0 {
		n.copy = copied{set: true, mode: n.mode, size: n.size, mtime: n.mtime, ctime: d.stamp()}
		if flags&copyAsSource == 0 {
			n.copy.mode, n.copy.size, n.copy.mtime = d.mode(), d.size(), d.stamp()
		}
	}
}

func (d *decoder) mode() uint32 {
	m := uint32(d.fixed(2))
	if m > 0o7777 {
		d.fail("bad mode")
	}
	return m
}

func (d *decoder) xattrs(n *node) {
	count := d.count(3)
	if count == 0 {
		d.fail("no attributes")
	}
	for range count {
		x := fsat.Xattr{Name: d.string(), Value: []byte(d.string())}
		if k := len(n.xattrs); x.Name == "" || strings.Contains(x.Name, "\x00") || k > 0 && x.Name <= n.xattrs[k-1].Name {
			d.fail("bad attribute")
			return
		}
		n.xattrs = append(n.xattrs, x)
	}
}

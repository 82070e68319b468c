package source

import (
	"crypto/sha256"
	"encoding/binary"
	"strconv"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Digest is a function of the tree's paths, types, modes, sizes, contents and
// links alone: not of owners, times, extended attributes, of which names are
// hard links, nor of the directory that holds the tree or of who reads it.
//
// It is the sha256 over the line "lamina source tree 1\n" and then, for each
// entry in path order, numbers big endian:
//
//	uint64   length of the path
//	bytes    the path, relative, slash separated
//	byte     type: d, f, l (symbolic link), p (FIFO), c, b (devices)
//	uint32   mode: permissions, setuid, setgid and sticky (07777);
//	         0777 for symbolic links
//	uint64   size of a regular file, else 0
//	32 bytes sha256 of a regular file's content, else zeros
//	uint64   length of the link
//	bytes    the link: the target of a symbolic link as it is,
//	         "major:minor" in decimal for a device, else nothing
//
// Path order is the order of the paths' bytes where '/' counts as less than
// every other byte, so that a directory's entries follow it without a gap.
func (t *Tree) Digest() digest.Digest {
	h := sha256.New()
	buf := append(make([]byte, 0, 64<<10), "lamina source tree 1\n"...)
	// prefix is the path of the directory that the last entry was in.
	var prefix []byte
	dir := int32(-1)
	for i := range t.nodes {
		n := &t.nodes[i]
		if n.parent != dir {
			dir = n.parent
			prefix = append(prefix[:0], t.path(dir)...)
			if dir >= 0 {
				prefix = append(prefix, '/')
			}
		}
		link := n.digestLink()
		buf = binary.BigEndian.AppendUint64(buf, uint64(len(prefix)+len(n.name)))
		buf = append(buf, prefix...)
		buf = append(buf, n.name...)
		buf = append(buf, byte(n.typ))
		buf = binary.BigEndian.AppendUint32(buf, n.mode)
		buf = binary.BigEndian.AppendUint64(buf, uint64(n.size))
		buf = append(buf, n.sum[:]...)
		buf = binary.BigEndian.AppendUint64(buf, uint64(len(link)))
		buf = append(buf, link...)
		if len(buf) > 60<<10 {
			h.Write(buf)
			buf = buf[:0]
		}
	}
	h.Write(buf)
	return digest.NewDigest(digest.SHA256, h)
}

// digestLink is what the digest takes as the entry's link.
func (n *node) digestLink() string {
	switch n.typ {
	case Symlink:
		return n.target
	case CharDevice, BlockDevice:
		return strconv.FormatUint(uint64(unix.Major(n.rdev)), 10) + ":" + strconv.FormatUint(uint64(unix.Minor(n.rdev)), 10)
	default:
		return ""
	}
}

package contenthash

import (
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// sum is a sha256. The algorithm is part of the v0 form and not a choice.
type sum = [sha256.Size]byte

// digestOf is a sum in the form in which digests are given out.
func digestOf(s sum) digest.Digest {
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(s[:]))
}

// appendDigest appends the text form of a sum, which is how digests of entries
// enter the digests of directories and lists.
func appendDigest(buf []byte, s *sum) []byte {
	return hex.AppendEncode(append(buf, "sha256:"...), s[:])
}

// parseDigest is the reverse of digestOf; ok is false for anything that is not
// a sha256.
func parseDigest(d string) (s sum, ok bool) {
	text, found := strings.CutPrefix(d, "sha256:")
	if !found || len(text) != 2*len(s) || strings.ToLower(text) != text {
		return s, false
	}
	_, err := hex.Decode(s[:], []byte(text))
	return s, err == nil
}

// Xattr is one extended attribute.
type Xattr = fsat.Xattr

// countedXattr says whether an attribute enters digests: all do but those of
// the machine's own policies and of the kernel (security.* and system.*), of
// which file capabilities alone belong to the tree.
func countedXattr(name string) bool {
	if name == "security.capability" {
		return true
	}
	return !strings.HasPrefix(name, "security.") && !strings.HasPrefix(name, "system.")
}

// Header is what of a file, apart from its content, enters its digest. Times,
// link counts and inode numbers do not.
type Header struct {
	// Mode holds type and permissions as os.Lstat gives them.
	Mode fs.FileMode
	// UID and GID are the owners.
	UID, GID uint32
	// Size is that of a regular file, in bytes; it is ignored for others.
	Size int64
	// Linkname is the target of a symbolic link; ignored for others.
	Linkname string
	// Devmajor and Devminor are the numbers of a device; ignored for others.
	Devmajor, Devminor uint32
	// Xattrs are the extended attributes in any order. Those that do not
	// count (security.*, except security.capability, and system.*) are
	// ignored.
	Xattrs []Xattr
}

// Hash computes the digest of one file: make it with its Header, write its
// content if it is a regular file, ask for Digest. It is for those who read or
// write files anyhow; Change and List take the result. Use by one goroutine at
// a time.
type Hash struct {
	h    hash.Hash
	head []byte
}

// NewHash begins the digest of the file that h describes.
func NewHash(h Header) *Hash {
	out := &Hash{h: sha256.New()}
	out.Reset(h)
	return out
}

// Reset begins the digest of another file.
func (h *Hash) Reset(of Header) {
	raw := rawHeader{mode: unixMode(of.Mode), uid: of.UID, gid: of.GID, size: of.Size, link: of.Linkname}
	if isDevice(raw.mode) {
		raw.major, raw.minor = of.Devmajor, of.Devminor
	}
	for _, x := range of.Xattrs {
		if countedXattr(x.Name) {
			raw.xattrs = append(raw.xattrs, x)
		}
	}
	h.head = raw.appendTo(h.head[:0])
	h.h.Reset()
	h.h.Write(h.head)
}

// Write adds content. It never fails.
func (h *Hash) Write(p []byte) (int, error) { return h.h.Write(p) }

// Sum is the digest of the file as written so far, as bytes.
func (h *Hash) Sum() (s [sha256.Size]byte) {
	h.h.Sum(s[:0])
	return s
}

// Digest is Sum in the form in which digests are given out.
func (h *Hash) Digest() digest.Digest { return digestOf(h.Sum()) }

func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	if m&fs.ModeSetuid != 0 {
		mode |= unix.S_ISUID
	}
	if m&fs.ModeSetgid != 0 {
		mode |= unix.S_ISGID
	}
	if m&fs.ModeSticky != 0 {
		mode |= unix.S_ISVTX
	}
	switch {
	case m.IsDir():
		mode |= unix.S_IFDIR
	case m&fs.ModeSymlink != 0:
		mode |= unix.S_IFLNK
	case m&fs.ModeNamedPipe != 0:
		mode |= unix.S_IFIFO
	case m&fs.ModeSocket != 0:
		mode |= unix.S_IFSOCK
	case m&fs.ModeCharDevice != 0:
		mode |= unix.S_IFCHR
	case m&fs.ModeDevice != 0:
		mode |= unix.S_IFBLK
	default:
		mode |= unix.S_IFREG
	}
	return mode
}

func isDevice(mode uint32) bool {
	return mode&unix.S_IFMT == unix.S_IFCHR || mode&unix.S_IFMT == unix.S_IFBLK
}

// rawHeader is a Header in the kernel's terms.
type rawHeader struct {
	mode         uint32 // st_mode
	uid, gid     uint32
	size         int64
	link         string
	major, minor uint32
	xattrs       []Xattr // counted ones only
}

// of fills in what stat data say; link and attributes are read apart.
func (h *rawHeader) of(st *unix.Stat_t) {
	*h = rawHeader{mode: st.Mode, uid: st.Uid, gid: st.Gid, size: st.Size}
	if isDevice(st.Mode) {
		h.major, h.minor = unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev)) //nolint:unconvert // 32 bits on some architectures
	}
}

// appendTo appends the header in the form that is hashed, that of docker's
// tarsum version 1: names of tar header fields, each followed by its value in
// decimal, without separators. The fields name, uname and gname are always
// empty, mtime is left out, the attributes follow sorted by name.
//
// A socket goes as a regular file, since tar knows none.
func (h *rawHeader) appendTo(buf []byte) []byte {
	mode, size, link := int64(h.mode&0o7777), int64(0), ""
	var typeflag byte
	switch h.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		typeflag = '5'
	case unix.S_IFLNK:
		typeflag = '2'
		mode |= 0o777
		link = h.link
	case unix.S_IFCHR:
		typeflag = '3'
	case unix.S_IFBLK:
		typeflag = '4'
	case unix.S_IFIFO:
		typeflag = '6'
	default:
		typeflag = '0'
		size = h.size
	}
	buf = strconv.AppendInt(append(buf, "namemode"...), mode, 10)
	buf = strconv.AppendUint(append(buf, "uid"...), uint64(h.uid), 10)
	buf = strconv.AppendUint(append(buf, "gid"...), uint64(h.gid), 10)
	buf = strconv.AppendInt(append(buf, "size"...), size, 10)
	buf = append(append(buf, "typeflag"...), typeflag)
	buf = append(append(buf, "linkname"...), link...)
	buf = append(buf, "unamegname"...)
	buf = strconv.AppendUint(append(buf, "devmajor"...), uint64(h.major), 10)
	buf = strconv.AppendUint(append(buf, "devminor"...), uint64(h.minor), 10)
	if len(h.xattrs) > 1 {
		slices.SortFunc(h.xattrs, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	}
	for _, x := range h.xattrs {
		buf = append(append(buf, x.Name...), x.Value...)
	}
	return buf
}

func sum256(p []byte) sum { return sha256.Sum256(p) }

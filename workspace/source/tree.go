package source

import (
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/internal/fsat"
)

// Type is what kind of file an entry is. The values are part of the encoded
// form.
type Type byte

// The types that a tree holds.
const (
	Dir         Type = 'd'
	File        Type = 'f'
	Symlink     Type = 'l'
	FIFO        Type = 'p'
	CharDevice  Type = 'c'
	BlockDevice Type = 'b'
)

// Tree is what a source directory held when it was scanned and, after a sync,
// what its copies in the workspace look like. A Tree does not change once it
// is returned and is safe for concurrent use.
type Tree struct {
	// nodes are in path order: that of the paths' bytes where '/' counts as
	// less than every other byte. So a directory comes before what it holds,
	// and what it holds follows without a gap.
	nodes []node
	notes []Note
	// root says that the tree was read by root, who sees more attributes.
	root bool
	// started is the clock when the scan began; synced when the sync ended.
	started, synced stamp

	// kids lists the nodes of each directory in name order: those of node d
	// are kids[first[d+1]:first[d+2]], those of the top first[0]:first[1].
	kids, first []int32

	// now is the clock, handed on from Options to SyncTo.
	now func() time.Time

	digestOnce sync.Once
	digest     digest.Digest
}

// node is an entry in memory.
type node struct {
	name   string
	parent int32 // -1: the top
	// link is the first node of the same file, for the other names of a hard
	// link; otherwise the node itself.
	link     int32
	typ      Type
	mode     uint32 // permissions, setuid, setgid, sticky: 07777
	uid, gid uint32
	size     int64 // of regular files, else 0
	rdev     uint64
	mtime    stamp
	target   string
	// sum is the digest of a regular file, as own gives it.
	sum    [32]byte
	xattrs []fsat.Xattr

	// What decides whether the content is read again.
	dev, ino uint64
	ctime    stamp

	copy copied
}

// copied is how lstat showed the copy in the workspace when the sync left it.
type copied struct {
	set          bool
	mode         uint32
	size         int64
	mtime, ctime stamp
}

// stamp is a time of a file, exact and comparable.
type stamp struct {
	sec  int64
	nsec int32
}

func stampOf(t time.Time) stamp { return stamp{t.Unix(), int32(t.Nanosecond())} }

func (s stamp) time() time.Time { return time.Unix(s.sec, int64(s.nsec)) }

func (s stamp) before(o stamp) bool {
	return s.sec < o.sec || s.sec == o.sec && s.nsec < o.nsec
}

// Note says that something is not kept as it is, and why.
type Note struct {
	// Path is relative to the source.
	Path string
	// Reason is one line for people, e.g. "socket left out".
	Reason string
}

// Entry is one file of a tree.
type Entry struct {
	// Path is relative, slash separated, and may hold any bytes but NUL.
	Path string
	Type Type
	// Mode holds the permissions with setuid, setgid and sticky (07777).
	Mode     uint32
	UID, GID uint32
	// Size is that of regular files, in bytes.
	Size    int64
	ModTime time.Time
	// Link is the target of a symbolic link.
	Link string
	// Device is the device number of a device.
	Device uint64
	// Hardlink is the first path in the tree that names the same file, empty
	// for that first one and for files with one name.
	Hardlink string
	// Xattrs are sorted by name; do not change them.
	Xattrs []Xattr
}

// Xattr is one extended attribute.
type Xattr = fsat.Xattr

// Len is the number of entries.
func (t *Tree) Len() int { return len(t.nodes) }

// Size is the bytes of all regular files, those with several names once.
func (t *Tree) Size() int64 {
	var sum int64
	for i := range t.nodes {
		if t.nodes[i].link == int32(i) {
			sum += t.nodes[i].size
		}
	}
	return sum
}

// Notes lists what the scan left out although it is in the directory.
func (t *Tree) Notes() []Note { return t.notes }

// Entries yields the entries in path order.
func (t *Tree) Entries() iter.Seq[Entry] {
	return func(yield func(Entry) bool) {
		for i := range t.nodes {
			n := &t.nodes[i]
			e := Entry{
				Path: t.path(int32(i)), Type: n.typ, Mode: n.mode, UID: n.uid, GID: n.gid,
				Size: n.size, ModTime: n.mtime.time(), Device: n.rdev, Xattrs: n.xattrs,
				Link: n.target,
			}
			if n.link != int32(i) {
				e.Hardlink = t.path(n.link)
			}
			if !yield(e) {
				return
			}
		}
	}
}

// Has says whether the tree has an entry of this path, which is clean and
// relative to its top.
func (t *Tree) Has(p string) bool {
	at := int32(-1)
	for name := range strings.SplitSeq(p, "/") {
		kids := t.children(at)
		k, found := slices.BinarySearchFunc(kids, name, func(i int32, name string) int {
			return strings.Compare(t.nodes[i].name, name)
		})
		if !found {
			return false
		}
		at = kids[k]
	}
	return true
}

// path is the path of node i; that of -1, the top, is empty.
func (t *Tree) path(i int32) string {
	if i < 0 {
		return ""
	}
	if t.nodes[i].parent < 0 {
		return t.nodes[i].name
	}
	size := -1
	for j := i; j >= 0; j = t.nodes[j].parent {
		size += len(t.nodes[j].name) + 1
	}
	buf := make([]byte, size)
	for j := i; ; j = t.nodes[j].parent {
		name := t.nodes[j].name
		size -= len(name)
		copy(buf[size:], name)
		if size == 0 {
			return string(buf)
		}
		size--
		buf[size] = '/'
	}
}

// children lists the nodes in directory d (-1: the top) in name order.
func (t *Tree) children(d int32) []int32 {
	return t.kids[t.first[d+1]:t.first[d+2]]
}

// index builds the lists behind children once the nodes are complete.
func (t *Tree) index() {
	// first has a slot more than it needs while it is filled: counting into
	// d+2 and summing up leaves at d+1 where the next child of d goes.
	t.first = make([]int32, len(t.nodes)+3)
	for i := range t.nodes {
		t.first[t.nodes[i].parent+3]++
	}
	for i := 1; i < len(t.first); i++ {
		t.first[i] += t.first[i-1]
	}
	t.kids = make([]int32, len(t.nodes))
	for i := range t.nodes {
		at := &t.first[t.nodes[i].parent+2]
		t.kids[*at] = int32(i)
		*at++
	}
	t.first = t.first[:len(t.nodes)+2]
}

// emptyTree stands for a missing previous one.
func emptyTree() *Tree {
	t := &Tree{}
	t.index()
	return t
}

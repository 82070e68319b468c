package contenthash

import (
	"slices"
	"strings"
	"sync"
	"time"
)

// Tree is what is known of the files of one snapshot: which there are, their
// digests, and the stat data by which a digest can be told to hold still. It
// is a cache of facts about a directory tree, never the truth itself: what it
// does not know, Checksum reads from the files.
//
// All methods are safe for concurrent use. Questions that the tree can answer
// by itself wait for nobody; of those that must read files one works at a
// time, and the others find what it read.
type Tree struct {
	// busy is held by the one who reads files for this tree: a channel, so
	// that waiting ends with the caller's context. It comes before mu.
	busy chan struct{}
	// workers is how many goroutines read files at once. Fixed.
	workers int
	// pageTarget is the size of stored pages, now the clock in nanoseconds,
	// fault that of files. Fixed; tests choose others.
	pageTarget int
	now        func() int64
	fault      func(call string) error
	// readers are the buffers of workers that are not at work.
	readers sync.Pool

	mu sync.RWMutex
	// The fields below are guarded by mu, which is never held across I/O.

	root *node
	// rev counts changes that come from outside (HandleChange, Unconfirm,
	// ApplyLayer). What was read while it changed is dropped.
	rev uint64
	// epoch and trusted say which facts may be used as they are: those of
	// nodes with an epoch of at least trusted. Reading a fact gives its node
	// the current epoch.
	epoch, trusted uint32
	// oldest is not above the epoch of any node.
	oldest uint32
	// writing says that somebody may change files: between Unconfirm and
	// Confirm or Seal. before is what Confirm makes of trusted.
	writing bool
	before  uint32
	// legacy says that the digests were computed by a BuildKit daemon, maybe
	// by older rules. They are kept together or not at all.
	legacy bool
	// ownerless says that new digests are computed by rules that ignore
	// owners. Only with legacy.
	ownerless bool

	pages pageSet
	stats Stats
}

// New returns a tree that knows nothing.
func New() *Tree {
	t := &Tree{
		busy:       make(chan struct{}, 1),
		workers:    defaultWorkers(),
		pageTarget: pageTarget,
		now:        func() int64 { return time.Now().UnixNano() },
	}
	t.reset()
	t.oldest = t.epoch
	return t
}

// reset forgets everything. The caller holds mu, or is the only one.
func (t *Tree) reset() {
	t.rev++
	t.epoch++
	t.trusted = t.epoch
	t.discard()
}

// Stats counts what a tree did since it was made.
type Stats struct {
	// FilesRead are files whose content was read, BytesRead what was in them.
	FilesRead, BytesRead uint64
	// DirsListed are directories whose names were read, Stats the entries that
	// were looked at.
	DirsListed, Stats uint64
}

func (s *Stats) add(o Stats) {
	s.FilesRead += o.FilesRead
	s.BytesRead += o.BytesRead
	s.DirsListed += o.DirsListed
	s.Stats += o.Stats
}

// Stats returns the counts.
func (t *Tree) Stats() Stats {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.stats
}

// kind is the type of a node as far as digests care.
type kind uint8

const (
	kindUnknown kind = iota
	kindFile         // regular
	kindDir
	kindSymlink
	kindSpecial // FIFO, socket, device: looked at, never opened
	kindMax     = kindSpecial
)

// node is one entry of the tree. About 112 bytes and its name; a directory has
// 64 more.
type node struct {
	name   string
	parent *node
	dir    *dirInfo // of directories
	link   *string  // target of a symbolic link, nil while not known
	// digest is that of a file, a link or a special file, or of a directory's
	// header; it counts if has(fDigest).
	digest sum
	// stat counts if has(fStat), and then all facts of the node were read when
	// it looked like that.
	stat  Stat
	epoch uint32
	kind  kind
	flags flag
}

type flag uint8

const (
	fDigest flag = 1 << iota
	fStat
	// fRacy: the stat data were so young when they were taken that a later
	// change may not show in them.
	fRacy
	// fSaved is the trust bit as it stands in the stored page.
	fSaved
)

// dirInfo is what directories have beside.
type dirInfo struct {
	children []*node // sorted by the bytes of the names
	// sum is the digest of the directory with all that is in it. It counts if
	// hasSum; to be used as it is sumEpoch must be trusted, too.
	sum      sum
	sumEpoch uint32
	hasSum   bool
	// listed says that children are all there are.
	listed bool
}

// Stat are the data by which an unchanged file is recognized.
type Stat struct {
	Ino uint64
	// Ctime and Mtime are nanoseconds since 1970.
	Ctime, Mtime int64
	Size         int64
}

func (n *node) has(f flag) bool { return n.flags&f != 0 }

func (n *node) set(f flag, on bool) {
	if on {
		n.flags |= f
	} else {
		n.flags &^= f
	}
}

// trusts says that the facts of n hold without another look.
func (t *Tree) trusts(n *node) bool { return n.epoch >= t.trusted }

// child finds an entry by name.
func (n *node) child(name string) *node {
	if n.dir == nil {
		return nil
	}
	i, ok := n.index(name)
	if !ok {
		return nil
	}
	return n.dir.children[i]
}

func (n *node) index(name string) (int, bool) {
	return slices.BinarySearchFunc(n.dir.children, name, func(c *node, name string) int {
		return strings.Compare(c.name, name)
	})
}

// add puts c into the directory n, in the place of an entry of that name.
func (t *Tree) add(n, c *node) {
	c.parent = n
	i, ok := n.index(c.name)
	if ok {
		n.dir.children[i].parent = nil
		n.dir.children[i] = c
	} else {
		n.dir.children = slices.Insert(n.dir.children, i, c)
	}
	t.touch(c)
}

// drop takes c out of its directory.
func (t *Tree) drop(c *node) {
	p := c.parent
	if p == nil {
		return
	}
	t.touch(c)
	if i, ok := p.index(c.name); ok && p.dir.children[i] == c {
		p.dir.children = slices.Delete(p.dir.children, i, i+1)
	}
	c.parent = nil
}

// touch notes that facts of n changed: its page has to be written, and the
// digests of the directories above it no longer count.
func (t *Tree) touch(n *node) {
	t.pages.touch(n)
	if n.dir != nil {
		n.dir.hasSum = false
	}
	for p := n.parent; p != nil; p = p.parent {
		if p.dir.hasSum && t.legacy {
			t.pages.touch(p) // only there sums are stored whatever they span
		}
		p.dir.hasSum = false
	}
}

// path is that of a node, slash separated, without one at the start; the
// root's is empty.
func (n *node) path() string { return n.join('/') }

// key is the path with NUL bytes between the names, which makes the order of
// the bytes that of a walk.
func (n *node) key() string { return n.join(0) }

func (n *node) join(sep byte) string {
	if n.parent == nil {
		return n.name
	}
	size := -1
	for p := n; p.parent != nil; p = p.parent {
		size += len(p.name) + 1
	}
	buf := make([]byte, size)
	for p := n; p.parent != nil; p = p.parent {
		size -= len(p.name)
		copy(buf[size:], p.name)
		if size > 0 {
			size--
			buf[size] = sep
		}
	}
	return string(buf)
}

// find walks to the node at path as far as it is known; it follows no links.
func (t *Tree) find(path string) *node {
	n := t.root
	for path != "" && n != nil {
		var name string
		name, path, _ = strings.Cut(path, "/")
		n = n.child(name)
	}
	return n
}

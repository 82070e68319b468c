package contenthash

import (
	"fmt"
	"io/fs"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// ChangeKind says what happened to a path.
type ChangeKind uint8

const (
	// Add is a new entry.
	Add ChangeKind = iota
	// Modify is an entry with new content, new metadata or another type.
	Modify
	// Delete is an entry that is gone with all that was below it.
	Delete
)

// Change is one change that has been made to the files of a snapshot. All that
// is optional saves reading later and changes no digest.
type Change struct {
	Kind ChangeKind
	// Path is that of the entry; the root's header is "/".
	Path string
	// Mode gives the type of what is there now; its permissions are not used.
	// Delete ignores it, and everything below.
	Mode fs.FileMode
	// Digest is that of the entry alone (of a directory: its header), as Hash
	// computes it. Optional.
	Digest digest.Digest
	// Linkname is the target of a symbolic link. Optional.
	Linkname string
	// Stat are the stat data of the entry, taken after all of it was written.
	// With them the entry can be validated when the tree is unconfirmed.
	// Ignored for directories. Racy says that they were taken so soon after
	// that a later change might not show. Optional.
	Stat Stat
	Racy bool
}

// Unconfirm says that from now on files may change without a report. What is
// known is validated by its stat data whenever it is used, entry by entry, and
// what has none is read anew. It costs nothing by itself.
//
// A holder that may write begins with it. One that reports every change that
// it makes with HandleChange ends with Confirm, and nothing needs validation;
// another one ends with Seal. One that is cut off ends with neither.
//
// The next Save writes the index page whatever it says: UnconfirmStored may
// have changed the stored one.
func (t *Tree) Unconfirm() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pages.index = nil
	t.rev++
	t.epoch++
	if t.writing {
		// The one before was cut off: what it changed without telling is what
		// the next one finds in place and does not tell, either.
		t.before = t.epoch
	} else {
		t.before = t.trusted
	}
	t.writing = true
	t.trusted = t.epoch
}

// Confirm ends what Unconfirm began: every change since was reported, and what
// was known before and not reported since holds without validation.
//
// If the holder before was cut off, only what was reported or read since the
// last Unconfirm holds.
func (t *Tree) Confirm() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.writing {
		t.writing = false
		t.trusted = t.before
	}
}

// Seal ends what Unconfirm began without saying what was changed: from now on
// nothing changes, and each fact is validated once before it is used. A tree of
// digests that BuildKit stored is forgotten: nothing of it can be validated.
func (t *Tree) Seal() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.writing {
		t.writing = false
		if t.legacy {
			t.discard()
		}
		t.revalidate()
	}
}

// revalidate makes everything that is known subject to validation. The caller
// holds mu.
func (t *Tree) revalidate() {
	t.rev++
	t.epoch++
	t.trusted = t.epoch
}

// Confirmed says that what is known needs no validation.
func (t *Tree) Confirmed() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return !t.writing && t.allTrusted(t.root)
}

func (t *Tree) allTrusted(n *node) bool {
	if n.flags != 0 && !t.trusts(n) {
		return false
	}
	if n.dir != nil {
		for _, c := range n.dir.children {
			if !t.allTrusted(c) {
				return false
			}
		}
	}
	return true
}

// HandleChange enters one change that has been made. Changes may come in any
// order that ends with the truth: a hard link before or after the file it
// names, a directory before or after its entries. Of a directory that was
// renamed, the old path and everything at and below the new one are changes;
// of a file with several names, every name is.
//
// A tree of digests that were stored by BuildKit is forgotten by the first
// change: they may be of older rules, which do not mix.
//
// A path that is not clean, or a digest that is not a sha256, is
// errdefs.ErrInvalidArgument, and nothing is entered.
func (t *Tree) HandleChange(c Change) error {
	path := cleanPath(c.Path)
	if strings.Trim(c.Path, "/") != path || strings.IndexByte(path, 0) >= 0 {
		return fmt.Errorf("change of %q: path is not clean: %w", c.Path, errdefs.ErrInvalidArgument)
	}
	var own *sum
	if c.Digest != "" {
		d, ok := parseDigest(string(c.Digest))
		if !ok {
			return fmt.Errorf("change of %q: digest %q: %w", c.Path, c.Digest, errdefs.ErrInvalidArgument)
		}
		own = &d
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rev++
	if t.legacy {
		t.discard()
	}
	switch {
	case path == "" && c.Kind == Delete:
		t.discard()
	case path == "":
		t.report(t.root, c, own)
	default:
		dir, name := t.parentOf(path)
		if dir == nil {
			return nil // not known, so it will be read when it is needed
		}
		n := dir.child(name)
		if c.Kind == Delete {
			if n != nil {
				t.drop(n)
				dir.set(fStat, false)
			}
			return nil
		}
		if n == nil {
			n = &node{name: name}
			t.add(dir, n)
			dir.set(fStat, false) // they are of before
		}
		t.report(n, c, own)
	}
	return nil
}

// parentOf finds the directory that a changed path lies in. If what is known
// has no such directory, what is known of the way there is doubted, since the
// path exists, or did a moment ago.
func (t *Tree) parentOf(path string) (dir *node, name string) {
	dir = t.root
	for {
		first, rest, more := strings.Cut(path, "/")
		if !more {
			return dir, first
		}
		c := dir.child(first)
		if c == nil || c.kind != kindDir {
			if c != nil {
				t.drop(c)
			}
			dir.dir.listed = false
			dir.set(fStat, false)
			t.touch(dir)
			return nil, ""
		}
		dir, path = c, rest
	}
}

// report enters what is at n now.
func (t *Tree) report(n *node, c Change, own *sum) {
	if k := kindOf(unixMode(c.Mode)); n.kind != k {
		t.become(n, k)
	}
	n.flags &= fSaved
	n.link = nil
	if own != nil {
		n.digest = *own
		n.set(fDigest, true)
	}
	if n.kind == kindSymlink && c.Linkname != "" {
		link := c.Linkname
		n.link = &link
	}
	if n.dir == nil && c.Stat != (Stat{}) {
		n.stat = c.Stat
		n.set(fStat, true)
		n.set(fRacy, c.Racy)
	}
	n.epoch = t.epoch
	t.touch(n)
}

// discard forgets everything but what Unconfirm and Confirm said. The caller
// holds mu.
func (t *Tree) discard() {
	t.root = &node{kind: kindDir, dir: &dirInfo{}, epoch: t.epoch}
	t.legacy, t.ownerless = false, false
	t.pages.replaceAll()
}

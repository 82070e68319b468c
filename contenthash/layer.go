package contenthash

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// Clone returns a tree of its own that knows the same, with nothing saved. It
// is what the tree of a child starts from: see ApplyLayer.
func (t *Tree) Clone() *Tree {
	c := New()
	t.mu.RLock()
	defer t.mu.RUnlock()
	c.epoch, c.trusted, c.before, c.oldest, c.writing = t.epoch, t.trusted, t.before, t.oldest, t.writing
	c.legacy, c.ownerless = t.legacy, t.ownerless
	c.workers, c.pageTarget, c.now = t.workers, t.pageTarget, t.now
	c.root = new(node)
	t.root.cloneTo(c.root, nil)
	return c
}

// cloneTo makes c a copy of n with all below it. Entries of one directory are
// allocated together, which costs a third of the time.
func (n *node) cloneTo(c, parent *node) {
	*c = *n
	c.parent = parent
	if n.dir == nil {
		return
	}
	d := *n.dir
	nodes := make([]node, len(d.children))
	d.children = make([]*node, len(nodes))
	for i, child := range n.dir.children {
		d.children[i] = &nodes[i]
		child.cloneTo(&nodes[i], c)
	}
	c.dir = &d
}

// Layer is what a snapshot has beyond those below it: the upper directory of
// an overlay.
type Layer struct {
	// Open gives access to the upper directory itself, not to what a mount
	// shows.
	Open Opener
	// Marks is how the names of overlayfs's own attributes begin in it:
	// "trusted.overlay." or "user.overlay.".
	Marks string
}

// ApplyLayer enters what a layer changes, so that a tree that described what is
// below the layer describes the two together: a Clone of the parent's tree
// becomes that of a child. It reads the names in the directories of the layer
// and no file; the digests of what changed are read when they are wanted,
// through the mount of the whole.
//
// The stacked layers of a merge are applied one after the other, lowest first.
// A snapshot that is a copy of its parent and not a layer starts from New: it
// cannot be told what changed without looking at every file.
//
// After an error the tree knows nothing, which is right for every snapshot.
func (t *Tree) ApplyLayer(ctx context.Context, l Layer) (err error) {
	select {
	case t.busy <- struct{}{}:
		defer func() { <-t.busy }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	root, err := l.Open(ctx)
	if err != nil {
		t.forgetAll()
		return err
	}
	defer func() { err = errors.Join(err, root.close()) }()
	a := &applier{t: t, ctx: ctx, marks: l.Marks, root: root.at(), files: files{t.fault}, buf: make([]byte, 32<<10)}
	t.mu.Lock()
	t.rev++
	a.rev = t.rev
	if t.legacy {
		t.discard()
	}
	t.mu.Unlock()
	if err := a.dir(""); err != nil {
		t.forgetAll()
		return err
	}
	return nil
}

func (t *Tree) forgetAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rev++
	t.discard()
}

// applier walks through a layer.
type applier struct {
	files
	t     *Tree
	ctx   context.Context //nolint:containedctx // of the one call that the applier lives for
	marks string
	root  *fsat.Root
	rev   uint64
	buf   []byte
}

// mark reads one of overlayfs's attributes; empty if there is none.
func (a *applier) mark(at int, entry, name string) (string, error) {
	value, err := a.xattr(at, entry, a.marks+name)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return "", nil
	}
	return string(value), err
}

// upper is an entry of the layer.
type upper struct {
	dirent
	// whiteout says that it hides what is below, fresh that it is a directory
	// that shows nothing of what is below under its name.
	whiteout, fresh bool
}

// dir enters the directory path of the layer, which is a directory below, too.
func (a *applier) dir(path string) error {
	if err := context.Cause(a.ctx); err != nil {
		return err
	}
	fd, err := a.openDir(a.root, path)
	if err != nil {
		return failed("read the layer's", path, err)
	}
	entries, err := a.read(fd)
	fsat.Close(fd)
	if err != nil {
		return failed("read the layer's", path, err)
	}
	deeper, err := a.enter(path, entries)
	if err != nil {
		return err
	}
	for _, name := range deeper {
		if err := a.dir(joinPath(path, name)); err != nil {
			return err
		}
	}
	return nil
}

func (a *applier) read(fd int) (entries []upper, err error) {
	names, err := a.list(fd, a.buf)
	if err != nil {
		return nil, err
	}
	mark, err := a.mark(fd, "", "opaque")
	if err != nil {
		return nil, err
	}
	for _, d := range names {
		e := upper{dirent: d}
		if e.kind == kindUnknown || e.kind == kindSpecial || (e.kind == kindFile && mark == "x") {
			var st unix.Stat_t
			if err := a.lstat(fd, d.name, &st); err != nil {
				return nil, err
			}
			e.kind = kindOf(st.Mode)
			e.whiteout = st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
			if e.kind == kindFile && st.Size == 0 && mark == "x" {
				// A whiteout may be an empty file with an attribute, in
				// directories that say so. The attribute has no value.
				_, err := a.xattr(fd, d.name, a.marks+"whiteout")
				e.whiteout = err == nil
			}
		}
		if e.kind == kindDir {
			if e.fresh, err = a.fresh(fd, d.name); err != nil {
				return nil, err
			}
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// fresh says that a directory of the layer shows nothing of the one of its
// name below: it is opaque, or shows another one.
func (a *applier) fresh(at int, entry string) (bool, error) {
	opaque, err := a.mark(at, entry, "opaque")
	if err != nil {
		return false, err
	}
	redirect, err := a.mark(at, entry, "redirect")
	return opaque == "y" || redirect != "", err
}

// errMeanwhile is for changes while a layer is entered, which are the caller's
// mistake.
var errMeanwhile = errors.New("the tree was changed while a layer was entered")

// enter enters the entries of a directory, and returns which of them have to
// be looked into. Of what is new only the kind is entered: what a new directory
// holds is read when it is wanted.
func (a *applier) enter(path string, entries []upper) (deeper []string, err error) {
	t := a.t
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.rev != a.rev {
		return nil, errMeanwhile
	}
	n := t.find(path)
	if n == nil || n.dir == nil {
		return nil, nil
	}
	// Its header is the layer's.
	n.flags &= fSaved
	t.touch(n)
	for _, e := range entries {
		c := n.child(e.name)
		switch {
		case e.whiteout:
			if c != nil {
				t.drop(c)
			}
		case e.kind == kindDir && !e.fresh && c != nil && c.kind == kindDir:
			deeper = append(deeper, e.name)
		default:
			c = &node{name: e.name, epoch: t.epoch}
			t.become(c, e.kind)
			t.add(n, c)
		}
	}
	return deeper, nil
}

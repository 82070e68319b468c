package contenthash

import (
	"context"
	"fmt"
	"iter"

	"github.com/containerd/errdefs"
)

// Side is one of two snapshots that are compared: what is known of it, and
// where its files are.
type Side struct {
	Tree *Tree
	Open Opener
}

// Difference is a path at which two snapshots differ.
type Difference struct {
	Path string
	// Change is Add for what only the second has, Delete for what only the
	// first has, Modify for what differs in content, type or metadata. Of a
	// directory Modify means its metadata.
	Change ChangeKind
}

// Compare yields the paths at which two snapshots differ, sorted like a walk,
// every path below a directory that one side lacks included. Directories with
// equal digests are passed without a look at what is in them, and files are
// only read where a digest is not known.
//
// A side that somebody may write to, between Unconfirm and Confirm or Seal, is
// errdefs.ErrFailedPrecondition. An error is the last thing that it yields.
func Compare(ctx context.Context, first, second Side) iter.Seq2[Difference, error] {
	return func(yield func(Difference, error) bool) {
		c := comparer{ctx: ctx, sides: [2]Side{first, second}}
		for _, side := range c.sides {
			if side.Tree.isWriting() {
				yield(Difference{}, fmt.Errorf("compare: somebody may write: %w", errdefs.ErrFailedPrecondition))
				return
			}
			// All digests of both become known.
			if _, err := side.Tree.Checksum(ctx, side.Open, "/", Options{}); err != nil {
				yield(Difference{}, err)
				return
			}
		}
		c.yield = yield
		var tops [2]brief
		for i := range c.sides {
			top, err := c.list(i, "", true)
			if err != nil {
				yield(Difference{}, err)
				return
			}
			tops[i] = top[0]
		}
		c.entries("", tops[0], tops[1])
	}
}

func (t *Tree) isWriting() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.writing
}

type comparer struct {
	ctx   context.Context //nolint:containedctx // of the one call that it lives for
	sides [2]Side
	yield func(Difference, error) bool
}

// brief is an entry as far as it is compared. own is its digest without what
// is below, whole that with it.
type brief struct {
	name       string
	there      bool
	kind       kind
	own, whole sum
}

// brief takes down n; known is false if a digest is missing. The caller holds
// mu for writing.
func (t *Tree) brief(n *node) (b brief, known bool) {
	b = brief{name: n.name, there: true, kind: n.kind, own: n.digest, whole: n.digest}
	known = n.has(fDigest) && t.trusts(n)
	if n.dir != nil {
		// A tree that was loaded may know a directory's digest and not those
		// of the directories in it.
		known = known && t.sumUp(n)
		b.whole = n.dir.sum
	}
	return b, known
}

// list takes down the entries of the directory path of one side, or with root
// the root. The lock of one tree is held at a time.
func (c *comparer) list(side int, path string, root bool) (out []brief, err error) {
	t := c.sides[side].Tree
	for range maxRounds {
		var unknown []string
		out = out[:0]
		t.mu.Lock()
		n := t.find(path)
		switch {
		case root:
			b, known := t.brief(t.root)
			out = append(out, b)
			if !known {
				unknown = append(unknown, "")
			}
		case n != nil && n.dir != nil:
			for _, child := range n.dir.children {
				b, known := t.brief(child)
				out = append(out, b)
				if !known {
					unknown = append(unknown, joinPath(path, child.name))
				}
			}
		}
		t.mu.Unlock()
		if len(unknown) == 0 {
			return out, nil
		}
		for _, p := range unknown {
			if err := c.learn(c.sides[side], p); err != nil {
				return nil, err
			}
		}
	}
	return nil, failed("compare", path, ErrChanged)
}

// learn makes the digests of a path and of what is below known.
func (c *comparer) learn(s Side, path string) error {
	if _, err := s.Tree.Checksum(c.ctx, s.Open, path, Options{}); err != nil {
		return err
	}
	// The digest of a directory may be known without that of its header.
	_, err := s.Tree.Checksum(c.ctx, s.Open, path, Options{ExcludePatterns: []string{"?*"}})
	return err
}

// entries compares what both sides have at path; false ends it.
func (c *comparer) entries(path string, a, b brief) bool {
	if a.there && b.there && a.kind == b.kind && a.whole == b.whole {
		return true
	}
	change, differ := Modify, a.kind != b.kind || a.own != b.own
	switch {
	case !b.there:
		change = Delete
	case !a.there:
		change = Add
	}
	if differ || change != Modify {
		if !c.yield(Difference{Path: path, Change: change}, nil) {
			return false
		}
	}
	var as, bs []brief
	var err error
	if a.kind == kindDir {
		as, err = c.list(0, path, false)
	}
	if b.kind == kindDir && err == nil {
		bs, err = c.list(1, path, false)
	}
	if err != nil {
		c.yield(Difference{}, err)
		return false
	}
	for len(as) > 0 || len(bs) > 0 {
		var x, y brief
		if len(bs) == 0 || len(as) > 0 && as[0].name <= bs[0].name {
			x, as = as[0], as[1:]
		}
		if len(bs) > 0 && (!x.there || x.name == bs[0].name) {
			y, bs = bs[0], bs[1:]
		}
		name := x.name
		if !x.there {
			name = y.name
		}
		if !c.entries(joinPath(path, name), x, y) {
			return false
		}
	}
	return true
}

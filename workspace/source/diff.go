package source

import (
	"iter"

	"github.com/lamina-build/lamina/contenthash"
)

// Changed yields the paths, in path order, at which two trees differ in what
// their digests count: everything below a directory that one of them lacks
// included. Nothing is yielded if and only if the digests are equal.
func Changed(before, now *Tree) iter.Seq[string] {
	return func(yield func(string) bool) {
		d := differ{before: before, now: now, yield: yield, hash: contenthash.NewHash(contenthash.Header{})}
		d.dir(-1, -1, true, true)
	}
}

type differ struct {
	before, now *Tree
	yield       func(string) bool
	hash        *contenthash.Hash
}

// dir compares the entries of two directories, of which one may not be there;
// false ends it.
func (d *differ) dir(b, n int32, inBefore, inNow bool) bool {
	var olds, news []int32
	if inBefore {
		olds = d.before.children(b)
	}
	if inNow {
		news = d.now.children(n)
	}
	for len(olds) > 0 || len(news) > 0 {
		old, new := int32(-1), int32(-1)
		if len(news) == 0 || len(olds) > 0 && d.before.nodes[olds[0]].name <= d.now.nodes[news[0]].name {
			old, olds = olds[0], olds[1:]
		}
		if len(news) > 0 && (old < 0 || d.before.nodes[old].name == d.now.nodes[news[0]].name) {
			new, news = news[0], news[1:]
		}
		if !d.entry(old, new) {
			return false
		}
	}
	return true
}

// entry compares what stands under one name; -1 is nothing.
func (d *differ) entry(old, new int32) bool {
	oldDir := old >= 0 && d.before.nodes[old].typ == Dir
	newDir := new >= 0 && d.now.nodes[new].typ == Dir
	if old < 0 || new < 0 || d.differs(&d.before.nodes[old], &d.now.nodes[new]) {
		path := ""
		if new >= 0 {
			path = d.now.path(new)
		} else {
			path = d.before.path(old)
		}
		if !d.yield(path) {
			return false
		}
	}
	if !oldDir && !newDir {
		return true
	}
	return d.dir(old, new, oldDir, newDir)
}

// differs says whether the digest tells the two entries apart.
func (d *differ) differs(old, new *node) bool {
	return old.typ != new.typ || old.own(d.hash) != new.own(d.hash)
}

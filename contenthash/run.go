package contenthash

import (
	"slices"
)

// run is one question under way. It is answered from the tree alone; where the
// tree does not know, the run notes what is wanted, somebody reads it, and the
// question is asked again.
type run struct {
	t *Tree
	// sums says that digests of directories may be computed and kept: the
	// caller holds mu for writing.
	sums bool
	// missing are paths that were looked for in vain for this run.
	missing map[string]bool

	looks map[string]struct{}
	// scans are directories of which everything below is wanted.
	scans []scan
	// reads are the entries of which the own digest is wanted, by the path of
	// their directory.
	reads map[string][]string
	// readRoot is the same for the root, which has no directory above.
	readRoot bool
}

// scan wants the names below a directory and, with hash, all digests.
type scan struct {
	path string
	hash bool
	// prune leaves directories out.
	prune *pruner
}

func (r *run) forgetWants() {
	r.looks, r.scans, r.reads, r.readRoot = nil, nil, nil, false
}

func (r *run) wantLook(path string) {
	if r.looks == nil {
		r.looks = map[string]struct{}{}
	}
	r.looks[path] = struct{}{}
}

func (r *run) wantScan(s scan) {
	same := func(o scan) bool { return o.path == s.path && o.hash == s.hash }
	if !slices.ContainsFunc(r.scans, same) {
		r.scans = append(r.scans, s)
	}
}

func (r *run) wantRead(n *node) {
	if n.parent == nil {
		r.readRoot = true
		return
	}
	if r.reads == nil {
		r.reads = map[string][]string{}
	}
	dir := n.parent.path()
	r.reads[dir] = append(r.reads[dir], n.name)
}

// own is the digest of the entry itself: of a file, a link, a directory's
// header. ok is false if it has to be read first.
func (r *run) own(n *node) (s sum, ok bool) {
	if n.has(fDigest) && r.t.trusts(n) {
		return n.digest, true
	}
	r.wantRead(n)
	return s, false
}

// whole is the digest of the entry with all that is below it.
func (r *run) whole(n *node) (s sum, ok bool) {
	if n.kind != kindDir {
		return r.own(n)
	}
	if n.dir.hasSum && n.dir.sumEpoch >= r.t.trusted {
		return n.dir.sum, true
	}
	if r.sums && r.t.sumUp(n) {
		return n.dir.sum, true
	}
	r.wantScan(scan{path: n.path(), hash: true})
	return s, false
}

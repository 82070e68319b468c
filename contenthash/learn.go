package contenthash

// This file enters into a tree what was read.

// become makes n an entry of another kind, of which nothing is known.
func (t *Tree) become(n *node, k kind) {
	n.kind, n.dir, n.link = k, nil, nil
	n.flags &= fSaved
	if k == kindDir {
		n.dir = &dirInfo{}
	}
}

// learn enters facts that were read of n. Facts that n has from another time
// stay if the stat data are the same and certain.
func (t *Tree) learn(n *node, got facts) {
	if n.kind != got.kind {
		t.become(n, got.kind)
		t.touch(n)
	}
	if !(n.has(fStat) && n.stat == got.stat && !n.has(fRacy)) {
		old, had := n.digest, n.has(fDigest)
		n.flags &= fSaved
		n.link = nil
		if n.dir != nil {
			n.dir.listed = false
		}
		n.stat = got.stat
		n.set(fStat, true)
		n.set(fRacy, got.racy)
		if had && got.digest != nil && *got.digest == old && n.dir == nil {
			n.set(fDigest, true) // only the stat data are new
			t.pages.touch(n)
		} else {
			t.touch(n)
		}
	}
	if got.link != nil {
		n.link = got.link
	}
	if got.digest != nil && !(n.has(fDigest) && n.digest == *got.digest) {
		n.digest = *got.digest
		n.set(fDigest, true)
		t.touch(n)
	}
	n.epoch = t.epoch
}

// setNames makes names, sorted, the entries of the directory n. Those that are
// known and of the same kind stay as they are.
func (t *Tree) setNames(n *node, names []dirent) {
	d := n.dir
	if d == nil {
		return // not a directory any more
	}
	old := d.children
	children := make([]*node, 0, len(names))
	changed := false
	for _, e := range names {
		for len(old) > 0 && old[0].name < e.name {
			t.pages.touch(old[0])
			old[0].parent = nil
			old, changed = old[1:], true
		}
		if len(old) > 0 && old[0].name == e.name {
			c := old[0]
			old = old[1:]
			if e.kind != kindUnknown && c.kind != e.kind {
				t.become(c, e.kind)
				c.epoch, changed = t.epoch, true
				t.pages.touch(c)
			}
			children = append(children, c)
			continue
		}
		c := &node{name: e.name, parent: n, epoch: t.epoch}
		t.become(c, e.kind)
		t.pages.touch(c)
		children, changed = append(children, c), true
	}
	for _, c := range old {
		t.pages.touch(c)
		c.parent, changed = nil, true
	}
	d.children = children
	if changed || !d.listed {
		d.listed = true
		t.touch(n)
	}
}

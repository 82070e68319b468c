package main

import "slices"

// mutants lists all.
func mutants() []mutant { return slices.Concat(coreMutants(), hashMutants(), layerMutants()) }

// hashMutants are those of the content hashes, and of what stands on them.
func hashMutants() []mutant {
	return []mutant{
		{"contenthash/read.go", "	return s.Ctime > at-int64(fsat.Window(s.Ctime%int64(time.Second)))", "	return false && fsat.Window(at) > 0 && time.Second > 0", "young stat data are believed"},
		{"contenthash/read.go", "	return f, n == st.Size && same(&st, &after), nil", "	return f, n == st.Size || same(&st, &after), nil", "a file that changed while it was read is believed"},
		{"contenthash/read.go", "	f = factsOf(&st, started)\n	if f.kind == kindFile && digest {", "	f = factsOf(&st, started+int64(time.Hour))\n	if f.kind == kindFile && digest {", "stat data are called old by a later clock"},
		{"contenthash/change.go", "		t.before = t.epoch\n", "		t.before = t.trusted\n", "what a writer that was cut off did not tell is vouched for by the next"},
		{"contenthash/change.go", "	t.writing = true\n	t.trusted = t.epoch\n", "	t.writing = true\n", "what is known is believed while somebody writes"},
		{"contenthash/change.go", "			if n != nil {\n				t.drop(n)\n				dir.set(fStat, false)\n			}", "", "a deletion is not entered"},
		{"contenthash/change.go", "	t.rev++\n	if t.legacy {\n		t.discard()\n	}\n	switch {", "	if t.legacy {\n		t.discard()\n	}\n	switch {", "what was read before a change is entered after it"},
		{"contenthash/change.go", "		if t.legacy {\n			t.discard()\n		}\n		t.revalidate()", "		t.revalidate()", "stored digests of BuildKit outlive a writer"},
		{"contenthash/tree.go", "			t.pages.touch(p) // only there sums are stored whatever they span\n		}\n		p.dir.hasSum = false", "			t.pages.touch(p) // only there sums are stored whatever they span\n		}", "the digest of the directory above outlives a change"},
		{"contenthash/checksum.go", "	if t.writing {\n		t.revalidate() // files may have changed since the last question\n	}", "", "while somebody writes what was validated once is believed"},
		{"contenthash/checksum.go", "			clear(r.missing) // what was not there may be there now\n", "", "a path that came meanwhile is still missing"},
		{"contenthash/checksum.go", "	other.ownerless, ", "	_, ", "owners count where they should not"},
		{"contenthash/fetch.go", "	if f.t.rev != f.rev {\n		return\n	}\n	change()", "	change()", "what was read while a change was reported is entered"},
		{"contenthash/fetch.go", "		if !same(&st, &after) {\n			continue\n		}", "", "a directory that changed while it was read is believed"},
		{"contenthash/fetch.go", "	defer func() { enter() }() // what was read is kept whatever happens\n", "	defer func() { if len(nodes) == 0 { enter() } }()\n", "what was read before an error is lost"},
		{"contenthash/layer.go", "	return opaque == \"y\" || redirect != \"\", err", "	return opaque == \"never\" || redirect != \"\", err", "an opaque directory shows what is below"},
		{"contenthash/layer.go", "	return opaque == \"y\" || redirect != \"\", err", "	return opaque == \"y\" || redirect == \"never\", err", "a redirected directory shows what is below under its name"},
		{"contenthash/layer.go", "			if c != nil {\n				t.drop(c)\n			}\n", "", "a whiteout hides nothing"},
		{"contenthash/layer.go", "	n.flags &= fSaved\n	t.touch(n)\n	for _, e", "	for _, e", "the header of a directory is the parent's"},
		{"contenthash/decode.go", "	if data[1] != pageVersion {", "	if false {", "a page of another version is read"},
		{"contenthash/decode.go", "	if crc != p.crc {", "	if false && crc != p.crc {", "a page of another save is read"},
		{"contenthash/decode.go", "	if crc != pageCRC(name, data[pageHead:]) {", "	if false {", "a damaged page is read"},
		{"contenthash/decode.go", "		out[pageHead] &^= iTrust // trustNone", "		_ = out", "a reopened record's tree stays confirmed"},
		{"contenthash/pages.go", "	if t.writing {\n		return trustNone\n	}", "", "a tree that is being written to is saved as confirmed"},
		{"contenthash/filter.go", "	if takesPart && !(n.kind == kindDir && f.q.slash && fn == f.p) {", "	if takesPart {", "the header of what was asked for with a slash counts"},
		{"contenthash/lookup.go", "			cur = \"\"\n", "", "an absolute link leads on from its place"},
		{"contenthash/list.go", "	if path == \"\" {\n		l.buf = append(l.buf, 0)\n	}\n", "", "the directory itself has no name in a list"},
		{"contenthash/sum.go", "	i, _ := c.index(\"\\xff\")", "	i := len(c.dir.children)", "entries with 0xff are counted once"},
		{"checksum/writer.go", "	if unreported {\n		w.tree.Seal()\n	} else {\n		w.tree.Confirm()\n	}", "	_ = unreported\n	w.tree.Confirm()", "a writer that lost count vouches for all"},
		{"checksum/writer.go", "		saved.Failed()\n		w.tree.Unconfirm()\n", "		saved.Failed()\n", "after a commit that failed a tree counts as confirmed"},
		{"checksum/writer.go", "		tree.Tree.Save().Failed() // what is stored is another tree, or none: the next save has all", "		_ = tree", "a writer takes another keeper's pages for its own"},
		{"checksum/writer.go", "	k.forget(s)\n	w, err", "	w, err", "a reopened id is still answered"},
		{"checksum/tree.go", "!bytes.Equal(now, t.stored)", "false && !bytes.Equal(now, t.stored)", "pages of two keepers are mixed"},
		{"checksum/tree.go", "	if errors.Is(err, errdefs.ErrDataLoss) {\n			damage, err = err, nil", "	if false {\n			damage, err = err, nil", "a damaged tree is an error for ever"},
		{"checksum/inherit.go", "slices.Equal(names(below), names(layers[:n]))", "slices.Equal(names(below), names(below))", "what an ancestor with other layers knows is inherited"},
		{"checksum/inherit.go", "			if inMemory != nil {\n				tree = tree.Clone()\n			}\n", "", "a child changes the tree of its parent"},
		{"checksum/keeper.go", "			if s.users == 0 && !s.unsafe &&", "			if s.users == 0 &&", "a tree is forgotten before it is saved"},
		{"checksum/keeper.go", "	s.unsafe = !k.closed\n", "", "what was learned is not saved in the background"},
		{"workspace/source/racy.go", "	return n.mtime.settled(started) && n.ctime.settled(started)", "	return true", "a file changed within the clock's tick is not read again"},
		{"workspace/source/racy.go", "	return c.set && c.ctime.settled(synced)", "	return c.set", "a copy changed within the clock's tick is left"},
		{"workspace/source/digest.go", "	h := contenthash.Header{Mode: n.fileMode(), Size: n.size, Linkname: n.target, Xattrs: n.xattrs}", "	h := contenthash.Header{Mode: n.fileMode(), Size: n.size, Linkname: n.target}", "attributes of a source do not count"},
		{"workspace/source/decode.go", "				t.started, t.synced = stamp{}, stamp{}\n", "", "digests of an earlier version are believed"},
		{"workspace/source/check.go", "			return verify, nil // attributes changed, and maybe the content", "			return attrs, nil", "a new content with new attributes is not copied"},
	}
}

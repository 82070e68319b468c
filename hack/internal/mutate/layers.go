package main

// layerMutants are those of layers: blobs, extraction, merges and diffs.
func layerMutants() []mutant {
	return []mutant{
		{"cache/extractlayer.go", "	if x.rec.DiffID != \"\" && done.DiffID != x.rec.DiffID {", "	if false && done.DiffID != x.rec.DiffID {", "a wrong layer gets the name of a right one"},
		{"cache/extractlayer.go", "			break\n		}\n	}\n	return errors.Join(errs...)", "		}\n		break\n	}\n	return errors.Join(errs...)", "one damaged variant is the end"},
		{"cache/extract.go", "			if rec.Blobs[i].Digest == x.from {", "			if false {", "what was applied stays a claim"},
		{"cache/extractstack.go", "own := list[len(list)-1]; own.Clean {", "own := list[len(list)-1]; own.Clean || true {", "a raw layer is stacked"},
		{"cache/extractstack.go", "	if m.pool.mounted(id) {\n		return nil\n	}\n", "", "a layer is changed while somebody looks at it"},
		{"cache/layers.go", "	for _, one := range slices.Backward(lists) {", "	for _, one := range lists {", "inputs of a merge change places"},
		{"cache/layers.go", "	if rec.Op == metadata.Diff {\n		list = difference(rec.ID, lists)\n	} else {", "	{", "a diff is a merge"},
		{"cache/getbyblob.go", "	if known != \"\" && known != d", "	known = d\n		if known != d", "a claim is believed against what is known"},
		{"cache/getbyblob.go", "	return l.equal(tx, tx.Children(parentID(l.parent)))", "	return found, nil", "a layer over a parent without a ChainID is made twice"},
		{"cache/remotes.go", "		return src.blob.Claimed && (o.Verify", "		return false && (o.Verify", "a blob is given out on a claim"},
		{"cache/blob.go", "				b.Claimed, b.DiffID = false, wrong.Holds\n", "", "a lie that was found out is forgotten"},
		{"cache/blob.go", "	if b.Claimed || b.DiffID == \"\"", "	if true || b.DiffID == \"\"", "a lie that was found out is tried again"},
		{"cache/remotes.go", "	if want := b.m.current(e).DiffID; d != want {", "	if want := b.m.current(e).DiffID; d == \"\" {", "what is read of a claim is not compared"},
		{"cache/blob.go", "!list[0].stored || list[0].blob.Claimed {", "!list[0].stored {", "a claim is what a layer can be made of again"},
		{"cache/blobintent.go", "	if err == nil && !named {\n", "	if err == nil && !named && false {\n", "blobs outlive their records"},
		{"cache/ingest.go", "	if err := b.intend(got); err != nil {\n		return nil, err\n	}\n", "", "a blob has no intent"},
		{"cache/sizer.go", "	if err == nil && rec.Raw {\n", "	if err == nil && false {\n", "cleaned copies are not counted"},
		{"snapshot/clean.go", "c.links(st) > 1 {\n		return false, nil", "c.links(st) > 1<<30 {\n		return false, nil", "one name of several is dropped"},
		{"snapshot/clean.go", "	if opaque == \"y\" {\n", "	if opaque == \"never\" {\n", "directories that were renamed into place hide what is below"},
		{"snapshot/clean.go", "	if white {\n", "	if false && white {\n", "whiteouts of a cleaned layer show"},
		{"layer/behind.go", "				b.failed.CompareAndSwap(nil, &err)\n			}\n		}\n", "			}\n		}\n", "a file that could not be written is applied"},
	}
}

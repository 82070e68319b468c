package main

// mutant is one thing that could have been written wrong.
type mutant struct {
	file     string
	old, new string // the old text stands in the file exactly once
	breaks   string
}

// coreMutants are those of the state machine, the store and the drivers.
func coreMutants() []mutant {
	return []mutant{
		// The state machine.
		{"cache/new.go", "	e, done := m.announce(rec.ID)\n	defer done()\n", "	e, done := m.announce(rec.ID)\n	done()\n	m.lock()\n	e = m.entryLocked(rec.ID)\n	m.unlock()\n	defer m.drop(e)\n", "a prune may take a new record before its handle is there"},
		{"cache/new.go", "		prec, err := m.finalize(ctx, pe)\n", "		prec, err := m.current(pe), error(nil)\n", "the parent of a new record is not finalized"},
		{"cache/new.go", "	if pe != nil && !o.Retain {", "	if pe != nil && o.Retain {", "an unrecorded child does not pin its parent"},
		{"cache/new.go", "		return nil, errors.Join(fmt.Errorf(\"prepare a snapshot over %q: %w\", parentKey, fullDisk(err)), m.discardKey(ctx, rec.Key))", "		return nil, fmt.Errorf(\"prepare a snapshot over %q: %w\", parentKey, fullDisk(err))", "a Prepare whose reply is lost leaves a snapshot"},
		{"cache/new.go", "			return nil, errors.Join(fmt.Errorf(\"record the new snapshot: %w\", err), m.discardKey(ctx, rec.Key))", "			return nil, fmt.Errorf(\"record the new snapshot: %w\", err)", "a New whose transaction fails leaves a snapshot"},
		{"cache/new.go", "		rec.OnPowerCut = metadata.Keep", "		rec.OnPowerCut = metadata.Drop", "what should be kept over a power cut is dropped"},
		{"cache/new.go", "	h.noTouch = true // to be made is no use", "", "to be made counts as a use"},
		{"cache/commit.go", "	if m.pool.writable(e.id) {", "	if false {", "a record is committed while it is mounted writable"},
		{"cache/commit.go", "		rec.State = metadata.Committed\n", "		rec.State = metadata.Finalized\n", "a commit claims to be final"},
		{"cache/commit.go", "		rec.Durable = false\n", "", "a commit keeps the mark of an earlier sync"},
		{"cache/commit.go", "rec.Interrupted, rec.Retain, rec.RetainAfter = false, rec.RetainAfter, false", "rec.Interrupted, rec.RetainAfter = false, false", "a commit does not bring the former policy back"},
		{"cache/commit.go", "		from.ClearValue(v.Name)\n", "		_ = from\n", "a value that moves stays with the parent"},
		{"cache/commit.go", "	m.recordedLocked(e)\n	m.dropHandleLocked(r.h)\n", "	m.dropHandleLocked(r.h)\n", "a committed record counts as unrecorded"},
		{"cache/commit.go", "	m.dropHandleLocked(r.h)\n	return &ImmutableRef", "	return &ImmutableRef", "the writer's handle lives on after a commit"},
		{"cache/get.go", "			if !e.recorded {", "			if false {", "a mutable that is being given up is called mutable"},
		{"cache/get.go", "		h.noTouch, h.caller = o.NoUpdate, from", "		h.noTouch, h.caller = false, from", "a look counts as a use"},
		// Finalize.
		{"cache/finalize.go", "testHold(m.root, e.id, false); err != nil", "testHold(m.root, e.id+\"x\", false); err != nil", "a record is finalized under a process that writes in it"},
		{"cache/finalize.go", "		if serr != nil || !done {\n			return errors.Join(err, serr)\n		}", "		_, _ = serr, done\n		return err", "a Commit of the driver whose reply is lost cannot be repeated"},
		{"cache/finalize.go", "	delete(m.unswapped, e.id)\n	delete(m.written", "	delete(m.written", "a finished finalize still counts as half done"},
		{"cache/ref.go", "	rec.Was, rec.Key = rec.Key, string(rec.ID)", "	rec.Key = string(rec.ID)", "the former name of a snapshot is forgotten at once"},
		{"cache/finalize.go", "	if done, err := m.awaitsSwap(ctx, id); err != nil || done {\n		return err\n	}\n", "", "a finalize that is repeated asks the driver again"},
		{"cache/finalize.go", "	rec, err := m.change(context.WithoutCancel(ctx), e,", "	rec, err := m.change(ctx, e,", "a cancelled finalize stops between driver and store"},
		// Handles.
		{"cache/ref.go", "	if h.released {\n		return\n	}\n	e := h.e\n	e.touched", "	e := h.e\n	e.touched", "a second release counts as a use"},
		{"cache/entry.go", "	if h.released {\n		return false\n	}\n	h.released = true", "	h.released = true", "a second release takes another handle's count"},
		{"cache/entry.go", "	if holders := m.holdersLocked(e); len(holders) > 0 {", "	if holders := m.holdersLocked(e); len(holders) > 1 {", "one holder does not keep a record"},
		{"cache/entry.go", "	if h.released {\n		return fmt.Errorf(\"handle on record", "	if false {\n		return fmt.Errorf(\"handle on record", "a released handle can be used"},
		{"cache/entry.go", "	if e.rec == nil || rec.Revision >= e.rec.Revision {", "	if e.rec == nil {", "what a transition wrote is not seen"},
		{"cache/entry.go", "	e.gone = true\n", "", "who waited for a removal takes the record for living"},
		{"cache/ref.go", "	h.noTouch = r.h.noTouch\n", "", "a clone of a look counts as a use"},
		{"cache/ref.go", "	if m.pool.mounted(e.id) {", "	if false {", "a mutable is discarded under its mount"},
		{"cache/ref.go", "	for _, p := range e.parents {\n		m.unuseLocked(p)\n	}\n	e.parents, e.attachments = nil, nil", "	e.parents, e.attachments = nil, nil", "a discarded child pins its parent for ever"},
		{"cache/mount.go", "	t.m.unuseLocked(t.e)\n", "", "an unmounted record stays in use"},
		// Reopen.
		{"cache/reopen.go", "	ne, done := m.announce(id)\n	defer done()\n", "	ne, done := m.announce(id)\n	done()\n	m.lock()\n	ne = m.entryLocked(id)\n	m.unlock()\n	defer m.drop(ne)\n", "a prune may take a reopened record before its handle is there"},
		{"cache/reopen.go", "	if mine == nil {\n", "	if false {\n", "a record is reopened under another process"},
		{"cache/reopen.go", "		next.Retain, next.RetainAfter, next.Interrupted = true, rec.Retain, true", "		next.RetainAfter, next.Interrupted = rec.Retain, true", "an interrupted record is not retained"},
		{"cache/reopen.go", "attach: map[string][]byte{FileList: nil}", "attach: map[string][]byte{}", "a file list outlives its content"},
		{"cache/reopen.go", "next.Size, next.Durable, next.Verified = metadata.SizeUnknown, false, false", "next.Size, next.Verified = metadata.SizeUnknown, false", "a reopened record counts as synced"},
		{"cache/reopen.go", "	defer func() { leave(gone) }() // also if o.Edit panics", "	defer func() { leave(gone && false) }()", "a reopened id is still known"},
		{"cache/reopen.go", "	if unswapped {\n", "	if unswapped && false {\n", "a half finalized record is reopened"},
		{"cache/reopen.go", "		e.leaving = nil\n		m.publishLocked(e, rec)", "		m.publishLocked(e, rec)", "a continued record seems to leave for ever"},
		// Removal and prune.
		{"cache/remove.go", "	if p, ok := r.plan[v.e.id]; ok && p.revision != rec.Revision {", "	if p, ok := r.plan[v.e.id]; ok && p.revision > rec.Revision {", "a plan removes what has changed since"},
		{"cache/remove.go", "	} else if busy {\n		return &LockedError{ID: v.e.id, Holders: holders}\n	}\n	if v.rec.State", "	} else if busy && len(holders) < 0 {\n		return &LockedError{ID: v.e.id, Holders: holders}\n	}\n	if v.rec.State", "what another process holds is removed"},
		{"cache/remove.go", "		if r.victims[child] == nil || r.failed[child] != nil {", "		if r.victims[child] == nil {", "a parent is removed under a child that stays"},
		{"cache/remove.go", "				if inside[p]--; inside[p] == 0 && r.known(p) {", "				if inside[p]--; r.known(p) {", "parents go before their children"},
		{"cache/remove.go", "			if err := r.m.driver.Restore(ctx, p); err != nil {", "			if err := error(nil); p.Key != \"\" && err != nil {", "a removal that fails loses the snapshot"},
		{"cache/remove.go", "			if m.discardPending(ctx, p) != nil {", "			if false && p.Key != \"\" {", "the bytes of what was removed stay"},
		{"cache/remove.go", "	for _, key := range []string{rec.Key, rec.Was, string(rec.ID)} {", "	for _, key := range []string{rec.Key} {", "a removal leaves the snapshot under its other name"},
		{"cache/remove.go", "			} else if !errors.Is(err, errdefs.ErrNotFound) {", "			} else if false {", "a record is removed although its snapshot cannot be"},
		{"cache/prune.go", "	victims = victims[n:]", "	victims = victims[:0]", "a prune ends after its first batch"},
		{"cache/prune.go", "		r.Size, r.Held = e.Size, e.Held", "		r.Size = e.Size", "a plan removes what is held"},
		// Holds.
		{"cache/hold.go", "	if alone && sameFile(f, h.path) {", "	if (alone || true) && sameFile(f, h.path) {", "a hold file is unlinked under another holder"},
		{"cache/hold.go", "	if write {\n		how = unix.F_WRLCK\n	}\n	if busy, err = locked", "	if !write {\n		how = unix.F_WRLCK\n	}\n	if busy, err = locked", "readers keep readers out, and writers in"},
		{"cache/hold.go", "	m.pool.detach(e.id)\n	m.lock()", "	m.lock()", "a detached mount ends with the manager"},
		{"cache/hold.go", "	if !recorded {\n		return nil, fmt.Errorf(\"record %s is in memory only", "	if !recorded && false {\n		return nil, fmt.Errorf(\"record %s is in memory only", "a snapshot that nothing names is detached"},
		{"cache/hold.go", "	delete(m.written, e.rec.Key)\n	h.noTouch", "	h.noTouch", "after a detach no other writer is looked for"},
		// Settling.
		{"cache/settle.go", "		if owner != \"\" && (children > 0 || s.held(owner)) {", "		if owner != \"\" && (children > 1<<30 || s.held(owner)) {", "a removal with children is finished"},
		{"cache/settle.go", "	return rec.State != metadata.Lazy && !rec.Durable", "	return false", "data that was not synced is taken for good after a power cut"},
		{"cache/settle.go", "			s.fixes = append(s.fixes, rec.ID)\n", "", "a lost swap is not made up for"},
		{"cache/settle.go", "		err := m.driver.Commit(ctx, string(rec.ID), rec.Was)", "		err := error(nil)", "a lost rename is not repeated"},
		{"cache/settle.go", "		meta.BootID = m.bootID\n", "", "every open is taken for one in another boot"},
		{"cache/settledrop.go", "			if errors.Is(err, errdefs.ErrNotFound) && !s.named(tx, key) {", "			if false && !s.named(tx, key) {", "what nobody committed stays"},
		{"cache/settledrop.go", "	if err == nil && rec.State == metadata.Committed && string(rec.ID) == key {", "	if false && err == nil && rec.State == metadata.Committed && string(rec.ID) == key {", "what a lost swap needs is removed"},
		{"cache/settledrop.go", "		for child := range tx.Children(top.id) {", "		for child := range tx.Children(\"\") {", "descendants of what was dropped stay"},
		{"cache/marks.go", "	if k.dirty {\n		return nil\n	}\n	if err := k.step(\"mark dirty\")", "	if true {\n		return nil\n	}\n	if err := k.step(\"mark dirty\")", "a store never counts as dirty"},
		{"cache/manager.go", "	return m.leftover || len(m.unswapped) > 0 || len(m.orphans) > 0", "	return m.leftover", "a close calls clean what is not"},
		// The store.
		{"metadata/derive.go", "		case side < 0:\n			if err := tx.writeRow(old[0], false); err != nil {", "		case side < 0:\n			if err := error(nil); err != nil {", "index entries outlive their values"},
		{"metadata/derive.go", "		return !r.Durable || r.Was != \"\"", "		return !r.Durable", "a record with a former name counts as settled"},
		{"metadata/derive.go", "	if err != nil || before == after {", "	if true || before == after {", "totals by sharing are not kept"},
		{"metadata/derive.go", "		if r == old {\n			n = -1\n		}", "", "totals only grow"},
		{"metadata/tx.go", "	if r.Revision != old.Revision {", "	if r.Revision > old.Revision {", "an old state overwrites a newer one"},
		{"metadata/tx.go", "	n.UsageCount, n.LastUsed = old.UsageCount, old.LastUsed\n", "", "uses are lost by a Put"},
		{"metadata/tx.go", "	if err := tx.childless(id); err != nil {\n		return err\n	}\n	if err := tx.removeAttachments", "	if err := tx.removeAttachments", "a parent is deleted under its children"},
		{"metadata/tx.go", "	n.Revision, n.attachments, n.unknown = 1, o.attachments, o.unknown", "	n.Revision, n.unknown = 1, o.unknown", "attachments are lost by a reopen"},
		{"metadata/keys.go", "	k = binary.BigEndian.AppendUint16(k, uint16(len(first)))", "	k = binary.BigEndian.AppendUint16(k, 0)", "an exact search finds longer keys"},
		{"metadata/frame.go", "	return crc32.Update(crc32.Checksum(key, table), table, payload)", "	return crc32.Checksum(payload, table)", "a value at another key is not noticed"},
		{"metadata/frame.go", "	if want, got := binary.BigEndian.Uint32(value[1:]), frameSum(key, payload); want != got {", "	if want, got := binary.BigEndian.Uint32(value[1:]), frameSum(key, payload); false && want != got {", "damage is not noticed"},
		{"metadata/group.go", "			return true, false\n", "			return false, true\n", "half of a failed update is written"},
		{"metadata/group.go", "		l.s.uses.land(false)\n", "", "uses are lost when an update ends its goroutine"},
		{"metadata/uses.go", "	if !written {\n", "	if false {\n", "uses are lost with a failed transaction"},
		{"metadata/uses.go", "	u.count += o.count\n", "", "two uses count as one"},
		// The drivers.
		{"snapshot/remove.go", "	err = requireChildless(key, t.at(trash))\n	if err == nil {", "	if err == nil {", "a name is removed while it gets a child"},
		{"snapshot/remove.go", "		if _, ok := splitTrash(name); !ok || t.marked(&t.held, name) {\n			continue\n		}\n		e := entry{dirTrash, name}\n		if n, err", "		if _, ok := splitTrash(name); !ok {\n			continue\n		}\n		e := entry{dirTrash, name}\n		if n, err", "a cleanup takes what may be restored"},
		{"snapshot/commit.go", "	if e.dir != dirActive || s.View {", "	if e.dir != dirActive {", "a view is committed"},
		{"snapshot/commit.go", "	s.Usage = &usage{Inodes: used.Inodes, Size: used.Size}\n", "", "a committed snapshot has no usage"},
		{"snapshot/settle.go", "			if n > 0 {\n				parents = append(parents, e)\n				continue\n			}", "			_ = n\n", "a removal that was about to be refused is finished"},
		{"snapshot/name.go", "		if plain(c) && (c != '.' || i > 0) {", "		if plain(c) || c == '/' {", "a key leads out of its directory"},
	}
}

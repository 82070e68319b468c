package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// Count is a number of records and the bytes that they occupy.
type Count struct {
	Records int64
	Bytes   int64
}

// Usage is what a store occupies on the disk, in bytes of allocated blocks.
// Every snapshot, blob, removal under way and the database is in it once.
type Usage struct {
	// Total is Snapshots + Blobs + Database + Pending.
	Total     int64
	Snapshots int64
	Blobs     int64
	// Database is the record store, and the directories of our own content
	// store, which no removal frees.
	Database int64
	// Pending is what removals that are under way will free.
	Pending int64
	// InUse + Reclaimable is Snapshots + Blobs: what somebody holds with all
	// that lies below it, and the rest.
	InUse       int64
	Reclaimable int64
	// Shared is the part of Snapshots that has two children or more.
	Shared  int64
	Records int64
	ByType  map[string]Count
	ByState map[string]Count
	// FSTotal and FSFree describe the file system of the store.
	FSTotal int64
	FSFree  int64
	// Entries has each record, sorted by id.
	Entries []UsageEntry
	// unrecorded are the snapshots that no record names yet.
	unrecorded []unrecorded
}

// unrecorded is a snapshot that no record names yet.
type unrecorded struct {
	labels map[string]string // of the mutable in memory, if it is this process's
	size   int64
}

// UsageEntry is one record's part of Usage.
type UsageEntry struct {
	Record   *Record
	Size     int64
	Children int
	// InUse says that somebody holds the record, or a descendant of it.
	InUse bool
	// Held says who holds the record itself, empty if nobody does.
	Held string
}

// LabelCount is the records of one value of a label.
type LabelCount struct {
	Value string
	// Set is false for the records without the label.
	Set bool
	Count
}

// ByLabel sums up the records by their value of a label, sorted by value; those
// without it are a group of their own, the last. The sum of all is Snapshots
// and Records: what has no record yet counts where its labels say.
func (u *Usage) ByLabel(label string) []LabelCount {
	type key struct {
		value string
		set   bool
	}
	sums := map[key]Count{}
	add := func(labels map[string]string, records, bytes int64) {
		value, set := labels[label]
		c := sums[key{value, set}]
		sums[key{value, set}] = Count{c.Records + records, c.Bytes + bytes}
	}
	for i := range u.Entries {
		add(u.Entries[i].Record.Labels, 1, u.Entries[i].Size)
	}
	for _, l := range u.unrecorded {
		add(l.labels, 0, l.size)
	}
	out := make([]LabelCount, 0, len(sums))
	for k, c := range sums {
		out = append(out, LabelCount{Value: k.value, Set: k.set, Count: c})
	}
	slices.SortFunc(out, func(a, b LabelCount) int {
		if a.Set != b.Set {
			if a.Set {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Value, b.Value)
	})
	return out
}

// DiskUsage measures the store. It takes no handle and changes no counter.
// Mutable records, and those whose size is not known yet, are measured, several
// at once. keep, if not nil, picks the records that are counted; it sees them
// with their size.
func (m *Manager) DiskUsage(ctx context.Context, keep func(*Record) bool) (*Usage, error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	m.tidy(ctx)
	s, err := m.survey(ctx)
	if err != nil {
		return nil, err
	}
	u := &Usage{ByType: map[string]Count{}, ByState: map[string]Count{}}
	u.Entries = s.entries[:0]
	for _, e := range s.entries {
		e.Record.Size = e.Size
		if keep == nil || keep(e.Record) {
			u.Entries = append(u.Entries, e)
			u.add(&e)
		}
	}
	slices.SortFunc(u.Entries, func(a, b UsageEntry) int { return cmpString(string(a.Record.ID), string(b.Record.ID)) })
	clear(s.entries[len(u.Entries):]) // so that what was left out is garbage
	if keep == nil {
		// Nobody asked for a part: what has no record yet counts, too.
		u.unrecorded = s.unrecorded
		for _, l := range s.unrecorded {
			u.Snapshots += l.size
			u.InUse += l.size
		}
	}
	if err := m.measureRest(ctx, u); err != nil {
		return nil, err
	}
	u.Reclaimable = u.Snapshots + u.Blobs - u.InUse
	u.Total = u.Snapshots + u.Blobs + u.Database + u.Pending
	return u, nil
}

func (u *Usage) add(e *UsageEntry) {
	u.Records++
	u.Snapshots += e.Size
	if e.InUse {
		u.InUse += e.Size
	}
	if e.Children > 1 {
		u.Shared += e.Size
	}
	t := u.ByType[e.Record.Type]
	u.ByType[e.Record.Type] = Count{t.Records + 1, t.Bytes + e.Size}
	s := u.ByState[e.Record.State.String()]
	u.ByState[e.Record.State.String()] = Count{s.Records + 1, s.Bytes + e.Size}
}

// tidy lets the driver give up what nobody needs any more, such as the work
// directories of what was finalized meanwhile, so that it need not be counted.
func (m *Manager) tidy(ctx context.Context) {
	if m.readOnly {
		return
	}
	if err := m.driver.Cleanup(context.WithoutCancel(ctx)); err != nil {
		m.log.Warn("what nobody needs any more could not be cleaned up; it is tried again later", "error", err)
	}
}

// survey is all records as they are at one moment, with sizes and holders.
type survey struct {
	entries []UsageEntry
	// unrecorded are the snapshots that no record names yet.
	unrecorded []unrecorded
}

func (m *Manager) survey(ctx context.Context) (*survey, error) {
	s := &survey{}
	m.lock()
	hint := m.surveyed
	m.unlock()
	damaged := false
	err := m.store.View(ctx, func(tx *metadata.Tx) error {
		s.entries = make([]UsageEntry, 0, hint)
		for rec, err := range tx.Records() {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				m.log.Warn("record cannot be read", "error", err)
				damaged = true
				continue
			}
			s.entries = append(s.entries, UsageEntry{Record: rec, Size: rec.Size})
		}
		if damaged {
			s.protectParents(tx)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	at := make(map[ID]int, len(s.entries))
	for i := range s.entries {
		at[s.entries[i].Record.ID] = i
	}
	if err := m.surveySizes(ctx, s); err != nil {
		return nil, err
	}
	if err := m.surveyUnrecorded(ctx, s, at); err != nil {
		return nil, err
	}
	m.surveyHolders(s, at)
	s.spread(at)
	return s, nil
}

// protectParents notes the parents of records that cannot be read: their rows
// still say that somebody needs them.
func (s *survey) protectParents(tx *metadata.Tx) {
	known := map[ID]int{}
	for i := range s.entries {
		for _, p := range s.entries[i].Record.Parents {
			known[p]++
		}
	}
	for i := range s.entries {
		if id := s.entries[i].Record.ID; tx.ChildCount(id) > known[id] {
			s.entries[i].Held = "a child that cannot be read"
		}
	}
}

// measured is a size that no transaction has written yet: it stands for one
// revision of a record.
type measured struct {
	revision uint64
	size     int64
}

// surveySizes fills in the sizes that the records do not have. A writer may be
// at work in a mutable one, so that is measured each time; what is found out
// of the others is kept in memory until somebody writes it.
func (m *Manager) surveySizes(ctx context.Context, s *survey) error {
	began := m.copies.began()
	m.lock()
	known := m.measured // it is replaced, never written to
	if began == nil || *began != m.measuredAfter {
		known = nil // a cleaned copy has come to be, which counts as its record's
	}
	m.unlock()
	now := map[ID]measured{}
	var recs []*Record
	var where []int
	for i := range s.entries {
		e := &s.entries[i]
		if e.Record.Key == "" {
			e.Size = max(e.Size, 0)
		} else if e.Record.State == metadata.Mutable {
			recs, where = append(recs, e.Record), append(where, i)
		} else if e.Size != metadata.SizeUnknown {
			continue
		} else if k, ok := known[e.Record.ID]; ok && k.revision == e.Record.Revision {
			e.Size, now[e.Record.ID] = k.size, k
		} else {
			recs, where = append(recs, e.Record), append(where, i)
		}
	}
	sizes, err := m.measure(ctx, recs)
	if err != nil {
		return err
	}
	for k, i := range where {
		rec := s.entries[i].Record
		s.entries[i].Size = sizes[k]
		if rec.State != metadata.Mutable {
			now[rec.ID] = measured{rec.Revision, sizes[k]}
			m.sizer.add(rec.ID)
		}
	}
	m.lock()
	defer m.unlock()
	m.surveyed = len(s.entries)
	if ended := m.copies.began(); began != nil && ended != nil && *began == *ended {
		m.measured, m.measuredAfter = now, *began
	}
	return nil
}

// surveyUnrecorded measures the snapshots that are being made: their names are
// in the driver, and no record has them. Their parents are in use.
func (m *Manager) surveyUnrecorded(ctx context.Context, s *survey, at map[ID]int) error {
	pending, err := m.driver.Pending(ctx)
	if err != nil {
		return fmt.Errorf("list snapshots without a record: %w", err)
	}
	pending = slices.DeleteFunc(pending, func(p snapshot.Pending) bool { return p.Kind != snapshot.PendingActive })
	if len(pending) == 0 {
		return nil
	}
	byKey := make(map[string]int, len(s.entries))
	for i := range s.entries {
		for _, key := range driverKeys(s.entries[i].Record) {
			byKey[key] = i
		}
	}
	for _, p := range pending {
		if _, recorded := byKey[p.Key]; recorded {
			continue
		}
		info, err := m.driver.Stat(ctx, p.Key)
		var size int64
		if err == nil {
			size, err = m.sizeOfKey(ctx, p.Key)
		}
		if is(err, errdefs.ErrNotFound) {
			continue // it went, or was committed, meanwhile
		}
		if err != nil {
			return fmt.Errorf("measure snapshot %s: %w", p.Key, err)
		}
		s.unrecorded = append(s.unrecorded, unrecorded{m.labelsInMemory(madeFor(p.Key)), size})
		if i, ok := byKey[info.Parent]; ok && info.Parent != "" {
			s.entries[i].Held = cmp.Or(s.entries[i].Held, "a snapshot that is being made on top of it")
		}
	}
	return nil
}

// labelsInMemory are those of a mutable that has no record yet.
func (m *Manager) labelsInMemory(id ID) map[string]string {
	m.lock()
	defer m.unlock()
	if e := m.entries[id]; e != nil && e.rec != nil {
		return e.rec.Labels
	}
	return nil
}

// surveyHolders notes who holds what: this process and others.
func (m *Manager) surveyHolders(s *survey, at map[ID]int) {
	m.lock()
	for id, e := range m.entries {
		i, ok := at[id]
		if !ok {
			continue
		}
		held := &s.entries[i].Held
		switch {
		case *held != "":
		case len(e.mounts) > 0:
			*held = string(HolderMount)
		case len(e.handles) > 0:
			*held = "handle"
		case e.uses > 0 || e.leaving != nil:
			*held = string(HolderOperation)
		}
	}
	m.unlock()

	names, err := os.ReadDir(filepath.Join(m.root, "holds"))
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		m.log.Warn("holders cannot be listed", "error", err)
	}
	if len(names) == 0 {
		return
	}
	byFile := make(map[string]int, len(at))
	for id, i := range at {
		byFile[fileName(id)] = i
	}
	for _, n := range names {
		i, ok := byFile[n.Name()]
		if !ok || !holdFileBusy(m.root, n.Name()) {
			continue
		}
		s.entries[i].Held = string(HolderProcess)
		if holders, busy, err := testHold(m.root, s.entries[i].Record.ID, true); err == nil && busy && len(holders) > 0 {
			s.entries[i].Held = holders[0].String()
		}
	}
}

// spread counts children, and lets what is held keep all that lies below it.
func (s *survey) spread(at map[ID]int) {
	var stack []int
	for i := range s.entries {
		if s.entries[i].Held != "" {
			s.entries[i].InUse = true
			stack = append(stack, i)
		}
		seen := s.entries[i].Record.Parents
		for k, p := range seen {
			if j, ok := at[p]; ok && !slices.Contains(seen[:k], p) {
				s.entries[j].Children++
			}
		}
	}
	for len(stack) > 0 {
		i := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		for _, p := range s.entries[i].Record.Parents {
			if j, ok := at[p]; ok && !s.entries[j].InUse {
				s.entries[j].InUse = true
				stack = append(stack, j)
			}
		}
	}
}

// Used is the bytes of all records whose size is known, read from the store's
// totals: it costs the same whatever the number of records.
func (m *Manager) Used(ctx context.Context) (bytes int64, err error) {
	totals, err := m.Totals(ctx)
	for _, t := range totals {
		bytes += t.Bytes
	}
	return bytes, err
}

// Reclaimable is what could be removed now, of Used: all that nobody in this
// process or another holds, nor has a descendant that somebody holds. Its cost
// grows with the number of records that are held and with what lies below
// them, not with the number of records.
func (m *Manager) Reclaimable(ctx context.Context) (bytes int64, err error) {
	end, err := m.begin()
	if err != nil {
		return 0, err
	}
	defer end()
	var held []ID
	m.lock()
	for id, e := range m.entries {
		if len(e.handles)+len(e.mounts)+e.uses > 0 {
			held = append(held, id)
		}
	}
	m.unlock()
	foreign, err := m.foreignHeld(ctx)
	if err != nil {
		return 0, err
	}
	held = append(held, foreign...)
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		totals, err := tx.Totals()
		if err != nil {
			return err
		}
		for _, t := range totals {
			bytes += t.Bytes
		}
		seen := map[ID]struct{}{}
		for len(held) > 0 {
			id := held[len(held)-1]
			held = held[:len(held)-1]
			if _, ok := seen[id]; ok {
				continue
			}
			seen[id] = struct{}{}
			rec, err := tx.Get(id)
			if is(err, errdefs.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			bytes -= max(rec.Size, 0)
			held = append(held, rec.Parents...)
		}
		return nil
	})
	return bytes, err
}

// foreignHeld lists the records that other processes hold. Hold files are
// named by ids, or by what can only be found by looking at all records.
func (m *Manager) foreignHeld(ctx context.Context) (ids []ID, err error) {
	names, err := os.ReadDir(filepath.Join(m.root, "holds"))
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return nil, fmt.Errorf("list holders: %w", err)
	}
	odd := map[string]bool{}
	for _, n := range names {
		if !holdFileBusy(m.root, n.Name()) {
			continue
		}
		if id := ID(n.Name()); fileName(id) == n.Name() {
			ids = append(ids, id)
		} else {
			odd[n.Name()] = true
		}
	}
	if len(odd) == 0 {
		return ids, nil
	}
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		for rec, err := range tx.Records() {
			if err == nil && odd[fileName(rec.ID)] {
				ids = append(ids, rec.ID)
			}
		}
		return nil
	})
	return ids, err
}

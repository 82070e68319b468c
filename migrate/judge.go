package migrate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate/buildkit"
)

// planner works out a plan.
type planner struct {
	s *buildkit.State
	// all are the fates in the order of ids: by the numbers of the rows.
	all []*fate
	// ofSnapshot are the records that come along by the snapshot that they
	// adopt.
	ofSnapshot map[*buildkit.Snapshot]*item
	// order has each record behind those that it lies on.
	order []*fate
	// held are the names of snapshots that a lease keeps.
	held map[string]bool
}

// fate is what becomes of one row.
type fate struct {
	row    *buildkit.Row
	action Action
	reason string
	into   string
	item   *item

	// stage is how far connect has come with it.
	stage int
	// on are those that it lies on, once connect has settled it, and needed says
	// that a record that comes along lies on this one.
	on     []*fate
	needed bool
}

// fate is that of a row by its id, nil if there is none.
func (b *planner) fate(id string) *fate {
	if r := b.s.Rows[id]; r != nil {
		return b.all[r.Number]
	}
	return nil
}

func (b *planner) drop(id, format string, args ...any) { b.fate(id).drop(format, args...) }

func (f *fate) drop(format string, args ...any) {
	f.action, f.item, f.into, f.reason = Drop, nil, "", fmt.Sprintf(format, args...)
}

// judgeRows decides for each row by itself, and for pairs.
func (b *planner) judgeRows() {
	b.held = map[string]bool{}
	for _, l := range b.s.Leases {
		if l.Temporary {
			continue
		}
		for _, name := range l.Snapshots {
			b.held[name] = true
		}
	}
	fates := make([]fate, len(b.s.List))
	for i, r := range b.s.List {
		fates[i].row = r
		b.all[i] = &fates[i]
	}
	owners := b.owners()
	// Pairs first: they decide over their mutable rows.
	for _, f := range b.all {
		r := f.row
		switch {
		case r.Damaged != nil:
			f.drop("its row is damaged: %v", r.Damaged)
		case r.Deleted:
			f.drop("marked deleted by a prune that was cut off")
		case r.EqualMutable != "":
			b.judgePair(r, owners[r.EqualMutable])
		case immutable(r):
			b.judgeImmutable(r)
		}
	}
	for _, f := range b.all {
		if f.action == "" {
			b.judgeMutable(f.row)
		}
	}
}

// immutable says whether a row is that of an immutable record. Those of merges
// and diffs need not say so.
func immutable(r *buildkit.Row) bool {
	return r.EqualMutable != "" || r.Committed || r.IsMerge() || r.IsDiff()
}

// owners maps each mutable row to the immutable one that it makes a pair with:
// the newest, should there be several.
func (b *planner) owners() map[string]*buildkit.Row {
	owners := map[string]*buildkit.Row{}
	for _, f := range b.all {
		r := f.row
		if r.EqualMutable == "" || r.Deleted || r.Damaged != nil {
			continue
		}
		if other := owners[r.EqualMutable]; other == nil || r.Created.After(other.Created) {
			owners[r.EqualMutable] = r
		}
	}
	return owners
}

// snapshot is a snapshot by name, if its data is here and it is of the kind.
func (b *planner) snapshot(name string, kind buildkit.Kind) *buildkit.Snapshot {
	snap := b.s.Snapshots[name]
	if snap == nil || snap.Kind != kind || !snap.Present || snap.Remote() {
		return nil
	}
	return snap
}

// lacks says why there is no usable snapshot of that kind.
func (b *planner) lacks(name string, kind buildkit.Kind) string {
	switch snap := b.s.Snapshots[name]; {
	case snap == nil:
		return "its snapshot is gone"
	case snap.Remote():
		return "its data is kept by a remote snapshotter, not here"
	case !snap.Present:
		return "the data of its snapshot is gone"
	default:
		return fmt.Sprintf("its snapshot is %s, not %s", snap.Kind, kind)
	}
}

func (b *planner) judgePair(r, owner *buildkit.Row) {
	m := b.s.Rows[r.EqualMutable]
	mutable := m != nil && !m.Deleted && m.Damaged == nil && !immutable(m)
	if mutable {
		if snap := b.snapshot(m.SnapshotName(), buildkit.Active); snap != nil {
			if r != owner {
				b.drop(r.ID, "a newer record, %s, has the same mutable", owner.ID)
				return
			}
			it := &item{rec: pairRecord(r, m), snap: snap, sources: []string{r.ID, m.ID}, hashes: []string{m.ID, r.ID}, folded: m.ID}
			it.rec.Key = m.ID + writable
			b.keep(r.ID, Fold, it, "one record with its mutable "+m.ID+", whose snapshot it takes over")
			*b.fate(m.ID) = fate{row: m, action: Fold, into: r.ID}
			return
		}
	}
	// The driver may be ahead of the rows.
	if snap := b.snapshot(r.SnapshotName(), buildkit.Committed); snap != nil {
		it := newItem(r, snap)
		if mutable {
			it.sources = append(it.sources, m.ID)
			it.hashes = []string{m.ID, r.ID}
			it.rec.Values = unionValues(it.rec.Values, valuesOf(m))
			if b.fate(m.ID).action == "" {
				b.drop(m.ID, "mutable of %s, which is finalized in the driver already", r.ID)
			}
		}
		b.finalized(it, r)
		b.keep(r.ID, Keep, it, "its finalize was cut off after the driver's part")
		return
	}
	switch {
	case m == nil:
		b.drop(r.ID, "its mutable %s has no row, and it has no snapshot of its own", r.EqualMutable)
	case m.Deleted:
		b.drop(r.ID, "its mutable %s is marked deleted", m.ID)
	case m.Damaged != nil:
		b.drop(r.ID, "the row of its mutable %s is damaged", m.ID)
	case !mutable:
		b.drop(r.ID, "what it names as its mutable, %s, is immutable", m.ID)
	default:
		b.drop(r.ID, "of its mutable %s: %s", m.ID, b.lacks(m.SnapshotName(), buildkit.Active))
	}
}

func newItem(r *buildkit.Row, snap *buildkit.Snapshot) *item {
	return &item{rec: newRecord(r), snap: snap, sources: []string{r.ID}, hashes: []string{r.ID}}
}

func (b *planner) keep(id string, action Action, it *item, reason string) {
	f := b.fate(id)
	f.action, f.item, f.reason = action, it, reason
	it.reason = reason
}

// finalized completes a record whose snapshot the driver has committed.
func (b *planner) finalized(it *item, r *buildkit.Row) {
	it.rec.State = metadata.Finalized
	it.rec.Key = r.ID
	it.rec.Durable = true
	it.rec.Raw = b.s.Snapshotter == buildkit.Overlayfs
	// Up to v0.33 a layer that nobody had verified could get this name.
	it.rec.Verified = verifiedName(r.SnapshotName())
}

func (b *planner) judgeImmutable(r *buildkit.Row) {
	name := r.SnapshotName()
	it := newItem(r, b.snapshot(name, buildkit.Committed))
	if it.snap != nil {
		reason := "as it is"
		if r.BlobOnly {
			reason = "extracted already"
		}
		b.finalized(it, r)
		b.keep(r.ID, Keep, it, reason)
		return
	}
	it.rec.State = metadata.Lazy
	if r.IsMerge() || r.IsDiff() {
		b.keep(r.ID, Keep, it, "lazy, as it is")
		return
	}
	blob := b.s.Blobs[r.Blob]
	switch {
	case r.Blob != "" && blob != nil && blob.Present && r.BlobOnly:
		b.keep(r.ID, Keep, it, "lazy, as it is")
	case r.Blob != "" && blob != nil && blob.Present:
		b.keep(r.ID, Keep, it, b.lacks(name, buildkit.Committed)+", but its blob is here: lazy again")
	case r.BlobOnly:
		b.drop(r.ID, "lazy layer whose blob is absent")
	default:
		b.drop(r.ID, "%s", b.lacks(name, buildkit.Committed))
	}
}

func (b *planner) judgeMutable(r *buildkit.Row) {
	snap := b.snapshot(r.SnapshotName(), buildkit.Active)
	switch {
	case snap == nil:
		b.drop(r.ID, "mutable row: %s", b.lacks(r.SnapshotName(), buildkit.Active))
	case !r.Retain:
		b.drop(r.ID, "mutable that nothing retains: the daemon was stopped while it was in use")
	default:
		it := newItem(r, snap)
		it.rec.State = metadata.Mutable
		it.rec.Key = r.ID + writable
		it.rec.OnPowerCut = metadata.Keep
		b.keep(r.ID, Keep, it, "as it is")
	}
}

// foldTwins makes one record of those that name one snapshot: one layer in
// several compressions.
func (b *planner) foldTwins() {
	groups := map[string][]*item{}
	first := make(map[string]*item, len(b.all))
	for _, f := range b.all {
		it := f.item
		if it == nil || it.rec.State != metadata.Finalized && it.rec.State != metadata.Lazy {
			continue
		}
		if it.snap == nil && it.rec.ChainID == "" {
			continue // nothing says that what they are going to be is the same
		}
		name := f.row.SnapshotName()
		switch other := first[name]; {
		case other == nil:
			first[name] = it
		case groups[name] == nil:
			groups[name] = []*item{other, it}
		default:
			groups[name] = append(groups[name], it)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		group := groups[name]
		slices.SortFunc(group, func(x, y *item) int {
			rx, ry := b.row(x), b.row(y)
			return cmp.Or(compareBool(rx.BlobOnly, ry.BlobOnly), rx.Created.Compare(ry.Created), cmp.Compare(rx.ID, ry.ID))
		})
		for _, twin := range group[1:] {
			b.foldTwin(group[0], twin, name)
		}
	}
	for _, f := range b.all {
		if f.item == nil || f.item.snap == nil {
			continue
		}
		if other := b.ofSnapshot[f.item.snap]; other != nil {
			f.drop("its snapshot is that of %s", other.rec.ID)
			continue
		}
		b.ofSnapshot[f.item.snap] = f.item
	}
}

func (b *planner) row(it *item) *buildkit.Row { return b.s.Rows[string(it.rec.ID)] }

func compareBool(x, y bool) int {
	switch {
	case x == y:
		return 0
	case y:
		return -1
	}
	return 1
}

// sameLayer says whether two records of one snapshot would also be made in the
// same way, should the snapshot be lost.
func sameLayer(x, y *metadata.Record) bool {
	switch {
	case x.Op != y.Op || x.ChainID != y.ChainID:
		return false
	case x.Op == metadata.Merge || x.Op == metadata.Diff:
		return slices.Equal(x.Parents, y.Parents)
	case x.ChainID != "":
		return true
	}
	return slices.EqualFunc(x.Blobs, y.Blobs, func(x, y metadata.Blob) bool { return x.Digest == y.Digest })
}

func (b *planner) foldTwin(first, twin *item, name string) {
	id := string(twin.rec.ID)
	if !sameLayer(first.rec, twin.rec) {
		b.drop(id, "names the snapshot of %s, but is another layer", first.rec.ID)
		return
	}
	into, from := first.rec, twin.rec
	into.Aliases = append(into.Aliases, from.ID)
	for _, blob := range from.Blobs {
		if !slices.ContainsFunc(into.Blobs, func(have metadata.Blob) bool { return have.Digest == blob.Digest }) {
			into.Blobs = append(into.Blobs, blob)
		}
	}
	for _, ref := range from.ImageRefs {
		if !slices.Contains(into.ImageRefs, ref) {
			into.ImageRefs = append(into.ImageRefs, ref)
		}
	}
	into.Values = joinValues(into.Values, from.Values, id)
	into.Retain = into.Retain || from.Retain
	mergeUsage(into, from)
	first.sources = append(first.sources, twin.sources...)
	first.hashes = append(first.hashes, twin.hashes...)
	f := b.fate(id)
	f.action, f.item, f.into = Alias, nil, string(into.ID)
	f.reason = fmt.Sprintf("the same layer as %s, in another compression: snapshot %s", into.ID, name)
}

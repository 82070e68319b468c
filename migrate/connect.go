package migrate

import (
	"slices"
	"strings"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate/buildkit"
)

// connect gives the records their parents, by the ids that survive, and drops
// those whose ancestors do not come along.
func (b *planner) connect() {
	for _, f := range b.all {
		b.connectFrom(f)
	}
}

// Stages of a visit.
const (
	unseen = iota
	under  // it is looked at what it lies on
	settled
)

// connectFrom visits a row after all that it lies on. It keeps its own stack:
// chains are as long as users make them.
func (b *planner) connectFrom(f *fate) {
	type visit struct {
		*fate
		deps []*fate
	}
	open := func(f *fate) visit {
		f.stage = under
		if f.item == nil {
			return visit{fate: f}
		}
		return visit{f, b.dependencies(f.item)}
	}
	if f.stage != unseen {
		return
	}
	stack := []visit{open(f)}
	for len(stack) > 0 {
		top := &stack[len(stack)-1]
		if len(top.deps) == 0 {
			b.settle(top.fate)
			top.stage = settled
			stack = stack[:len(stack)-1]
			continue
		}
		dep := top.deps[0]
		top.deps = top.deps[1:]
		switch dep.stage {
		case under:
			if top.item != nil {
				top.drop("it is its own ancestor")
			}
		case unseen:
			stack = append(stack, open(dep))
		}
	}
}

// dependencies are the rows that a record needs: its parents, and the owner of
// the snapshot below its own.
func (b *planner) dependencies(it *item) []*fate {
	var deps []*fate
	add := func(f *fate) {
		if f != nil && !slices.Contains(deps, f) {
			deps = append(deps, f)
		}
	}
	for _, p := range it.rec.Parents {
		add(b.survivor(string(p)))
	}
	if base := b.baseOf(it); base != nil {
		add(b.fate(string(base.rec.ID)))
	}
	return deps
}

// survivor is what becomes of a row, or of the one that it comes along with,
// nil if there is no such row.
func (b *planner) survivor(id string) *fate {
	f := b.fate(id)
	if f != nil && f.action == Alias {
		return b.fate(f.into)
	}
	return f
}

// baseOf is the owner of the snapshot that the item's lies on, nil for none.
func (b *planner) baseOf(it *item) *item {
	if it.snap == nil || it.snap.Below == nil {
		return nil
	}
	return b.ofSnapshot[it.snap.Below]
}

// settle decides over a row whose ancestors are decided.
func (b *planner) settle(f *fate) {
	it := f.item
	if it == nil {
		return
	}
	for i, p := range it.rec.Parents {
		parent := b.survivor(string(p))
		switch {
		case parent == nil:
			f.drop("its parent %s has no row", p)
			return
		case parent.item == nil && parent.action == Fold:
			f.drop("its parent %s is the mutable of a pair", p)
			return
		case parent.item == nil:
			f.drop("its parent %s does not come along: %s", p, parent.reason)
			return
		case parent.item.rec.State == metadata.Mutable:
			f.drop("its parent %s is mutable", p)
			return
		}
		it.rec.Parents[i] = parent.item.rec.ID
	}
	if why := b.checkBase(it); why != "" {
		b.lost(f, why)
		if it = f.item; it == nil {
			return
		}
	}
	addVariants(it.rec, b.s.Blobs)
	if it.rec.State == metadata.Lazy {
		// What such a blob holds the old daemon knew from its descriptor only.
		for i := range it.rec.Blobs {
			blob := &it.rec.Blobs[i]
			blob.Claimed = blob.DiffID != blob.Digest
		}
	}
	if err := metadata.Validate(it.rec); err != nil {
		f.drop("it cannot be kept here: %v", err)
		return
	}
	// Once more: it may have lost what it lay on.
	f.on = b.dependencies(it)
	b.order = append(b.order, f)
}

// checkBase looks whether the snapshot lies on that of the parent.
func (b *planner) checkBase(it *item) string {
	if it.snap == nil {
		return ""
	}
	base := b.baseOf(it)
	switch {
	case it.snap.Parent != "" && base == nil:
		return "its snapshot lies on one that no record has"
	case base != nil && base.rec.State != metadata.Finalized:
		return "its snapshot lies on one that is not finalized"
	case base != nil && b.fate(string(base.rec.ID)).item != base:
		return "its snapshot lies on that of " + string(base.rec.ID) + ", which does not come along"
	}
	it.base = base
	if it.rec.Op == metadata.Merge || it.rec.Op == metadata.Diff {
		return "" // they stack on what they like
	}
	var parent metadata.ID
	if len(it.rec.Parents) > 0 {
		parent = it.rec.Parents[0]
	}
	if base == nil && parent != "" || base != nil && base.rec.ID != parent {
		return "its snapshot does not lie on that of its parent"
	}
	return ""
}

// lost gives up the snapshot of a record: with its blob at hand, or as a merge
// or diff, it is lazy; else it goes.
func (b *planner) lost(f *fate, why string) {
	it := f.item
	delete(b.ofSnapshot, it.snap)
	blob := b.s.Blobs[f.row.Blob]
	again := it.rec.Op == metadata.Merge || it.rec.Op == metadata.Diff || blob != nil && blob.Present
	if it.rec.State != metadata.Finalized || !again {
		f.drop("%s", why)
		return
	}
	it.snap, it.base = nil, nil
	it.rec.State, it.rec.Key = metadata.Lazy, ""
	it.rec.Durable, it.rec.Raw, it.rec.Verified = false, false, false
	b.keep(f.row.ID, Keep, it, why+": lazy again")
}

// dropUnneeded drops what the old daemon was about to remove: no lease keeps
// it, nothing retains it, and nobody lies on it. With a record go its second
// ids and the mutable that it was folded with.
func (b *planner) dropUnneeded() {
	for _, f := range slices.Backward(b.order) {
		if !f.needed && !f.item.rec.Retain && !b.leased(f.item) {
			f.drop("no lease holds it and nothing retains it: its removal was cut off")
			continue
		}
		for _, dep := range f.on {
			dep.needed = true
		}
	}
	b.order = slices.DeleteFunc(b.order, func(f *fate) bool { return f.item == nil })
	for _, f := range b.all {
		if f.into != "" && b.fate(f.into).item == nil {
			f.drop("%s, which it was going to be a part of, does not come along", f.into)
		}
	}
}

// leased says whether a lease keeps what the record needs.
func (b *planner) leased(it *item) bool {
	if it.snap != nil {
		return b.held[it.snap.Name]
	}
	for _, id := range it.sources {
		if l := b.s.Leases[id]; l != nil && !l.Temporary {
			return true
		}
	}
	return false
}

// finish writes down what was decided.
func (b *planner) finish(p *Plan) {
	p.items = make([]*item, 0, len(b.order))
	for _, f := range b.order {
		p.items = append(p.items, f.item)
	}
	p.Steps = make([]Step, 0, len(b.all))
	for _, f := range b.all {
		st := Step{Action: f.action, ID: f.row.ID, Into: f.into, Reason: f.reason, Bytes: -1}
		switch {
		case f.item != nil:
			st.State, st.Op, st.Bytes = f.item.rec.State.String(), f.item.rec.Op.String(), f.item.rec.Size
			st.Into = f.item.folded
		case f.action == Fold:
			continue // told with the immutable
		}
		p.Steps = append(p.Steps, st)
	}
	b.leftovers(p)
}

// leftovers are the snapshots that no record of the new store has. What no row
// of the old daemon names goes; what one names that it might still show stays
// for its sake.
func (b *planner) leftovers(p *Plan) {
	var rest []*buildkit.Snapshot
	for _, snap := range b.s.Snapshots {
		if it := b.ofSnapshot[snap]; it == nil || b.fate(string(it.rec.ID)).item == nil {
			rest = append(rest, snap)
		}
	}
	rest = append(rest, b.s.Unnamed...)
	slices.SortFunc(rest, func(x, y *buildkit.Snapshot) int { return strings.Compare(x.Key, y.Key) })
	named := map[string]string{}
	for _, r := range b.s.List {
		if len(rest) > 0 && !r.Deleted {
			named[r.SnapshotName()] = r.ID
			named[r.ID] = r.ID
		}
	}
	// Below what stays for the old daemon everything stays, named or not.
	byKey := make(map[string]*buildkit.Snapshot, len(rest))
	for _, snap := range rest {
		byKey[snap.Key] = snap
	}
	stays := map[string]bool{}
	for _, snap := range rest {
		if snap.Name == "" || named[snap.Name] == "" {
			continue
		}
		for s := snap; s != nil && !stays[s.Key]; s = byKey[s.Parent] {
			stays[s.Key] = true
		}
	}
	for _, snap := range rest {
		if !snap.Present {
			continue
		}
		st := Step{Action: Free, ID: snap.Key, Reason: "garbage: no record names it", Bytes: -1, dir: snap.Dir}
		if snap.Kind == buildkit.View {
			st.Reason = "leftover of a mount"
		}
		if stays[snap.Key] {
			st.Action, st.Reason = Leave, "the old daemon may still need it"
		} else {
			p.discard = append(p.discard, snap.Dir)
		}
		p.Steps = append(p.Steps, st)
	}
	for _, dir := range b.s.StrayDirs {
		p.Steps = append(p.Steps, Step{
			Action: Free, ID: "snapshots/snapshots/" + dir, Reason: "leftover directory of the snapshotter", Bytes: -1, dir: dir,
		})
		p.discard = append(p.discard, dir)
	}
}

package legacytest

import (
	"maps"
	"slices"
)

// garbage is what no row names.
func (w *World) garbage() {
	name := w.id("garbage")
	switch w.r.IntN(3) {
	case 0:
		w.Snapshot(name, "", Active)
		w.Unname()
	case 1:
		w.Snapshot(name, "", Committed)
	default:
		if on := w.parent(false); on != "" && w.rows[on]["cache.snapshot"] == on {
			w.Snapshot(on+"-view", on, View)
			w.Temporary(on+"-view", on+"-view")
		}
	}
}

// leftover is what a kill in the middle of an operation leaves.
func (w *World) leftover() {
	id, m, parent := w.id("killed"), w.id("cut"), w.parent(false)
	switch w.r.IntN(7) {
	case 0: // Commit, before its last transaction
		w.Mutable(m, parent, true)
		w.lies(parent)
		w.Row(id, Row{"cache.description": "d"})
		w.keep(m, "mutable", parent)
		w.keep(id, "drop")
	case 1: // Finalize, after the driver's part, both rows there
		w.Finalized(id, parent, Row{"cache.equalMutable": m})
		w.lies(parent)
		w.Row(m, Row{"cache.snapshot": m, "cache.cachePolicy": 1, "cache-dir": Indexed{Value: m, Index: "cache-dir:" + id}})
		w.Lease(m, []string{m})
		w.keep(id, "finalized", parent, m)
		w.keep(m, "drop", id)
		w.shows(id, []string{id}, parent)
	case 2: // Finalize, after the mutable's removal
		w.Finalized(id, parent, Row{"cache.equalMutable": m})
		w.lies(parent)
		w.keep(id, "finalized", parent)
		w.shows(id, []string{id}, parent)
	case 3: // Prune, after it marked the mutable of a pair
		w.Pair(id, m, parent)
		w.lies(parent)
		w.Value(m, "cache.deleted", true)
		w.keep(id, "drop", parent)
		w.keep(m, "drop", parent)
	case 4: // Prune, after it marked a finalized record
		w.Finalized(id, parent, Row{"cache.deleted": true})
		w.lies(parent)
		w.keep(id, "drop", parent)
	case 5: // removal, between the lease and the row
		w.Finalized(id, parent, nil)
		w.lies(parent)
		w.Lease(id, nil)
		w.keep(id, "drop", parent)
	default: // Extract, after the driver's part
		w.layer()
		id = w.below[len(w.below)-1]
		on, _ := w.rows[id]["cache.parent"].(string)
		if w.lazy[on] {
			return
		}
		w.Snapshot(w.NameOf(id), "", Committed)
		w.snapshots[len(w.snapshots)-1].data = map[string]string{"own-" + id: "content of " + id}
		w.lies(on)
		w.log("%s is extracted", id)
		w.Want[id], w.lazy[id] = "finalized", false
	}
}

// someRow and someSnapshot are what damage meets; ok is false if there is none.
func (w *World) someRow() (id string, ok bool) {
	ids := slices.Sorted(maps.Keys(w.rows))
	if len(ids) == 0 {
		return "", false
	}
	return ids[w.r.IntN(len(ids))], true
}

func (w *World) someSnapshot() (*snap, bool) {
	if len(w.snapshots) == 0 {
		return nil, false
	}
	return &w.snapshots[w.r.IntN(len(w.snapshots))], true
}

// damage does one thing that no daemon would do. What it may concern is
// touched.
func (w *World) damage() {
	if w.r.IntN(2) == 0 {
		if id, ok := w.someRow(); ok {
			w.damageRow(id)
		}
		return
	}
	if s, ok := w.someSnapshot(); ok {
		w.damageSnapshot(s)
	}
}

func (w *World) touch(ids ...string) {
	for _, id := range ids {
		w.touched[id] = true
	}
}

// touchSnapshot touches the rows that name a snapshot.
func (w *World) touchSnapshot(name string) {
	for id := range w.rows {
		if w.NameOf(id) == name || id == name {
			w.touch(id)
		}
	}
}

func (w *World) damageRow(id string) {
	row := w.rows[id]
	other, _ := w.someRow()
	w.touch(id, other)
	set := func(key string, value any) {
		w.log("damage: %s of %s is %v", key, id, value)
		row[key] = value
	}
	switch w.r.IntN(14) {
	case 0:
		keys := slices.Sorted(maps.Keys(row))
		set(keys[w.r.IntN(len(keys))], []any{nil, []byte("{"), 7, "text", []string{"a"}, []byte(" ")}[w.r.IntN(6)])
	case 1:
		set("cache.deleted", true)
	case 2:
		set("cache.parent", []string{other, id, "nowhere"}[w.r.IntN(3)])
	case 3:
		set("cache.equalMutable", other)
	case 4:
		set("cache.snapshot", []string{w.NameOf(other), other, "", "nothing"}[w.r.IntN(4)])
	case 5:
		set("snapshot.committed", w.r.IntN(2) == 0)
	case 6:
		set("cache.mergeParents", []string{other, id, other})
	case 7:
		set("cache.upperDiffParent", other)
	case 8:
		set("cache.blobonly", w.r.IntN(2) == 0)
	case 9:
		set("cache.cachePolicy", w.r.IntN(2))
	case 10:
		set("cache.chainID", Indexed{Value: w.chains[other], Index: "chainid:" + w.chains[other].String()})
	case 11:
		w.log("damage: the row of %s is gone", id)
		delete(w.rows, id)
	case 12:
		w.log("damage: the lease of %s is gone", id)
		delete(w.leases, id)
	default:
		if d := w.chains[id]; d != "" && w.blobs[d].data != nil {
			w.log("damage: the blob of %s is gone, or its end", id)
			if w.r.IntN(2) == 0 {
				w.LoseBlob(d)
			} else {
				w.CutBlob(d)
			}
		}
	}
}

func (w *World) damageSnapshot(s *snap) {
	other, _ := w.someSnapshot()
	w.touchSnapshot(s.name)
	w.touchSnapshot(other.name)
	what := w.r.IntN(9)
	w.log("damage: %d of snapshot %q with %q", what, s.name, other.name)
	switch what {
	case 0:
		s.data = nil
	case 1:
		w.next++
		s.noDriver, s.number = true, w.next
	case 2:
		s.kind = byte(w.r.IntN(5))
	case 3:
		s.parent = other.name
	case 4:
		s.parent = "no such key"
	case 5:
		s.labels = map[string]string{"containerd.io/snapshot/remote": ""}
	case 6:
		s.leads = other.key
	case 7:
		if !other.noDriver {
			s.number = other.number
		}
	default:
		for id, l := range w.leases {
			if slices.Contains(l.snapshots, s.name) {
				w.Temporary(id, l.snapshots...)
			}
		}
	}
}

// forgetTouched takes back what was wanted of rows that damage concerns, or
// that lie on such.
func (w *World) forgetTouched() {
	for changed := true; changed; {
		changed = false
		for id, needs := range w.needs {
			if !w.touched[id] && slices.ContainsFunc(needs, func(n string) bool { return w.touched[n] }) {
				w.touched[id], changed = true, true
			}
		}
	}
	for id := range w.touched {
		delete(w.Want, id)
	}
}

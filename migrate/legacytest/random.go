package legacytest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// World is a random state directory, with what must become of it.
type World struct {
	*Builder
	// Want says what must become of a row: the state of a record, "alias",
	// "fold" for the mutable of a pair, or "drop". Rows that damage may concern
	// are not in it.
	Want map[string]string
	// Into is the id that a folded or second one becomes a part of.
	Into map[string]string
	// Trees are the files of the records that come along, by path.
	Trees map[string]map[string]string
	// Log says how the directory was made, for people.
	Log []string

	r *rand.Rand
	n int
	// below are the ids that lie on others: finalized ones, and lazy layers.
	below []string
	lazy  map[string]bool
	// needs are the ids whose loss may be that of a record.
	needs  map[string][]string
	chains map[string]digest.Digest
	// touched are the ids that damage concerns.
	touched map[string]bool
}

// Random makes a world of a seed: some records, as daemons and their ends leave
// them, and perhaps some damage.
func Random(root string, seed uint64) *World {
	r := rand.New(rand.NewPCG(seed, 11))
	w := &World{
		Builder: NewBuilder(root, []string{"overlayfs", "native"}[r.IntN(2)]), r: r,
		Want: map[string]string{}, Into: map[string]string{}, Trees: map[string]map[string]string{},
		lazy: map[string]bool{}, needs: map[string][]string{}, chains: map[string]digest.Digest{}, touched: map[string]bool{},
	}
	w.V1, w.NoFreelist, w.Copies = r.IntN(5) == 0, r.IntN(2) == 0, true
	w.log("seed %d: %s, v1 %t, no freelist %t", seed, w.Driver, w.V1, w.NoFreelist)
	making := w.ways()
	for range 2 + r.IntN(16) {
		making[r.IntN(len(making))]()
	}
	if w.V1 {
		w.Older()
	}
	if r.IntN(4) > 0 {
		for range 1 + r.IntN(4) {
			w.damage()
		}
	}
	w.forgetTouched()
	return w
}

func (w *World) log(format string, args ...any) { w.Log = append(w.Log, fmt.Sprintf(format, args...)) }

// id is a new one, whose place in the order of all says nothing of when it was
// made.
func (w *World) id(what string) string {
	w.n++
	return fmt.Sprintf("%c%d-%s", 'a'+rune(w.r.IntN(26)), w.n, what)
}

// ways are those in which records come to be. The layout up to v0.6 knows few
// of them.
func (w *World) ways() []func() {
	both := []func(){w.finalized, w.finalized, w.finalized, w.pair, w.mutable, w.unretained, w.garbage}
	if w.V1 {
		return both
	}
	return append(both, w.layer, w.layer, w.merge, w.extractedMerge, w.diff, w.twins, w.leftover)
}

// parent is an id to lie on, or none.
func (w *World) parent(lazy bool) string {
	id := ""
	if n := len(w.below); n > 0 && w.r.IntN(4) > 0 {
		id = w.below[w.r.IntN(n)]
	}
	if w.lazy[id] && !lazy {
		return ""
	}
	return id
}

// details are values that any row may have.
func (w *World) details(id string) Row {
	row := Row{}
	if w.r.IntN(2) == 0 {
		row["cache.description"] = "what " + id + " is"
	}
	if w.r.IntN(3) == 0 {
		row["cache.recordType"] = []string{"regular", "internal", "source.local"}[w.r.IntN(3)]
	}
	if w.r.IntN(3) == 0 {
		row["cache.usageCount"], row["cache.lastUsedAt"] = w.r.IntN(5), int64(1_700_000_100_000_000_000)
	}
	if w.r.IntN(3) == 0 {
		row["cache-dir"] = Indexed{Value: "dir:" + id, Index: "cache-dir:" + id}
	}
	if w.r.IntN(4) == 0 {
		row["cache.equalMutable"] = nil // as a finalize leaves it
	}
	return row
}

// keep notes what must become of a row that lies on others.
func (w *World) keep(id, state string, on ...string) {
	w.Want[id] = state
	on = slices.DeleteFunc(on, func(id string) bool { return id == "" })
	w.needs[id] = append(w.needs[id], on...)
	w.log("%s: %s on %q", id, state, on)
}

// shows notes the tree of a record: those of others, and files of its own.
func (w *World) shows(id string, own []string, on ...string) {
	w.Trees[id] = map[string]string{}
	for _, other := range on {
		maps.Copy(w.Trees[id], w.Trees[other])
	}
	for _, name := range own {
		w.Trees[id]["own-"+name] = "content of " + name
	}
}

func (w *World) finalized() {
	id, parent := w.id("final"), w.parent(false)
	w.Finalized(id, parent, w.details(id))
	w.lies(parent)
	w.keep(id, "finalized", parent)
	w.shows(id, []string{id}, parent)
	w.below = append(w.below, id)
}

// NameOf is the name of a record's snapshot.
func (w *World) NameOf(id string) string {
	if name, _ := w.rows[id]["cache.snapshot"].(string); name != "" {
		return name
	}
	return id
}

// lies puts the last snapshot on that of a record.
func (w *World) lies(on string) {
	s := &w.snapshots[len(w.snapshots)-1]
	if s.parent = ""; on != "" {
		s.parent = w.NameOf(on)
	}
}

func (w *World) pair() {
	id, m, parent := w.id("pair"), w.id("mutable"), w.parent(false)
	w.Pair(id, m, parent)
	maps.Copy(w.rows[m], w.details(m))
	w.lies(parent)
	w.keep(id, "committed", parent, m)
	w.keep(m, "fold", id)
	w.Into[m] = id
	w.shows(id, []string{m}, parent)
}

func (w *World) mutable() {
	id, parent := w.id("writable"), w.parent(false)
	w.Mutable(id, parent, true)
	w.lies(parent)
	w.keep(id, "mutable", parent)
}

func (w *World) unretained() {
	id, parent := w.id("inuse"), w.parent(false)
	w.Mutable(id, parent, false)
	w.lies(parent)
	w.keep(id, "drop", parent)
}

// layer is a lazy one, of a blob, on none or on another record.
func (w *World) layer() {
	id, parent := w.id("layer"), w.parent(true)
	name := "buildkit-layer-snapshot-v1-sha256-" + id
	blob := w.Blob(layerOf(id), nil)
	chain := w.chain(id, parent, blob)
	row := w.layerRow(name, parent, blob, blob, chain)
	maps.Copy(row, w.details(id))
	w.Row(id, row)
	w.Lease(id, []string{name}, blob)
	w.keep(id, "lazy", parent)
	w.shows(id, []string{id}, parent)
	w.below = append(w.below, id)
	w.lazy[id] = true
}

func (w *World) layerRow(name, parent string, blob, diff, chain digest.Digest) Row {
	row := Row{
		"snapshot.committed": true, "cache.blobonly": true, "cache.snapshot": name, "cache.blob": blob, "cache.diffID": diff,
		"cache.mediatype": "application/vnd.oci.image.layer.v1.tar", "cache.blobsize": len(w.blobs[blob].data),
		"cache.chainID": Indexed{Value: chain, Index: "chainid:" + chain.String()},
	}
	if parent != "" {
		row["cache.parent"] = parent
	}
	return row
}

func (w *World) chain(id, parent string, diff digest.Digest) digest.Digest {
	w.chains[id] = diff
	if below := w.chains[parent]; below != "" {
		w.chains[id] = identity.ChainID([]digest.Digest{below, diff})
	}
	return w.chains[id]
}

// layerOf is a layer with one file.
func layerOf(name string) string {
	var b bytes.Buffer
	t := tar.NewWriter(&b)
	text := "content of " + name
	err := t.WriteHeader(&tar.Header{Name: "own-" + name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(text))})
	if err == nil {
		_, err = t.Write([]byte(text))
	}
	if err == nil {
		err = t.Close()
	}
	if err != nil {
		panic(err) // it is written to memory
	}
	return b.String()
}

// inputs are two or three records, or none if there are too few.
func (w *World) inputs() []string {
	if len(w.below) < 3 {
		return nil
	}
	var ids []string
	for _, i := range w.r.Perm(len(w.below))[:2+w.r.IntN(2)] {
		ids = append(ids, w.below[i])
	}
	return ids
}

// merge is a lazy one, as a kill may leave it: without the flag.
func (w *World) merge() {
	in := w.inputs()
	if in == nil {
		return
	}
	id := w.id("merge")
	row := w.details(id)
	row["cache.mergeParents"], row["cache.snapshot"] = in, id
	if w.r.IntN(2) == 0 {
		row["snapshot.committed"] = true
	}
	w.Row(id, row)
	w.Lease(id, []string{id})
	w.keep(id, "lazy", in...)
	w.shows(id, nil, in...)
}

// extractedMerge has a snapshot, which lies on that of its first input.
func (w *World) extractedMerge() {
	in := w.inputs()
	if in == nil || slices.ContainsFunc(in, func(id string) bool { return w.lazy[id] }) {
		return
	}
	id := w.id("merged")
	w.Finalized(id, in[0], w.details(id))
	w.lies(in[0])
	delete(w.rows[id], "cache.parent")
	w.Value(id, "cache.mergeParents", in)
	w.keep(id, "finalized", in...)
	w.shows(id, []string{id}, in[0]) // what the daemon made of the others is its own
}

// diff is a lazy one, of a record and the one below it.
func (w *World) diff() {
	for _, upper := range w.below {
		lower, _ := w.rows[upper]["cache.parent"].(string)
		if lower == "" || w.r.IntN(3) > 0 {
			continue
		}
		id := w.id("diff")
		row := w.details(id)
		row["cache.lowerDiffParent"], row["cache.upperDiffParent"] = lower, upper
		row["snapshot.committed"], row["cache.snapshot"] = true, id
		w.Row(id, row)
		w.Lease(id, []string{id})
		w.keep(id, "lazy", lower, upper)
		w.shows(id, nil, upper)
		maps.DeleteFunc(w.Trees[id], func(path, _ string) bool { return w.Trees[lower][path] != "" })
		return
	}
}

// twins are two rows of one layer in two compressions, extracted.
func (w *World) twins() {
	first, second, parent := w.id("twin"), w.id("twin"), w.parent(false)
	name := "buildkit-layer-snapshot-v1-sha256-" + first
	diff := w.Blob(layerOf(name), nil)
	other := w.Blob("compressed "+name, nil)
	chain := w.chain(first, parent, diff)
	w.chains[second] = chain
	w.Row(first, w.layerRow(name, parent, diff, diff, chain))
	w.Row(second, w.layerRow(name, parent, other, diff, chain))
	w.Value(first, "cache.blobonly", false)
	w.Lease(first, []string{name}, diff)
	w.Lease(second, []string{name}, other)
	w.Snapshot(name, "", Committed)
	w.lies(parent)
	w.keep(first, "finalized", parent, second)
	w.keep(second, "alias", first)
	w.Into[second] = first
	w.shows(first, []string{name}, parent)
	w.below = append(w.below, first)
}

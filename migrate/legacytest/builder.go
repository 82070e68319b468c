package legacytest

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Builder makes the directory of a worker by hand: whatever a daemon, a kill or
// damage may leave. Nothing is on the disk before Write.
type Builder struct {
	// Dir is the worker's directory; its name says the snapshotter.
	Dir string
	// V1 writes the layout up to v0.6.
	V1 bool
	// Driver is the snapshotter: overlayfs or native.
	Driver string
	// NoFreelist leaves the free pages out of the databases, as v0.34 does.
	NoFreelist bool
	// Copies has each snapshot of native hold the files of those below it, as
	// that snapshotter leaves them. Without it each has its own alone.
	Copies bool

	rows      map[string]Row
	external  map[string]map[string][]byte
	leases    map[string]lease
	snapshots []snap
	blobs     map[digest.Digest]blob
	next      uint64
}

// Row are the values of a record by their keys. A nil value is a cleared one:
// zero bytes. Indexed values carry an index key.
type Row map[string]any

// Indexed is a value with an index key.
type Indexed struct {
	Value any
	Index string
}

type lease struct {
	labels    map[string]string
	snapshots []string
	blobs     []digest.Digest
}

type snap struct {
	name, parent string // names; an unnamed one has none
	key          string
	leads        string // the key that the name leads to, if not its own
	kind         byte
	number       uint64
	labels       map[string]string
	data         map[string]string
	noDriver     bool
}

type blob struct {
	data   []byte
	labels map[string]string
	absent bool
	cut    bool
}

// Kinds of snapshots.
const (
	View      = 1
	Active    = 2
	Committed = 3
)

// NewBuilder begins a worker's directory root/runc-<driver>.
func NewBuilder(root, driver string) *Builder {
	return &Builder{
		Dir: filepath.Join(root, "runc-"+driver), Driver: driver,
		rows: map[string]Row{}, external: map[string]map[string][]byte{}, leases: map[string]lease{},
		blobs: map[digest.Digest]blob{},
	}
}

// Row adds a record. One that has no creation time gets one.
func (b *Builder) Row(id string, r Row) {
	if _, ok := r["cache.createdAt"]; !ok {
		r["cache.createdAt"] = int64(1_700_000_000_000_000_000) + int64(len(b.rows))
	}
	b.rows[id] = r
}

// Value adds a value to a record.
func (b *Builder) Value(id, key string, value any) { b.rows[id][key] = value }

// External adds bytes beside a record.
func (b *Builder) External(id, name string, data []byte) {
	if b.external[id] == nil {
		b.external[id] = map[string][]byte{}
	}
	b.external[id][name] = data
}

// Snapshot adds a snapshot with a file of its own, called after it, and more
// as given.
func (b *Builder) Snapshot(name, parent string, kind byte, files ...string) {
	b.next++
	own := strings.ReplaceAll("own-"+name, "/", "_")
	data := map[string]string{own[:min(len(own), 100)]: "content of " + name}
	for _, f := range files {
		data[f] = f + " in " + name
	}
	b.snapshots = append(b.snapshots, snap{
		name: name, parent: parent, kind: kind, number: b.next, data: data,
		key: fmt.Sprintf("buildkit/%d/%s", 100+b.next, name),
	})
}

// SnapshotLabel labels the last snapshot.
func (b *Builder) SnapshotLabel(key, value string) {
	s := &b.snapshots[len(b.snapshots)-1]
	if s.labels == nil {
		s.labels = map[string]string{}
	}
	s.labels[key] = value
}

// LoseData leaves the directory of the last snapshot out.
func (b *Builder) LoseData() { b.snapshots[len(b.snapshots)-1].data = nil }

// ShareData gives the last snapshot the directory of the one before.
func (b *Builder) ShareData() {
	n := len(b.snapshots)
	b.snapshots[n-1].number, b.snapshots[n-1].data = b.snapshots[n-2].number, nil
}

// LoseKey leaves the snapshotter's row of the last snapshot out.
func (b *Builder) LoseKey() { b.snapshots[len(b.snapshots)-1].noDriver = true }

// Unname makes the last snapshot one that only the snapshotter knows.
func (b *Builder) Unname() {
	s := &b.snapshots[len(b.snapshots)-1]
	s.key, s.name = "buildkit/1/"+s.name, ""
}

// Lease adds a lease on snapshots and blobs.
func (b *Builder) Lease(id string, snapshots []string, blobs ...digest.Digest) {
	b.leases[id] = lease{snapshots: snapshots, blobs: blobs}
}

// Temporary adds a lease that a daemon deletes when it starts.
func (b *Builder) Temporary(id string, snapshots ...string) {
	b.leases[id] = lease{snapshots: snapshots, labels: map[string]string{"buildkit/lease.temporary": "2026-01-01T00:00:00Z"}}
}

// Blob adds a blob.
func (b *Builder) Blob(data string, labels map[string]string) digest.Digest {
	d := digest.FromString(data)
	b.blobs[d] = blob{data: []byte(data), labels: labels}
	return d
}

// LoseBlob leaves a blob's file out.
func (b *Builder) LoseBlob(d digest.Digest) { b.blobs[d] = blob{absent: true} }

// CutBlob leaves out the end of a blob's file.
func (b *Builder) CutBlob(d digest.Digest) {
	cut := b.blobs[d]
	cut.cut = true
	b.blobs[d] = cut
}

// Finalized adds a finalized record with its snapshot and lease.
func (b *Builder) Finalized(id, parent string, r Row) {
	if r == nil {
		r = Row{}
	}
	r["snapshot.committed"], r["cache.snapshot"] = true, id
	if parent != "" {
		r["cache.parent"] = parent
	}
	b.Row(id, r)
	b.Snapshot(id, parent, Committed)
	b.Lease(id, []string{id})
}

// Mutable adds a mutable record with its snapshot and lease.
func (b *Builder) Mutable(id, parent string, retain bool) {
	r := Row{"cache.snapshot": id}
	if parent != "" {
		r["cache.parent"] = parent
	}
	if retain {
		r["cache.cachePolicy"] = 1
	}
	b.Row(id, r)
	b.Snapshot(id, parent, Active)
	b.Lease(id, []string{id})
}

// Pair adds an immutable record and the mutable one that owns its snapshot.
func (b *Builder) Pair(immutable, mutable, parent string) {
	b.Mutable(mutable, parent, true)
	r := Row{"snapshot.committed": true, "cache.snapshot": immutable, "cache.equalMutable": mutable, "snapshot.size": -1}
	if parent != "" {
		r["cache.parent"] = parent
	}
	b.Row(immutable, r)
}

// Older makes of all that was added so far what a daemon up to v0.6 would have
// written: the snapshotter alone says what lies on what and what is immutable,
// and labels keep the snapshots.
func (b *Builder) Older() {
	b.V1 = true
	for id, row := range b.rows {
		if _, merge := row["cache.mergeParents"]; merge {
			delete(b.rows, id)
		}
		for _, key := range []string{"snapshot.committed", "cache.snapshot", "cache.parent"} {
			delete(row, key)
		}
	}
	for i := range b.snapshots {
		if s := &b.snapshots[i]; b.rows[s.name] != nil {
			s.labels = map[string]string{"containerd.io/gc.root": "2026-01-01T00:00:00Z"}
		}
	}
	clear(b.leases)
}

// IDs lists the ids of all rows, in no order.
func (b *Builder) IDs() []string {
	var ids []string
	for id := range b.rows {
		ids = append(ids, id)
	}
	return ids
}

// Indexes are the keys by which a row is found.
func (b *Builder) Indexes(id string) (keys []string) {
	for _, value := range b.rows[id] {
		if v, ok := value.(Indexed); ok {
			keys = append(keys, v.Index)
		}
	}
	return keys
}

// Tree are the files of a snapshot and of those below it, by path, nil if there
// is no such snapshot.
func (b *Builder) Tree(name string) map[string]string {
	var files map[string]string
	for seen := map[string]bool{}; name != "" && !seen[name]; {
		seen[name] = true
		i := slices.IndexFunc(b.snapshots, func(s snap) bool { return s.name == name })
		if i < 0 {
			break
		}
		if files == nil {
			files = map[string]string{}
		}
		maps.Copy(files, b.snapshots[i].data)
		name = b.snapshots[i].parent
	}
	return files
}

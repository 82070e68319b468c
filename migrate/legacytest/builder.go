package legacytest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
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

// LoseData leaves the directory of the last snapshot out, LoseKey the
// snapshotter's row of it.
func (b *Builder) LoseData() { b.snapshots[len(b.snapshots)-1].data = nil }

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

// Write makes the directory.
func (b *Builder) Write() error {
	if err := os.MkdirAll(filepath.Join(b.Dir, "snapshots", "snapshots"), 0o700); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(b.Dir, "content", "blobs"), 0o700); err != nil {
		return err
	}
	records := "metadata_v2.db"
	if b.V1 {
		records = "metadata.db"
	}
	return errors.Join(
		os.WriteFile(filepath.Join(b.Dir, "workerid"), []byte("worker"), 0o600),
		b.database(records, b.writeRecords),
		b.database("containerdmeta.db", b.writeNames),
		b.database("snapshots/metadata.db", b.writeDriver),
		b.writeData(),
		b.writeBlobs(),
	)
}

func (b *Builder) database(name string, fill func(*bolt.Tx) error) error {
	db, err := bolt.Open(filepath.Join(b.Dir, name), 0o600, &bolt.Options{NoSync: true, NoFreelistSync: b.NoFreelist})
	if err != nil {
		return err
	}
	return errors.Join(db.Update(fill), db.Sync(), db.Close())
}

// in makes a path of buckets.
func in(tx *bolt.Tx, path ...string) (*bolt.Bucket, error) {
	b, err := tx.CreateBucketIfNotExists([]byte(path[0]))
	for _, name := range path[1:] {
		if err != nil {
			return nil, err
		}
		b, err = b.CreateBucketIfNotExists([]byte(name))
	}
	return b, err
}

func (b *Builder) writeRecords(tx *bolt.Tx) error {
	index, err := in(tx, "_index")
	if err != nil {
		return err
	}
	for id, row := range b.rows {
		bucket, err := in(tx, "_main", id)
		if err != nil {
			return err
		}
		for key, value := range row {
			data, at, err := encodeValue(value)
			if err == nil {
				err = bucket.Put([]byte(key), data)
			}
			if err == nil && at != "" {
				err = index.Put([]byte(at+"::"+id), nil)
			}
			if err != nil {
				return err
			}
		}
	}
	for id, values := range b.external {
		for name, data := range values {
			bucket, err := in(tx, "_external", id)
			if err == nil {
				err = bucket.Put([]byte(name), data)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// encodeValue is the form in the database. Bytes are written as they are.
func encodeValue(value any) (data []byte, index string, err error) {
	var item struct {
		Value any    `json:"value,omitempty"`
		Index string `json:"index,omitempty"`
	}
	switch v := value.(type) {
	case nil:
		return nil, "", nil
	case []byte:
		return v, "", nil
	case Indexed:
		item.Value, item.Index = v.Value, v.Index
	default:
		item.Value = v
	}
	data, err = json.Marshal(item)
	return data, item.Index, err
}

func putAll(b *bolt.Bucket, values map[string][]byte) error {
	for k, v := range values {
		if err := b.Put([]byte(k), v); err != nil {
			return err
		}
	}
	return nil
}

func varint(n int64) []byte { return binary.AppendVarint(nil, n) }

// moment is when everything was made.
func moment() []byte {
	data, err := time.Unix(1_700_000_000, 0).UTC().MarshalBinary()
	if err != nil {
		panic(err) // a time in UTC can be encoded
	}
	return data
}

func putLabels(b *bolt.Bucket, labels map[string]string) error {
	if labels == nil {
		return nil
	}
	at, err := b.CreateBucketIfNotExists([]byte("labels"))
	for k, v := range labels {
		if err != nil {
			return err
		}
		err = at.Put([]byte(k), []byte(v))
	}
	return err
}

func (b *Builder) writeNames(tx *bolt.Tx) error {
	v1, err := in(tx, "v1")
	if err != nil {
		return err
	}
	if err := v1.Put([]byte("version"), varint(4)); err != nil {
		return err
	}
	for _, s := range b.snapshots {
		if s.name == "" {
			continue
		}
		at, err := in(tx, "v1", "buildkit", "snapshots", b.Driver, s.name)
		if err == nil {
			err = putAll(at, map[string][]byte{"name": []byte(s.key), "parent": []byte(s.parent), "createdat": moment(), "updatedat": moment()})
		}
		if err == nil {
			err = putLabels(at, s.labels)
		}
		if err != nil {
			return err
		}
	}
	for id, l := range b.leases {
		if err := b.writeLease(tx, id, l); err != nil {
			return err
		}
	}
	for d, blob := range b.blobs {
		at, err := in(tx, "v1", "buildkit", "content", "blob", d.String())
		if err == nil {
			err = putAll(at, map[string][]byte{"size": varint(int64(len(blob.data))), "createdat": moment(), "updatedat": moment()})
		}
		if err == nil {
			err = putLabels(at, blob.labels)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *Builder) writeLease(tx *bolt.Tx, id string, l lease) error {
	at, err := in(tx, "v1", "buildkit", "leases", id)
	if err != nil {
		return err
	}
	if err := errors.Join(at.Put([]byte("createdat"), moment()), putLabels(at, l.labels)); err != nil {
		return err
	}
	for _, name := range l.snapshots {
		held, err := in(tx, "v1", "buildkit", "leases", id, "snapshots", b.Driver)
		if err == nil {
			err = held.Put([]byte(name), nil)
		}
		if err != nil {
			return err
		}
	}
	for _, d := range l.blobs {
		held, err := in(tx, "v1", "buildkit", "leases", id, "content")
		if err == nil {
			err = held.Put([]byte(d), nil)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *Builder) writeDriver(tx *bolt.Tx) error {
	if _, err := in(tx, "v1", "snapshots"); err != nil {
		return err
	}
	keys := map[string]string{}
	for _, s := range b.snapshots {
		if s.name != "" {
			keys[s.name] = s.key
		}
	}
	for _, s := range b.snapshots {
		if s.noDriver {
			continue
		}
		at, err := in(tx, "v1", "snapshots", s.key)
		if err != nil {
			return err
		}
		values := map[string][]byte{
			"id": binary.AppendUvarint(nil, s.number), "kind": {s.kind}, "createdat": moment(), "updatedat": moment(),
		}
		if s.parent != "" {
			values["parent"] = []byte(keys[s.parent])
		}
		if s.kind == Committed {
			values["size"], values["inodes"] = varint(4096), varint(2)
		}
		if err := putAll(at, values); err != nil {
			return err
		}
	}
	return nil
}

func (b *Builder) writeData() error {
	for _, s := range b.snapshots {
		if s.data == nil {
			continue
		}
		dir := filepath.Join(b.Dir, "snapshots", "snapshots", fmt.Sprint(s.number))
		upper := dir
		if b.Driver == "overlayfs" {
			upper = filepath.Join(dir, "fs")
			if err := os.MkdirAll(filepath.Join(dir, "work"), 0o711); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(upper, 0o755); err != nil {
			return err
		}
		for name, text := range s.data {
			if err := os.WriteFile(filepath.Join(upper, name), []byte(text), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *Builder) writeBlobs() error {
	for d, blob := range b.blobs {
		if blob.absent {
			continue
		}
		path := filepath.Join(b.Dir, "content", "blobs", d.Algorithm().String(), d.Encoded())
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(path, blob.data, 0o400); err != nil {
			return err
		}
	}
	return nil
}

// IDs lists the ids of all rows, in no order.
func (b *Builder) IDs() []string {
	var ids []string
	for id := range b.rows {
		ids = append(ids, id)
	}
	return ids
}

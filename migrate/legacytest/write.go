package legacytest

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
)

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

// made is when everything was made.
func made() time.Time { return time.Unix(1_700_000_000, 0).UTC() }

// moment is that as a database has it.
func moment() []byte {
	data, err := made().MarshalBinary()
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
			err = putAll(at, map[string][]byte{"name": []byte(cmp.Or(s.leads, s.key)), "parent": []byte(s.parent), "createdat": moment(), "updatedat": moment()})
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
			values["parent"] = []byte(cmp.Or(keys[s.parent], s.parent))
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
		files := s.data
		if b.Driver == "native" && b.Copies {
			files = b.Tree(s.name)
		}
		for name, text := range files {
			path := filepath.Join(upper, name)
			// A copy has the time of what it is of.
			if err := errors.Join(os.WriteFile(path, []byte(text), 0o644), os.Chtimes(path, made(), made())); err != nil {
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
		data := blob.data
		if blob.cut {
			data = data[:len(data)-1]
		}
		if err := os.WriteFile(path, data, 0o400); err != nil {
			return err
		}
	}
	return nil
}

package metadata

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// SchemaVersion is the version of the layout that this package writes. A
// store with a higher one is refused; fields that are added to a message
// need no new version.
const SchemaVersion uint32 = 1

// Meta describes the store itself.
type Meta struct {
	// Schema is the version of the layout.
	Schema uint32
	// Created is when the store was made.
	Created time.Time
	// MigratedFrom names the legacy state that the store was made from.
	MigratedFrom string
	// Driver is the snapshot driver that the store was made for.
	Driver string
	// Attributes is the class of extended attributes that overlayfs uses in
	// this store's snapshots.
	Attributes string
	// BootID is the boot in which the store was settled last.
	BootID string

	// unknown holds the fields that a newer version wrote.
	unknown []byte
}

// Meta returns what describes the store.
func (tx *Tx) Meta() (Meta, error) {
	schema, err := tx.schema()
	if err != nil {
		return Meta{}, err
	}
	payload, err := tx.framed(bucketMeta, keyStore)
	if err != nil {
		return Meta{}, err
	}
	m, err := decodeMeta(payload)
	if err != nil {
		return Meta{}, &DamagedError{Bucket: bucketMeta, Key: keyStore, Reason: err.Error()}
	}
	m.Schema = schema
	return m, nil
}

// SetMeta replaces what describes the store, but for the schema, which is
// the store's own: it must be the stored one, or 0.
func (tx *Tx) SetMeta(m Meta) error {
	schema, err := tx.schema()
	if err != nil {
		return err
	}
	if m.Schema != 0 && m.Schema != schema {
		return invalid("schema %d cannot become %d", schema, m.Schema)
	}
	if old, err := tx.Meta(); err == nil {
		m.unknown = old.unknown
	}
	payload, err := encodeMeta(m)
	if err != nil {
		return err
	}
	return tx.put(bucketMeta, []byte(keyStore), frame([]byte(keyStore), payload))
}

// schema reads the version that the file was written with.
func (tx *Tx) schema() (uint32, error) {
	payload, err := tx.framed(bucketMeta, keySchema)
	if err != nil {
		return 0, err
	}
	if len(payload) != 4 {
		return 0, &DamagedError{Bucket: bucketMeta, Key: keySchema, Reason: fmt.Sprintf("%d bytes", len(payload))}
	}
	return binary.BigEndian.Uint32(payload), nil
}

func (tx *Tx) framed(bucket, key string) ([]byte, error) {
	v, ok, err := tx.get(bucket, []byte(key))
	if err != nil {
		return nil, err
	}
	if !ok {
		err = errors.New("missing")
	} else {
		v, err = unframe([]byte(key), v)
	}
	if err != nil {
		return nil, &DamagedError{Bucket: bucket, Key: key, Reason: err.Error()}
	}
	return v, nil
}

// init fills a fresh file.
func (tx *Tx) init(created time.Time) error {
	schema := binary.BigEndian.AppendUint32(nil, SchemaVersion)
	if err := tx.put(bucketMeta, []byte(keySchema), frame([]byte(keySchema), schema)); err != nil {
		return err
	}
	for _, b := range buckets() {
		if err := tx.makeBucket(b); err != nil {
			return err
		}
	}
	return tx.SetMeta(Meta{Created: created})
}

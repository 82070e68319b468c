package buildkit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
)

// Row is a record of BuildKit's.
type Row struct {
	ID string
	// Number is its place in State.List.
	Number int

	Created, LastUsed time.Time // zero: never
	UsageCount        uint64
	Retain            bool
	Description       string
	RecordType        string
	Size              int64 // -1: unknown

	// Committed is set for immutable rows; those up to v0.6 do not say it.
	Committed bool
	Deleted   bool
	// EqualMutable is the row that owns the snapshot of a pair.
	EqualMutable string
	Parent       string
	MergeParents []string
	// DiffLower and DiffUpper are the inputs of a diff; upper may be absent.
	DiffLower, DiffUpper string
	// Snapshot is the name of the snapshot, in BuildKit's namespace.
	Snapshot string

	BlobOnly  bool
	Blob      digest.Digest
	BlobSize  int64
	DiffID    digest.Digest
	MediaType string
	ChainID   digest.Digest
	URLs      []string
	ImageRefs []string

	// Values are all others, also unknown ones, sorted by name.
	Values []Value

	// Damaged is why the row cannot be trusted, nil if it can.
	Damaged error
}

// Value is one that BuildKit does not need to tell what the record is, or one
// that another version knows.
type Value struct {
	Name  string
	JSON  []byte
	Index string
}

// IsMerge and IsDiff say how the row came to be.
func (r *Row) IsMerge() bool { return len(r.MergeParents) > 0 }

// IsDiff says that the row is the difference of two others.
func (r *Row) IsDiff() bool { return r.DiffLower != "" || r.DiffUpper != "" }

// SnapshotName is the name of the row's own snapshot.
func (r *Row) SnapshotName() string {
	if r.Snapshot != "" {
		return r.Snapshot
	}
	return r.ID
}

// Index returns the index key under which a value of the row is found.
func (r *Row) Index(name string) string {
	for _, v := range r.Values {
		if v.Name == name {
			return v.Index
		}
	}
	return ""
}

// item is how a value is stored.
type item struct {
	Value json.RawMessage `json:"value,omitempty"`
	Index string          `json:"index,omitempty"`
}

// nanoseconds is a time since 1970; 0 is never.
type nanoseconds struct{ at *time.Time }

func (n *nanoseconds) UnmarshalJSON(raw []byte) error {
	var ns int64
	err := json.Unmarshal(raw, &ns)
	n.set(ns)
	return err
}

func (n *nanoseconds) set(ns int64) {
	if ns != 0 {
		*n.at = time.Unix(0, ns).UTC()
	}
}

// retained is a cache policy, of which 1 is to retain.
type retained struct{ retain *bool }

func (p *retained) UnmarshalJSON(raw []byte) error {
	var policy int
	err := json.Unmarshal(raw, &policy)
	*p.retain = policy == 1
	return err
}

// field is what the value of a key is read into, nil if the key has no meaning
// here.
func (r *Row) field(key string) any {
	switch key {
	case "cache.createdAt":
		return &nanoseconds{&r.Created}
	case "cache.lastUsedAt":
		return &nanoseconds{&r.LastUsed}
	case "cache.usageCount":
		return &r.UsageCount
	case "cache.cachePolicy":
		return &retained{&r.Retain}
	case "cache.description":
		return &r.Description
	case "cache.recordType":
		return &r.RecordType
	case "snapshot.size":
		return &r.Size
	case "snapshot.committed":
		return &r.Committed
	case "cache.deleted":
		return &r.Deleted
	case "cache.equalMutable":
		return &r.EqualMutable
	case "cache.parent":
		return &r.Parent
	case "cache.mergeParents":
		return &r.MergeParents
	case "cache.lowerDiffParent":
		return &r.DiffLower
	case "cache.upperDiffParent":
		return &r.DiffUpper
	case "cache.snapshot":
		return &r.Snapshot
	}
	return r.layerField(key)
}

// layerField is field for what describes a layer.
func (r *Row) layerField(key string) any {
	switch key {
	case "cache.blobonly":
		return &r.BlobOnly
	case "cache.blob":
		return &r.Blob
	case "cache.blobsize":
		return &r.BlobSize
	case "cache.diffID":
		return &r.DiffID
	case "cache.mediatype":
		return &r.MediaType
	case "cache.chainID":
		return &r.ChainID
	case "cache.layer.urls":
		return &r.URLs
	case "cache.imageRefs":
		return &r.ImageRefs
	}
	return nil
}

// indexed are keys whose index a record has by itself, so that the value need
// not be carried: a chain id is one of its fields.
func indexed(name string) bool { return name == "cache.chainID" }

// parse reads a value of the row; they come in the order of their keys. One
// that cannot be read spoils the row: what it was is not known.
func (r *Row) parse(key, raw []byte) {
	if len(bytes.TrimSpace(raw)) == 0 {
		return // cleared
	}
	it, ok := quickItem(raw)
	if !ok {
		it = item{}
		if err := json.Unmarshal(raw, &it); err != nil {
			r.Damaged = fmt.Errorf("value %q cannot be read: %w", key, err)
			return
		}
	}
	field := r.field(string(key))
	known := field != nil
	if known && len(it.Value) > 0 && !quickValue(it.Value, field) {
		if err := json.Unmarshal(it.Value, field); err != nil {
			r.Damaged = fmt.Errorf("value %q cannot be read: %w", key, err)
		}
	}
	if known && (it.Index == "" || indexed(string(key))) {
		return
	}
	r.Values = append(r.Values, Value{Name: string(key), JSON: bytes.Clone(it.Value), Index: it.Index})
}

// check looks for values that no daemon writes.
func (r *Row) check() {
	for _, d := range []struct {
		what string
		d    digest.Digest
	}{{"blob", r.Blob}, {"diff id", r.DiffID}, {"chain id", r.ChainID}} {
		if d.d != "" && d.d.Validate() != nil && r.Damaged == nil {
			r.Damaged = fmt.Errorf("%s %q is no digest", d.what, printable(string(d.d)))
		}
	}
	if r.Size < -1 {
		r.Size = -1
	}
}

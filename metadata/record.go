package metadata

import (
	"time"

	digest "github.com/opencontainers/go-digest"
)

// ID names a record. Ids that the store mints are ULIDs; imported ones are
// kept as they came, so everybody else treats an ID as opaque bytes.
type ID string

// MaxIDLen is the longest id, in bytes, that the store takes. Longer ones are
// invalid arguments: ids become file names of holds and driver keys.
const MaxIDLen = 1024

// State says where a record stands in the life of its snapshot. The zero
// value is no state and is refused by the store.
type State uint8

const (
	// Mutable is a snapshot that is active in the driver and that one
	// writer may change. Only retained ones have a record.
	Mutable State = iota + 1
	// Committed is a snapshot that nobody changes any more while the
	// driver still has it as active: its commit there is put off.
	Committed
	// Finalized is a snapshot that is committed in the driver under the
	// record's own id.
	Finalized
	// Lazy is a record whose snapshot does not exist yet; its blobs or its
	// inputs say how to make it.
	Lazy
)

// Op says how a record came to be.
type Op uint8

const (
	// Base is a record without a parent that a writer filled.
	Base Op = iota + 1
	// Layer is a record over one parent, or one that a layer blob describes.
	Layer
	// Merge stacks its parents, bottom first.
	Merge
	// Diff is what its second parent adds to its first.
	Diff
)

// PowerCut says what becomes of a retained mutable whose data may not have
// reached the disk when the machine went down.
type PowerCut uint8

const (
	// Drop removes it: half-written files must not be taken for good ones.
	Drop PowerCut = iota
	// Keep keeps it, for directories whose users check what they read.
	Keep
)

// SizeUnknown is the size of a snapshot that nobody measured yet.
const SizeUnknown int64 = -1

// Record is all that the store knows of one snapshot. It goes in and out
// whole; a Record that was read is the caller's own copy. Times come back in
// UTC without a monotonic reading. An empty slice or map comes back as nil.
type Record struct {
	ID    ID
	State State
	Op    Op
	// Revision counts the writes of the record; the store sets it. A Put
	// with another revision than the stored one is refused, so a result
	// that was computed on an old state cannot overwrite a newer one.
	Revision uint64

	// Key is the snapshot's name in the driver, empty for a lazy record.
	Key string
	// Was is the former Key while a rename of the snapshot may not have
	// reached the disk yet; else empty.
	Was string
	// Parents never change. A merge has its inputs bottom first; a diff
	// lower, then upper.
	Parents []ID
	// Aliases are further ids under which the record is found.
	Aliases []ID

	// Retain keeps the record past its last handle. It is no protection
	// from prune.
	Retain bool
	// Interrupted marks a reopened record that was not committed again.
	Interrupted bool
	// RetainAfter is the policy that Commit restores in Retain when it ends
	// an interruption.
	RetainAfter bool
	OnPowerCut  PowerCut
	// Durable says that the snapshot's data has reached the disk.
	Durable bool
	// Raw says that the snapshot's upper directory still has the marks that
	// overlayfs left in it: it mounts under its own children only, until a
	// cleaned copy is made.
	Raw bool

	Type        string
	Description string
	Labels      map[string]string

	Created time.Time
	// LastUsed is zero as long as no handle was released. It and UsageCount
	// are set by Create and Replace, and then by Store.Touch alone: Put
	// leaves them as they are.
	LastUsed   time.Time
	UsageCount uint64
	// Cost is what it took to make the content: for a build, the duration
	// of its command.
	Cost time.Duration
	// Size is what the snapshot itself occupies, in bytes on the disk,
	// without its parents, or SizeUnknown.
	Size int64

	ChainID digest.Digest
	DiffID  digest.Digest
	// Verified says that the snapshot was made from a blob whose DiffID was
	// recomputed while applying.
	Verified  bool
	Blobs     []Blob
	ImageRefs []string
	Values    []Value

	// row is the key of the record's row, by which all other rows know it:
	// the id that the first record in the row had. The store owns it.
	row ID
	// unknown holds the fields that a newer version wrote, so that a
	// rewrite by this one keeps them. Blob and Value have their own.
	unknown []byte
}

// Blob is one compressed form of the record's layer.
type Blob struct {
	Digest      digest.Digest
	MediaType   string
	Size        int64
	DiffID      digest.Digest
	Annotations map[string]string
	URLs        []string
	// Stored says that the blob was in the content store when the record
	// learnt of it, or since: that it is not there is a loss. A blob that is
	// not stored is known from a descriptor only.
	Stored bool
	// Claimed says that DiffID is what somebody said of the blob, and nobody has
	// held its bytes against it yet.
	Claimed bool

	unknown []byte
}

// Value is a named datum that callers attach to a record and may search by.
// Names are unique in a record. All three fields may hold any bytes.
type Value struct {
	Name string
	Data []byte
	// Index, if not empty, is the exact key under which ByIndex finds the
	// record for as long as the value stands.
	Index string

	unknown []byte
}

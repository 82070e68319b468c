package snapshot

import (
	"context"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// Driver keeps snapshots as directories. It is containerd's Snapshotter,
// whose documentation is the contract for the embedded methods, and what a
// cache needs beside: names that show what is under way, removal in two
// steps, and mounts of its own.
//
// A Driver is safe for concurrent use. It assumes that no other process
// changes names under its root meanwhile; the cache's store lock sees to it.
type Driver interface {
	// Snapshotter: Remove moves the name out of the key space and leaves
	// the bytes for Cleanup (containerd's Cleaner, which every Driver has).
	snapshots.Snapshotter
	snapshots.Cleaner

	// Info describes the driver and what it found in the kernel.
	Info() Info

	// Settle finishes or takes back what a killed process left half done in
	// the names: it empties the making area, puts removed names that still
	// have children back, and leaves the rest to Pending. It decides
	// nothing about active names.
	Settle(ctx context.Context) error

	// Pending lists the names that say what is under way: active snapshots
	// and removals whose bytes are still there.
	Pending(ctx context.Context) ([]Pending, error)

	// Committed lists the names of committed snapshots. Like Pending it goes
	// by names alone: what a power cut left of a snapshot does not matter.
	Committed(ctx context.Context) ([]string, error)

	// Detach is the first step of a removal: key leaves the key space by one
	// rename. It is refused with FailedPrecondition while another name has
	// key as its parent, and is NotFound for an unknown key. Until Discard
	// or Restore is called on the result, Cleanup leaves it alone.
	Detach(ctx context.Context, key string) (Pending, error)

	// Discard deletes the bytes of a removal that Detach or Pending gave.
	// Repeating it is harmless.
	Discard(ctx context.Context, p Pending) error

	// Restore takes a removal back: the name is in the key space again. It
	// is FailedPrecondition if the parent was removed meanwhile (so parents
	// are restored first), AlreadyExists if the key is taken again, and
	// NotFound once Discard has begun.
	Restore(ctx context.Context, p Pending) error

	// Mount mounts the tree of key on the existing directory target: a
	// writable mount for an active key unless readOnly is set, and always a
	// read-only one for a committed key or a view. A key that Commit renames
	// meanwhile is NotFound; the caller looks the new name up and tries
	// again. A writable mount of a key that InUse would report is
	// FailedPrecondition, as is a stack deeper than Info().MaxDepth, in which
	// the layer of an active key counts for read-only mounts. The mount ends
	// with the system's unmount.
	Mount(ctx context.Context, key, target string, readOnly bool) error

	// Dir is the directory that holds the whole tree of key, for drivers
	// that copy; ok is false for those that stack.
	Dir(ctx context.Context, key string) (dir string, ok bool, err error)

	// InUse says whether some mount, in whatever mount namespace, still has
	// key as its writable layer. Drivers that cannot know say false.
	InUse(ctx context.Context, key string) (bool, error)

	// Stacker is what the driver can do with layers; ok is false for one
	// that keeps whole trees, or whose layers nobody can reach. Merges and
	// differences are applied file by file there, see Apply.
	Stacker() (s Stacker, ok bool)

	// Sync writes everything below the driver's root to the disk. After an
	// error the data must be taken as lost, even if a later Sync succeeds.
	Sync(ctx context.Context) error
}

// Kinds of a Pending name.
const (
	// PendingActive is a writable snapshot.
	PendingActive PendingKind = iota + 1
	// PendingRemoval is a name that was detached and whose bytes are there.
	PendingRemoval
)

// PendingKind says what is under way with a name.
type PendingKind uint8

// Pending is a name that is not simply committed.
type Pending struct {
	// Key is the name as callers gave it.
	Key  string
	Kind PendingKind
	// entry is the directory below the driver's root, as the driver knows it.
	entry string
}

// Info describes a driver for people and for the store's meta data.
type Info struct {
	// Name is "overlay", "native", or the name of an adapted snapshotter.
	Name string
	// Attributes is the class of extended attributes that holds overlay
	// marks: "trusted", "user", or empty where there are none.
	Attributes string
	// Reason says why this driver was chosen, in one line for people.
	Reason string
	// Features are the abilities of the kernel that the driver uses or
	// misses, e.g. "lowerdir by descriptor": true.
	Features map[string]bool
	// MaxDepth is how many layers one mount can stack; 0 means no limit.
	MaxDepth int
	// Lingers says that the bytes of what was discarded may stay until Cleanup.
	Lingers bool
}

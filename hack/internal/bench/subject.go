package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// Opener opens a cache of one kind.
type Opener struct {
	// Name stands over the subject's column.
	Name string
	// Open opens, or makes, the cache in dir.
	Open func(ctx context.Context, dir string) (Subject, error)
	// Databases are the paths of the bbolt files of the cache in dir.
	Databases func(dir string) []string
	// Portable says that a closed cache may be copied to another directory.
	// Its state is then built in memory, without a disk to wait for.
	Portable bool
	// Legacy makes the directory dir as an old daemon leaves it that has n
	// records, nil for caches that nobody migrates from.
	Legacy func(ctx context.Context, dir string, n int) error
}

// Subject is an open cache. Its methods are safe for concurrent use.
type Subject interface {
	// New makes a writable snapshot over parent, which may be nil. What is
	// committed from it stays after its last handle is released.
	New(ctx context.Context, parent Immutable, values ...Value) (Mutable, error)
	// Get gives a handle on a record and notes that it is used.
	Get(ctx context.Context, id string) (Immutable, error)
	// Look is Get of a record whose use is not noted.
	Look(ctx context.Context, id string) (Immutable, error)
	// GetMutable makes a committed record writable again; id is its
	// ReopenID.
	GetMutable(ctx context.Context, id string) (Mutable, error)
	// Search returns the ids of the records with a value indexed by key.
	Search(ctx context.Context, key string) ([]string, error)
	// NewVictim is New of a record whose description is Victims.
	NewVictim(ctx context.Context, parent Immutable) (Mutable, error)
	// Prune removes the records of this description that nobody holds, or all
	// if it is empty, until the store uses no more than maxUsed bytes if that is
	// not nil, and says how many went. Their space is free when it returns.
	Prune(ctx context.Context, description string, maxUsed *int64) (removed int, err error)
	// Used is what all records occupy, in bytes.
	Used(ctx context.Context) (int64, error)
	// List lists all records with their sizes, and says how many there are.
	List(ctx context.Context) (records int, err error)
	// PutBlob puts a layer's blob into the content store.
	PutBlob(ctx context.Context, b LayerBlob) error
	// GetByBlob gives the record of a layer over parent, which may be nil,
	// without extracting it. It finds a provider for the blob if it wants one.
	// What it makes, and what Merge and Diff make, are victims.
	GetByBlob(ctx context.Context, b LayerBlob, parent Immutable) (Immutable, error)
	// Merge gives the record of the inputs one above the other.
	Merge(ctx context.Context, inputs []Immutable) (Immutable, error)
	// Diff gives the record of what upper has more than lower.
	Diff(ctx context.Context, lower, upper Immutable) (Immutable, error)
	// Close waits for all that is under way.
	Close() error
}

// Victims describes the records that samples of a prune remove.
const Victims = "victim"

// Value is a datum of a record that Search finds by Index.
type Value struct{ Name, Data, Index string }

// Mutable is the writer's handle on a snapshot.
type Mutable interface {
	ID() string
	// Change mounts the snapshot, changes what is in it and unmounts it.
	Change(ctx context.Context, change func(dir string) error) error
	// Commit consumes the handle.
	Commit(ctx context.Context) (Immutable, error)
	Release(ctx context.Context) error
}

// Immutable is a reader's handle on a record.
type Immutable interface {
	ID() string
	// ReopenID is the id by which GetMutable finds the record.
	ReopenID() string
	// Finalize returns when the snapshot is committed in its driver.
	Finalize(ctx context.Context) error
	SetValue(ctx context.Context, v Value) error
	Release(ctx context.Context) error

	// Extract makes the snapshots of the record and of what it is made of.
	Extract(ctx context.Context) error
	// Blob makes the blob of each layer that has none.
	Blob(ctx context.Context, gzip bool) error

	// Checksum is the content hash of the whole tree.
	Checksum(ctx context.Context) (string, error)
	// ForgetChecksum forgets what is known of the content hashes: what is in
	// memory only, which is stored first, or with all what is stored, too.
	ForgetChecksum(ctx context.Context, all bool) error
	// ReportChange tells that a file, mode 0644 of root, has this content now,
	// computes the digest of the whole tree and stores what changed.
	ReportChange(ctx context.Context, name string, data []byte) error
}

// transactions is the number of write transactions that the bbolt files saw
// since they were made. It reads the transaction id of the newer meta page,
// which every write transaction that commits adds one to.
func transactions(files []string) (uint64, error) {
	var sum uint64
	for _, file := range files {
		id, err := txid(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // some are made at their first use
		}
		if err != nil {
			return 0, fmt.Errorf("read the transaction id of %s: %w", file, err)
		}
		sum += id
	}
	return sum, nil
}

// A bbolt file starts with two meta pages: a page header of 16 bytes, then
// magic and version (u32 each), page size (u32) and, at 64, the id (u64).
const (
	pageSizeAt = 24
	txidAt     = 64
)

func txid(file string) (id uint64, err error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()

	var first [txidAt + 8]byte
	if _, err := f.ReadAt(first[:], 0); err != nil {
		return 0, err
	}
	id = binary.NativeEndian.Uint64(first[txidAt:])
	var second [8]byte
	pageSize := int64(binary.NativeEndian.Uint32(first[pageSizeAt:]))
	if _, err := f.ReadAt(second[:], pageSize+txidAt); err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	return max(id, binary.NativeEndian.Uint64(second[:])), nil
}

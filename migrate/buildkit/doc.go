// Package buildkit reads the state that a BuildKit worker keeps in its
// directory. It only looks: it opens every file read-only, holds bbolt's lock
// on the databases meanwhile, so that no daemon works on them, and believes
// nothing that it reads. What cannot be read is named, never a panic.
//
//	metadata_v2.db          records: one bucket each, JSON values  → Row
//	metadata.db             the same, up to v0.6                   → Row
//	containerdmeta.db       leases, names of snapshots, blobs      → Lease, Snapshot, Blob
//	snapshots/metadata.db   the snapshotter's own names            → Snapshot
//	snapshots/snapshots/N   the data
//	content/blobs/ALG/HEX   blobs
//
// The package says what is there. What it means, package migrate decides.
package buildkit

// Package cache keeps filesystem snapshots as records: one record per
// snapshot, from the moment a writer opens it to its removal.
//
//	  New           Commit              Finalize
//	─────▶ mutable ──────▶ committed ───────────▶ finalized
//	            ▲               │
//	            └───────────────┘
//	             GetMutable: same snapshot, new id
//
// Commit freezes a snapshot with one transaction: nothing is copied and the
// driver is not asked. Finalize commits it in the driver under the record's
// own id; it happens when the record becomes a parent, or on request. A
// committed record that nobody holds can be reopened: the new record takes
// over the snapshot, the values and the attachments, and the old id is gone,
// so an immutable id never names two contents.
//
// # Handles
//
// Open gives a Manager; Manager.New and Manager.GetMutable give a MutableRef,
// MutableRef.Commit and Manager.Get an ImmutableRef. A handle keeps its record
// from being removed or reopened until Release. Releasing twice is harmless.
// All methods are safe for concurrent use.
//
// A record outlives its last handle: committed and retained ones stay until
// they are removed. A mutable that was neither committed nor retained has no
// record; it dies with its handle.
//
// # Layers
//
// GetByBlob gives the record of an image layer, Merge and Diff those of trees
// that are made of others. They are lazy: Extract, or whatever needs the
// snapshot, makes it. GetRemotes gives layers out as blobs.
//
// # Usage and pruning
//
// DiskUsage counts everything once; Used, Totals and Reclaimable cost the same
// however many records there are. Plan computes what policies (package policy)
// would remove, Execute does it in batches that nobody waits for, and Prune is
// both. Managers that sync in the background measure sizes there, too.
//
// # Locks
//
// Ranks are taken downwards only:
//
//  1. a record's transition token: the right to drive its next transition.
//     It is waited for with the caller's context and held across I/O.
//  2. Manager.mu: the table of loaded records, handle counts and states in
//     memory. Never held across I/O, a channel operation that can block, a
//     callback or a driver call.
//  3. a store transaction.
//  4. leaves: the mount pool's lock of one key (held across the mount call),
//     the dirty mark, the list of records to be measured.
//
// A transition is: take the token, call the driver, commit the transaction,
// publish in memory, drop the token. Whoever reads in between sees the old
// state, which is still true on the disk; only a removal and a reopen make
// others wait, since after them the id is gone.
package cache

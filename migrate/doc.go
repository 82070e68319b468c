// Package migrate takes over the state of existing BuildKit daemons, and gives
// daemons the Open that does so when it is needed.
//
//	legacy databases ──read──▶ buildkit.State ──NewPlan──▶ Plan ──Execute──▶ lamina.db
//	                                           (pure)        │
//	                                                         └─ printed by --dry-run
//
// A Plan is data: what becomes of each row, and why; what is adopted, what is
// left over. Executing it never asks again what should be done.
//
// # What is never touched
//
// The legacy databases, blobs and data directories are read, never written,
// renamed or copied. Snapshots are adopted where they stand: an entry of the
// driver leads to the data by a link. The new store is written beside, under
// another name, synced, and renamed into place as the last step. Until then the
// old daemon finds everything as it was; a migration that is killed at any
// point is simply run again.
//
// # Way back
//
// As long as no adopted snapshot was changed, Rollback takes the store away
// again. When that ends is said in the package's documentation of Rollback.
package migrate

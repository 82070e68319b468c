// Package workspace runs build commands in warm workspaces: a workspace is a
// directory that keeps its build products from run to run, and it is a record
// of the cache, found by its key.
//
// A run goes through these steps; the store is open in those with a box only,
// so that runs of different keys do not wait for each other:
//
//	┌ look ┐   scan     ┌ begin ┐   sync, command,    ┌ end ┐
//	│      │ ─ source ─▶│       │ ─ outputs         ─▶│     │
//	└──────┘            └───┬───┘                     └─────┘
//	                        └─ same as last time: log and outputs come from
//	                           the record, nothing runs
//
// Begin reopens the record: the snapshot is the same, nothing is copied, the
// id is new. End commits it lazily. Between the two a hold on the record tells
// other processes who works in it. A workspace that was finalized meanwhile
// gets a child instead, to which the key moves at the end.
//
// What a run depends on is its memo: command, environment, mounts and the
// digest of the source. A run is skipped only if all of it equals the memo of
// the run that made the workspace's present content, and that run succeeded.
package workspace

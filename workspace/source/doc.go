// Package source brings a source tree into a workspace: it reads what a
// directory holds, gives it a digest, and makes a second directory hold the
// same, copying only what changed.
//
//	Scan ──▶ Tree ──▶ Digest            what the source is
//	           │
//	           └────▶ SyncTo ──▶ Tree   the same, with what the copies look like
//	                               │
//	           Encode ◀────────────┘    kept beside the workspace, and given as
//	                                    prev to the next Scan and SyncTo
//
// # What a tree holds
//
// Directories, regular files, symbolic links, FIFOs and devices below a
// directory, with mode, owner, modification time, extended attributes and
// which names are hard links of one file. The directory itself is not part of
// its tree: its name, mode and times are the caller's business. Sockets are
// left out, and so are files under way of this program's own outputs; a tree
// lists what it leaves out in Notes, so nothing is dropped silently. What
// Options.Exclude and Options.Skip name is not source at all.
//
// # What is read again
//
// Content is read only where the stat data (device, inode, size, mtime, ctime)
// differ from those of the previous tree, or where they could not tell a
// change: a file written twice within one tick of the kernel's clock shows the
// same times. Hence the rule that git calls racy: an entry whose mtime or
// ctime is not older than the start of the scan that read it, less a safety
// window, is read again by the next one. A file that is replaced by one of the
// same size with its mtime set back has another inode or ctime.
//
// Two things stat data cannot show: writes through a shared memory map that
// the kernel has not yet noted in the times, and file systems whose server has
// a clock that runs behind by more than the window.
//
// # What a sync leaves alone
//
// SyncTo changes what the source names or named, nothing else. Files that the
// workspace has beside stay, in directories of the source too; a directory
// that the source dropped goes only when nothing else is in it. Where both
// claim a place the source wins, whatever the type. What a command changed,
// removed or replaced among the synced files is put back.
//
// # Races
//
// All names are resolved by descriptors below the two directories, without
// following a symbolic link, so a directory swapped for a link never leads out
// of either. A file that changes between the scan and its copy is a
// ChangedError: scan again. Two syncs into one workspace at once are the
// caller's mistake.
package source

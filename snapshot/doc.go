// Package snapshot keeps snapshots of file trees as directories, in layers:
// the drivers overlay (stacks layers with overlayfs) and native (copies), and
// an adaptor for any other snapshotter of containerd.
//
// # Layout
//
// The two drivers share one layout below the store's root and have no
// database. What is under way can be told from the names alone.
//
//	snapshots/driver                  which driver made this tree, and how
//	snapshots/new/<key>~<random>/     being made
//	snapshots/active/<key>/           writable, or a view
//	snapshots/committed/<name>/       sealed; Commit is a rename
//	snapshots/trash/<key>~<a|c><random>/  removed from active or committed,
//	                                  bytes still there
//	snapshots/empty/                  the empty layer at the bottom of mounts
//	snapshots/l/<inode>               short links to fs directories, for mount
//	                                  options that would be too long
//	snapshots/snapshots/<n>/          directories adopted from another owner
//
// An entry, as each <key> directory is called here, holds
//
//	fs        the tree (native) or the layer (overlay); a relative link to
//	          ../../snapshots/<n>/fs where it was adopted
//	work      overlayfs's scratch directory beside a writable fs
//	info      log of what is known, see below
//	id        empty file, made for the first child; id.1 and so on when the
//	          file system takes no more links
//	parent    hard link to the parent's id
//
// so that the number of children is a matter of one stat: each has a link to
// the parent's id. Every name appears by one rename of a complete entry, and
// renames never replace anything (RENAME_NOREPLACE).
//
// The name of an entry is its key with bytes outside [A-Za-z0-9._-] and a
// leading dot as %XX, or, where that is longer than 200 bytes, "~" and the
// SHA-256 of the key, which then stands in info. Keys of active and committed
// entries share one key space.
//
// # Info
//
// info is a log: one line per change, appended by one write, each with a
// CRC-32C and the whole state in JSON. The last valid line wins, so a torn
// one is as if never written. Commit appends a line that is marked sealed and
// then renames the entry. Sealed lines count in committed only, the others
// elsewhere, which makes the rename the moment of the commit.
//
// # Crashes
//
// A process that is killed leaves entries in new (dropped by Settle), a cut
// commit (the active name is as before), or entries in trash. Settle needs
// no more than these names. No operation syncs; Sync does, for all.
//
// # Locks
//
// A lock per key is held while the names of that key change and across an
// overlay mount or probe of it, which exclude each other. Several are taken
// in the order of the keys. Measuring, copying and deleting trees happen
// outside. The mutexes of the caches are leaves.
package snapshot

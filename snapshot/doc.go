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
//	snapshots/adopted                 which of them are what, until they get an
//	                                  entry, see below
//
// An entry, as each <key> directory is called here, holds
//
//	fs        the tree (native) or the layer (overlay); a relative link to
//	          ../../snapshots/<n>/fs where it was adopted
//	work      overlayfs's scratch directory beside a writable fs
//	info      log of what is known, see below
//	id        empty file, made for the first child; id.1 and so on when the
//	          file system takes no more links
//	parent    hard link to the parent's id; a stack, which has no fs, has one
//	          to the id of each of its layers: parent, parent.1 and so on
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
// # Adopted snapshots
//
// adopted is a list with a line for each snapshot that was adopted, in the
// order of the names of their entries:
//
//	<mark> <name> <key> <n> <a|c> <parent> <bound> <created> <updated> <inodes> <size> <CRC-32C>
//
// with names and keys escaped, and "." for what is empty. As long as the mark is
// "+" the snapshot has no entry, and is as good as one that has: it is listed,
// its key is taken, its parent cannot be removed. Its first use makes the entry,
// by one rename as any other, and then sets the mark to "-". A removal before
// that moves <n> itself to trash/<key>~m<a|c><n>, which needs no room on the
// disk. An entry counts more than its line, so a kill between the two changes
// nothing; marks that a power cut lost are found out by Settle, as the data of a
// snapshot that is in use, in trash or gone is known by its number.
//
// # Layers
//
// With the overlay driver each committed snapshot is a layer: its upper
// directory, which is the difference to its parent. A Driver that has a
// [Stacker] offers what can be done with layers:
//
//   - Stack commits a list of layers as a snapshot: a merge.
//   - Layers lists those of a snapshot, with their directories.
//   - Clean, called before Commit, makes a layer the mere difference, which can
//     be stacked; CleanCopy does so for one that was committed without.
//   - Diff compares two trees and commits the difference as a layer.
//
// A merge of snapshots is therefore
//
//	list = Flatten(layers of all inputs, bottom first)
//	for each raw layer in it: CleanCopy, and its name in the list
//	Stack(name, list)
//
// a difference is Stack(name, rest) where [Remainder] finds that upper has rest
// on top of lower, and else Diff. A layer that was written from a blob is
// committed [WithExactLayer].
//
// Drivers without a Stacker keep whole trees. There, and where a merge cannot
// be stacked because it is too deep ([DepthError]) or has a layer that makes
// sense over its own parent only ([LayerError]), it is made file by file:
//
//	Prepare(key, "")
//	Apply(key, {{Lower: parent of a layer, Upper: the layer}, ...})
//	Commit(name, key, WithExactLayer)
//
// A difference has no layer there either. Its snapshot, made by Apply of
// {{Lower: lower, Upper: upper}}, shows what the difference adds; what it
// deletes can be told only from the two trees. So a merge applies the pair
// (lower, upper) again instead of the snapshot of the difference, and the two
// have to be kept for as long as there is the difference.
//
// Applying means what it means for the layers of OCI images: a whiteout
// removes, an opaque directory hides all that it held, a directory over a
// directory replaces its attributes and keeps what it holds, anything else
// replaces what was there. Hard links are kept within a layer.
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
// outside; only Clean holds the lock of its key for as long as it walks, as
// nobody may mount it meanwhile. The mutexes of the caches are leaves.
package snapshot

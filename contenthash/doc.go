// Package contenthash computes digests of files and trees inside a snapshot,
// equal to those of BuildKit's contenthash version 0 for the same tree and
// options, and remembers them. It knows snapshots as directories and storage
// as named pages; it knows no cache and no store.
//
//	                Checksum(path, options)
//	                         │
//	HandleChange ──▶  Tree: what is known  ◀── reads ──  Opener: the files
//	ApplyLayer   ──▶         │     ▲
//	ImportV0     ──▶      Save     Load
//	                         ▼     │
//	                   pages of some 16 KiB and an index
//
// # Digests
//
// A file's digest is over a header (mode, owners, size, type, link, device
// numbers, extended attributes) and its content; a directory's is over its
// header and the names and digests of its entries. Times do not count, nor
// which names are hard links of one file. A digest is a function of the files
// alone: however a tree came to know what it knows, it answers what a new one
// would. docs/contenthash.md tells the form, and where the peer differs.
//
// # What a tree knows, and when it is believed
//
// A Tree is a cache of facts: which entries a directory has, their types,
// digests, and the stat data (inode, ctime, mtime, size) from which a digest
// was read. It is lazy: only what an answer needs is read, and only what is
// not known.
//
// Facts of a snapshot that nobody writes are used as they are. A writer begins
// with Unconfirm; from then on each fact is used only if the entry still has
// its stat data, and was not changed so shortly before these were taken that a
// later change could hide behind them. A writer that reports all its changes
// by HandleChange ends with Confirm, which spares the validation; one that
// does not with Seal; one that is cut off ends with neither, and what it left
// untold is never believed.
//
// # Storage
//
// Save returns what has to be written, in one transaction, so that Load gives
// the tree again; after one changed file that is one page and the index. What
// Load finds damaged is told as a DamagedError, and computed anew.
//
// # Safety
//
// Every name is resolved from a descriptor below the root, without following a
// link in the kernel; links are followed by their text, inside the root.
// Nothing but regular files and directories is opened. What changes while it
// is read is read again, and in the end is ErrChanged.
//
// # Concurrency
//
// All methods may be called at once. Of those who need files read one works at
// a time, with several goroutines; the others wait, with their contexts, and
// then find what was read. One who is cancelled leaves what was read so far to
// the next.
package contenthash

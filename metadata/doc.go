// Package metadata is the record store of a snapshot cache: one bbolt file,
// in which each snapshot has one record, and everything by which records are
// found is derived from them in the transaction that writes them.
//
// # The file
//
// This is all that a store holds. A row is KEY → VALUE; words in quotes are
// meant literally, u8, u16 and u64 are unsigned numbers in big endian, what
// follows to the end of a key is unframed. Each bucket's line has its name
// first.
//
//	meta
//	    "schema"                                → frame(u32 version)
//	    "store"                                 → frame(Meta)
//	record                                        header number: ms of the greatest ULID
//	    row                                     → frame(Record)
//	index
//	    u16 length of key, key, row             → nothing
//	child
//	    u16 length of parent id, parent id, row → nothing
//	snapshot
//	    driver key                              → row
//	blob
//	    u16 length of digest, digest, row       → nothing
//	unsettled
//	    row                                     → nothing
//	total
//	    u8 state, u8 shared, type               → frame(Total)
//	alias
//	    alias                                   → row
//	attachment
//	    u16 length of row, row, name            → frame(data)
//	quarantine                                    header number: last number given out
//	    u64 number, row                         → what was found in the row
//
//	frame(payload) = u8 format (1), u32 CRC-32C of key and payload, payload
//
// A row of the bucket record has as its key the id of the record that was
// created in it. One that replaces another takes the row over under a new id,
// and all that leads to the row stays as it is: a reopened record has the same
// snapshot, values and attachments.
//
// Record, Meta and Total are the protobuf messages of internal/recordpb. The
// checksum is there because protobuf decodes most damaged bytes without
// complaint; the key is part of it so that a value that turns up at another
// key is noticed. Fields that this version does not know survive a rewrite.
//
// A header number is bbolt's sequence of a bucket. It lies on a page that
// each transaction writes anyway.
//
// The rows of index, child, snapshot, blob, unsettled, total and alias are
// derived. Their rules:
//
//	index      each value's index key, and "chainid:" + ChainID
//	child      each parent
//	snapshot   Key and Was; unique over all records
//	blob       each blob's digest
//	unsettled  mutable, committed, finalized but not durable or with Was
//	total      count and known bytes by state, shared (two children) and type
//	alias      each alias, and the id of a record that is not its row's key;
//	           unique, and never the key of a row
//
// Two halves of a key are kept apart by the length of the first one, so keys
// may hold any bytes and an exact search finds exactly its key. A search
// believes a row only if the record that it names agrees.
//
// # Transactions
//
// Concurrent updates share a transaction (see Store.Update). A transaction
// that fails changes nothing. When it fails so late that nobody can know
// whether its result is on the disk, the store refuses everything from then
// on with ErrUnknownOutcome, and the next Open reads the truth.
//
// The file is locked with flock, shared by readers, for as long as a store
// is open. It appears whole, by a rename, and so does the one that Compact
// writes in its place; the lock is never free in between.
//
// A transaction that makes the store larger leaves free pages that have their
// blocks on the disk, so that others, removals above all, succeed on a disk
// that is full. Opening, looking and removing need no free byte and no inode.
//
// # Damage
//
// bbolt believes its pages, and a page that leads back to itself ends the
// process. So rows are read by a reader of our own, which looks at each page
// before it goes by it, and pages that bbolt is going to change are looked at
// first. A page that cannot be read is an error of the call that needed it.
//
// Close seals the file: with a copy of the newest meta page and a checksum of
// the list of free pages, in a part of the other meta page that bbolt does not
// use. Open believes a file that is sealed, at the cost of a few pages, and
// restores the newest meta page from its copy if need be. In one that is not,
// somebody was killed: then all pages are looked at before it is written.
//
// A file that is cut off, foreign or of a newer schema is refused before it
// is mapped or changed. A record that cannot be read is an error that names
// it, costs nobody else anything, and can be set aside by Tx.Quarantine. Check
// goes on behind what is damaged and names what is missing. Repair writes what
// can be read into a new file.
//
// What no checksum guards is a key in a page, or a page that another state of
// the file had in the same place: damage there that leaves keys in order is a
// miss, and Check, which compares rows with records, says so.
package metadata

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
//	    id                                      → frame(Record)
//	index
//	    u16 length of key, key, id              → nothing
//	child
//	    u16 length of parent id, parent id, id  → nothing
//	snapshot
//	    driver key                              → id
//	blob
//	    u16 length of digest, digest, id        → nothing
//	unsettled
//	    id                                      → nothing
//	total
//	    u8 state, u8 shared, type               → frame(Total)
//	alias
//	    alias                                   → id
//	attachment                                    header number: last owner given out
//	    u64 owner, name                         → frame(data)
//	quarantine                                    header number: last number given out
//	    u64 number, id                          → what was found under the id
//
//	frame(payload) = u8 format (1), u32 CRC-32C of key and payload, payload
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
//	alias      each alias; unique, and never the id of a record
//
// Two halves of a key are kept apart by the length of the first one, so keys
// may hold any bytes and an exact search finds exactly its key. A search
// believes a row only if the record that it names agrees. Attachments belong
// to a number that the record keeps, not to its id: a record that replaces
// another takes the number over, and no attachment is copied.
//
// # Transactions
//
// Concurrent updates share a transaction (see Store.Update). A transaction
// that fails changes nothing. When it fails so late that nobody can know
// whether its result is on the disk, the store refuses everything from then
// on with ErrUnknownOutcome, and the next Open reads the truth.
//
// The file is locked with flock, shared by readers, for as long as a store
// is open. It appears whole, by a rename.
//
// # Damage
//
// A file that is cut off, foreign or of a newer schema is refused before it
// is mapped or changed. A record that cannot be read is an error that names
// it, costs nobody else anything, and can be set aside by Tx.Quarantine. A
// page that cannot be read is an error of the call that needed it.
package metadata

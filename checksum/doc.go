// Package checksum gives the records of a cache content hashes and keeps them:
// it joins package cache, which knows nothing of hashes, with package
// contenthash, which knows nothing of records.
//
//	m, err := cache.Open(ctx, cache.Options{Root: dir, Unconfirm: contenthash.UnconfirmStored})
//	sums := checksum.New(m, checksum.Options{})
//	d, err := sums.Checksum(ctx, ref, "/src", contenthash.Options{})
//
// # What is kept
//
// What was found out about a record is its tree. A Keeper has the trees that
// were used last in memory, and writes what they learned to the record's
// attachments, "contenthash/" and the name of the page, in the background.
// Commit and Finalize carry them over, so a digest that was asked for once
// costs neither a read nor a look at the files again, after a restart either.
//
//	record                 its tree starts from
//	─────────────────────  ──────────────────────────────────────────────
//	has stored pages       these
//	child, overlayfs       the nearest ancestor's that has one, and what the
//	                       layers in between hold: only that is read
//	any other              nothing: the files are scanned
//
// # Who may change files
//
// A reopen makes the stored tree unconfirmed in its own transaction, whoever
// asked for it: each entry is compared with its stat data before it is
// believed again. A holder who reports every change that it makes works with a
// Writer, from Keeper.New or Keeper.Reopen; its Commit writes the tree in the
// same transaction, and nothing has to be looked at again. One that is cut off
// leaves an unconfirmed tree.
//
// A committed id names one content for ever, and what is saved for it names
// that id: results for a record that was reopened or removed meanwhile are
// dropped.
//
// # Damage
//
// A stored tree that cannot be read is logged and computed anew. Check lists
// such trees, Verify reads files again and compares them with what is stored.
package checksum

package metadata

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
	"maps"
	"slices"
)

// The codes of findings. They are stable: tools and scripts go by them.
const (
	// CodePageDamaged: a page of the database file cannot be read. What was
	// in and below it is missing from all that is found after it.
	CodePageDamaged = "page-damaged"
	// CodeMetaDamaged: what describes the store cannot be read.
	CodeMetaDamaged = "meta-damaged"
	// CodeForeignKey: a key, value or bucket that this package never writes.
	CodeForeignKey = "foreign-key"
	// CodeBucketMissing: a bucket is not there.
	CodeBucketMissing = "bucket-missing"
	// CodeRecordDamaged: a record cannot be read.
	CodeRecordDamaged = "record-damaged"
	// CodeRecordInvalid: a record holds what no record may hold.
	CodeRecordInvalid = "record-invalid"
	// CodeRecordQuarantined: a record was damaged and has been set aside.
	CodeRecordQuarantined = "record-quarantined"
	// CodeParentMissing: a parent of a record does not exist.
	CodeParentMissing = "parent-missing"
	// CodeNameConflict: two records declare an id or alias, or one declares
	// that of another's row.
	CodeNameConflict = "name-conflict"
	// CodeKeyConflict: two records name one driver key.
	CodeKeyConflict = "key-conflict"
	// CodeRowMissing: a derived row that a record asks for is not there, or
	// has another value.
	CodeRowMissing = "row-missing"
	// CodeRowStale: a derived row that no record asks for.
	CodeRowStale = "row-stale"
	// CodeTotalWrong: a total is not the sum over the records.
	CodeTotalWrong = "total-wrong"
	// CodeAttachmentDamaged: an attachment cannot be read.
	CodeAttachmentDamaged = "attachment-damaged"
	// CodeAttachmentOrphan: an attachment belongs to no record.
	CodeAttachmentOrphan = "attachment-orphan"
	// CodeNumberWrong: the time of the newest id is behind one that was given
	// out.
	CodeNumberWrong = "number-wrong"
)

// Finding is one thing that is not as it should be.
type Finding struct {
	// Code is one of the constants.
	Code string
	// ID is the record concerned, empty if that is not known.
	ID ID
	// Bucket is where it is.
	Bucket string
	// Key is the row's key, as it is stored.
	Key string
	// Message says it for people.
	Message string
}

// Check looks at every row. It computes all that is derived again and yields
// what differs, in no promised order. An error means that it could not go on.
// Its memory grows with the number of records, by some hundred bytes each.
func (tx *Tx) Check() iter.Seq2[Finding, error] {
	return func(yield func(Finding, error) bool) {
		c := &checker{
			tx: tx, sums: newSums(), names: map[ID]ID{}, keys: map[string]ID{},
			owners: map[ID]ID{}, moved: map[ID]bool{}, asked: newTallies(),
			report: func(f Finding) bool { return yield(f, nil) },
		}
		steps := []func() bool{
			c.pages, c.meta, c.bucketNames, c.records, c.parents,
			c.derived, c.totals, c.attachments, c.numbers, c.quarantine,
		}
		for _, step := range steps {
			if !step() {
				return
			}
			if tx.err != nil {
				yield(Finding{}, fmt.Errorf("check: %w", tx.err))
				return
			}
		}
	}
}

// checker holds what one pass over the records has found. Its methods return
// false when the caller of Check wants no more.
type checker struct {
	tx     *Tx
	report func(Finding) bool

	sums    *sums
	names   map[ID]ID
	keys    map[string]ID // only once something was found to be wrong
	owners  map[ID]ID     // records by their rows, where that is not the id
	moved   map[ID]bool   // those, by their ids
	asked   *tallies      // derived rows that records ask for
	newest  uint64
	damaged bool // some record cannot be read, so sums cannot be compared
}

func (c *checker) find(code string, id ID, bucket string, key []byte, format string, args ...any) bool {
	return c.report(Finding{Code: code, ID: id, Bucket: bucket, Key: string(key), Message: fmt.Sprintf(format, args...)})
}

// pages looks at all pages, before anything goes by them. A transaction that
// reads passes over the damaged ones from then on.
func (c *checker) pages() bool {
	w := newPageWalk(c.tx.tree)
	w.goOn = true
	err := c.tx.guard("look at", "pages", func() error { w.run(); return nil })
	if err == nil && c.tx.handle != nil {
		w.damaged = append(w.damaged, c.tx.handle.usedAndFree(uint64(c.tx.tx.ID()), w.reached)...)
	}
	if err != nil {
		c.tx.fail(err)
		return true
	}
	for _, d := range w.damaged {
		c.damaged = true
		if !c.find(CodePageDamaged, "", d.Bucket, []byte(d.Key), "%v", d) {
			return false
		}
	}
	c.tx.tree.passOver = c.damaged && !c.tx.writable
	return true
}

// usedAndFree returns the pages that are in use and in the list of free ones,
// if the file has one of this transaction.
func (h *handle) usedAndFree(txid uint64, reached []bool) (bad []*DamagedError) {
	m, err := newestMeta(h.file)
	if err != nil || m.txid != txid || m.freelist == boltNoFreelist {
		return nil
	}
	free, err := freePages(fileSource{h.file}, m)
	if m2, err2 := newestMeta(h.file); err2 != nil || m2.txid != m.txid {
		return nil // somebody has committed meanwhile
	}
	if err != nil {
		return []*DamagedError{badPage(m.freelist, "%v", err)}
	}
	for _, id := range free {
		if id < uint64(len(reached)) && reached[id] {
			bad = append(bad, badPage(id, "it is in use and in the list of free ones"))
		}
	}
	return bad
}

func (c *checker) meta() bool {
	if _, err := c.tx.Meta(); err != nil {
		return c.find(CodeMetaDamaged, "", bucketMeta, nil, "%v", err)
	}
	for k := range c.tx.scan(bucketMeta, nil) {
		if string(k) != keySchema && string(k) != keyStore &&
			!c.find(CodeForeignKey, "", bucketMeta, k, "bucket meta has key %s", printable(k)) {
			return false
		}
	}
	return true
}

func (c *checker) bucketNames() bool {
	have, err := c.tx.rootKeys()
	if err != nil {
		c.tx.fail(err)
		return true
	}
	for _, b := range buckets() {
		if !have[b] && !c.find(CodeBucketMissing, "", b, nil, "bucket %s is missing", b) {
			return false
		}
		delete(have, b)
	}
	for _, b := range slices.Sorted(maps.Keys(have)) {
		if !c.find(CodeForeignKey, "", b, nil, "file has bucket %s", printable([]byte(b))) {
			return false
		}
	}
	return true
}

func (c *checker) records() bool {
	for k, v := range c.tx.scan(bucketRecord, nil) {
		if v == nil || len(k) > MaxIDLen {
			if !c.find(CodeForeignKey, "", bucketRecord, k, "bucket record has key %s", printable(k)) {
				return false
			}
			continue
		}
		r, err := decodeOwned(ID(k), v)
		if err != nil {
			c.damaged = true
			if !c.find(CodeRecordDamaged, ID(k), bucketRecord, k, "%v%s", err, c.knownAs(k)) {
				return false
			}
			continue
		}
		if !c.record(r) {
			return false
		}
	}
	return true
}

// knownAs lists the names that lead to a row: the record in it may have another
// id.
func (c *checker) knownAs(row []byte) string {
	names := ""
	for name, v := range c.tx.scan(bucketAlias, nil) {
		if bytes.Equal(v, row) {
			names += fmt.Sprintf(", known as %q", name)
		}
	}
	return names
}

func (c *checker) record(r *Record) bool {
	if err := validate(r); err != nil && !c.find(CodeRecordInvalid, r.ID, bucketRecord, []byte(r.row), "%v", err) {
		return false
	}
	c.sums.add(r)
	if ms, ok := ulidTime(r.ID); ok {
		c.newest = max(c.newest, ms)
	}
	if r.row != r.ID {
		c.owners[r.row], c.moved[r.ID] = r.ID, true
	}
	for _, n := range rowlessNames(r) {
		other, taken := c.names[n]
		if ok, err := c.tx.has(bucketRecord, []byte(n)); err == nil && ok {
			other, taken = n, true
		}
		if taken && !c.find(CodeNameConflict, r.ID, bucketAlias, []byte(n), "name %q of record %q is taken by record %q", n, r.ID, other) {
			return false
		}
		c.names[n] = r.ID
	}
	for _, row := range derived(r) {
		c.asked.add(row)
	}
	return true
}

// recordRows looks for the rows that a record asks for.
func (c *checker) recordRows(r *Record) bool {
	for _, k := range slices.Compact(driverKeys(r)) {
		if other, taken := c.keys[k]; taken &&
			!c.find(CodeKeyConflict, r.ID, bucketSnapshot, []byte(k), "records %q and %q name driver key %q", other, r.ID, k) {
			return false
		}
		c.keys[k] = r.ID
	}
	for _, row := range derived(r) {
		v, ok, err := c.tx.get(row.bucket, []byte(row.key))
		switch {
		case err != nil:
			c.tx.fail(err)
			return true
		case ok && string(v) == row.value:
		case ok && c.rival(row, v): // that is told of their names
		case !c.find(CodeRowMissing, r.ID, row.bucket, []byte(row.key), "bucket %s lacks the row %s of record %q", row.bucket, printable([]byte(row.key)), r.ID):
			return false
		}
	}
	return true
}

// rival says whether a row that should lead to one record leads to another one
// that asks for it as well.
func (c *checker) rival(asked row, value []byte) bool {
	r, err := c.tx.row(ID(value))
	asked.value = string(value)
	return err == nil && slices.Contains(derived(r), asked)
}

func (c *checker) parents() bool {
	var missing []ID
	for p := range c.sums.children {
		if _, ok := c.sums.records[p]; ok {
			continue
		}
		ok, err := c.tx.exists(p)
		if err != nil {
			c.tx.fail(err)
			return true
		}
		if !ok {
			missing = append(missing, p)
		}
	}
	slices.Sort(missing)
	for _, p := range missing {
		for _, child := range c.sums.children[p] {
			if child != "" && !c.find(CodeParentMissing, child, bucketRecord, []byte(child), "parent %q of record %q does not exist", p, child) {
				return false
			}
		}
	}
	return true
}

// derived compares the derived rows with those that records ask for. Mostly
// both are the same, which one walk over each bucket shows; only if not it is
// looked row by row for what is missing and for what no record asks for.
func (c *checker) derived() bool {
	var wrong []string
	for _, b := range derivedBuckets() {
		if c.tx.tally(b, c.asked.seed) != c.asked.of[b] {
			wrong = append(wrong, b)
		}
	}
	if len(wrong) == 0 {
		return true
	}
	for k, v := range c.tx.scan(bucketRecord, nil) {
		if r, err := decodeRecord(ID(k), v); err == nil && !c.recordRows(r) {
			return false
		}
	}
	for _, b := range wrong {
		for k, v := range c.tx.scan(b, nil) {
			if !c.row(b, k, v) {
				return false
			}
		}
	}
	return true
}

// row judges one derived row by the record that it is of.
func (c *checker) row(bucket string, k, v []byte) bool {
	owner, ok := rowOwner(bucket, k, v)
	if !ok {
		return c.find(CodeForeignKey, "", bucket, k, "bucket %s has key %s", bucket, printable(k))
	}
	r, err := c.tx.row(owner)
	if err != nil {
		// Nobody can tell what a record asks for that cannot be read.
		return true
	}
	if slices.Contains(derived(r), row{bucket, string(k), string(v)}) {
		return true
	}
	id := owner
	if r != nil {
		id = r.ID
	}
	return c.find(CodeRowStale, id, bucket, k, "bucket %s has row %s, which record %q does not ask for", bucket, printable(k), id)
}

// rowOwner returns the row of the record that a derived row belongs to.
func rowOwner(bucket string, k, v []byte) (ID, bool) {
	if v == nil {
		return "", false
	}
	var id string
	switch bucket {
	case bucketIndex, bucketChild, bucketBlob:
		_, second, ok := splitPair(k)
		if !ok || len(v) != 0 {
			return "", false
		}
		id = second
	case bucketUnsettled:
		if len(v) != 0 {
			return "", false
		}
		id = string(k)
	case bucketSnapshot, bucketAlias:
		id = string(v)
	}
	return ID(id), id != "" && len(id) <= MaxIDLen
}

func (c *checker) totals() bool {
	want := c.sums.groups()
	for k, v := range c.tx.scan(bucketTotal, nil) {
		g, ok := splitTotal(k)
		if !ok || v == nil {
			if !c.find(CodeForeignKey, "", bucketTotal, k, "bucket total has key %s", printable(k)) {
				return false
			}
			continue
		}
		count, size, err := readTotal(k, v)
		w := want[g]
		delete(want, g)
		if err == nil && (c.damaged || (count == w.Count && size == w.Bytes)) {
			continue
		}
		if !c.find(CodeTotalWrong, "", bucketTotal, k, "total of type %q, state %d, shared %t is %d records, %d bytes, not %d and %d", g.typ, g.state, g.shared, count, size, w.Count, w.Bytes) {
			return false
		}
	}
	for g, w := range want {
		if !c.damaged && !c.find(CodeTotalWrong, "", bucketTotal, totalKey(g), "total of type %q, state %d, shared %t is missing: %d records, %d bytes", g.typ, g.state, g.shared, w.Count, w.Bytes) {
			return false
		}
	}
	return true
}

// owner is the record in a row, empty for none.
func (c *checker) owner(row ID) ID {
	if id := c.owners[row]; id != "" {
		return id
	}
	_, there := c.sums.records[row]
	if there && c.moved[row] { // into another row, unless it is there twice
		there, _ = c.tx.has(bucketRecord, []byte(row)) // what cannot be read was found before
	}
	if there {
		return row
	}
	return ""
}

func (c *checker) attachments() bool {
	for k, v := range c.tx.scan(bucketAttachment, nil) {
		owner, name, ok := splitAttachment(k)
		id := c.owner(owner)
		good := true
		switch {
		case !ok || v == nil:
			good = c.find(CodeForeignKey, "", bucketAttachment, k, "bucket attachment has key %s", printable(k))
		case id == "" && !c.damaged:
			good = c.find(CodeAttachmentOrphan, "", bucketAttachment, k, "attachment %q of row %q belongs to no record", name, owner)
		default:
			if _, err := unframe(k, v); err != nil {
				good = c.find(CodeAttachmentDamaged, id, bucketAttachment, k, "attachment %q of record %q: %v", name, id, err)
			}
		}
		if !good {
			return false
		}
	}
	return true
}

func (c *checker) numbers() bool {
	n, err := c.tx.sequence(bucketRecord)
	if err != nil {
		c.tx.fail(err)
		return true
	}
	if c.newest > n {
		return c.find(CodeNumberWrong, "", bucketRecord, nil, "newest id is of %d ms, noted is %d", c.newest, n)
	}
	return true
}

func (c *checker) quarantine() bool {
	for k, v := range c.tx.scan(bucketQuarantine, nil) {
		seq, id, ok := splitQuarantine(k)
		var good bool
		if !ok || v == nil {
			good = c.find(CodeForeignKey, "", bucketQuarantine, k, "bucket quarantine has key %s", printable(k))
		} else {
			good = c.find(CodeRecordQuarantined, id, bucketQuarantine, k, "record %q was damaged and is in quarantine as number %d", id, seq)
		}
		if !good {
			return false
		}
	}
	return true
}

// splitQuarantine undoes the key of the bucket quarantine.
func splitQuarantine(k []byte) (seq uint64, id ID, ok bool) {
	if len(k) <= 8 || len(k) > 8+MaxIDLen {
		return 0, "", false
	}
	return binary.BigEndian.Uint64(k), ID(k[8:]), true
}

package metadata

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Everything in this file is a function of the records. Rows are written by
// comparing what the old record asks for with what the new one asks for, so
// a row that both ask for stays, for whichever of their values.

// row is a derived row.
type row struct{ bucket, key, value string }

func (r row) compare(o row) int {
	return cmp.Or(strings.Compare(r.bucket, o.bucket), strings.Compare(r.key, o.key))
}

// derived lists the rows that a record asks for, in order, each once. Totals
// are sums over records and not among them.
func derived(r *Record) []row {
	if r == nil {
		return nil
	}
	id := string(r.row)
	most := len(r.Values) + len(r.Parents) + len(r.Blobs) + len(r.Aliases) + 5
	rows := make([]row, 0, most)
	for _, k := range indexKeys(r) {
		rows = append(rows, row{bucketIndex, pairString(k, id), ""})
	}
	for _, p := range r.Parents {
		rows = append(rows, row{bucketChild, pairString(string(p), id), ""})
	}
	for _, k := range driverKeys(r) {
		rows = append(rows, row{bucketSnapshot, k, id})
	}
	for _, b := range r.Blobs {
		rows = append(rows, row{bucketBlob, pairString(string(b.Digest), id), ""})
	}
	if unsettled(r) {
		rows = append(rows, row{bucketUnsettled, id, ""})
	}
	for _, n := range rowlessNames(r) {
		rows = append(rows, row{bucketAlias, string(n), id})
	}
	slices.SortFunc(rows, row.compare)
	return slices.Compact(rows)
}

// indexKeys are the keys under which ByIndex finds the record.
func indexKeys(r *Record) []string {
	var keys []string
	for _, v := range r.Values {
		if v.Index != "" {
			keys = append(keys, v.Index)
		}
	}
	if r.ChainID != "" {
		keys = append(keys, chainIndex(string(r.ChainID)))
	}
	return keys
}

// rowlessNames are those under which the record is found, but for one that is
// the key of its row.
func rowlessNames(r *Record) []ID {
	if r.ID == r.row {
		return r.Aliases
	}
	return append(slices.Clone(r.Aliases), r.ID)
}

// driverKeys are the names that the record has or may have in the driver.
func driverKeys(r *Record) []string {
	var keys []string
	for _, k := range []string{r.Key, r.Was} {
		if k != "" {
			keys = append(keys, k)
		}
	}
	return keys
}

// unsettled says whether an Open has to compare the record with the driver.
// A lazy record has no snapshot to compare with.
func unsettled(r *Record) bool {
	switch r.State {
	case Mutable, Committed:
		return true
	case Finalized:
		return !r.Durable || r.Was != ""
	}
	return false
}

// write replaces a record by another one in the same row: old is nil to create,
// new is nil to delete. It has been checked that nothing stands in the way.
func (tx *Tx) write(old, new *Record) error {
	if err := tx.countTotals(old, new); err != nil {
		return err
	}
	if err := tx.writeDerived(derived(old), derived(new)); err != nil {
		return err
	}
	if new == nil {
		return tx.remove(bucketRecord, []byte(old.row))
	}
	return tx.rewrite(new)
}

// rewrite stores a record without what is derived from it.
func (tx *Tx) rewrite(r *Record) error {
	b, err := encodeRecord(r)
	if err != nil {
		tx.fail(err)
		return err
	}
	return tx.put(bucketRecord, []byte(r.row), b)
}

// writeDerived writes what differs between two lists of rows.
func (tx *Tx) writeDerived(old, new []row) error {
	for len(old) > 0 || len(new) > 0 {
		side := 0
		switch {
		case len(old) == 0:
			side = 1
		case len(new) == 0:
			side = -1
		default:
			side = old[0].compare(new[0])
		}
		switch {
		case side < 0:
			if err := tx.writeRow(old[0], false); err != nil {
				return err
			}
		case side > 0 || old[0].value != new[0].value:
			if err := tx.writeRow(new[0], true); err != nil {
				return err
			}
		}
		if side <= 0 {
			old = old[1:]
		}
		if side >= 0 {
			new = new[1:]
		}
	}
	return nil
}

// writeRow puts or removes one derived row. A child row may change on which
// side of "shared" its parent is counted.
func (tx *Tx) writeRow(r row, put bool) error {
	set := func() error {
		if put {
			return tx.put(r.bucket, []byte(r.key), []byte(r.value))
		}
		return tx.remove(r.bucket, []byte(r.key))
	}
	if r.bucket != bucketChild {
		return set()
	}
	parent, _, _ := splitPair([]byte(r.key))
	before, err := tx.shared(ID(parent))
	if err != nil {
		return err
	}
	if err := set(); err != nil {
		return err
	}
	after, err := tx.shared(ID(parent))
	if err != nil || before == after {
		return err
	}
	return tx.moveTotal(ID(parent), before, after)
}

// shared says whether a record has two child rows or more.
func (tx *Tx) shared(id ID) (bool, error) {
	n, err := tx.countChildren(id, 2)
	return n >= 2, err
}

// countChildren counts child rows, up to a limit if that is positive.
func (tx *Tx) countChildren(id ID, limit int) (n int, err error) {
	prefix := pairPrefix(string(id))
	c := tx.cursor(bucketChild)
	for k, _, ok := c.seek(prefix); ok && slices.Equal(k[:min(len(k), len(prefix))], prefix); k, _, ok = c.next() {
		n++
		if n == limit {
			break
		}
	}
	return n, c.err
}

// group is what totals are kept by.
type group struct {
	typ    string
	state  State
	shared bool
}

func groupOf(r *Record, shared bool) group { return group{r.Type, r.State, shared} }

// knownSize is what a record adds to the bytes of its group.
func knownSize(r *Record) int64 { return max(r.Size, 0) }

// totalChange is what is to be added to a total.
type totalChange struct{ count, size int64 }

// countTotals notes what the change of a record does to the totals. They are
// written when they are read, or else once at the end of the transaction: in
// one that many share, most changes of one total meet there.
func (tx *Tx) countTotals(old, new *Record) error {
	if old != nil && new != nil && old.ID == new.ID &&
		groupOf(old, false) == groupOf(new, false) && knownSize(old) == knownSize(new) {
		return nil
	}
	for _, r := range []*Record{old, new} {
		if r == nil {
			continue
		}
		shared, err := tx.shared(r.ID)
		if err != nil {
			return err
		}
		n := int64(1)
		if r == old {
			n = -1
		}
		tx.addTotal(groupOf(r, shared), n, n*knownSize(r))
	}
	return nil
}

// moveTotal counts a record as shared, or no longer. A parent that cannot be
// read is counted nowhere after the totals have been computed again.
func (tx *Tx) moveTotal(id ID, before, after bool) error {
	r, err := tx.load(id)
	switch {
	case isDamaged(err):
		tx.staleTotals = true
		return nil
	case err != nil:
		return err
	case r == nil:
		return nil
	}
	tx.addTotal(groupOf(r, before), -1, -knownSize(r))
	tx.addTotal(groupOf(r, after), 1, knownSize(r))
	return nil
}

func (tx *Tx) addTotal(g group, count, size int64) {
	if tx.totals == nil {
		tx.totals = map[group]totalChange{}
	}
	c := tx.totals[g]
	tx.totals[g] = totalChange{c.count + count, c.size + size}
}

// writeTotals brings the rows up to date.
func (tx *Tx) writeTotals() error {
	changes := tx.totals
	tx.totals = nil
	for g, c := range changes {
		if c == (totalChange{}) || tx.staleTotals {
			continue
		}
		key := totalKey(g)
		value, ok, err := tx.get(bucketTotal, key)
		if err != nil {
			return err
		}
		if ok {
			count, size, err := readTotal(key, value)
			if err != nil {
				tx.staleTotals = true
				continue
			}
			c = totalChange{c.count + count, c.size + size}
		}
		if c.count < 0 || c.size < 0 {
			tx.staleTotals = true
			continue
		}
		if err := tx.putTotal(g, c.count, c.size); err != nil {
			return err
		}
	}
	if tx.staleTotals {
		return tx.rebuildTotals()
	}
	return nil
}

func (tx *Tx) putTotal(g group, count, size int64) error {
	key := totalKey(g)
	if count == 0 {
		return tx.remove(bucketTotal, key)
	}
	b, err := encodeTotal(count, size)
	if err != nil {
		tx.fail(err)
		return err
	}
	return tx.put(bucketTotal, key, frame(key, b))
}

func readTotal(key, value []byte) (count, size int64, err error) {
	payload, err := unframe(key, value)
	if err == nil {
		count, size, err = decodeTotal(payload)
	}
	if err != nil {
		return 0, 0, &DamagedError{Bucket: bucketTotal, Key: string(key), Reason: err.Error()}
	}
	return count, size, nil
}

// rebuildTotals computes the totals again from all records. It is the way
// out where a sum cannot be kept up, after damage; its cost grows with the
// store.
func (tx *Tx) rebuildTotals() error {
	var stale [][]byte
	for k := range tx.scan(bucketTotal, nil) {
		stale = append(stale, k)
	}
	for _, k := range stale {
		if err := tx.remove(bucketTotal, k); err != nil {
			return err
		}
	}
	sums := newSums()
	for r, err := range tx.Records() {
		if err == nil {
			sums.add(r)
		}
	}
	if tx.err != nil {
		return fmt.Errorf("compute totals again: %w", tx.err)
	}
	for g, t := range sums.groups() {
		if err := tx.putTotal(g, t.Count, t.Bytes); err != nil {
			return err
		}
	}
	tx.staleTotals = false
	return nil
}

// sums adds up totals from records alone, without any derived row.
type sums struct {
	records  map[ID]Total
	children map[ID]firstTwo
}

// firstTwo are the first children of a record that were seen, which are enough
// to know whether it is shared.
type firstTwo [2]ID

func newSums() *sums {
	return &sums{records: map[ID]Total{}, children: map[ID]firstTwo{}}
}

func (s *sums) add(r *Record) {
	s.records[r.ID] = Total{Type: r.Type, State: r.State, Bytes: knownSize(r)}
	for _, p := range r.Parents {
		have := s.children[p]
		switch {
		case have[0] == "":
			have[0] = r.ID
		case have[1] == "" && have[0] != r.ID:
			have[1] = r.ID
		default:
			continue
		}
		s.children[p] = have
	}
}

func (s *sums) groups() map[group]Total {
	out := map[group]Total{}
	for id, r := range s.records {
		g := group{r.Type, r.State, s.children[id][1] != ""}
		t := out[g]
		out[g] = Total{Type: g.typ, State: g.state, Shared: g.shared, Count: t.Count + 1, Bytes: t.Bytes + r.Bytes}
	}
	return out
}

package metadata

import (
	"fmt"
	"slices"
)

// Everything in this file is a function of the records. Rows are written by
// comparing what the old record asks for with what the new one asks for, so
// a row that both ask for stays, for whichever of their values.

// rowKey names a derived row.
type rowKey struct{ bucket, key string }

// derived lists the rows that a record asks for, with their values. Totals
// are sums over records and not among them.
func derived(r *Record) map[rowKey]string {
	rows := map[rowKey]string{}
	if r == nil {
		return rows
	}
	id := string(r.ID)
	for _, k := range indexKeys(r) {
		rows[rowKey{bucketIndex, string(pairKey(k, id))}] = ""
	}
	for _, p := range r.Parents {
		rows[rowKey{bucketChild, string(pairKey(string(p), id))}] = ""
	}
	for _, k := range driverKeys(r) {
		rows[rowKey{bucketSnapshot, k}] = id
	}
	for _, b := range r.Blobs {
		rows[rowKey{bucketBlob, string(pairKey(string(b.Digest), id))}] = ""
	}
	if unsettled(r) {
		rows[rowKey{bucketUnsettled, id}] = ""
	}
	for _, a := range r.Aliases {
		rows[rowKey{bucketAlias, string(a)}] = id
	}
	return rows
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

// write replaces a record by another one: old is nil to create, new is nil
// to delete. It has been checked that nothing stands in the way.
func (tx *Tx) write(old, new *Record) error {
	if err := tx.writeTotals(old, new); err != nil {
		return err
	}
	if err := tx.writeDerived(derived(old), derived(new)); err != nil {
		return err
	}
	if old != nil && (new == nil || new.ID != old.ID) {
		if err := tx.remove(bucketRecord, []byte(old.ID)); err != nil {
			return err
		}
	}
	if new == nil {
		return nil
	}
	b, err := encodeRecord(new)
	if err != nil {
		tx.fail(err)
		return err
	}
	return tx.put(bucketRecord, []byte(new.ID), b)
}

func (tx *Tx) writeDerived(old, new map[rowKey]string) error {
	for row := range old {
		if _, stays := new[row]; !stays {
			if err := tx.writeRow(row, "", false); err != nil {
				return err
			}
		}
	}
	for row, value := range new {
		if have, stands := old[row]; !stands || have != value {
			if err := tx.writeRow(row, value, true); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeRow puts or removes one derived row. A child row may change on which
// side of "shared" its parent is counted.
func (tx *Tx) writeRow(row rowKey, value string, put bool) error {
	set := func() error {
		if put {
			return tx.put(row.bucket, []byte(row.key), []byte(value))
		}
		return tx.remove(row.bucket, []byte(row.key))
	}
	if row.bucket != bucketChild {
		return set()
	}
	parent, _, _ := splitPair([]byte(row.key))
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

func (tx *Tx) writeTotals(old, new *Record) error {
	if old != nil {
		shared, err := tx.shared(old.ID)
		if err != nil {
			return err
		}
		if err := tx.addTotal(groupOf(old, shared), -1, -knownSize(old)); err != nil {
			return err
		}
	}
	if new != nil {
		shared, err := tx.shared(new.ID)
		if err != nil {
			return err
		}
		return tx.addTotal(groupOf(new, shared), 1, knownSize(new))
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
	if err := tx.addTotal(groupOf(r, before), -1, -knownSize(r)); err != nil {
		return err
	}
	return tx.addTotal(groupOf(r, after), 1, knownSize(r))
}

func (tx *Tx) addTotal(g group, count, size int64) error {
	key := totalKey(g)
	value, ok, err := tx.get(bucketTotal, key)
	if err != nil {
		return err
	}
	if ok {
		c, s, err := readTotal(key, value)
		if err != nil {
			tx.staleTotals = true
			return nil
		}
		count, size = count+c, size+s
	}
	if count < 0 || size < 0 {
		tx.staleTotals = true
		return nil
	}
	return tx.putTotal(g, count, size)
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
	children map[ID]map[ID]struct{}
}

func newSums() *sums {
	return &sums{records: map[ID]Total{}, children: map[ID]map[ID]struct{}{}}
}

func (s *sums) add(r *Record) {
	s.records[r.ID] = Total{Type: r.Type, State: r.State, Bytes: knownSize(r)}
	for _, p := range r.Parents {
		if s.children[p] == nil {
			s.children[p] = map[ID]struct{}{}
		}
		if len(s.children[p]) < 2 {
			s.children[p][r.ID] = struct{}{}
		}
	}
}

func (s *sums) groups() map[group]Total {
	out := map[group]Total{}
	for id, r := range s.records {
		g := group{r.Type, r.State, len(s.children[id]) >= 2}
		t := out[g]
		out[g] = Total{Type: g.typ, State: g.state, Shared: g.shared, Count: t.Count + 1, Bytes: t.Bytes + r.Bytes}
	}
	return out
}

package metadata

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

// pairs yields the second halves of the rows of a bucket whose first half is
// exactly first, as ids. A row that cannot be an id's is passed over.
func (tx *Tx) pairs(bucket, first string) iter.Seq[ID] {
	return func(yield func(ID) bool) {
		if len(first) > MaxIndexLen {
			return
		}
		prefix := pairPrefix(first)
		for k, v := range tx.scan(bucket, prefix) {
			id := ID(k[len(prefix):])
			if v != nil && id != "" && len(id) <= MaxIDLen && !yield(id) {
				return
			}
		}
	}
}

// ByKey returns the record whose snapshot has the driver key, now or as its
// former one. Errors: not found, ErrDamaged.
func (tx *Tx) ByKey(driverKey string) (ID, error) {
	missing := fmt.Errorf("driver key %q: %w", driverKey, errdefs.ErrNotFound)
	if driverKey == "" || len(driverKey) > MaxKeyLen {
		return "", missing
	}
	v, ok, err := tx.get(bucketSnapshot, []byte(driverKey))
	if err != nil {
		return "", err
	}
	if !ok || len(v) == 0 || len(v) > MaxIDLen {
		return "", missing
	}
	r, err := tx.row(ID(v))
	if isDamaged(err) {
		// Its snapshot is taken all the same.
		return ID(v), nil
	}
	if err != nil {
		return "", err
	}
	if r == nil || !slices.Contains(driverKeys(r), driverKey) {
		return "", missing
	}
	return r.ID, nil
}

// ByIndex yields the records that declare exactly this index key, in the
// order of Records.
func (tx *Tx) ByIndex(key string) iter.Seq[ID] {
	return func(yield func(ID) bool) {
		for row := range tx.pairs(bucketIndex, key) {
			if id, ok := tx.declares(row, key); ok && !yield(id) {
				return
			}
		}
	}
}

// declares says whether the record in a row declares the key, and its id. One
// that cannot be read does not.
func (tx *Tx) declares(row ID, key string) (id ID, ok bool) {
	err := tx.find(bucketRecord, []byte(row), func(v []byte) { id, ok = declares(row, v, key) })
	return id, ok && err == nil
}

// ByIndexPrefix yields the index keys that start with prefix and the records
// that declare them, ordered by the length of the key, then the key, then as
// Records is. Keys are stored behind their length, so this seeks once for each
// length that occurs.
func (tx *Tx) ByIndexPrefix(prefix string) iter.Seq2[string, ID] {
	return func(yield func(string, ID) bool) {
		for key, row := range tx.prefixed(prefix) {
			if id, ok := tx.declares(row, key); ok && !yield(key, id) {
				return
			}
		}
	}
}

// prefixed yields the rows of the index whose first half has the prefix.
func (tx *Tx) prefixed(prefix string) iter.Seq2[string, ID] {
	return func(yield func(string, ID) bool) {
		n := len(prefix)
		if n > MaxIndexLen {
			return
		}
		c := tx.cursor(bucketIndex)
		k, v, ok := c.seek(lengthKey(n, prefix))
		for ok {
			if len(k) < 2 {
				k, v, ok = c.next()
				continue
			}
			if at := int(binary.BigEndian.Uint16(k)); at > n {
				if n = at; n > MaxIndexLen {
					return
				}
				k, v, ok = c.seek(lengthKey(n, prefix))
				continue
			}
			if !bytes.HasPrefix(k[2:], []byte(prefix)) {
				if n == MaxIndexLen {
					return
				}
				n++
				k, v, ok = c.seek(lengthKey(n, prefix))
				continue
			}
			key, id, whole := splitPair(k)
			if whole && v != nil && id != "" && len(id) <= MaxIDLen && !yield(key, ID(id)) {
				return
			}
			k, v, ok = c.next()
		}
		if c.err != nil {
			tx.fail(c.err)
		}
	}
}

// lengthKey is where keys of length n that start with prefix begin.
func lengthKey(n int, prefix string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(n)), prefix...)
}

// ByBlob yields the records that have a blob with the digest.
func (tx *Tx) ByBlob(d digest.Digest) iter.Seq[ID] {
	return func(yield func(ID) bool) {
		for row := range tx.pairs(bucketBlob, string(d)) {
			r, err := tx.row(row)
			if err == nil && r != nil && slices.ContainsFunc(r.Blobs, func(b Blob) bool { return b.Digest == d }) && !yield(r.ID) {
				return
			}
		}
	}
}

// ByIDPrefix yields the records whose id or alias starts with prefix, each
// once, those in a row of that name first.
func (tx *Tx) ByIDPrefix(prefix string) iter.Seq[ID] {
	return func(yield func(ID) bool) {
		seen := map[ID]bool{}
		for k, v := range tx.scan(bucketRecord, []byte(prefix)) {
			id := ID(k)
			if v == nil || len(k) > MaxIDLen {
				continue
			}
			if r, err := decodeRecord(id, v); err == nil {
				if id = r.ID; !strings.HasPrefix(string(id), prefix) {
					continue
				}
			}
			seen[id] = true
			if !yield(id) {
				return
			}
		}
		for k := range tx.scan(bucketAlias, []byte(prefix)) {
			r, err := tx.lookUp(ID(k))
			if err != nil || r == nil || seen[r.ID] {
				continue
			}
			seen[r.ID] = true
			if !yield(r.ID) {
				return
			}
		}
	}
}

// Unsettled yields the records that an Open has to compare with the driver:
// mutable and committed ones, and those with a snapshot that is not durable
// or may have its former name. A record that cannot be read is among them if
// it was before, and named by its row.
func (tx *Tx) Unsettled() iter.Seq[ID] {
	return func(yield func(ID) bool) {
		for k, v := range tx.scan(bucketUnsettled, nil) {
			if v == nil || len(k) > MaxIDLen {
				continue
			}
			id := ID(k)
			r, err := tx.row(id)
			switch {
			case err != nil:
			case r == nil || !unsettled(r):
				continue
			default:
				id = r.ID
			}
			if !yield(id) {
				return
			}
		}
	}
}

// Records yields all records in the order of their ids, where one that replaced
// others stands for the first of them. One that cannot be read comes as a nil
// record with a *DamagedError, and the walk goes on.
func (tx *Tx) Records() iter.Seq2[*Record, error] {
	return func(yield func(*Record, error) bool) {
		for k, v := range tx.scan(bucketRecord, nil) {
			if v == nil {
				continue
			}
			r, err := decodeOwned(ID(k), v)
			if err == nil && tx.store != nil {
				tx.store.uses.addPending(r, tx.serial())
			}
			if !yield(r, err) {
				return
			}
		}
	}
}

// Total is a sum over the records of one type, state and sharing.
type Total struct {
	Type  string
	State State
	// Shared says that the records have two or more children each.
	Shared bool
	Count  int64
	// Bytes adds up the sizes that are known.
	Bytes int64
}

// Totals returns the sums over all records. They are read, not computed.
func (tx *Tx) Totals() ([]Total, error) {
	if tx.writable {
		if err := tx.writeTotals(); err != nil {
			return nil, err
		}
	}
	var out []Total
	c := tx.cursor(bucketTotal)
	for k, v, ok := c.seek(nil); ok; k, v, ok = c.next() {
		g, known := splitTotal(k)
		if !known {
			continue
		}
		count, size, err := readTotal(k, v)
		if err != nil {
			return nil, err
		}
		out = append(out, Total{Type: g.typ, State: g.state, Shared: g.shared, Count: count, Bytes: size})
	}
	return out, c.err
}

package metadata

import (
	"encoding/binary"
	"hash/maphash"
)

// derivedBuckets are those whose rows are functions of the records, but for
// the totals.
func derivedBuckets() []string {
	return []string{bucketIndex, bucketChild, bucketSnapshot, bucketBlob, bucketUnsettled, bucketAlias}
}

// tally sums up rows, in whatever order. Two tallies of one seed that are equal
// are of the same rows, each as often: but for one chance in 2^64, which no
// file can aim at, as nobody knows the seed before.
type tally struct {
	rows int
	sum  uint64
}

// tallies are tallies of one seed, by bucket.
type tallies struct {
	seed maphash.Seed
	of   map[string]tally
	buf  []byte
}

func newTallies() *tallies { return &tallies{seed: maphash.MakeSeed(), of: map[string]tally{}} }

func (t *tallies) add(r row) {
	have := t.of[r.bucket]
	t.buf = addRow(&have, t.seed, t.buf, r.key, r.value)
	t.of[r.bucket] = have
}

// addRow counts a row. It returns buf, to be used again.
func addRow[T string | []byte](t *tally, seed maphash.Seed, buf []byte, key, value T) []byte {
	buf = binary.AppendUvarint(buf[:0], uint64(len(key)))
	buf = append(append(buf, key...), value...)
	t.rows++
	t.sum += maphash.Bytes(seed, buf)
	return buf
}

// tally sums up the rows of a bucket. A nested bucket, which does not belong
// there, makes it one that no records ask for.
func (tx *Tx) tally(bucket string, seed maphash.Seed) tally {
	var t tally
	var buf []byte
	add := func(k, v []byte, nested bool) {
		if buf = addRow(&t, seed, buf, k, v); nested {
			t.rows = -1 << 32
		}
	}
	if tx.writable || tx.tree.passOver {
		for k, v := range tx.scan(bucket, nil) {
			add(k, v, v == nil)
		}
		return t
	}
	err := tx.guard("walk", bucket, func() error {
		b, ok, err := tx.tree.bucket(bucket)
		if err != nil || !ok {
			return err
		}
		return tx.tree.leaves(b, func(uint64) bool { return false }, func(p *page) {
			for i := range p.count {
				v, nested := p.value(i)
				add(p.key(i), v, nested)
			}
		})
	})
	if err != nil {
		tx.fail(err)
	}
	return t
}

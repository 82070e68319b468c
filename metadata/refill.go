package metadata

import (
	"encoding/binary"
	"maps"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// refill writes what a repair salvaged into a fresh file, in transactions of
// bounded size.
type refill struct {
	db *bolt.DB
	r  *repair
	s  *salvaged
}

// refillRows is how many records, or how many bytes of anything else, are
// written in one transaction.
const refillRows = 1000

func (w *refill) update(fn func(*Tx) error) error {
	if err := w.r.step("repair copy"); err != nil {
		return err
	}
	return w.db.Update(func(b *bolt.Tx) error {
		tx := newTx(nil, nil, b)
		if err := fn(tx); err != nil {
			return err
		}
		if err := tx.writeTotals(); err != nil {
			return err
		}
		return tx.err
	})
}

func (w *refill) begin() error {
	return w.update(func(tx *Tx) error {
		if err := tx.init(w.s.meta.Created); err != nil {
			return err
		}
		m := w.s.meta
		m.Schema = 0
		return tx.SetMeta(m)
	})
}

// records writes the records with all that is derived. One that asks for a
// name that another has is set aside.
func (w *refill) records() error {
	for ids := range slices.Chunk(slices.Sorted(maps.Keys(w.s.records)), refillRows) {
		err := w.update(func(tx *Tx) error {
			for _, id := range ids {
				if err := w.record(tx, w.s.records[id]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *refill) record(tx *Tx, rec *Record) error {
	if err := tx.free(nil, rec); err != nil {
		if tx.err != nil {
			return tx.err
		}
		b, err := encodeRecord(rec)
		if err != nil {
			return err
		}
		w.s.unread[rec.row] = b
		delete(w.s.records, rec.row)
		return nil
	}
	if err := tx.write(nil, rec); err != nil {
		return err
	}
	return tx.noteID(rec.ID)
}

func (w *refill) attachments() error {
	keys := slices.Sorted(maps.Keys(w.s.attachments))
	for len(keys) > 0 {
		err := w.update(func(tx *Tx) error {
			for len(keys) > 0 && tx.putBytes < compactBatch {
				k := keys[0]
				keys = keys[1:]
				if row, _, _ := splitAttachment([]byte(k)); w.s.records[row] == nil {
					delete(w.s.attachments, k)
					continue
				}
				if err := tx.put(bucketAttachment, []byte(k), w.s.attachments[k]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// quarantine keeps what was there and adds what could not be read.
func (w *refill) quarantine() error {
	return w.update(func(tx *Tx) error {
		n := w.s.sequences[bucketQuarantine]
		for _, row := range w.s.quarantine {
			if err := tx.put(bucketQuarantine, row[0], row[1]); err != nil {
				return err
			}
			n = max(n, binary.BigEndian.Uint64(row[0]))
		}
		for _, id := range slices.Sorted(maps.Keys(w.s.unread)) {
			n++
			key := append(binary.BigEndian.AppendUint64(nil, n), id...)
			if err := tx.put(bucketQuarantine, key, w.s.unread[id]); err != nil {
				return err
			}
		}
		return tx.setSequence(bucketQuarantine, n)
	})
}

// end notes the newest id ever given out, and has the free pages stored.
func (w *refill) end() error {
	w.db.NoFreelistSync = false
	return w.update(func(tx *Tx) error {
		have, err := tx.sequence(bucketRecord)
		if err != nil {
			return err
		}
		return tx.setSequence(bucketRecord, max(have, w.s.sequences[bucketRecord]))
	})
}

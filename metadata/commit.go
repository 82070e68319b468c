package metadata

import (
	"fmt"
	"runtime/debug"
)

func (s *Store) beginWrite() (*Tx, error) {
	if err := s.usable(); err != nil {
		return nil, err
	}
	if err := s.opts.Step("tx begin"); err != nil {
		return nil, ioError("begin transaction", err)
	}
	return s.begin(true)
}

// isClosing says whether the batch holds the store's last call.
func isClosing(batch []*call) bool {
	return len(batch) > 0 && batch[len(batch)-1].close
}

// finalWork says whether a batch whose functions wrote nothing is worth a
// transaction: for gathered uses, or for free pages that the next Open would
// otherwise have to look for.
func (s *Store) finalWork(batch []*call) bool {
	return s.uses.waiting() > 0 || (isClosing(batch) && !s.freelistStored)
}

// finish adds what rides along and commits. Whatever the outcome, the
// transaction has ended after it.
func (s *Store) finish(tx *Tx, batch []*call, withUses bool) error {
	closing := isClosing(batch)
	bare := tx.writes == 0 && s.uses.waiting() == 0
	err := func() error {
		if withUses {
			if err := tx.applyUses(); err != nil {
				return err
			}
		}
		if err := tx.writeTotals(); err != nil {
			return err
		}
		return s.makeRoom(tx)
	}()
	if err != nil {
		tx.rollback()
	} else {
		err = s.commit(tx, closing)
	}
	s.uses.land(err == nil)
	if err != nil {
		if bare && outOfSpace(err) && s.usable() == nil {
			// Only the free pages were to be stored: a full disk makes the
			// next Open slower, but nothing is lost.
			return nil
		}
		return err
	}
	s.transactions.Add(1)
	for _, c := range batch {
		if !c.flush {
			s.updates.Add(1)
		}
	}
	if !closing {
		s.compactSoon(int64(tx.tree.used))
	}
	return nil
}

// commit writes the transaction to the disk. After an error the store is as
// before, or broken.
func (s *Store) commit(tx *Tx, closing bool) error {
	step := "tx commit"
	if closing {
		step = "close commit"
	}
	if err := s.opts.Step(step); err != nil {
		tx.rollback()
		return ioError("commit", err)
	}
	h := tx.handle
	h.db.NoFreelistSync = !closing && s.transactions.Load() >= freelistTxs
	txid := uint64(tx.tx.ID())
	h.free.Store(nil)
	err := s.commitBolt(tx)
	tx.end()
	if err == nil {
		s.freelistStored = !h.db.NoFreelistSync
		return nil
	}
	if !s.wedged.Load() && h.untouched(txid) {
		return ioError("commit", err)
	}
	return s.breakDown(fmt.Errorf("%w: %w", ErrUnknownOutcome, ioError("commit", err)))
}

// commitBolt calls bbolt, which keeps its lock when it panics there.
func (s *Store) commitBolt(tx *Tx) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			s.wedged.Store(true)
			err = recovered("commit", p)
		}
	}()
	return tx.tx.Commit()
}

// untouched says whether a transaction that failed did so before it touched
// its meta page. Reads and writes of the file meet in the page cache, so a
// page that still has its old content was not written, and nothing can bring
// it to the disk later.
func (h *handle) untouched(txid uint64) bool {
	m, err := readMeta(h.file, int64(txid%2)*h.pageSize)
	return err == nil && m.txid < txid
}

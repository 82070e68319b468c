package metadata

import (
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"
)

// Quarantine sets a damaged record aside: its bytes go to the bucket
// quarantine, its derived rows go, and it is not found from then on. What
// rows the record asked for cannot be read, so all derived rows are looked
// through, and the totals are computed again; both grow with the store.
//
// It returns the names that the record had in the driver, as far as rows say
// so. Attachments stay behind and are reported by Check. Children keep their
// rows: they are what says that an ancestor is missing. Errors: not found;
// failed precondition for a record that can be read.
func (tx *Tx) Quarantine(id ID) (driverKeys []string, err error) {
	if err := validateID("record id", id); err != nil {
		return nil, err
	}
	raw, ok, err := tx.get(bucketRecord, []byte(id))
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, notFound(id)
	}
	if _, err := decodeRecord(id, raw); err == nil {
		return nil, fmt.Errorf("record %q is not damaged: %w", id, errdefs.ErrFailedPrecondition)
	}
	if err := tx.setAside(id, raw); err != nil {
		return nil, err
	}
	for _, b := range []string{bucketIndex, bucketChild, bucketSnapshot, bucketBlob, bucketUnsettled, bucketAlias} {
		for k, v := range tx.scan(b, nil) {
			if owner, ok := rowOwner(b, k, v); !ok || owner != id {
				continue
			}
			if b == bucketSnapshot {
				driverKeys = append(driverKeys, string(k))
			}
			if err := tx.remove(b, k); err != nil {
				return nil, err
			}
		}
	}
	tx.staleTotals = true
	return driverKeys, tx.err
}

// setAside keeps the raw bytes, each time under a number of their own: an
// imported id may come, and be damaged, again.
func (tx *Tx) setAside(id ID, raw []byte) error {
	n, err := tx.sequence(bucketQuarantine)
	if err != nil {
		return err
	}
	if err := tx.setSequence(bucketQuarantine, n+1); err != nil {
		return err
	}
	key := append(binary.BigEndian.AppendUint64(nil, n+1), id...)
	if err := tx.put(bucketQuarantine, key, raw); err != nil {
		return err
	}
	return tx.remove(bucketRecord, []byte(id))
}

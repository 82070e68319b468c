package metadata

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// Quarantine sets a damaged record aside: its bytes go to the bucket
// quarantine, its derived rows go, and it is not found from then on. What
// rows the record asked for cannot be read, so all derived rows are looked
// through, and the totals are computed again; both grow with the store.
//
// It returns the names that the record had in the driver, as far as rows say
// so. Its attachments go, too: nothing says of what content they are. Children
// keep their rows: they are what says that an ancestor is missing. Errors: not
// found; failed precondition for a record that can be read.
//
// A record that cannot be read is known by its row; the id of one that replaced
// another is found all the same, as long as it leads there.
func (tx *Tx) Quarantine(id ID) (driverKeys []string, err error) {
	if err := validateID("record id", id); err != nil {
		return nil, err
	}
	_, err = tx.lookUp(id)
	var d *DamagedError
	switch {
	case err == nil:
		if _, err = tx.stored(id); err == nil {
			err = fmt.Errorf("record %q is not damaged: %w", id, errdefs.ErrFailedPrecondition)
		}
		return nil, err
	case !errors.As(err, &d) || d.ID == "":
		return nil, err
	}
	row := d.ID
	raw, _, err := tx.get(bucketRecord, []byte(row))
	if err != nil {
		return nil, err
	}
	if err := tx.setAside(row, raw); err != nil {
		return nil, err
	}
	if err := tx.removeAttachments(row); err != nil {
		return nil, err
	}
	for _, b := range []string{bucketIndex, bucketChild, bucketSnapshot, bucketBlob, bucketUnsettled, bucketAlias} {
		for k, v := range tx.scan(b, nil) {
			if owner, ok := rowOwner(b, k, v); !ok || owner != row {
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
func (tx *Tx) setAside(row ID, raw []byte) error {
	n, err := tx.sequence(bucketQuarantine)
	if err != nil {
		return err
	}
	if err := tx.setSequence(bucketQuarantine, n+1); err != nil {
		return err
	}
	key := append(binary.BigEndian.AppendUint64(nil, n+1), row...)
	if err := tx.put(bucketQuarantine, key, raw); err != nil {
		return err
	}
	return tx.remove(bucketRecord, []byte(row))
}

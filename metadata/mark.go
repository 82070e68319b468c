package metadata

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Mark writes what was found out about the content of a record: its Size, that
// it is Durable, and that Was is empty by now. Nothing else of the passed record
// is taken. The content is what it was, so the revision stays: two such
// findings do not void each other, and neither voids a plan. Errors: not found;
// failed precondition if the record has another revision than the passed one by
// now; invalid argument.
func (tx *Tx) Mark(r *Record) error {
	old, err := tx.stored(r.ID)
	if err != nil {
		return err
	}
	if r.Revision != old.Revision {
		return fmt.Errorf("record %q has revision %d, not %d: %w", r.ID, old.Revision, r.Revision, errdefs.ErrFailedPrecondition)
	}
	n := *old
	n.Size, n.Durable = r.Size, r.Durable
	if r.Was == "" {
		n.Was = ""
	}
	if err := validate(&n); err != nil {
		return err
	}
	return tx.write(old, &n)
}

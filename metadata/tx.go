package metadata

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// Tx is one transaction. It belongs to the function that View or Update
// called, in one goroutine, until that returns. What its methods return is
// the caller's own.
//
// Methods that return a sequence have nowhere to put an error of the file
// itself: the sequence ends early, and View or Update returns the error.
// Rows of a derived bucket that no record answers for are passed over; Check
// reports them.
type Tx struct {
	store  *Store
	handle *handle
	tree   *tree
	// tx is bbolt's; nil in a look at a file that bbolt has not opened.
	tx       *bolt.Tx
	writable bool

	// err, once set, is what the transaction ends in.
	err error
	// writes counts changes of rows.
	writes int
	// putBytes is the size of what was written, and largest that of the
	// largest row, in bytes; creates says that something new was.
	putBytes, largest int64
	creates           bool
	// totals are changes of the totals that are not in their rows yet.
	totals map[group]totalChange
	// staleTotals asks for rebuildTotals before the commit.
	staleTotals bool
	// done is set when the function has returned.
	done bool
}

func notFound(id ID) error { return fmt.Errorf("record %q: %w", id, errdefs.ErrNotFound) }

func isDamaged(err error) bool { return errors.Is(err, ErrDamaged) }

// row reads the record that is in a row; nil means that there is none.
func (tx *Tx) row(key ID) (*Record, error) {
	var r *Record
	var damaged error
	if err := tx.find(bucketRecord, []byte(key), func(v []byte) { r, damaged = decodeRecord(key, v) }); err != nil {
		return nil, err
	}
	return r, damaged
}

// lookUp reads the record with the id or alias; nil means that there is none.
func (tx *Tx) lookUp(name ID) (*Record, error) {
	r, err := tx.row(name)
	if err != nil || (r != nil && r.ID == name) {
		return r, err
	}
	v, ok, err := tx.get(bucketAlias, []byte(name))
	if err != nil || !ok || len(v) == 0 || len(v) > MaxIDLen {
		return nil, err
	}
	r, err = tx.row(ID(v))
	if err == nil && r != nil && !slices.Contains(rowlessNames(r), name) {
		r = nil
	}
	return r, err
}

// load reads a record by its id alone; nil means that there is none.
func (tx *Tx) load(id ID) (*Record, error) {
	r, err := tx.lookUp(id)
	if r != nil && r.ID != id {
		r = nil
	}
	return r, err
}

// known turns a missing record into an error.
func known(id ID, find func(ID) (*Record, error)) (*Record, error) {
	if err := validateID("record id", id); err != nil {
		return nil, err
	}
	r, err := find(id)
	if err == nil && r == nil {
		err = notFound(id)
	}
	return r, err
}

// stored is load for ids that must be there.
func (tx *Tx) stored(id ID) (*Record, error) { return known(id, tx.load) }

// Get returns the record with the id or alias. Uses that wait to be written
// are in its counts already. Errors: not found, invalid argument for an
// empty or too long id, ErrDamaged as a *DamagedError.
func (tx *Tx) Get(id ID) (*Record, error) {
	r, err := known(id, tx.lookUp)
	if err != nil {
		return nil, err
	}
	tx.store.uses.addPending(r, tx.serial())
	return r, nil
}

// Resolve returns the id of the record that is known under an id or alias.
// Errors as for Get.
func (tx *Tx) Resolve(id ID) (ID, error) {
	r, err := known(id, tx.lookUp)
	if err != nil {
		return "", err
	}
	return r.ID, nil
}

// Create adds a record with revision 1. Errors: already exists if its id, an
// alias or a driver key is taken, naming the owner; failed precondition if a
// parent does not exist; invalid argument. The passed record is not changed.
func (tx *Tx) Create(r *Record) error {
	if err := validate(r); err != nil {
		return err
	}
	if err := tx.free(nil, r); err != nil {
		return err
	}
	if err := tx.parents(nil, r); err != nil {
		return err
	}
	tx.creates = true
	n := *r
	n.Revision, n.row = 1, r.ID
	// Those of a record that was lost with its page would be taken for its.
	if err := tx.removeAttachments(n.row); err != nil {
		return err
	}
	if err := tx.write(nil, &n); err != nil {
		return err
	}
	return tx.noteID(n.ID)
}

// Put rewrites a record and returns its new revision, which holds once
// Update has returned nil; the passed record is not changed. The passed
// revision must be the stored one, else the error is failed precondition and
// names both. UsageCount and LastUsed are left as they are stored: uses are
// counted by Touch alone, so that a count cannot be lost between a Get and a
// Put. Further errors: not found; already exists as in Create; invalid
// argument, also for other parents than the stored ones.
func (tx *Tx) Put(r *Record) (revision uint64, err error) {
	if err := validate(r); err != nil {
		return 0, err
	}
	old, err := tx.stored(r.ID)
	if err != nil {
		return 0, err
	}
	if r.Revision != old.Revision {
		return 0, fmt.Errorf("record %q has revision %d, not %d: %w", r.ID, old.Revision, r.Revision, errdefs.ErrFailedPrecondition)
	}
	if !slices.Equal(r.Parents, old.Parents) {
		return 0, invalid("record %q: parents never change", r.ID)
	}
	if err := tx.free(old, r); err != nil {
		return 0, err
	}
	n := *r
	n.Revision = old.Revision + 1
	n.UsageCount, n.LastUsed = old.UsageCount, old.LastUsed
	n.row, n.unknown = old.row, old.unknown
	return n.Revision, tx.write(old, &n)
}

// Delete removes a record with its aliases, index entries and attachments.
// Errors: not found; failed precondition, listing the children, if there are
// any; ErrDamaged, for which there is Quarantine.
func (tx *Tx) Delete(id ID) error {
	old, err := tx.stored(id)
	if err != nil {
		return err
	}
	if err := tx.childless(id); err != nil {
		return err
	}
	if err := tx.removeAttachments(old.row); err != nil {
		return err
	}
	return tx.write(old, nil)
}

// Replace puts r, under a new id, in the place of the record old. From then on
// the old id is not found, and neither are its aliases: r may not have them,
// since an id never names two contents. Usage counts are those of r. Errors as
// for Delete and Create.
//
// The record stays in its row, so all that other rows know of it stands, and
// its attachments are those of r.
func (tx *Tx) Replace(old ID, r *Record) error {
	if err := validate(r); err != nil {
		return err
	}
	if r.ID == old {
		return invalid("record %q cannot replace itself", old)
	}
	o, err := tx.stored(old)
	if err != nil {
		return err
	}
	if err := tx.childless(old); err != nil {
		return err
	}
	if err := tx.free(o, r); err != nil {
		return err
	}
	if err := tx.parents(o, r); err != nil {
		return err
	}
	n := *r
	n.Revision, n.row, n.unknown = 1, o.row, o.unknown
	if err := tx.write(o, &n); err != nil {
		return err
	}
	return tx.noteID(n.ID)
}

// childless refuses a record that has children.
func (tx *Tx) childless(id ID) error {
	const shown = 10
	var list []string
	more := false
	for c := range tx.Children(id) {
		if more = len(list) == shown; more {
			break
		}
		list = append(list, fmt.Sprintf("%q", string(c)))
	}
	if tx.err != nil {
		return tx.err
	}
	if len(list) == 0 {
		return nil
	}
	if more {
		list = append(list, "...")
	}
	return fmt.Errorf("record %q has children %s: %w", id, strings.Join(list, ", "), errdefs.ErrFailedPrecondition)
}

// free checks that nobody but old has what r asks to be known by. A record
// that is rewritten keeps its own names; one that replaces another takes over
// its driver keys only, since no id may ever name two contents.
func (tx *Tx) free(old, r *Record) error {
	rewrite := old != nil && old.ID == r.ID
	if !rewrite {
		if err := tx.freeName(r, "id", r.ID); err != nil {
			return err
		}
	}
	for _, a := range r.Aliases {
		if rewrite && slices.Contains(old.Aliases, a) {
			continue
		}
		if err := tx.freeName(r, "alias", a); err != nil {
			return err
		}
	}
	for _, k := range driverKeys(r) {
		if old != nil && slices.Contains(driverKeys(old), k) {
			continue
		}
		owner, err := tx.ByKey(k)
		if err == nil {
			return fmt.Errorf("record %q: driver key %q is taken by record %q: %w", r.ID, k, owner, errdefs.ErrAlreadyExists)
		}
		if !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// freeName checks that nobody has an id or alias that r asks for.
func (tx *Tx) freeName(r *Record, what string, name ID) error {
	owner, err := tx.owner(name)
	if err != nil {
		return err
	}
	if owner != "" {
		return fmt.Errorf("record %q: %s %q is taken by record %q: %w", r.ID, what, name, owner, errdefs.ErrAlreadyExists)
	}
	return nil
}

// owner returns the record that a name stands for, empty for none. A record
// that cannot be read keeps its names, and one that replaced another keeps that
// one's id from ever being given to a third.
func (tx *Tx) owner(name ID) (ID, error) {
	r, err := tx.row(name)
	if err == nil && r == nil {
		r, err = tx.lookUp(name)
	}
	var d *DamagedError
	switch {
	case errors.As(err, &d) && d.ID != "":
		return d.ID, nil
	case err != nil || r == nil:
		return "", err
	}
	return r.ID, nil
}

// parents checks that all parents of r exist and outlive it.
func (tx *Tx) parents(old, r *Record) error {
	for _, p := range r.Parents {
		ok, err := tx.exists(p)
		if err != nil {
			return err
		}
		if !ok || (old != nil && p == old.ID) {
			return fmt.Errorf("record %q: parent %q does not exist: %w", r.ID, p, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// exists says whether there is a record with the id, if only a damaged one.
func (tx *Tx) exists(id ID) (bool, error) {
	r, err := tx.load(id)
	var d *DamagedError
	if errors.As(err, &d) && d.ID != "" {
		return true, nil
	}
	return r != nil, err
}

// Children yields the records that have id among their parents. One that
// cannot be read is named by its row.
func (tx *Tx) Children(id ID) iter.Seq[ID] {
	return func(yield func(ID) bool) {
		for child := range tx.pairs(bucketChild, string(id)) {
			r, err := tx.row(child)
			switch {
			case err != nil: // it still needs its parent
			case r == nil || !slices.Contains(r.Parents, id):
				continue
			default:
				child = r.ID
			}
			if !yield(child) {
				return
			}
		}
	}
}

// ChildCount returns the number of child rows; its cost grows with it.
func (tx *Tx) ChildCount(id ID) int {
	n, err := tx.countChildren(id, 0)
	if err != nil {
		tx.fail(err)
	}
	return n
}

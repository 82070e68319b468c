package cache

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// MergeOptions describe a merge or a diff that is made. One that is found keeps
// its own.
type MergeOptions struct {
	// Type is the record type, TypeRegular if empty.
	Type        string
	Description string
	Labels      map[string]string
	Values      []Value
}

// madeOf is the value by which equal merges and diffs are found. Its index is
// "merge:" and a digest of the layer list, or "diff:" and one of both inputs.
const madeOf = "lamina.made-of"

// Merge gives a handle on the record whose tree is that of the inputs applied
// one after the other as OCI layers, bottom first: what a later one has replaces
// what an earlier one has, and what it deletes is gone. A layer that several
// inputs have is applied once, at its topmost place. The record is lazy; its
// snapshot is a list of layers where the driver can stack. An equal merge that
// is there is found. One input is its own merge.
//
// Inputs that are committed are finalized, lazy ones stay lazy. Their handles
// stay the caller's; the merge keeps their records.
//
// Errors: InvalidArgument without inputs; FailedPrecondition for more layers
// than one mount can stack.
func (m *Manager) Merge(ctx context.Context, refs []*ImmutableRef, o MergeOptions) (*ImmutableRef, error) {
	if len(refs) == 1 {
		return m.cloneInput(refs[0])
	}
	ref, err := m.combine(ctx, metadata.Merge, refs, o)
	if err != nil {
		return nil, fmt.Errorf("merge: %w", err)
	}
	return ref, nil
}

// Diff gives a handle on the record whose tree is what upper has more than
// lower, as one OCI layer or several: applied over lower it gives upper. If lower
// is an ancestor of upper these are the layers between them, else the trees are
// compared when the record is extracted. Without a lower it is upper. Inputs,
// equal diffs and errors are as in Merge.
func (m *Manager) Diff(ctx context.Context, lower, upper *ImmutableRef, o MergeOptions) (*ImmutableRef, error) {
	if upper == nil {
		return nil, fmt.Errorf("diff without an upper: %w", errdefs.ErrInvalidArgument)
	}
	if lower == nil {
		return m.cloneInput(upper)
	}
	ref, err := m.combine(ctx, metadata.Diff, []*ImmutableRef{lower, upper}, o)
	if err != nil {
		return nil, fmt.Errorf("diff: %w", err)
	}
	return ref, nil
}

// cloneInput is what an input is by itself.
func (m *Manager) cloneInput(r *ImmutableRef) (*ImmutableRef, error) {
	if err := m.requireInput(r); err != nil {
		return nil, err
	}
	return r.Clone()
}

func (m *Manager) requireInput(r *ImmutableRef) error {
	if r == nil || r.h.m != m {
		return fmt.Errorf("an input is missing or belongs to another cache: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// combine finds or makes the merge or diff of inputs.
func (m *Manager) combine(ctx context.Context, op metadata.Op, refs []*ImmutableRef, o MergeOptions) (*ImmutableRef, error) {
	end, err := m.beginChange()
	if err != nil {
		return nil, err
	}
	defer end()
	if len(refs) == 0 {
		return nil, fmt.Errorf("no inputs: %w", errdefs.ErrInvalidArgument)
	}
	c := &combination{m: m, op: op, o: o, from: callerOf(2)}
	for _, r := range refs {
		if err := m.requireInput(r); err != nil {
			return nil, err
		}
		e, done, err := r.h.use()
		if err != nil {
			return nil, err
		}
		defer done()
		rec, err := m.immutable(ctx, e)
		if err != nil {
			return nil, fmt.Errorf("finalize input %s: %w", short(e.id), err)
		}
		c.parents = append(c.parents, rec.ID)
	}
	return c.get(ctx)
}

// combination is a call of Merge or Diff.
type combination struct {
	m       *Manager
	op      metadata.Op
	o       MergeOptions
	from    caller
	parents []ID
	index   string
}

// get finds the record, or makes it; one that is found may be gone the moment
// after.
func (c *combination) get(ctx context.Context) (*ImmutableRef, error) {
	m := c.m
	draft, err := c.draft()
	if err != nil {
		return nil, err
	}
	for {
		var found *Record
		err := m.store.View(ctx, func(tx *metadata.Tx) error {
			list, err := c.list(tx, draft)
			if err == nil {
				c.index = c.indexOf(list)
				found, err = c.find(tx)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		var ref *ImmutableRef
		if found != nil {
			ref, err = m.get(ctx, found.ID, GetOptions{}, c.from)
		} else {
			ref, err = c.make(ctx, draft)
		}
		if !is(err, errdefs.ErrNotFound) {
			return ref, err
		}
	}
}

func (c *combination) draft() (*Record, error) {
	rec := &Record{
		ID: c.m.store.NewID(), State: metadata.Lazy, Op: c.op, Parents: c.parents,
		Type: c.o.Type, Description: c.o.Description, Labels: maps.Clone(c.o.Labels),
		Created: c.m.now(), Size: metadata.SizeUnknown,
	}
	if rec.Type == "" {
		rec.Type = TypeRegular
	}
	edit := Edit{rec: rec}
	for _, v := range c.o.Values {
		if err := edit.SetValue(v); err != nil {
			return nil, err
		}
	}
	return rec, validate(rec)
}

// list is the layer list, which must not be higher than a mount.
func (c *combination) list(tx *metadata.Tx, draft *Record) ([]ID, error) {
	list, err := newLister(tx).of(draft)
	if err == nil {
		err = c.m.requireStackable(len(list))
	}
	return list, err
}

// indexOf is the key by which equal records are found: for a merge those of
// the same layers, whatever inputs brought them.
func (c *combination) indexOf(list []ID) string {
	what, ids := "merge:", list
	if c.op == metadata.Diff {
		what, ids = "diff:", c.parents
	}
	sum := sha256.New()
	for _, id := range ids {
		fmt.Fprintf(sum, "%d:%s", len(id), id)
	}
	return what + hex.EncodeToString(sum.Sum(nil))
}

func (c *combination) find(tx *metadata.Tx) (*Record, error) {
	for id := range tx.ByIndex(c.index) {
		rec, err := tx.Get(id)
		if err != nil {
			return nil, err
		}
		if rec.Op == c.op && (rec.State == metadata.Lazy || rec.State == metadata.Finalized) {
			return rec, nil
		}
	}
	return nil, nil
}

// make writes the record, unless somebody was faster.
func (c *combination) make(ctx context.Context, draft *Record) (*ImmutableRef, error) {
	e, done := c.m.announce(draft.ID)
	defer done()
	var made *Record
	err := c.m.store.Update(ctx, func(tx *metadata.Tx) error {
		found, err := c.find(tx)
		if made = found; made != nil || err != nil {
			return err
		}
		rec := draft.Clone()
		rec.Values = slices.DeleteFunc(rec.Values, func(v Value) bool { return v.Name == madeOf })
		rec.Values = append(rec.Values, Value{Name: madeOf, Index: c.index})
		made = rec
		return tx.Create(rec)
	})
	if errors.Is(err, errdefs.ErrAlreadyExists) {
		err = fmt.Errorf("a new id is taken: %w", err)
	}
	if err != nil {
		return nil, err
	}
	if made.ID == e.id {
		c.m.created(e, made)
	}
	return c.m.get(ctx, made.ID, GetOptions{}, c.from)
}

// requireStackable refuses more layers than one mount can stack.
func (m *Manager) requireStackable(layers int) error {
	if most := m.info.MaxDepth; most > 0 && layers > most {
		return fmt.Errorf("%d layers, and one mount stacks %d: %w", layers, most, errdefs.ErrFailedPrecondition)
	}
	return nil
}

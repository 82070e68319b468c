package cache

import (
	"context"
	"errors"
	"slices"

	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/lamina-build/lamina/metadata"
)

// The layer list of a record says what its tree is made of: the records whose
// layers are stacked, or applied one after the other, bottom first.
//
//	base, layer   the list of its parent, and itself
//	merge         the lists of its inputs one after the other; a layer that
//	              is there twice is kept at its topmost place
//	diff          what the list of upper has more than that of lower, if lower
//	              is the beginning of upper; else itself
//
// It never changes, since parents never do.

// lister computes layer lists in one transaction.
type lister struct {
	tx   *metadata.Tx
	memo map[ID][]ID
}

func newLister(tx *metadata.Tx) *lister { return &lister{tx: tx, memo: map[ID][]ID{}} }

// of is the layer list of a record.
func (l *lister) of(rec *Record) ([]ID, error) {
	// Chains are as long as users make them: only merges and diffs recurse.
	var above []*Record
	for rec.Op != metadata.Merge && rec.Op != metadata.Diff && l.memo[rec.ID] == nil {
		above = append(above, rec)
		if len(rec.Parents) == 0 {
			break
		}
		parent, err := l.tx.Get(rec.Parents[0])
		if err != nil {
			return nil, err
		}
		rec = parent
	}
	var list []ID
	if len(above) == 0 || above[len(above)-1] != rec {
		below, err := l.joined(rec)
		if err != nil {
			return nil, err
		}
		list = slices.Clone(below)
	}
	for _, r := range slices.Backward(above) {
		list = append(list, r.ID)
	}
	if len(above) > 0 {
		l.memo[above[0].ID] = list
	}
	return list, nil
}

// joined is of for merges, diffs and what is known.
func (l *lister) joined(rec *Record) (list []ID, err error) {
	if list, ok := l.memo[rec.ID]; ok {
		return list, nil
	}
	lists := make([][]ID, len(rec.Parents))
	for i, id := range rec.Parents {
		parent, err := l.tx.Get(id)
		if err != nil {
			return nil, err
		}
		if lists[i], err = l.of(parent); err != nil {
			return nil, err
		}
	}
	if rec.Op == metadata.Diff {
		list = difference(rec.ID, lists)
	} else {
		list = join(lists)
	}
	l.memo[rec.ID] = list
	return list, nil
}

// join puts lists one above the other, each layer at its topmost place only.
func join(lists [][]ID) (list []ID) {
	seen := map[ID]bool{}
	for _, one := range slices.Backward(lists) {
		for _, id := range slices.Backward(one) {
			if !seen[id] {
				seen[id] = true
				list = append(list, id)
			}
		}
	}
	slices.Reverse(list)
	return list
}

// difference is the layer list of the diff id of two lists, lower and upper.
func difference(id ID, lists [][]ID) []ID {
	if len(lists) == 2 {
		lower, upper := lists[0], lists[1]
		if len(upper) >= len(lower) && slices.Equal(lower, upper[:len(lower)]) {
			return upper[len(lower):]
		}
	}
	return []ID{id}
}

// chainOf is the ChainID of a layer list, empty if the DiffID of a layer is not
// known yet.
func (l *lister) chainOf(list []ID) (digest.Digest, error) {
	ids := make([]digest.Digest, len(list))
	for i, id := range list {
		rec, err := l.tx.Get(id)
		if err != nil {
			return "", err
		}
		if ids[i] = rec.DiffID; ids[i] == "" {
			return "", nil
		}
	}
	return identity.ChainID(ids), nil
}

// chain is the ChainID of a record's tree, empty if it is not known yet.
func (l *lister) chain(rec *Record) (digest.Digest, error) {
	if rec.ChainID != "" {
		return rec.ChainID, nil
	}
	list, err := l.of(rec)
	if err != nil || len(list) == 0 {
		return "", err
	}
	return l.chainOf(list)
}

// chainOver is the ChainID of a layer over a tree with the ChainID below; below
// is empty for a layer without a parent.
func chainOver(below, diffID digest.Digest) digest.Digest {
	if below == "" {
		return diffID
	}
	return identity.ChainID([]digest.Digest{below, diffID})
}

// layers is the layer list of the record of e, which the caller uses.
func (m *Manager) layers(ctx context.Context, e *entry) ([]ID, error) {
	m.lock()
	rec, list := e.rec, e.layers
	m.unlock()
	if list != nil {
		return list, nil
	}
	err := m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		list, err = newLister(tx).of(rec)
		return err
	})
	if err != nil {
		return nil, err
	}
	m.lock()
	defer m.unlock()
	e.layers = list
	return list, nil
}

// LayerChain gives a handle on each record whose layer the tree is made of,
// bottom first: for a chain all its ancestors and itself, for a merge the
// layers of its inputs, each at its topmost place only. Release them all.
func (r *ImmutableRef) LayerChain(ctx context.Context) (_ []*ImmutableRef, err error) {
	m := r.h.m
	e, done, err := r.h.begin()
	if err != nil {
		return nil, err
	}
	defer done()
	list, err := m.layers(ctx, e)
	if err != nil {
		return nil, err
	}
	refs := make([]*ImmutableRef, 0, len(list))
	for _, id := range list {
		ref, err := m.Get(ctx, id, GetOptions{NoUpdate: true})
		if err != nil {
			for _, r := range refs {
				err = errors.Join(err, r.Release(ctx))
			}
			return nil, err
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// ChainID identifies the tree by the DiffIDs of its layers, as the OCI image
// specification says. It is empty as long as the DiffID of one of them is not
// known: GetRemotes computes them.
func (r *ImmutableRef) ChainID(ctx context.Context) (chain digest.Digest, err error) {
	m := r.h.m
	e, done, err := r.h.begin()
	if err != nil {
		return "", err
	}
	defer done()
	rec := m.current(e)
	err = m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		chain, err = newLister(tx).chain(rec)
		return err
	})
	return chain, err
}

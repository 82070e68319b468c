package checksum

import (
	"context"
	"errors"
	"os"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/metadata"
)

// inherit makes the tree of a child from that of its nearest ancestor that has
// one, and the layers in between. Nil without an error says that there is
// nothing to start from.
func inherit(ctx context.Context, m *cache.Manager, ref *cache.ImmutableRef, loaded func(cache.ID) *contenthash.Tree) (tree *contenthash.Tree, err error) {
	h := heritage{m: m, loaded: loaded}
	defer func() { err = errors.Join(err, h.release(ctx)) }()
	start, err := h.climb(ctx, ref)
	if err != nil || start == nil {
		return nil, err
	}
	for _, l := range slices.Backward(h.layers) {
		if err := start.ApplyLayer(ctx, l); err != nil {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			// A layer that cannot be read as one is no reason not to
			// answer: everything is read through the mount.
			return contenthash.New(), nil
		}
	}
	return start, nil
}

// heritage is the way from a record up to an ancestor whose tree is known.
type heritage struct {
	m      *cache.Manager
	loaded func(cache.ID) *contenthash.Tree
	// layers are those on the way, the record's own first.
	layers []contenthash.Layer
	refs   []*cache.ImmutableRef
}

// climb collects layers until a tree is found, of which it returns a copy.
func (h *heritage) climb(ctx context.Context, at *cache.ImmutableRef) (*contenthash.Tree, error) {
	for {
		rec := at.Record()
		if rec.Op != metadata.Layer || len(rec.Parents) != 1 {
			return nil, nil
		}
		dir, marks, err := at.OpenLayer(ctx)
		if errors.Is(err, errdefs.ErrNotImplemented) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		// It is opened again when it is read: there may be hundreds.
		if err := dir.Close(); err != nil {
			return nil, err
		}
		ref := at
		h.layers = append(h.layers, contenthash.Layer{Marks: marks, Open: func(ctx context.Context) (*contenthash.Root, error) {
			return openLayer(ref.OpenLayer(ctx))
		}})
		if at, err = h.m.Get(ctx, rec.Parents[0], cache.GetOptions{NoUpdate: true}); err != nil {
			return nil, err
		}
		h.refs = append(h.refs, at)
		if tree := h.loaded(at.ID()); tree != nil {
			return tree.Clone(), nil
		}
		stored, err := loadStored(ctx, h.m, at.ID())
		if err != nil {
			return nil, err
		}
		if stored != nil && stored.Damage == nil {
			return stored.Clone(), nil
		}
	}
}

func openLayer(dir *os.File, _ string, err error) (*contenthash.Root, error) {
	if err != nil {
		return nil, err
	}
	return contenthash.NewRoot(dir, nil), nil
}

func (h *heritage) release(ctx context.Context) error {
	var errs []error
	for _, ref := range h.refs {
		errs = append(errs, ref.Release(ctx))
	}
	return errors.Join(errs...)
}

package checksum

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/snapshot"
)

// inherit makes the tree of a record from that of its nearest ancestor that
// has one, and the layers that it shows beyond that one's. A merge has the
// layers of its lowest input and more, so it is a child of that. Nil without an
// error says that there is nothing to start from.
func inherit(ctx context.Context, m *cache.Manager, ref *cache.ImmutableRef, loaded func(cache.ID) *contenthash.Tree) (*contenthash.Tree, error) {
	const tries = 2 // a finalize may move the topmost layer once
	for try := 1; ; try++ {
		layers, err := ref.SnapshotLayers(ctx)
		if errors.Is(err, errdefs.ErrNotImplemented) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		tree, rest, err := startOf(ctx, m, ref, layers, loaded)
		if err != nil || tree == nil {
			return nil, err
		}
		err = apply(ctx, tree, rest)
		switch {
		case err == nil:
			return tree, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case try == tries || !errors.Is(err, fs.ErrNotExist):
			// A layer that cannot be read as one is no reason not to
			// answer: everything is read through the mount.
			return nil, nil
		}
	}
}

func apply(ctx context.Context, tree *contenthash.Tree, layers []snapshot.Layer) error {
	for _, l := range layers {
		err := tree.ApplyLayer(ctx, contenthash.Layer{Open: contenthash.Dir(l.Dir), Marks: l.Attributes + ".overlay."})
		if err != nil {
			return err
		}
	}
	return nil
}

// startOf finds the nearest ancestor with a tree, whose layers are the lowest
// of these. It returns a copy of the tree, and the layers above.
func startOf(ctx context.Context, m *cache.Manager, ref *cache.ImmutableRef, layers []snapshot.Layer, loaded func(cache.ID) *contenthash.Tree) (tree *contenthash.Tree, rest []snapshot.Layer, err error) {
	var ancestors []*cache.ImmutableRef
	defer func() {
		for _, a := range ancestors {
			err = errors.Join(err, a.Release(ctx))
		}
	}()
	for at := ref; ; {
		rec := at.Record()
		if len(rec.Parents) == 0 {
			return nil, nil, nil
		}
		if at, err = m.Get(ctx, rec.Parents[0], cache.GetOptions{NoUpdate: true}); err != nil {
			return nil, nil, err
		}
		ancestors = append(ancestors, at)
		inMemory := loaded(at.ID())
		if tree = inMemory; tree == nil {
			stored, err := loadStored(ctx, m, at.ID())
			if err != nil {
				return nil, nil, err
			}
			if stored == nil || stored.Damage != nil {
				continue
			}
			tree = stored.Tree
		}
		below, err := at.SnapshotLayers(ctx)
		if errors.Is(err, errdefs.ErrNotImplemented) {
			continue // it is lazy
		}
		if err != nil {
			return nil, nil, err
		}
		n := len(below)
		if n <= len(layers) && slices.Equal(names(below), names(layers[:n])) {
			if inMemory != nil {
				tree = tree.Clone()
			}
			return tree, layers[n:], nil
		}
	}
}

// names are what tells layers apart.
func names(layers []snapshot.Layer) []string {
	out := make([]string, len(layers))
	for i, l := range layers {
		out[i] = l.Name
	}
	return out
}

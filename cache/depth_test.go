package cache_test

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
)

// A chain grows as long as it can be mounted.
func TestDepth(t *testing.T) {
	w := newWorld(t, overlayKind)
	deepest := w.Driver().MaxDepth
	require.Positive(t, deepest)
	top := w.layer(nil, "first", "1")
	for range deepest - 2 {
		mut, err := w.New(w.ctx, top, cache.NewOptions{})
		require.NoError(t, err)
		w.release(top)
		top = w.commit(mut)
	}
	last := w.layer(top, "last", "2")
	w.release(top)
	require.Equal(t, "first=1 last=2", w.tree(last))
	require.NoError(t, last.Finalize(w.ctx))
	require.Equal(t, "first=1 last=2", w.tree(last))
	_, err := w.New(w.ctx, last, cache.NewOptions{})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "500 layers")
	w.release(last)
	w.reopenStore()
	last = w.get(last.ID())
	_, err = w.New(w.ctx, last, cache.NewOptions{})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	w.release(last)
}

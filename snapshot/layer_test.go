package snapshot_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
)

// A layer holds what its snapshot has beyond the parent, also after the commit
// that renames it while it is open.
func TestOpenLayer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes a store for overlayfs")
	}
	ctx := t.Context()
	d, err := snapshot.Open(ctx, t.TempDir(), snapshot.Options{Driver: snapshot.Overlay})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	layers := d.(snapshot.LayerOpener)

	_, err = d.Prepare(ctx, "base-w", "")
	require.NoError(t, err)
	f, err := layers.OpenLayer(ctx, "base-w")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(f.Name(), "a"), []byte("1"), 0o600))
	require.NoError(t, d.Commit(ctx, "base", "base-w"))
	names, err := f.Readdirnames(-1)
	require.NoError(t, err)
	require.Equal(t, []string{"a"}, names)
	require.NoError(t, f.Close())
	_, err = layers.OpenLayer(ctx, "base-w")
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	_, err = d.Prepare(ctx, "child-w", "base")
	require.NoError(t, err)
	f, err = layers.OpenLayer(ctx, "child-w")
	require.NoError(t, err)
	names, err = f.Readdirnames(-1)
	require.NoError(t, err)
	require.Empty(t, names, "what is below is not in the layer")
	require.NoError(t, f.Close())

	_, err = d.View(ctx, "view", "base")
	require.NoError(t, err)
	_, err = layers.OpenLayer(ctx, "view")
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
}

// Copies have no layer.
func TestNativeHasNoLayer(t *testing.T) {
	ctx := t.Context()
	d, err := snapshot.Open(ctx, t.TempDir(), snapshot.Options{Driver: snapshot.Native})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	_, err = d.Prepare(ctx, "a", "")
	require.NoError(t, err)
	_, err = d.(snapshot.LayerOpener).OpenLayer(ctx, "a")
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
	require.ErrorContains(t, err, "not kept apart")
}

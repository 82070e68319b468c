package snapshot_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

func opener(driver string) func(t *testing.T, root string) snapshot.Driver {
	return func(t *testing.T, root string) snapshot.Driver {
		d, err := snapshot.Open(t.Context(), root, snapshot.Options{Driver: driver})
		require.NoError(t, err)
		return d
	}
}

func TestOverlay(t *testing.T) { snapshottest.Run(t, "overlayfs", opener(snapshot.Overlay)) }

func TestNative(t *testing.T) { snapshottest.Run(t, "native", opener(snapshot.Native)) }

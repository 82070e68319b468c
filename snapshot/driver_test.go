package snapshot_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

func TestMain(m *testing.M) { os.Exit(snapshottest.Main(m)) }

func opener(driver string) func(t *testing.T, root string) snapshot.Driver {
	return func(t *testing.T, root string) snapshot.Driver {
		d, err := snapshot.Open(t.Context(), root, snapshot.Options{Driver: driver})
		require.NoError(t, err)
		return d
	}
}

func TestOverlay(t *testing.T) { snapshottest.Run(t, "overlayfs", opener(snapshot.Overlay)) }

func TestNative(t *testing.T) {
	inMemory(t)
	snapshottest.Run(t, "native", opener(snapshot.Native))
}

// inMemory puts the test's directories in memory where it can: the suite has
// the copying driver, and each transaction's syncs, cost many seconds otherwise.
func inMemory(t *testing.T) {
	if dir, err := os.MkdirTemp("/dev/shm", "lamina-test-"); err == nil {
		t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
		t.Setenv("TMPDIR", dir)
	}
}

// containerds is containerd's own overlay snapshotter through the adaptor.
func containerds(t *testing.T, root string) snapshot.Driver {
	db, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	require.NoError(t, err)
	s, err := overlay.NewSnapshotter(root, overlay.WithMetaStore(db), overlay.AsynchronousRemove)
	require.NoError(t, err)
	return snapshot.Adapt("overlayfs", s, snapshot.AdaptOptions{Root: root, Attributes: snapshot.Trusted})
}

func TestAdapted(t *testing.T) {
	inMemory(t)
	snapshottest.Run(t, "overlayfs", containerds)
}

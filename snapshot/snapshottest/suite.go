package snapshottest

import (
	"context"
	"os"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/lamina-build/lamina/snapshot"
)

// Run is the conformance suite of snapshot.Driver. open makes or opens a
// driver below root; name is only for the titles of tests and for containerd's
// own suite, which treats some snapshotters by their names: drivers that stack
// with overlayfs are "overlayfs".
//
// It needs root, as most of it mounts.
func Run(t *testing.T, name string, open func(t *testing.T, root string) snapshot.Driver) {
	if os.Geteuid() != 0 {
		t.Skip("the conformance suite mounts, which needs root")
	}
	t.Run("Containerd", func(t *testing.T) {
		testsuite.SnapshotterSuite(t, name, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
			d := open(t, root)
			return d, d.Close, nil
		})
	})
}

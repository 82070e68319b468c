package cachetest_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"

	"github.com/lamina-build/lamina/cache/cachetest"
	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

func TestMain(m *testing.M) { os.Exit(snapshottest.Main(m)) }

// openTheirs opens a driver that is not ours, containerd's overlayfs
// snapshotter, which keeps a database of its own.
func openTheirs(root string) (snapshot.Driver, error) {
	s, err := overlay.NewSnapshotter(filepath.Join(root, "containerd"))
	if err != nil {
		return nil, err
	}
	return snapshot.Adapt("containerd-overlayfs", s, snapshot.AdaptOptions{Root: root, Attributes: snapshot.Trusted}), nil
}

// This is what stands in the tests of a driver. Whatever has the methods of
// snapshot.Driver can be proved; a containerd snapshotter gets them from
// snapshot.Adapt.
func ExampleProve() {
	_ = func(t *testing.T) { // TestDriver
		cachetest.Prove(t, "overlayfs", openTheirs, cachetest.Options{})
	}
}

// The example is run, with fewer histories.
func TestADriverOfOthers(t *testing.T) {
	cachetest.Prove(t, "overlayfs", openTheirs, cachetest.Options{Histories: 4, Length: 100})
}

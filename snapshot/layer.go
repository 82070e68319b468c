package snapshot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// LayerOpener is what a Driver may have beside: it keeps of a snapshot only
// what that has beyond its parent, as overlayfs does.
type LayerOpener interface {
	// OpenLayer opens the upper directory of key, with overlayfs's marks in
	// it, to be read. The caller closes it; a commit that renames key
	// meanwhile does no harm. NotImplemented where there is no such thing:
	// for snapshots that are copies, and for views.
	OpenLayer(ctx context.Context, key string) (*os.File, error)
}

var _ LayerOpener = (*tree)(nil)

// OpenLayer implements LayerOpener.
func (t *tree) OpenLayer(_ context.Context, key string) (*os.File, error) {
	if err := requireKey(key); err != nil {
		return nil, fmt.Errorf("open layer: %w", err)
	}
	defer t.lock(key)()
	e, s, err := t.load(key)
	if err != nil {
		return nil, fmt.Errorf("open layer: %w", err)
	}
	if _, whole := t.backend.whole(e, s); whole || e.kind(s) == snapshots.KindView {
		return nil, fmt.Errorf("layer of %q: it is not kept apart from what is below: %w", key, errdefs.ErrNotImplemented)
	}
	// Of an adopted snapshot it is a link.
	f, err := os.OpenFile(filepath.Join(t.at(e), "fs"), os.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open layer of %q: %w", key, asNotFound(err))
	}
	return f, nil
}

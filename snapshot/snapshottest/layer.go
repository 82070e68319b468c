package snapshottest

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/snapshot"
)

// OpenLayer passes on to drivers that are a snapshot.LayerOpener; others do not
// implement it.
func (f *Faulty) OpenLayer(ctx context.Context, key string) (*os.File, error) {
	if d, ok := f.d.(snapshot.LayerOpener); ok {
		return d.OpenLayer(ctx, key)
	}
	return nil, fmt.Errorf("layer of %q: %w", key, errdefs.ErrNotImplemented)
}

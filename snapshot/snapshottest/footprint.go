package snapshottest

import (
	"context"

	"github.com/lamina-build/lamina/snapshot"
)

// Footprint passes on to drivers that are a snapshot.Footprinter; others have
// none.
func (f *Faulty) Footprint(ctx context.Context, key string) (int64, error) {
	if d, ok := f.d.(snapshot.Footprinter); ok {
		return d.Footprint(ctx, key)
	}
	return 0, nil
}

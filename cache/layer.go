package cache

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/snapshot"
)

// SnapshotLayers lists the layers that the record's snapshot shows, bottom
// first, with their directories: see snapshot.Stacker. While the handle is held
// they can be read; that of a committed record moves when it is finalized.
// NotImplemented where the driver copies, or cannot tell, and for lazy records.
func (r *ImmutableRef) SnapshotLayers(ctx context.Context) (list []snapshot.Layer, err error) {
	m := r.h.m
	e, done, err := r.h.begin()
	if err != nil {
		return nil, err
	}
	defer done()
	s, ok := m.driver.Stacker()
	if !ok {
		return nil, fmt.Errorf("driver %s does not tell what a layer holds: %w", m.info.Name, errdefs.ErrNotImplemented)
	}
	err = m.byName(e, func(key string) (err error) {
		list, err = s.Layers(ctx, key)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("layers of record %s: %w", short(e.id), err)
	}
	return list, nil
}

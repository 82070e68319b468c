package cache

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/snapshot"
)

// OpenLayer opens the directory that holds what the record's snapshot has
// beyond that of its parent, with overlayfs's marks in it, to be read; marks is
// how the names of these attributes begin ("trusted.overlay."). The caller
// closes it before the handle is released. NotImplemented where the driver
// copies, or cannot tell.
func (r *ImmutableRef) OpenLayer(ctx context.Context) (dir *os.File, marks string, err error) {
	m := r.h.m
	end, err := m.begin()
	if err != nil {
		return nil, "", err
	}
	defer end()
	e, done, err := r.h.use()
	if err != nil {
		return nil, "", err
	}
	defer done()
	d, ok := m.driver.(snapshot.LayerOpener)
	if !ok {
		return nil, "", fmt.Errorf("driver %s does not tell what a layer holds: %w", m.info.Name, errdefs.ErrNotImplemented)
	}
	err = m.byName(e, func(key string) (err error) {
		dir, err = d.OpenLayer(ctx, key)
		return err
	})
	if err != nil {
		return nil, "", fmt.Errorf("layer of record %s: %w", short(e.id), err)
	}
	return dir, m.info.Attributes + ".overlay.", nil
}

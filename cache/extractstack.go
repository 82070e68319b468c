package cache

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// makeStack makes the snapshot of a merge, or of a diff that consists of layers
// of its upper: a list of names where the driver stacks, else the layers
// applied one after the other.
func (x *extraction) makeStack(ctx context.Context, list []ID) error {
	m := x.m
	s, ok := m.driver.Stacker()
	if !ok {
		return x.applyLayers(ctx, list)
	}
	names := make([]string, len(list))
	for i, id := range list {
		name, err := m.stackable(ctx, s, id)
		var bound *snapshot.LayerError
		if errors.As(err, &bound) && bound.Bound {
			m.log.Info("a layer cannot be stacked, so all are applied", "id", x.rec.ID, "layer", id, "reason", bound.Reason)
			return x.applyLayers(ctx, list)
		}
		if err != nil {
			return err
		}
		names[i] = name
	}
	return x.named(ctx, func(name string) error { return s.Stack(ctx, name, names) })
}

// makeDiff makes the snapshot of a diff that has a layer of its own, by
// comparing its inputs.
func (x *extraction) makeDiff(ctx context.Context) error {
	m := x.m
	c, err := m.changeOf(ctx, x.rec)
	if err != nil {
		return err
	}
	if s, ok := m.driver.Stacker(); ok {
		return x.named(ctx, func(name string) error { return s.Diff(ctx, name, c.Lower, c.Upper) })
	}
	return x.fresh(ctx, "", func(key string) error {
		return snapshot.Apply(ctx, m.driver, key, []snapshot.Change{c})
	})
}

// named makes a committed name at once.
func (x *extraction) named(ctx context.Context, make func(name string) error) error {
	if err := x.m.step("extract commit"); err != nil {
		return err
	}
	return x.landed(ctx, make(string(x.rec.ID)))
}

// stackable is the name of a record's layer that may lie over any other: the
// snapshot's own or, where that is raw, that of a cleaned copy, which is made
// when it is first needed.
func (m *Manager) stackable(ctx context.Context, s snapshot.Stacker, id ID) (string, error) {
	key, err := m.keyOf(ctx, id)
	if err != nil {
		return "", err
	}
	list, err := s.Layers(ctx, key)
	if err != nil {
		return "", err
	}
	if own := list[len(list)-1]; own.Clean {
		return key, nil
	}
	copied := cleanKey(id)
	_, err = m.cleaning.do(ctx, &m.running, id, func(ctx context.Context) (struct{}, error) {
		_, err := m.driver.Stat(ctx, copied)
		if is(err, errdefs.ErrNotFound) {
			err = m.cleanCopy(ctx, s, id, copied, key)
		}
		return struct{}{}, err
	})
	return copied, err
}

// cleanCopy makes the cleaned copy of a record's layer, which counts as its
// record's: so its size is not known any more from before there is one.
func (m *Manager) cleanCopy(ctx context.Context, s snapshot.Stacker, id ID, copied, key string) error {
	m.copies.begin()
	defer m.sizer.add(id)
	defer m.copies.end()
	if err := m.forgetSize(ctx, id); err != nil {
		return err
	}
	if err := m.step("clean copy"); err != nil {
		return err
	}
	return s.CleanCopy(ctx, copied, key)
}

// cleanKey is the driver's name of a cleaned copy of a record's layer. It
// belongs to the record, which does not name it.
func cleanKey(id ID) string { return string(id) + cleanSuffix }

const cleanSuffix = "-c"

// applyLayers makes the snapshot from an empty one. A layer that was made from a
// blob is applied as the blob says it, as only that knows what it replaced;
// another as the difference that it made to what lay below it, of which a blob
// that was computed may not have every attribute.
func (x *extraction) applyLayers(ctx context.Context, list []ID) error {
	m := x.m
	_, stacks := m.driver.Stacker()
	return x.fresh(ctx, "", func(key string) error {
		for _, id := range list {
			rec, err := m.read(ctx, id)
			if err != nil {
				return err
			}
			if !stacks && rec.Verified {
				if done, err := x.applyBlob(ctx, key, rec); done || err != nil {
					if err != nil {
						return fmt.Errorf("layer %s: %w", short(id), err)
					}
					continue
				}
			}
			c, err := m.changeOf(ctx, rec)
			if err == nil {
				err = snapshot.Apply(ctx, m.driver, key, []snapshot.Change{c})
			}
			if err != nil {
				return fmt.Errorf("layer %s: %w", short(id), err)
			}
		}
		return nil
	})
}

// applyBlob applies a layer's blob to a tree, if one is here that is known to
// hold it.
func (x *extraction) applyBlob(ctx context.Context, key string, rec *Record) (done bool, err error) {
	src, ok, err := x.m.blobs.proven(ctx, rec)
	if err != nil || !ok {
		return false, err
	}
	ra, err := src.open(ctx, x.m.blobs)
	if err != nil {
		return false, err
	}
	one := &extraction{m: x.m, rec: rec}
	err = one.applyVerified(ctx, key, &src.blob, ra, sequential(ctx, ra))
	return true, errors.Join(err, ra.Close())
}

// changeOf is the difference that a record's own layer is.
func (m *Manager) changeOf(ctx context.Context, rec *Record) (c snapshot.Change, err error) {
	switch {
	case rec.Op == metadata.Diff:
		if c.Lower, err = m.keyOf(ctx, rec.Parents[0]); err == nil {
			c.Upper, err = m.keyOf(ctx, rec.Parents[1])
		}
		return c, err
	case len(rec.Parents) > 0:
		if c.Lower, err = m.keyOf(ctx, rec.Parents[0]); err != nil {
			return c, err
		}
	}
	c.Upper, err = m.keyOf(ctx, rec.ID)
	return c, err
}

// isRaw says whether the layer of a committed snapshot may lie over its own
// parent only, as overlayfs left it.
func (m *Manager) isRaw(ctx context.Context, key string) (bool, error) {
	s, ok := m.driver.Stacker()
	if !ok {
		return m.info.Attributes != "", nil
	}
	list, err := s.Layers(ctx, key)
	if err != nil || len(list) == 0 {
		return false, err
	}
	own := list[len(list)-1]
	return own.Name == key && !own.Clean, nil
}

// cleanUpper makes the layer of an active snapshot that is about to be
// committed the mere difference to its parent. Where somebody may look at it
// that cannot be: then it stays raw. Mounts wait for it; one that comes before
// the commit changes nothing, as a writable one needs the token.
func (m *Manager) cleanUpper(ctx context.Context, id ID, key string) error {
	s, ok := m.driver.Stacker()
	if !ok {
		return nil
	}
	defer m.pool.lockKey(id)()
	if m.pool.mounted(id) {
		return nil
	}
	if _, busy, err := testHold(m.root, id, true); busy || err != nil {
		return err
	}
	if err := m.step("clean"); err != nil {
		return err
	}
	_, err := s.Clean(ctx, key)
	if ctx.Err() == nil && is(err, errdefs.ErrFailedPrecondition, errdefs.ErrPermissionDenied) {
		return nil
	}
	return err
}

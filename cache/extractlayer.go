package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/userns"

	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/snapshot"
)

// makeLayer makes the snapshot of a layer from one of its blobs. One that turns
// out to be damaged is no reason to give up while there is another.
func (x *extraction) makeLayer(ctx context.Context, e *entry) error {
	m := x.m
	parent := ""
	if len(x.rec.Parents) > 0 {
		var err error
		if parent, err = m.keyOf(ctx, x.rec.Parents[0]); err != nil {
			return err
		}
	}
	sources, err := m.blobs.sources(ctx, x.rec)
	if err != nil {
		return err
	}
	if len(sources) == 0 {
		return m.requireBlobs(ctx, []*Record{x.rec})
	}
	var errs []error
	for _, src := range sources {
		err := x.fresh(ctx, parent, func(key string) error { return x.fill(ctx, key, src) }, m.exact()...)
		if err == nil {
			x.verified, x.from = true, src.blob.Digest
			return nil
		}
		errs = append(errs, err, m.expose(ctx, e, err))
		if !is(err, errdefs.ErrDataLoss, errdefs.ErrNotFound, errdefs.ErrInvalidArgument) {
			break
		}
	}
	return errors.Join(errs...)
}

// exact tells a driver that stacks that a layer is the mere difference.
func (m *Manager) exact() []snapshots.Opt {
	if _, ok := m.driver.Stacker(); !ok {
		return nil
	}
	return []snapshots.Opt{snapshot.WithExactLayer}
}

// fill applies a blob to the active snapshot key, and keeps the blob if it was
// not here.
func (x *extraction) fill(ctx context.Context, key string, src source) (err error) {
	ra, err := src.open(ctx, x.m.blobs)
	if err != nil {
		return fmt.Errorf("open blob %s: %w", src.blob.Digest, err)
	}
	defer func() { err = errors.Join(err, ra.Close()) }()
	raw := sequential(ctx, ra)
	var in *ingest
	if !src.stored {
		if in, err = x.m.blobs.ingest(ctx); err != nil {
			return err
		}
		raw = io.TeeReader(raw, in)
	}
	err = x.applyVerified(ctx, key, &src.blob, ra, raw)
	if in == nil {
		return err
	}
	if err != nil {
		return errors.Join(err, in.abort(ctx))
	}
	pub, err := in.publish(ctx, src.blob.Digest)
	if err != nil {
		return err
	}
	x.blob = pub
	return nil
}

// applyVerified applies what raw reads, and is happy only if it is what the
// record says.
func (x *extraction) applyVerified(ctx context.Context, key string, blob *Blob, ra content.ReaderAt, raw io.Reader) error {
	r, err := readTar(blob, ra, raw)
	if err != nil {
		return err
	}
	done, err := x.apply(ctx, key, r.ReadCloser) // which may know its DiffID
	err = errors.Join(err, r.Close())
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err = r.explain(err); err != nil {
		return fmt.Errorf("apply blob %s: %w", blob.Digest, err)
	}
	if x.rec.DiffID != "" && done.DiffID != x.rec.DiffID {
		return &WrongLayerError{Blob: blob.Digest, Holds: done.DiffID, Claimed: x.rec.DiffID}
	}
	if done.Skipped != (layer.Skipped{}) {
		x.m.log.Warn("parts of a layer could not be kept here", "id", x.rec.ID, "devices", done.Skipped.Devices, "xattrs", done.Skipped.Xattrs)
	}
	return nil
}

// apply applies an uncompressed layer to the active snapshot key: to its upper
// directory, to its tree or, where the driver shows neither, to a mount of it.
func (x *extraction) apply(ctx context.Context, key string, r io.Reader) (done layer.Applied, err error) {
	m := x.m
	o := layer.ApplyOptions{Limits: m.limits}
	if os.Geteuid() != 0 {
		o.Owners = layer.OwnersCaller
	}
	o.Devices = layer.DevicesMade
	if os.Geteuid() != 0 || userns.RunningInUserNS() {
		o.Devices = layer.DevicesSkipped
	}
	err = m.inside(ctx, key, func(dir string, form layer.Form, parents []string) (err error) {
		o.Form, o.Parents = form, parents
		done, err = layer.Apply(ctx, dir, r, o)
		return err
	})
	return done, err
}

// inside gives the directory in which an active snapshot can be worked in:
// that of its layer, with those below it, topmost first, or that of its tree.
func (m *Manager) inside(ctx context.Context, key string, work func(dir string, form layer.Form, parents []string) error) (err error) {
	if s, ok := m.driver.Stacker(); ok {
		list, err := s.Layers(ctx, key)
		if err != nil {
			return err
		}
		dirs := make([]string, len(list))
		for i, l := range list {
			if dirs[i], err = filepath.EvalSymlinks(l.Dir); err != nil {
				return err
			}
		}
		slices.Reverse(dirs)
		return work(dirs[0], m.form(), dirs[1:])
	}
	dir, ok, err := m.driver.Dir(ctx, key)
	if err != nil {
		return err
	}
	if ok {
		return work(dir, layer.Plain, nil)
	}
	at := poolKey{id: ID(key)}
	path, err := m.pool.get(ctx, at, func(target string) error {
		return m.driver.Mount(ctx, key, target, false)
	}, func() (string, error) { return "", nil })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.pool.put(at)) }()
	return work(path, layer.Plain, nil)
}

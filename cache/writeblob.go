package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// madeBlob is a layer blob that was written.
type madeBlob struct {
	desc   ocispec.Descriptor
	DiffID digest.Digest
}

// write writes the layer of e from its snapshot.
func (b *blobbing) write(ctx context.Context, e *entry, w io.Writer) (made madeBlob, err error) {
	m := b.m
	if err := m.ground(ctx, e); err != nil {
		return made, err
	}
	err = m.layerSource(ctx, m.current(e), func(src layer.Source) error {
		// Times are kept whole: the snapshot can be made again from the blob.
		o := layer.WriteOptions{SourceDateEpoch: b.o.SourceDateEpoch, Nanoseconds: true}
		blob, err := layer.WriteBlob(ctx, w, src, b.o.Compression, o)
		if blob.Sockets > 0 {
			m.log.Warn("sockets are left out of a layer", "id", e.id, "sockets", blob.Sockets)
		}
		made = madeBlob{blob.Descriptor, blob.DiffID}
		return err
	})
	if err != nil {
		return made, fmt.Errorf("write the layer: %w", err)
	}
	return made, nil
}

// convert writes a blob in another compression.
func (b *blobbing) convert(ctx context.Context, rec *Record, src source, w io.Writer) (made madeBlob, err error) {
	ra, err := src.open(ctx, b.m.blobs)
	if err != nil {
		return made, fmt.Errorf("open blob %s: %w", src.blob.Digest, err)
	}
	defer func() { err = errors.Join(err, ra.Close()) }()
	r, err := readTar(&src.blob, ra, sequential(ctx, ra))
	if err != nil {
		return made, err
	}
	sum := digest.SHA256.Digester()
	out := &meter{w: w, sum: digest.SHA256.Digester()}
	z, err := layer.Compress(out, b.o.Compression)
	if err == nil {
		_, err = b.m.limits.Copy(z, io.TeeReader(r, sum.Hash()))
		err = errors.Join(err, z.Close())
	}
	err = errors.Join(err, r.Close())
	if ctx.Err() != nil {
		return made, context.Cause(ctx)
	}
	if err = r.explain(err); err != nil {
		return made, fmt.Errorf("convert blob %s: %w", src.blob.Digest, err)
	}
	made.DiffID = sum.Digest()
	if rec.DiffID != "" && made.DiffID != rec.DiffID {
		return made, &WrongLayerError{Blob: src.blob.Digest, Holds: made.DiffID, Claimed: rec.DiffID}
	}
	made.desc = ocispec.Descriptor{
		MediaType: b.o.Compression.Algorithm.MediaType(), Digest: out.sum.Digest(), Size: out.n,
	}
	return made, nil
}

// meter passes on what is written, and knows digest and size of it.
type meter struct {
	w   io.Writer
	sum digest.Digester
	n   int64
}

func (m *meter) Write(p []byte) (int, error) {
	n, err := m.w.Write(p)
	m.sum.Hash().Write(p[:n])
	m.n += int64(n)
	return n, err
}

// layerSource gives what a record's own layer can be written from: its upper
// directory, or the trees without it and with it.
func (m *Manager) layerSource(ctx context.Context, rec *Record, write func(layer.Source) error) (err error) {
	if s, ok := m.driver.Stacker(); ok {
		list, err := s.Layers(ctx, rec.Key)
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
		return write(layer.Upper{Dir: dirs[0], Form: m.form(), Parents: dirs[1:]})
	}
	lower, upper := ID(""), rec.ID
	if rec.Op == metadata.Diff {
		lower, upper = rec.Parents[0], rec.Parents[1]
	} else if len(rec.Parents) > 0 {
		lower = rec.Parents[0]
	}
	var trees layer.Trees
	for _, tree := range []struct {
		id  ID
		dir *string
	}{{lower, &trees.Lower}, {upper, &trees.Upper}} {
		if tree.id == "" {
			continue
		}
		dir, done, err := m.look(ctx, tree.id)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done()) }()
		*tree.dir = dir
	}
	return write(trees)
}

// form is how the driver keeps layers.
func (m *Manager) form() layer.Form {
	if m.info.Attributes == snapshot.User {
		return layer.OverlayUser
	}
	return layer.OverlayTrusted
}

// look shows the tree of a record that has its snapshot, to be read.
func (m *Manager) look(ctx context.Context, id ID) (dir string, done func() error, err error) {
	key, err := m.keyOf(ctx, id)
	if err != nil {
		return "", nil, err
	}
	if dir, ok, err := m.driver.Dir(ctx, key); ok || err != nil {
		return dir, func() error { return nil }, err
	}
	if !m.pool.private && !m.pool.plain {
		if err := m.marks.setDirty(); err != nil {
			return "", nil, err
		}
	}
	at := poolKey{id: id, readOnly: true}
	dir, err = m.pool.get(ctx, at, func(target string) error {
		return m.driver.Mount(ctx, key, target, true)
	}, func() (string, error) { return "", nil })
	return dir, func() error { return m.pool.put(at) }, err
}

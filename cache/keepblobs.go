package cache

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/lamina-build/lamina/layer"
)

// BlobWriter writes blobs into the content store for records that are made
// later, also while the cache is not open: for a command that has a large
// archive to read and shares the store with others. What no GetByBlob has named
// by the time of its Release is removed by the next open, as after a kill.
type BlobWriter struct {
	b    *blobStore
	hold *Hold
}

// BlobWriter begins to write blobs. It may be used after Close.
func (m *Manager) BlobWriter(ctx context.Context) (*BlobWriter, error) {
	end, err := m.beginChange()
	if err != nil {
		return nil, err
	}
	defer end()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := m.marks.setDirty(); err != nil {
		return nil, err
	}
	hold, err := takeHold(m.root, blobsHold, false, m.command, m.now())
	if err != nil {
		return nil, err
	}
	return &BlobWriter{b: m.blobs, hold: hold}, nil
}

// Put writes the blob that desc describes, and verifies it: other bytes are
// DataLoss and leave nothing. One that is there already is not read.
func (w *BlobWriter) Put(ctx context.Context, desc ocispec.Descriptor, r io.Reader) (err error) {
	if !w.hold.held() {
		return fmt.Errorf("blob writer was released: %w", errdefs.ErrFailedPrecondition)
	}
	size, there, err := w.b.size(ctx, desc.Digest)
	if err != nil || there && size == desc.Size {
		return err
	}
	v, err := layer.Verify(&alive{ctx, r}, desc.Digest, desc.Size)
	if err != nil {
		return err
	}
	s, err := w.b.open()
	if err != nil {
		return err
	}
	ref := w.b.label + "-" + rand.Text()
	in, err := s.Writer(ctx, content.WithRef(ref), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write blob %s: %w", desc.Digest, fullDisk(err))
	}
	if _, err = io.Copy(in, v); err == nil {
		err = w.publish(ctx, in, desc.Digest, desc.Size)
	}
	if err != nil {
		err = errors.Join(err, in.Close(), ignoreNotFound(s.Abort(context.WithoutCancel(ctx), ref)))
		return fmt.Errorf("write blob %s: %w", desc.Digest, fullDisk(err))
	}
	return in.Close()
}

func (w *BlobWriter) publish(ctx context.Context, in content.Writer, d digest.Digest, size int64) error {
	if err := w.b.intend(d); err != nil {
		return err
	}
	var opts []content.Opt
	if w.b.given() != nil {
		opts = append(opts, content.WithLabels(w.b.labels(labelWrote)))
	}
	return ignoreExists(in.Commit(ctx, size, d, opts...))
}

func ignoreExists(err error) error {
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// Release ends the writing. Releasing twice is harmless.
func (w *BlobWriter) Release() error { return w.hold.Release() }

package cache_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

// file is an entry of a layer in a test.
type file struct {
	name, text string
	typ        byte // a regular file if zero
	mode       int64
	xattrs     map[string]string
}

// layerTar is a layer as an uncompressed archive.
func layerTar(t testing.TB, files ...file) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.text)), Format: tar.FormatPAX}
		if f.mode != 0 {
			h.Mode = f.mode
		}
		for k, v := range f.xattrs {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		if f.typ != 0 {
			h.Typeflag, h.Size = f.typ, 0
			if f.typ == tar.TypeDir && f.mode == 0 {
				h.Mode = 0o755
			}
			if f.typ == tar.TypeLink || f.typ == tar.TypeSymlink {
				h.Linkname = f.text
			}
		}
		require.NoError(t, w.WriteHeader(h))
		if h.Size > 0 {
			_, err := w.Write([]byte(f.text))
			require.NoError(t, err)
		}
	}
	require.NoError(t, w.Close())
	return buf.Bytes()
}

// blob is a layer in one compression.
type blob struct {
	desc ocispec.Descriptor
	data []byte
}

// pack compresses a layer.
func pack(t testing.TB, how layer.Algorithm, data []byte) blob {
	var buf bytes.Buffer
	mediaType := ocispec.MediaTypeImageLayer
	var w io.WriteCloser
	switch how {
	case layer.Gzip:
		w, mediaType = gzip.NewWriter(&buf), ocispec.MediaTypeImageLayerGzip
	case layer.Zstd:
		z, err := zstd.NewWriter(&buf)
		require.NoError(t, err)
		w, mediaType = z, ocispec.MediaTypeImageLayerZstd
	default:
		buf.Write(data)
	}
	if w != nil {
		_, err := w.Write(data)
		require.NoError(t, err)
		require.NoError(t, w.Close())
	}
	return blob{data: buf.Bytes(), desc: ocispec.Descriptor{
		MediaType: mediaType, Digest: digest.FromBytes(buf.Bytes()), Size: int64(buf.Len()),
		Annotations: map[string]string{"containerd.io/uncompressed": digest.FromBytes(data).String()},
	}}
}

// registry provides blobs from memory, and counts.
type registry struct {
	mu    sync.Mutex
	blobs map[digest.Digest][]byte
	reads atomic.Int64
	// gate, if not nil, is received from before each read.
	gate chan struct{}
	// began gets something with each open, if it is not nil.
	began chan struct{}
}

func newRegistry(blobs ...blob) *registry {
	r := &registry{blobs: map[digest.Digest][]byte{}}
	for _, b := range blobs {
		r.blobs[b.desc.Digest] = b.data
	}
	return r
}

// ReaderAt implements content.Provider.
func (r *registry) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	data, ok := r.blobs[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("registry has no %s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	r.reads.Add(1)
	if r.began != nil {
		r.began <- struct{}{}
	}
	return &served{r: r, ctx: ctx, Reader: bytes.NewReader(data)}, nil
}

type served struct {
	*bytes.Reader
	r   *registry
	ctx context.Context
}

func (s *served) ReadAt(p []byte, at int64) (int, error) {
	if s.r.gate != nil {
		select {
		case <-s.r.gate:
		case <-s.ctx.Done():
			return 0, s.ctx.Err()
		}
	}
	return s.Reader.ReadAt(p, at)
}

func (s *served) Size() int64  { return s.Reader.Size() }
func (s *served) Close() error { return nil }

// byBlob is GetByBlob with a provider.
func (w *world) byBlob(b blob, parent *cache.ImmutableRef, r *registry) *cache.ImmutableRef {
	w.Helper()
	o := cache.BlobOptions{}
	if r != nil {
		o.Provider = r
	}
	ref, err := w.GetByBlob(w.ctx, b.desc, parent, o)
	require.NoError(w, err)
	return ref
}

// chainOf makes a chain of lazy layers with one file each.
func (w *world) chainOf(n int, r *registry) (ref *cache.ImmutableRef, blobs []blob) {
	w.Helper()
	for i := range n {
		b := pack(w, layer.Gzip, layerTar(w, file{name: fmt.Sprintf("f%03d", i), text: fmt.Sprint(i)}))
		blobs = append(blobs, b)
		if r != nil {
			r.blobs[b.desc.Digest] = b.data
		}
		next := w.byBlob(b, ref, r)
		if ref != nil {
			w.release(ref)
		}
		ref = next
	}
	return ref, blobs
}

// store puts a blob into the cache's own content store, as a migration would
// find it there.
func (w *world) store(b blob) {
	w.Helper()
	dir := filepath.Join(w.root, "content", "blobs", b.desc.Digest.Algorithm().String())
	require.NoError(w, os.MkdirAll(dir, 0o700))
	require.NoError(w, os.WriteFile(filepath.Join(dir, b.desc.Digest.Encoded()), b.data, 0o400))
}

// stored lists the blobs in the cache's own content store.
func (w *world) stored() (out []digest.Digest) {
	w.Helper()
	names, err := filepath.Glob(filepath.Join(w.root, "content", "blobs", "*", "*"))
	require.NoError(w, err)
	for _, n := range names {
		out = append(out, digest.NewDigestFromEncoded(digest.Algorithm(filepath.Base(filepath.Dir(n))), filepath.Base(n)))
	}
	return out
}

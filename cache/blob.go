package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
)

// Blob is one compressed form of a record's layer.
type Blob = metadata.Blob

// MissingBlobsError says that layers cannot be made, or given out, because
// their blobs are neither in the content store nor did anybody hand in a
// provider for them since the cache was opened. GetByBlob with a provider
// helps. It is errdefs' FailedPrecondition.
type MissingBlobsError struct {
	// Digests has one blob of each such layer, bottom first.
	Digests []digest.Digest
}

// Error names the digests.
func (e *MissingBlobsError) Error() string {
	list := make([]string, len(e.Digests))
	for i, d := range e.Digests {
		list[i] = string(d)
	}
	return "no provider for blobs that are not here: " + strings.Join(list, ", ")
}

// Unwrap gives the class of the error.
func (e *MissingBlobsError) Unwrap() error { return errdefs.ErrFailedPrecondition }

// WrongLayerError says that a blob was decompressed and holds another layer than
// somebody had said. The record remembers it: the blob is not tried again, nor
// given out as the layer, and GetByBlob with the same descriptor is refused.
// Another blob of the layer helps. It is errdefs' DataLoss.
type WrongLayerError struct {
	// Blob is the digest of the blob, Holds the DiffID of the layer in it, and
	// Claimed that of the layer that it was said to hold.
	Blob, Holds, Claimed digest.Digest
}

// Error names all three.
func (e *WrongLayerError) Error() string {
	return fmt.Sprintf("blob %s holds the layer %s, not %s", e.Blob, e.Holds, e.Claimed)
}

// Unwrap gives the class of the error.
func (e *WrongLayerError) Unwrap() error { return errdefs.ErrDataLoss }

// isWrong is the error of a blob of the record that is known to hold another
// layer, or nil.
func isWrong(rec *Record, b *Blob) error {
	if b.Claimed || b.DiffID == "" || rec.DiffID == "" || b.DiffID == rec.DiffID {
		return nil
	}
	return &WrongLayerError{Blob: b.Digest, Holds: b.DiffID, Claimed: rec.DiffID}
}

// candidates are the blobs of a record that may hold its layer, those that are
// known to first; err says of another one what it holds, if there is one.
func candidates(rec *Record) (list []Blob, err error) {
	var claimed []Blob
	for i := range rec.Blobs {
		switch werr := isWrong(rec, &rec.Blobs[i]); {
		case werr != nil:
			err = werr
		case rec.Blobs[i].Claimed:
			claimed = append(claimed, rec.Blobs[i])
		default:
			list = append(list, rec.Blobs[i])
		}
	}
	return append(list, claimed...), err
}

// expose notes what a blob of e was found to hold, if that is what err says.
func (m *Manager) expose(ctx context.Context, e *entry, err error) error {
	var wrong *WrongLayerError
	if !errors.As(err, &wrong) {
		return nil
	}
	_, err = m.change(context.WithoutCancel(ctx), e, func(_ *metadata.Tx, edit *Edit) error {
		for i := range edit.rec.Blobs {
			if b := &edit.rec.Blobs[i]; b.Digest == wrong.Blob {
				b.Claimed, b.DiffID = false, wrong.Holds
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("note what blob %s holds: %w", wrong.Blob, err)
	}
	return nil
}

// Compression is an algorithm and a level, see package layer.
type Compression = layer.Compression

// descriptor describes a blob of a layer for others.
func descriptor(rec *Record, b *Blob) ocispec.Descriptor {
	desc := ocispec.Descriptor{
		MediaType: b.MediaType, Digest: b.Digest, Size: b.Size,
		URLs: slices.Clone(b.URLs), Annotations: map[string]string{},
	}
	for k, v := range b.Annotations {
		desc.Annotations[k] = v
	}
	if rec.DiffID != "" {
		desc.Annotations[labelUncompressed] = string(rec.DiffID)
	}
	return desc
}

// blobOf is what a descriptor says of a blob, with a DiffID that is known to be
// right.
func blobOf(desc ocispec.Descriptor, diffID digest.Digest, stored bool) Blob {
	return Blob{
		Digest: desc.Digest, MediaType: desc.MediaType, Size: desc.Size, DiffID: diffID,
		Annotations: desc.Annotations, URLs: slices.Clone(desc.URLs), Stored: stored,
	}
}

// withBlob adds a blob to a record, or notes that it is stored, or that its
// DiffID is right.
func withBlob(rec *Record, b Blob) {
	for i := range rec.Blobs {
		if rec.Blobs[i].Digest == b.Digest {
			rec.Blobs[i].Stored = rec.Blobs[i].Stored || b.Stored
			rec.Blobs[i].Claimed = rec.Blobs[i].Claimed && b.Claimed
			return
		}
	}
	rec.Blobs = append(rec.Blobs, b)
}

// source is where the bytes of a layer can be had from.
type source struct {
	blob Blob
	// stored says that they are in the content store, else provider has them.
	stored   bool
	provider content.Provider
}

// sources lists the blobs of a layer that can be read and are not known to hold
// another one: those that are here, then those that somebody offered to provide,
// both in the order of candidates.
func (b *blobStore) sources(ctx context.Context, rec *Record) (list []source, err error) {
	var offered []source
	blobs, _ := candidates(rec)
	for _, blob := range blobs {
		if _, cerr := layer.CompressionOf(blob.MediaType); cerr != nil {
			continue
		}
		size, there, err := b.size(ctx, blob.Digest)
		if err != nil {
			return nil, fmt.Errorf("look for blob %s: %w", blob.Digest, err)
		}
		if there && (blob.Size <= 0 || size == blob.Size) {
			list = append(list, source{blob: blob, stored: true})
		}
		if p := b.provider(blob.Digest); p != nil {
			offered = append(offered, source{blob: blob, provider: p})
		}
	}
	return append(list, offered...), nil
}

// proven is the first of sources that is here and known to hold the layer; ok
// is false if there is none.
func (b *blobStore) proven(ctx context.Context, rec *Record) (src source, ok bool, err error) {
	list, err := b.sources(ctx, rec)
	if err != nil || len(list) == 0 || !list[0].stored || list[0].blob.Claimed {
		return source{}, false, err
	}
	return list[0], true, nil
}

// source is the first of sources; ok is false if there is none.
func (b *blobStore) source(ctx context.Context, rec *Record) (src source, ok bool, err error) {
	list, err := b.sources(ctx, rec)
	if err != nil || len(list) == 0 {
		return source{}, false, err
	}
	return list[0], true, nil
}

// descriptor describes the blob.
func (s *source) descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType: s.blob.MediaType, Digest: s.blob.Digest, Size: s.blob.Size,
		Annotations: s.blob.Annotations, URLs: s.blob.URLs,
	}
}

// open opens the bytes of the blob, unverified.
func (s *source) open(ctx context.Context, b *blobStore) (content.ReaderAt, error) {
	if s.stored {
		return b.reader(ctx, s.descriptor())
	}
	return s.provider.ReaderAt(ctx, s.descriptor())
}

// sequential reads a blob from its beginning, as long as ctx is alive.
func sequential(ctx context.Context, ra content.ReaderAt) io.Reader {
	return &alive{ctx, content.NewReader(ra)}
}

// alive is a reader that fails when its context has ended.
type alive struct {
	ctx context.Context
	r   io.Reader
}

func (a *alive) Read(p []byte) (int, error) {
	if a.ctx.Err() != nil {
		return 0, context.Cause(a.ctx)
	}
	return a.r.Read(p)
}

// verifiedTar reads the uncompressed layer of a blob. Its finish, after the last
// read, says whether the bytes were those of the blob, which explains any other
// error.
type verifiedTar struct {
	io.ReadCloser
	v *layer.Verifier
}

// readTar begins to read what raw reads of the blob, of which ra knows the
// size.
func readTar(blob *Blob, ra content.ReaderAt, raw io.Reader) (*verifiedTar, error) {
	size := blob.Size
	if size <= 0 {
		size = ra.Size()
	}
	v, err := layer.Verify(raw, blob.Digest, size)
	if err != nil {
		return nil, err
	}
	r, err := layer.Decompress(v, blob.MediaType)
	t := &verifiedTar{r, v}
	if err != nil {
		return nil, t.explain(err)
	}
	return t, nil
}

// explain is the error of a blob that is not what it should be, if it is not,
// else err.
func (t *verifiedTar) explain(err error) error {
	if verr := t.v.Finish(); verr != nil {
		return verr
	}
	return err
}

// readDiffID computes the DiffID of a blob that is in the content store.
func (m *Manager) readDiffID(ctx context.Context, desc ocispec.Descriptor, ra content.ReaderAt) (digest.Digest, error) {
	blob := blobOf(desc, "", true)
	r, err := readTar(&blob, ra, sequential(ctx, ra))
	if err != nil {
		return "", err
	}
	sum := digest.SHA256.Digester()
	_, err = m.limits.Copy(sum.Hash(), r)
	err = r.explain(errors.Join(err, r.Close()))
	if err != nil {
		return "", fmt.Errorf("read blob %s to find its DiffID: %w", desc.Digest, err)
	}
	return sum.Digest(), nil
}

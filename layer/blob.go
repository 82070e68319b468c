package layer

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Verifier passes bytes on and holds them against a digest and a size.
type Verifier struct {
	r    io.Reader
	want digest.Digest
	size int64
	sum  hash.Hash
	read int64
	err  error
}

// Verify returns a reader of r that ends with an error of class DataLoss, and
// not with io.EOF, when r is not what the descriptor says. It reads no more than
// one byte beyond the size. A digest that cannot be checked is InvalidArgument.
func Verify(r io.Reader, want digest.Digest, size int64) (*Verifier, error) {
	if err := want.Validate(); err != nil {
		return nil, invalid("digest %q: %w", want, err)
	}
	if size < 0 {
		return nil, invalid("a blob of %d bytes", size)
	}
	return &Verifier{r: r, want: want, size: size, sum: want.Algorithm().Hash()}, nil
}

// Read implements io.Reader.
func (v *Verifier) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	if left := v.size - v.read; int64(len(p)) > left+1 {
		p = p[:left+1]
	}
	n, err := v.r.Read(p)
	v.sum.Write(p[:n])
	v.read += int64(n)
	switch {
	case v.read > v.size:
		err = fmt.Errorf("blob %s is longer than its %d bytes: %w", v.want, v.size, errdefs.ErrDataLoss)
	case err == io.EOF && v.read < v.size: //nolint:errorlint // the end is io.EOF itself
		err = fmt.Errorf("blob %s ends after %d of %d bytes: %w", v.want, v.read, v.size, errdefs.ErrDataLoss)
	case err == io.EOF: //nolint:errorlint // the end is io.EOF itself
		if got := digest.NewDigest(v.want.Algorithm(), v.sum); got != v.want {
			err = fmt.Errorf("blob %s has the content of %s: %w", v.want, got, errdefs.ErrDataLoss)
		}
	}
	v.err = err
	return n, err
}

// Finish reads the rest of the blob, which a decompressor leaves, and returns
// nil if all of it was right.
func (v *Verifier) Finish() error {
	if _, err := io.Copy(io.Discard, v); err != nil {
		return err
	}
	if errors.Is(v.err, io.EOF) {
		return nil
	}
	return v.err
}

// ApplyBlob applies the layer blob that r gives: it holds r against the digest
// and the size of the descriptor, decompresses, and applies as Apply does. That
// the result has the DiffID that it should is for the caller to check. A blob
// that is not what the descriptor says is DataLoss.
func ApplyBlob(ctx context.Context, root string, r io.Reader, desc ocispec.Descriptor, o ApplyOptions) (Applied, error) {
	v, err := Verify(r, desc.Digest, desc.Size)
	if err != nil {
		return Applied{}, err
	}
	d, err := Decompress(v, desc.MediaType)
	if err != nil {
		return Applied{}, v.blame(err)
	}
	out, err := Apply(ctx, root, d, o)
	if err = errors.Join(err, d.Close()); err != nil {
		return Applied{}, v.blame(err)
	}
	return out, v.Finish()
}

// blame says that the blob is not what it should be, if that is so, instead of
// what followed from it.
func (v *Verifier) blame(err error) error {
	if errdefs.IsInvalidArgument(err) {
		_ = v.Finish() // what it finds is in v.err
	}
	if errdefs.IsDataLoss(v.err) {
		return v.err
	}
	return err
}

// Blob describes a layer blob that WriteBlob wrote.
type Blob struct {
	Written
	// Descriptor has media type, digest and size of the blob.
	Descriptor ocispec.Descriptor
}

// WriteBlob writes the layer of src to w as Write does, compressed.
func WriteBlob(ctx context.Context, w io.Writer, src Source, c Compression, o WriteOptions) (Blob, error) {
	if err := c.check(); err != nil {
		return Blob{}, err
	}
	m := &meter{w: w, sum: digest.SHA256.Hash()}
	z, err := Compress(m, c)
	if err != nil {
		return Blob{}, err
	}
	out, err := Write(ctx, z, src, o)
	if err = errors.Join(err, z.Close()); err != nil {
		return Blob{}, err
	}
	return Blob{Written: out, Descriptor: ocispec.Descriptor{
		MediaType: c.Algorithm.MediaType(),
		Digest:    digest.NewDigest(digest.SHA256, m.sum),
		Size:      m.size,
	}}, nil
}

// meter hashes and counts what is written.
type meter struct {
	w    io.Writer
	sum  hash.Hash
	size int64
}

func (m *meter) Write(p []byte) (int, error) {
	n, err := m.w.Write(p)
	m.sum.Write(p[:n])
	m.size += int64(n)
	return n, err
}

package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/lamina-build/lamina/layer"
)

// annotationDiffID is where a layer's descriptor has its DiffID, as containerd
// writes it.
const annotationDiffID = "containerd.io/uncompressed"

// Select says which image of an archive is meant, and how much is taken from
// the archive to find it.
type Select struct {
	// Ref is the name or tag of the image, or the digest of its manifest in an
	// OCI layout; empty if there is but one.
	Ref string
	// Platform is as containerd writes it ("linux/arm64"); empty is that of
	// this machine, or the only one that there is.
	Platform string
	// Limits bound an archive in a file or from standard input: Bytes its length
	// and that of what it unpacks to, Entries its files, of which an image has
	// never more than 1<<18. Nothing is copied of directories. The zero value has
	// the defaults of layers.
	Limits layer.Limits
	// maxEntries is fewer than the constant, in tests.
	maxEntries int64
}

// SelectError says that a Select names no image, or several. It is errdefs'
// InvalidArgument.
type SelectError struct {
	// What is wrong, with what was asked for.
	What string
	// By is what could choose, "ref" or "platform"; Choices are what it could
	// say, empty if there is nothing.
	By      string
	Choices []string
}

// Error lists some of the choices.
func (e *SelectError) Error() string {
	const most = 10
	switch n := len(e.Choices); {
	case n == 0:
		return e.What
	case n > most:
		return fmt.Sprintf("%s; there are %s and %d more", e.What, strings.Join(e.Choices[:most], ", "), n-most)
	case n == 1:
		return e.What + "; there is " + e.Choices[0]
	default:
		return e.What + "; there are " + strings.Join(e.Choices, ", ")
	}
}

// Unwrap gives the class of the error.
func (e *SelectError) Unwrap() error { return errdefs.ErrInvalidArgument }

// Image is an image in an archive. Close it when done.
type Image struct {
	// Name is what the archive calls it, empty for a layer without a name.
	Name string
	// Layers are its layers, bottom first. Each has its DiffID in the
	// annotation containerd.io/uncompressed.
	Layers []ocispec.Descriptor

	from  files
	names map[digest.Digest]string
}

// Close closes the archive.
func (i *Image) Close() error { return i.from.close() }

// ReaderAt reads a layer's blob; it is a content.Provider. NotFound for a
// layer that the archive names and does not have.
func (i *Image) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	name, ok := i.names[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("blob %s is not in the archive: %w", desc.Digest, errdefs.ErrNotFound)
	}
	f, err := i.from.open(name)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return f, err
}

// Open opens the image in the directory or file name: an OCI layout or a tar of
// one, a docker archive, or a layer tar. "-" is standard input. Archives may be
// compressed with gzip or zstd. What cannot be sought in is copied to a
// temporary file first.
//
// Errors: InvalidArgument for what is none of these; a *SelectError for a Select
// that means none or several of the images that are there, as any name or
// platform does for a plain layer; NotFound for documents that are missing;
// ResourceExhausted for an archive beyond the limits, of which no more is copied.
func Open(ctx context.Context, name string, s Select) (*Image, error) {
	var img *Image
	_, err := s.matcher()
	if err == nil {
		img, err = open(ctx, name, s)
	}
	if err != nil {
		return nil, fmt.Errorf("open image %s: %w", name, err)
	}
	return img, nil
}

func open(ctx context.Context, name string, s Select) (_ *Image, err error) {
	in := os.Stdin
	if name != "-" {
		st, err := os.Stat(name)
		if err != nil {
			return nil, err
		}
		if st.IsDir() {
			dir, err := openDir(name)
			if err != nil {
				return nil, err
			}
			return closing(dir, func() (*Image, error) { return layout(dir, s) })
		}
		if in, err = os.Open(name); err != nil {
			return nil, err
		}
	}
	f, err := seekable(ctx, in, s.Limits)
	if err != nil {
		return nil, errors.Join(err, closeInput(in))
	}
	img, err := openFile(ctx, f, filepath.Base(name), s)
	if err != nil {
		err = errors.Join(err, f.Close())
	}
	return img, err
}

func closeInput(in *os.File) error {
	if in == os.Stdin {
		return nil
	}
	return in.Close()
}

// closing closes from if the image in it cannot be opened.
func closing(from files, open func() (*Image, error)) (*Image, error) {
	img, err := open()
	if err != nil {
		return nil, errors.Join(err, from.close())
	}
	return img, nil
}

// openFile finds out what f is.
func openFile(ctx context.Context, f *os.File, name string, s Select) (*Image, error) {
	plain, diffID, err := decompressed(ctx, f, s.Limits)
	if err != nil {
		return nil, err
	}
	t, err := scanTar(ctx, plain, s)
	if err != nil {
		if plain != f {
			err = errors.Join(err, plain.Close())
		}
		return nil, err
	}
	var img *Image
	switch {
	case t.has(ociLayout) && t.has(ociIndex):
		if err = t.whole(); err == nil {
			img, err = layout(t, s)
		}
	case t.has(dockerIndex) && isDocker(t):
		if err = t.whole(); err == nil {
			img, err = docker(ctx, t, s)
		}
	case s.Ref != "":
		err = &SelectError{What: fmt.Sprintf("a plain layer is not called %q: it has no name", s.Ref), By: "ref"}
	case s.Platform != "":
		err = &SelectError{What: fmt.Sprintf("a plain layer is not known to be for platform %q: it has none", s.Platform), By: "platform"}
	default:
		img, err = single(ctx, f, diffID)
		if plain != f {
			err = errors.Join(err, plain.Close())
		}
		return img, err
	}
	switch {
	case plain == f:
		return img, err
	case err != nil:
		return nil, errors.Join(err, plain.Close())
	}
	return img, f.Close()
}

// single is the image that is but one layer.
func single(ctx context.Context, f *os.File, diffID digest.Digest) (*Image, error) {
	sum, size, err := digestOf(ctx, io.NewSectionReader(f, 0, 1<<62))
	if err != nil {
		return nil, err
	}
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: sum, Size: size}
	if diffID == "" {
		diffID = sum
	} else if desc.MediaType, err = mediaType(f); err != nil {
		return nil, err
	}
	desc.Annotations = map[string]string{annotationDiffID: string(diffID)}
	return &Image{
		Layers: []ocispec.Descriptor{desc}, from: oneFile{f, size}, names: map[digest.Digest]string{sum: "layer"},
	}, nil
}

// oneFile is a file that is all there is.
type oneFile struct {
	f    *os.File
	size int64
}

func (o oneFile) open(string) (file, error) {
	return section{io.NewSectionReader(o.f, 0, o.size)}, nil
}
func (o oneFile) close() error { return o.f.Close() }

// digestOf reads r to its end.
func digestOf(ctx context.Context, r io.Reader) (digest.Digest, int64, error) {
	sum := digest.SHA256.Digester()
	n, err := io.Copy(sum.Hash(), &alive{ctx, r})
	return sum.Digest(), n, err
}

// alive is a reader that fails when its context has ended.
type alive struct {
	ctx context.Context //nolint:containedctx // of the one call that reads
	r   io.Reader
}

func (a *alive) Read(p []byte) (int, error) {
	if a.ctx.Err() != nil {
		return 0, context.Cause(a.ctx)
	}
	return a.r.Read(p)
}

// temporary makes a file that nobody else sees and that goes when it is closed.
func temporary() (*os.File, error) {
	f, err := os.CreateTemp("", "lamina-image-")
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

// seekable is f itself, or a copy of what it gives.
func seekable(ctx context.Context, f *os.File, limits layer.Limits) (*os.File, error) {
	st, err := f.Stat()
	if err != nil {
		return f, err
	}
	if st.Mode().IsRegular() {
		return f, limits.CheckLength(st.Size())
	}
	t, err := temporary()
	if err != nil {
		return nil, err
	}
	if _, err := limits.Copy(t, &alive{ctx, f}); err != nil {
		return nil, errors.Join(fmt.Errorf("copy the archive to a temporary file: %w", err), t.Close())
	}
	return t, closeInput(f)
}

// magics are the first bytes of compressed files.
var magics = []struct{ magic, mediaType string }{
	{"\x1f\x8b", ocispec.MediaTypeImageLayerGzip},
	{"\x28\xb5\x2f\xfd", ocispec.MediaTypeImageLayerZstd},
	{"\x50\x2a\x4d\x18", ocispec.MediaTypeImageLayerZstd}, // a skippable frame
}

// mediaType is that of a layer with the first bytes of f.
func mediaType(f io.ReaderAt) (string, error) {
	var head [4]byte
	switch n, err := f.ReadAt(head[:], 0); {
	case err != nil && !errors.Is(err, io.EOF):
		return "", err
	case n == 0:
		return "", fmt.Errorf("it is empty: %w", errdefs.ErrInvalidArgument)
	case n < len(head):
		return "", fmt.Errorf("it has only %d bytes: %w", n, errdefs.ErrInvalidArgument)
	}
	for _, m := range magics {
		if string(head[:len(m.magic)]) == m.magic {
			return m.mediaType, nil
		}
	}
	return ocispec.MediaTypeImageLayer, nil
}

// decompressed is what is in f, and the digest of that if f is compressed, else
// f itself.
func decompressed(ctx context.Context, f *os.File, limits layer.Limits) (*os.File, digest.Digest, error) {
	kind, err := mediaType(f)
	if err != nil || kind == ocispec.MediaTypeImageLayer {
		return f, "", err
	}
	r, err := layer.Decompress(&alive{ctx, io.NewSectionReader(f, 0, 1<<62)}, kind)
	if err != nil {
		return nil, "", err
	}
	t, err := temporary()
	if err != nil {
		return nil, "", errors.Join(err, r.Close())
	}
	sum := digest.SHA256.Digester()
	_, err = limits.Copy(io.MultiWriter(t, sum.Hash()), r)
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, "", errors.Join(fmt.Errorf("decompress the archive: %w", err), t.Close())
	}
	return t, sum.Digest(), nil
}

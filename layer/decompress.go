package layer

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's names of layers, which registries still serve.
const (
	dockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
	dockerForeignLayer = "application/vnd.docker.image.rootfs.foreign.diff.tar"
)

// CompressionOf says how a layer of a media type is compressed: those of OCI,
// also the non-distributable ones, and Docker's. Any other is NotImplemented.
func CompressionOf(mediaType string) (Algorithm, error) {
	base, suffix, _ := strings.Cut(mediaType, "+")
	// Docker separates by a point, and some registries mixed the two.
	for _, s := range []string{"gzip", "zstd"} {
		if rest, ok := strings.CutSuffix(base, "."+s); ok && suffix == "" {
			base, suffix = rest, s
		}
	}
	switch base {
	case ocispec.MediaTypeImageLayer, dockerLayer, dockerForeignLayer,
		"application/vnd.oci.image.layer.nondistributable.v1.tar":
		switch suffix {
		case "":
			return None, nil
		case "gzip":
			return Gzip, nil
		case "zstd":
			return Zstd, nil
		}
	}
	return None, fmt.Errorf("media type %q is none of a layer: %w", mediaType, errdefs.ErrNotImplemented)
}

// maxWindow bounds the memory that a zstd frame may ask for, in bytes. It is
// what the zstd command accepts without being told otherwise.
const maxWindow = 128 << 20

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// Decompress returns the tar of a layer blob: of gzip with all its members (as
// eStargz has them), of zstd with all its frames, skippable ones left out (as
// zstd:chunked has them), or the blob itself. The media type says which. Where
// the first bytes contradict it they count: there are registries full of
// layers with the wrong media type.
//
// Closing the result does not close r. It has not read r to the end when it is
// at its own; see Verify. Damaged data is InvalidArgument; a media type that is
// none of a layer is NotImplemented.
func Decompress(r io.Reader, mediaType string) (io.ReadCloser, error) {
	declared, err := CompressionOf(mediaType)
	if err != nil {
		return nil, err
	}
	src := &source{r: r}
	b := bufio.NewReaderSize(src, 64<<10)
	algorithm, err := sniff(b, declared)
	if err != nil {
		return nil, err
	}
	switch algorithm {
	case Gzip:
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, src.blame(algorithm, err)
		}
		return &decompressor{r: z, close: z.Close, src: src, algorithm: algorithm}, nil
	case Zstd:
		// One goroutine: Apply has one for all that happens in a Read.
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, src.blame(algorithm, err)
		}
		return &decompressor{r: z, close: func() error { z.Close(); return nil }, src: src, algorithm: algorithm}, nil
	default:
		held, _ := r.(*Verifier)
		return &verbatim{b, held}, nil
	}
}

// verbatim is a blob that is not compressed.
type verbatim struct {
	*bufio.Reader
	held *Verifier // what it reads, nil for any other reader
}

// diffID is the DiffID of what is still to be read, if that is the digest that
// the blob is held against anyway: at the end of the reading it is right. Else
// it is empty.
func (v *verbatim) diffID() digest.Digest {
	if h := v.held; h != nil && h.want.Algorithm() == digest.SHA256 && h.read == int64(v.Buffered()) {
		return h.want
	}
	return ""
}

func (v *verbatim) Close() error { return nil }

// sniff looks at the first bytes.
func sniff(b *bufio.Reader, declared Algorithm) (Algorithm, error) {
	head, err := b.Peek(512)
	if err != nil && err != io.EOF {
		return None, err
	}
	found := None
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		found = Gzip
	case bytes.HasPrefix(head, zstdMagic), isSkippable(head):
		found = Zstd
	}
	// The first name in a tar may be anything.
	if declared == None && found != None && isTarHeader(head) {
		return None, nil
	}
	return found, nil
}

// isSkippable says that a skippable frame of zstd begins here (RFC 8878,
// section 3.1.2).
func isSkippable(head []byte) bool {
	return len(head) >= 4 && head[0]&0xf0 == 0x50 && head[1] == 0x2a && head[2] == 0x4d && head[3] == 0x18
}

// isTarHeader checks the checksum of a tar header.
func isTarHeader(block []byte) bool {
	if len(block) < 512 {
		return false
	}
	sum, want := int64(0), int64(0)
	for i, c := range block {
		if i >= 148 && i < 156 {
			c = ' ' // the sum itself
		}
		sum += int64(c)
	}
	for _, c := range bytes.Trim(block[148:156], " \x00") {
		if c < '0' || c > '7' {
			return false
		}
		want = want<<3 | int64(c-'0')
	}
	return sum == want
}

// source remembers how the reader below a decompressor failed, since
// decompressors report that in words of their own.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// blame returns the reader's own error, or else says that the data is damaged.
func (s *source) blame(a Algorithm, err error) error {
	if s.err != nil {
		return s.err
	}
	return fmt.Errorf("decompress %s: %w: %w", a, err, errdefs.ErrInvalidArgument)
}

type decompressor struct {
	r         io.Reader
	close     func() error
	src       *source
	algorithm Algorithm
}

func (d *decompressor) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // the end is io.EOF itself
		err = d.src.blame(d.algorithm, err)
	}
	return n, err
}

func (d *decompressor) Close() error { return d.close() }

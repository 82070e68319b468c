package layer

import (
	"fmt"
	"io"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Algorithm is how a blob is compressed.
type Algorithm int

// The algorithms of the OCI image spec.
const (
	None Algorithm = iota
	Gzip
	Zstd
)

func (a Algorithm) String() string {
	switch a {
	case None:
		return "none"
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("algorithm %d", int(a))
}

// ParseAlgorithm is the reverse of String; anything else is InvalidArgument.
func ParseAlgorithm(name string) (Algorithm, error) {
	for _, a := range []Algorithm{None, Gzip, Zstd} {
		if name == a.String() {
			return a, nil
		}
	}
	return None, invalid("compression %q: none, gzip and zstd are known", name)
}

// MediaType is OCI's media type of a layer that is compressed in this way.
func (a Algorithm) MediaType() string {
	switch a {
	case Gzip:
		return ocispec.MediaTypeImageLayerGzip
	case Zstd:
		return ocispec.MediaTypeImageLayerZstd
	}
	return ocispec.MediaTypeImageLayer
}

// Compression is an algorithm and how hard it tries.
type Compression struct {
	Algorithm Algorithm
	// Level is 1 to 9 for gzip, 1 to 22 for zstd, where levels are folded into
	// four steps; 0 is the algorithm's default.
	Level int
}

// check says whether there is such a level.
func (c Compression) check() error {
	highest, known := map[Algorithm]int{None: 0, Gzip: 9, Zstd: 22}[c.Algorithm]
	if !known {
		return invalid("compression %s is not known", c.Algorithm)
	}
	if c.Level < 0 || c.Level > highest {
		return invalid("%s has no level %d", c.Algorithm, c.Level)
	}
	return nil
}

// Compress returns a writer that writes what it is given to w, compressed. The
// same input gives the same bytes with one version of this program, in
// whatever pieces it comes. Close ends the blob; it does not close w. A level
// that the algorithm does not have is InvalidArgument.
func Compress(w io.Writer, c Compression) (io.WriteCloser, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	switch c.Algorithm {
	case Gzip:
		level := c.Level
		if level == 0 {
			level = flate.DefaultCompression
		}
		return gzip.NewWriterLevel(w, level)
	case Zstd:
		level := zstd.SpeedDefault
		if c.Level != 0 {
			level = zstd.EncoderLevelFromZstd(c.Level)
		}
		return zstd.NewWriter(w, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1))
	}
	return nopWriteCloser{w}, nil
}

type nopWriteCloser struct{ io.Writer }

func (nopWriteCloser) Close() error { return nil }

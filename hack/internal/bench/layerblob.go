package bench

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"time"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// uncompressed is the annotation of a layer's descriptor that says what the
// layer is before compression.
const uncompressed = "containerd.io/uncompressed"

// layerBlob describes the blob at path, of the layer that is the i-th of its
// image and has n files, and writes it if it is not there.
func layerBlob(path string, n, i int, compress bool) (b LayerBlob, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		if f, err = os.Open(path); err != nil {
			return b, err
		}
		defer f.Close()
		return describe(f, compress)
	}
	if err != nil {
		return b, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := io.WriteCloser(f)
	if compress {
		w = gzip.NewWriter(f)
	}
	if err := writeLayer(w, n, i); err != nil {
		return b, err
	}
	if compress {
		if err := w.Close(); err != nil {
			return b, err
		}
	}
	return describe(f, compress)
}

// describe reads a blob to describe it.
func describe(f *os.File, compressed bool) (LayerBlob, error) {
	b := LayerBlob{Path: f.Name(), Descriptor: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer}}
	of := func(wrap func(io.Reader) (io.Reader, error)) (digest.Digest, int64, error) {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return "", 0, err
		}
		r, err := wrap(f)
		if err != nil {
			return "", 0, err
		}
		sum := digest.SHA256.Digester()
		n, err := io.Copy(sum.Hash(), r)
		return sum.Digest(), n, err
	}
	var err error
	if b.Digest, b.Size, err = of(func(r io.Reader) (io.Reader, error) { return r, nil }); err != nil {
		return b, err
	}
	diffID := b.Digest
	if compressed {
		b.MediaType = ocispec.MediaTypeImageLayerGzip
		diffID, _, err = of(func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) })
	}
	b.Annotations = map[string]string{uncompressed: string(diffID)}
	return b, err
}

// writeLayer writes a layer with n files, in directories of their own.
func writeLayer(w io.Writer, n, layer int) error {
	t := tar.NewWriter(w)
	made := map[string]bool{}
	at := time.Unix(1_600_000_000, 0)
	mkdir := func(dir string) error {
		if made[dir] {
			return nil
		}
		made[dir] = true
		return t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: at})
	}
	for i := range n {
		name := path.Join("layer"+strconv.Itoa(layer), treeFile(i))
		dir := path.Dir(name)
		if err := errors.Join(mkdir(path.Dir(path.Dir(dir))), mkdir(path.Dir(dir)), mkdir(dir)); err != nil {
			return err
		}
		data := treeContent(i)
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: at, Size: int64(len(data))}); err != nil {
			return err
		}
		if _, err := t.Write(data); err != nil {
			return err
		}
	}
	return t.Close()
}

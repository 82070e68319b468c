package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/platforms"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/lamina-build/lamina/layer"
)

// Output is an image to be written.
type Output struct {
	// Layers are its layers, bottom first, each with its DiffID in the
	// annotation containerd.io/uncompressed.
	Layers []ocispec.Descriptor
	// Provider reads their blobs.
	Provider content.Provider
	// Ref is the name that the layout gives the image, "latest" if empty.
	Ref string
	// Platform is what the image says to be for; that of this machine if nil.
	Platform *ocispec.Platform
}

// WriteTar writes the image as a tar of an OCI image layout. The same layers
// give the same bytes.
func WriteTar(ctx context.Context, w io.Writer, o Output) error {
	t := &tarSink{w: tar.NewWriter(w)}
	if err := o.write(ctx, t); err != nil {
		return err
	}
	return t.w.Close()
}

// WriteDir writes the image as an OCI image layout into a directory, which must
// be there and be empty.
func WriteDir(ctx context.Context, dir string, o Output) error {
	return o.write(ctx, dirSink(dir))
}

// sink takes the files of a layout.
type sink interface {
	dir(name string) error
	file(name string, size int64, r io.Reader) error
}

func (o *Output) write(ctx context.Context, s sink) error {
	if o.Ref == "" {
		o.Ref = "latest"
	}
	platform := platforms.DefaultSpec()
	if o.Platform != nil {
		platform = *o.Platform
	}
	config := ocispec.Image{
		Platform: ocispec.Platform{Architecture: platform.Architecture, OS: "linux", Variant: platform.Variant},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}},
	}
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Layers: []ocispec.Descriptor{},
	}
	for _, dir := range []string{"blobs", "blobs/sha256"} {
		if err := s.dir(dir); err != nil {
			return err
		}
	}
	written := map[digest.Digest]bool{}
	for _, l := range o.Layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.Digest(l.Annotations[annotationDiffID]))
		manifest.Layers = append(manifest.Layers, ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size})
		if written[l.Digest] {
			continue
		}
		written[l.Digest] = true
		if err := o.blob(ctx, s, l); err != nil {
			return fmt.Errorf("write layer %s: %w", l.Digest, err)
		}
	}
	var err error
	if manifest.Config, err = writeJSON(s, ocispec.MediaTypeImageConfig, config); err != nil {
		return err
	}
	top, err := writeJSON(s, ocispec.MediaTypeImageManifest, manifest)
	if err != nil {
		return err
	}
	top.Annotations = map[string]string{ocispec.AnnotationRefName: o.Ref}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{top},
	})
	if err != nil {
		return err
	}
	mark, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	if err := s.file("index.json", int64(len(index)), bytes.NewReader(index)); err != nil {
		return err
	}
	// Last, so that a layout that is cut off is none.
	return s.file(ocispec.ImageLayoutFile, int64(len(mark)), bytes.NewReader(mark))
}

// blob copies the blob of a layer, and verifies it on the way.
func (o *Output) blob(ctx context.Context, s sink, l ocispec.Descriptor) (err error) {
	ra, err := o.Provider.ReaderAt(ctx, l)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ra.Close()) }()
	v, err := layer.Verify(&alive{ctx, content.NewReader(ra)}, l.Digest, l.Size)
	if err != nil {
		return err
	}
	if err := s.file(blobName(l.Digest), l.Size, v); err != nil {
		return err
	}
	return v.Finish()
}

func writeJSON(s sink, mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return desc, s.file(blobName(desc.Digest), desc.Size, bytes.NewReader(data))
}

// tarSink writes a tar. All times are the epoch, and nobody owns the files.
type tarSink struct{ w *tar.Writer }

func (t *tarSink) dir(name string) error {
	return t.w.WriteHeader(&tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(0, 0)})
}

func (t *tarSink) file(name string, size int64, r io.Reader) error {
	err := t.w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0)})
	if err != nil {
		return err
	}
	_, err = io.Copy(t.w, r)
	return err
}

// dirSink writes files below a directory.
type dirSink string

func (d dirSink) dir(name string) error { return os.Mkdir(filepath.Join(string(d), name), 0o755) }

func (d dirSink) file(name string, _ int64, r io.Reader) error {
	f, err := os.OpenFile(filepath.Join(string(d), name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

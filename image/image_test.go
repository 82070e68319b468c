package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

// entry is a file of an archive in a test.
type entry struct {
	name, text string
	link       string
}

func tarOf(t testing.TB, entries ...entry) []byte {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(e.text))}
		if e.link != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, e.link, 0
		}
		require.NoError(t, w.WriteHeader(h))
		_, err := w.Write([]byte(e.text))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return buf.Bytes()
}

func zipped(t testing.TB, data []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	_, err := w.Write(data)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return buf.Bytes()
}

// blobs provides layers from memory.
type blobs map[digest.Digest][]byte

func (b blobs) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	data, ok := b[desc.Digest]
	if !ok {
		return nil, errdefs.ErrNotFound
	}
	return memory{bytes.NewReader(data)}, nil
}

type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

// add makes a descriptor of a layer.
func (b blobs) add(data, plain []byte, mediaType string) ocispec.Descriptor {
	desc := ocispec.Descriptor{
		MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data)),
		Annotations: map[string]string{annotationDiffID: digest.FromBytes(plain).String()},
	}
	b[desc.Digest] = data
	return desc
}

// two is an image of two layers.
func two(t testing.TB) Output {
	b := blobs{}
	one, other := tarOf(t, entry{name: "a", text: "1"}), tarOf(t, entry{name: "b", text: "2"})
	return Output{Provider: b, Layers: []ocispec.Descriptor{
		b.add(zipped(t, one), one, ocispec.MediaTypeImageLayerGzip), b.add(other, other, ocispec.MediaTypeImageLayer),
	}}
}

func save(t testing.TB, data []byte) string {
	name := filepath.Join(t.TempDir(), "archive")
	require.NoError(t, os.WriteFile(name, data, 0o600))
	return name
}

// requireLayers compares an image with what it was made of, bytes included.
func requireLayers(t testing.TB, want Output, img *Image) {
	require.Equal(t, want.Layers, img.Layers)
	for _, l := range img.Layers {
		data, err := content.ReadBlob(t.Context(), img, l)
		require.NoError(t, err)
		require.Equal(t, want.Provider.(blobs)[l.Digest], data)
	}
	require.NoError(t, img.Close())
}

func TestLayoutThereAndBack(t *testing.T) {
	want := two(t)
	var buf bytes.Buffer
	require.NoError(t, WriteTar(t.Context(), &buf, want))
	var again bytes.Buffer
	require.NoError(t, WriteTar(t.Context(), &again, want))
	require.Equal(t, buf.Bytes(), again.Bytes(), "the same bytes each time")
	dir := filepath.Join(t.TempDir(), "layout")
	require.NoError(t, os.Mkdir(dir, 0o700))
	require.NoError(t, WriteDir(t.Context(), dir, want))
	for _, name := range []string{save(t, buf.Bytes()), save(t, zipped(t, buf.Bytes())), dir} {
		for _, ref := range []string{"", "latest"} {
			img, err := Open(t.Context(), name, Select{Ref: ref})
			require.NoError(t, err)
			require.Equal(t, "latest", img.Name)
			requireLayers(t, want, img)
		}
		_, err := Open(t.Context(), name, Select{Ref: "other"})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, "latest")
		_, err = Open(t.Context(), name, Select{Platform: "plan9/mips"})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
}

func TestWrongBlobIsNotGivenOut(t *testing.T) {
	o := two(t)
	o.Provider.(blobs)[o.Layers[1].Digest] = bytes.Repeat([]byte{1}, int(o.Layers[1].Size))
	require.ErrorIs(t, WriteTar(t.Context(), io.Discard, o), errdefs.ErrDataLoss)
}

func TestPlainLayers(t *testing.T) {
	plain := tarOf(t, entry{name: "a", text: "1"}, entry{name: "manifest.json", text: `{"a": "web app's"}`})
	for mediaType, data := range map[string][]byte{ocispec.MediaTypeImageLayer: plain, ocispec.MediaTypeImageLayerGzip: zipped(t, plain)} {
		b := blobs{}
		want := Output{Provider: b, Layers: []ocispec.Descriptor{b.add(data, plain, mediaType)}}
		img, err := Open(t.Context(), save(t, data), Select{})
		require.NoError(t, err)
		requireLayers(t, want, img)
	}
}

func TestDockerArchive(t *testing.T) {
	one, other := tarOf(t, entry{name: "a", text: "1"}), tarOf(t, entry{name: "b", text: "2"})
	config, err := json.Marshal(ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{
		digest.FromBytes(one), digest.FromBytes(other), digest.FromBytes(one),
	}}})
	require.NoError(t, err)
	archive := tarOf(t,
		entry{name: "one/layer.tar", text: string(one)},
		entry{name: "two/layer.tar", text: string(zipped(t, other))},
		entry{name: "three/layer.tar", link: "../one/layer.tar"},
		entry{name: "config.json", text: string(config)},
		entry{name: "manifest.json", text: `[{"Config":"config.json","RepoTags":["app:1","app:2"],"Layers":["one/layer.tar","two/layer.tar","three/layer.tar"]}]`},
	)
	b := blobs{}
	want := Output{Provider: b, Layers: []ocispec.Descriptor{
		b.add(one, one, ocispec.MediaTypeImageLayer), b.add(zipped(t, other), other, ocispec.MediaTypeImageLayerGzip), b.add(one, one, ocispec.MediaTypeImageLayer),
	}}
	img, err := Open(t.Context(), save(t, archive), Select{Ref: "app:2"})
	require.NoError(t, err)
	require.Equal(t, "app:1", img.Name)
	requireLayers(t, want, img)
	_, err = Open(t.Context(), save(t, archive), Select{Ref: "app:3"})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// putDocument writes a document into the blobs of a layout.
func putDocument(t *testing.T, dir, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	data, err := json.Marshal(v)
	require.NoError(t, err)
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, blobName(d.Digest)), data, 0o600))
	return d
}

// TestSeveralImages: a name is needed, and a platform chooses.
func TestSeveralImages(t *testing.T) {
	dir := t.TempDir()
	put := func(mediaType string, v any) ocispec.Descriptor { return putDocument(t, dir, mediaType, v) }
	manifest := func(arch string) ocispec.Descriptor {
		layer := digest.FromString(arch)
		config := put(ocispec.MediaTypeImageConfig, ocispec.Image{
			Platform: ocispec.Platform{OS: "linux", Architecture: arch}, RootFS: ocispec.RootFS{DiffIDs: []digest.Digest{layer}},
		})
		return put(ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: config, Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: layer, Size: 5}}})
	}
	named := func(d ocispec.Descriptor, name string) ocispec.Descriptor {
		d.Annotations = map[string]string{ocispec.AnnotationRefName: name}
		return d
	}
	list := put(ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: []ocispec.Descriptor{manifest("amd64"), manifest("arm64")}})
	index, err := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{named(list, "many"), named(manifest("riscv64"), "one")}})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "index.json"), index, 0o600))

	_, err = Open(t.Context(), dir, Select{})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "many, one")
	for _, c := range []struct {
		s    Select
		arch string
	}{{Select{Ref: "many", Platform: "linux/arm64"}, "arm64"}, {Select{Ref: "many", Platform: "linux/amd64"}, "amd64"}, {Select{Ref: "one"}, "riscv64"}} {
		img, err := Open(t.Context(), dir, c.s)
		require.NoError(t, err)
		require.Equal(t, digest.FromString(c.arch), img.Layers[0].Digest)
		_, err = img.ReaderAt(t.Context(), img.Layers[0])
		require.ErrorIs(t, err, errdefs.ErrNotFound, "a layer that the layout does not have")
		require.NoError(t, img.Close())
	}
}

func TestWhatIsNoImage(t *testing.T) {
	evil := tarOf(t, entry{name: "oci-layout"}, entry{name: "index.json", text: `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:../../../../etc/passwd"}]}`})
	huge := tarOf(t, entry{name: "oci-layout"}, entry{name: "index.json", text: string(make([]byte, 17<<20))})
	for name, data := range map[string][]byte{
		"text": []byte("no archive at all, but long enough to be looked at"), "nothing": nil, "cut off": tarOf(t, entry{name: "a", text: "1"})[:300],
		"a digest that leads out": evil, "a document without end": huge, "gzip of text": zipped(t, []byte("no archive")),
		"cut gzip": zipped(t, tarOf(t, entry{name: "a", text: "1"}))[:30],
	} {
		_, err := Open(t.Context(), save(t, data), Select{})
		require.Error(t, err, name)
		require.True(t, errdefs.IsInvalidArgument(err) || errdefs.IsResourceExhausted(err), "%s: %v", name, err)
	}
	_, err := Open(t.Context(), filepath.Join(t.TempDir(), "nobody"), Select{})
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = Open(t.Context(), t.TempDir(), Select{})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

// TestLinksDoNotLeadOut: a blob of a directory that is a link elsewhere is
// refused.
func TestLinksDoNotLeadOut(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(dir, "index.json")))
	_, err := Open(t.Context(), dir, Select{})
	require.Error(t, err)
	require.NotContains(t, err.Error(), "root")
}

// TestChoiceOfAnImage: where a Select leaves several images, or none, the error
// says which there are.
func TestChoiceOfAnImage(t *testing.T) {
	dir := t.TempDir()
	put := func(mediaType string, v any) ocispec.Descriptor { return putDocument(t, dir, mediaType, v) }
	manifest := func(arch, text string) ocispec.Descriptor {
		layer := digest.FromString(text)
		config := put(ocispec.MediaTypeImageConfig, ocispec.Image{
			Platform: ocispec.Platform{OS: "linux", Architecture: arch}, RootFS: ocispec.RootFS{DiffIDs: []digest.Digest{layer}},
		})
		return put(ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: config, Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: layer, Size: 5}}})
	}
	index := func(list ...ocispec.Descriptor) {
		data, err := json.Marshal(ocispec.Index{Manifests: list})
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "index.json"), data, 0o600))
	}
	refused := func(s Select, by string, choices ...string) {
		t.Helper()
		_, err := Open(t.Context(), dir, s)
		var e *SelectError
		require.ErrorAs(t, err, &e)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.Equal(t, by, e.By)
		require.ElementsMatch(t, choices, e.Choices)
		for _, c := range choices {
			require.ErrorContains(t, err, c)
		}
	}
	opens := func(s Select, text string) {
		t.Helper()
		img, err := Open(t.Context(), dir, s)
		require.NoError(t, err)
		require.Equal(t, digest.FromString(text), img.Layers[0].Digest)
		require.NoError(t, img.Close())
	}
	one, two, arm := manifest("riscv64", "one"), manifest("riscv64", "two"), manifest("arm64", "arm")
	riscv := Select{Platform: "linux/riscv64"}

	index(one, two, arm)
	refused(riscv, "ref", one.Digest.String(), two.Digest.String())
	refused(Select{Platform: "linux/s390x"}, "platform", "linux/riscv64", "linux/arm64")
	refused(Select{Ref: "nobody"}, "ref", one.Digest.String(), two.Digest.String(), arm.Digest.String())
	opens(Select{Platform: "linux/arm64"}, "arm")
	opens(Select{Ref: two.Digest.String()}, "two")
	opens(Select{Ref: two.Digest.String(), Platform: "linux/riscv64"}, "two")
	refused(Select{Ref: two.Digest.String(), Platform: "linux/arm64"}, "platform", "linux/riscv64")

	index(one, one)
	opens(riscv, "one")
	index(put(ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: []ocispec.Descriptor{one, two}}))
	refused(riscv, "ref", one.Digest.String(), two.Digest.String())
	opens(Select{Ref: one.Digest.String()}, "one")
	index()
	refused(Select{}, "ref")
}

// TestPlatformIsLookedAt, whatever it is that is opened.
func TestPlatformIsLookedAt(t *testing.T) {
	layer := tarOf(t, entry{name: "a", text: "1"})
	config, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "arm64"},
		RootFS:   ocispec.RootFS{DiffIDs: []digest.Digest{digest.FromBytes(layer)}},
	})
	require.NoError(t, err)
	docker := tarOf(t,
		entry{name: "layer.tar", text: string(layer)}, entry{name: "config.json", text: string(config)},
		entry{name: "manifest.json", text: `[{"Config":"config.json","Layers":["layer.tar"]},{"Config":"other.json","Layers":["layer.tar"]}]`},
	)
	var oci bytes.Buffer
	require.NoError(t, WriteTar(t.Context(), &oci, two(t)))
	for _, name := range []string{save(t, layer), save(t, zipped(t, layer)), save(t, docker), save(t, oci.Bytes())} {
		for _, s := range []Select{{Platform: "linux/"}, {Platform: "a b"}, {Platform: "linux/s390x"}, {Ref: "nobody", Platform: "linux/arm64"}} {
			_, err := Open(t.Context(), name, s)
			var e *SelectError
			require.ErrorAs(t, err, &e, "%+v", s)
			require.Equal(t, 1, strings.Count(err.Error(), "open image"), "%v", err)
			require.NotContains(t, err.Error(), "invalid argument", "it says what is wrong itself")
		}
	}
	img, err := Open(t.Context(), save(t, docker), Select{Ref: "config.json", Platform: "linux/arm64"})
	require.NoError(t, err)
	require.NoError(t, img.Close())
	_, err = Open(t.Context(), save(t, docker), Select{Ref: "config.json", Platform: "linux/amd64"})
	require.ErrorContains(t, err, "linux/arm64")
	_, err = Open(t.Context(), save(t, docker), Select{})
	require.ErrorContains(t, err, "config.json, other.json")
}

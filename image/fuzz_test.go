package image

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

// secret lies beside what is opened, where no name may lead.
const secret = "a secret of somebody else"

// tryImage opens what a stranger wrote: it must be refused with a class, or be
// an image whose layers can be read, or are missing, and are never the secret.
func tryImage(t *testing.T, name string) {
	for _, s := range []Select{{}, {Ref: "latest"}, {Platform: "linux/arm64"}} {
		img, err := Open(context.Background(), name, s)
		if err != nil {
			require.True(t, errdefs.IsInvalidArgument(err) || errdefs.IsNotFound(err) || errdefs.IsDataLoss(err) ||
				errdefs.IsResourceExhausted(err), "no class: %v", err)
			continue
		}
		for _, l := range img.Layers {
			ra, err := img.ReaderAt(context.Background(), l)
			if err != nil {
				continue
			}
			data := make([]byte, min(ra.Size(), 1<<16))
			if n, err := ra.ReadAt(data, 0); n < len(data) {
				require.NoError(t, err)
			}
			require.NotContains(t, string(data), secret)
			require.NoError(t, ra.Close())
		}
		require.NoError(t, img.Close())
	}
}

// FuzzArchive opens any bytes.
func FuzzArchive(f *testing.F) {
	var oci strings.Builder
	require.NoError(f, WriteTar(f.Context(), &oci, two(f)))
	layer := tarOf(f, entry{name: "a", text: "1"})
	f.Add([]byte(oci.String()))
	f.Add(layer)
	f.Add(zipped(f, layer))
	f.Add(tarOf(f, entry{name: "manifest.json", text: `[{"Config":"c","Layers":["l"]}]`}, entry{name: "c", text: `{"rootfs":{"diff_ids":["x"]}}`}, entry{name: "l", link: "manifest.json"}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) { tryImage(t, save(t, data)) })
}

// FuzzLayout puts documents together to an OCI image layout, as a directory and
// as a tar, and to a docker archive. In the documents $C and $M stand for the
// digests of the config and the manifest, so that they can be changed and are
// found nevertheless.
func FuzzLayout(f *testing.F) {
	const (
		index    = `{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"$M","size":3,"annotations":{"org.opencontainers.image.ref.name":"latest"}}]}`
		manifest = `{"config":{"digest":"$C"},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0}]}`
		config   = `{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]}}`
	)
	f.Add(index, manifest, config, "blobs/x")
	f.Add(strings.Replace(index, "image.manifest", "image.index", 1), index, config, "..")
	f.Add(`[{"Config":"config","RepoTags":["latest"],"Layers":["l"]}]`, "text", config, "../secret")
	f.Add(`[{"Config":"config","Layers":["../secret"]}]`, "", config, "/etc/passwd")
	f.Add(index, strings.Replace(manifest, "sha256:e3b0", "sha256:../../secret", 1), config, "l")
	f.Fuzz(func(t *testing.T, index, manifest, config, link string) {
		if strings.ContainsRune(link, 0) || len(link) > 200 {
			return // neither a symbolic link nor a tar can say it
		}
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dir, "secret"), []byte(secret), 0o600))
		blob := func(text string) string { return "blobs/sha256/" + digest.FromString(text).Encoded() }
		manifest = strings.ReplaceAll(manifest, "$C", digest.FromString(config).String())
		index = strings.ReplaceAll(strings.ReplaceAll(index, "$M", digest.FromString(manifest).String()), "$C", digest.FromString(config).String())
		documents := []entry{
			{name: "oci-layout", text: `{"imageLayoutVersion":"1.0.0"}`},
			{name: "index.json", text: index},
			{name: blob(manifest), text: manifest},
			{name: blob(config), text: config},
			{name: blob(""), text: ""},
		}

		layout := filepath.Join(dir, "layout")
		require.NoError(t, os.MkdirAll(filepath.Join(layout, "blobs", "sha256"), 0o700))
		for _, e := range documents {
			require.NoError(t, os.WriteFile(filepath.Join(layout, e.name), []byte(e.text), 0o600))
		}
		if link != "" {
			// The blob of nothing is a link to anywhere.
			require.NoError(t, os.Remove(filepath.Join(layout, blob(""))))
			require.NoError(t, os.Symlink(link, filepath.Join(layout, blob(""))))
			documents = append(documents, entry{name: "l", link: link})
		}
		tryImage(t, layout)
		tryImage(t, save(t, tarOf(t, documents...)))
		tryImage(t, save(t, tarOf(t, entry{name: "manifest.json", text: index}, entry{name: "config", text: config}, entry{name: "l", link: link})))
	})
}

// An index that names indexes many times over is refused before it has been
// multiplied out.
func TestIndexesThatMultiply(t *testing.T) {
	blobs := map[string]string{}
	text := `{"manifests":[]}`
	for range 4 {
		d := digest.FromString(text)
		blobs[blobName(d)] = text
		one := `{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"` + d.String() + `","size":1}`
		text = `{"manifests":[` + strings.Repeat(one+",", 300) + one + `]}`
	}
	entries := []entry{{name: "oci-layout", text: "{}"}, {name: "index.json", text: text}}
	for name, text := range blobs {
		entries = append(entries, entry{name: name, text: text})
	}
	_, err := Open(t.Context(), save(t, tarOf(t, entries...)), Select{})
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
}

var _ content.Provider = (*Image)(nil)

package layer_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/layer"
)

func compress(t tb, c layer.Compression, parts ...[]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := layer.Compress(&b, c)
	require.NoError(t, err)
	for _, p := range parts {
		_, err = z.Write(p)
		require.NoError(t, err)
	}
	require.NoError(t, z.Close())
	return b.Bytes()
}

func decompress(t tb, blob []byte, mediaType string) []byte {
	t.Helper()
	r, err := layer.Decompress(iotest.OneByteReader(bytes.NewReader(blob)), mediaType)
	require.NoError(t, err)
	out, err := io.ReadAll(r)
	require.NoError(t, err)
	require.NoError(t, r.Close())
	return out
}

var skippable = []byte("\x52\x2a\x4d\x18\x03\x00\x00\x00abc")

func TestCompressionThereAndBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := layer.Compression{Algorithm: rapid.SampledFrom([]layer.Algorithm{layer.None, layer.Gzip, layer.Zstd}).Draw(t, "algorithm")}
		switch c.Algorithm {
		case layer.Gzip:
			c.Level = rapid.IntRange(0, 9).Draw(t, "level")
		case layer.Zstd:
			c.Level = rapid.IntRange(0, 22).Draw(t, "level")
		case layer.None:
		}
		text := bytes.Repeat([]byte(rapid.StringN(1, 20, -1).Draw(t, "text")), rapid.IntRange(1, 30_000).Draw(t, "times"))
		blob := compress(t, c, text)
		cut := rapid.IntRange(0, len(text)).Draw(t, "cut")
		require.True(t, bytes.Equal(blob, compress(t, c, text[:cut], text[cut:])), "the pieces that it was written in show")
		require.True(t, bytes.Equal(text, decompress(t, blob, c.Algorithm.MediaType())))
		a, err := layer.ParseAlgorithm(c.Algorithm.String())
		require.NoError(t, err)
		require.Equal(t, c.Algorithm, a)
	})
}

func TestDecompress(t *testing.T) {
	tarball := pack(t, file("f", "x"))
	var b bytes.Buffer
	require.NoError(t, tar.NewWriter(&b).WriteHeader(&tar.Header{Format: tar.FormatGNU, Name: "\x1f\x8b\x08f"}))
	odd := b.Bytes()
	require.True(t, bytes.HasPrefix(odd, []byte("\x1f\x8b")))
	gz, zst := compress(t, layer.Compression{Algorithm: layer.Gzip}, tarball), compress(t, layer.Compression{Algorithm: layer.Zstd}, tarball)
	half := len(tarball) / 2
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	const docker = "application/vnd.docker.image.rootfs.diff.tar"
	for name, tt := range map[string]struct {
		blob      []byte
		mediaType string
		want      []byte
	}{
		"tar":                    {tarball, ocispec.MediaTypeImageLayer, tarball},
		"docker's gzip":          {gz, docker + ".gzip", tarball},
		"docker's zstd":          {zst, docker + ".zstd", tarball},
		"docker's foreign gzip":  {gz, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", tarball},
		"mixed":                  {gz, docker + "+gzip", tarball},
		"non-distributable":      {gz, "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", tarball},
		"members, as eStargz":    {join(compress(t, layer.Compression{Algorithm: layer.Gzip, Level: 1}, tarball[:half]), compress(t, layer.Compression{Algorithm: layer.Gzip}, tarball[half:])), ocispec.MediaTypeImageLayerGzip, tarball},
		"frames, as chunked":     {join(skippable, compress(t, layer.Compression{Algorithm: layer.Zstd}, tarball[:half]), skippable, compress(t, layer.Compression{Algorithm: layer.Zstd}, tarball[half:]), skippable), ocispec.MediaTypeImageLayerZstd, tarball},
		"gzip that is none":      {tarball, ocispec.MediaTypeImageLayerGzip, tarball},
		"zstd that is gzip":      {gz, ocispec.MediaTypeImageLayerZstd, tarball},
		"tar that is zstd":       {zst, ocispec.MediaTypeImageLayer, tarball},
		"tar that looks as gzip": {odd, ocispec.MediaTypeImageLayer, odd},
		"empty":                  {nil, ocispec.MediaTypeImageLayer, []byte{}},
	} {
		t.Run(name, func(t *testing.T) { require.Equal(t, tt.want, decompress(t, tt.blob, tt.mediaType)) })
	}
	for _, mediaType := range []string{"", "text/plain", ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayer + "+lz4", docker + ".gzip.gzip"} {
		_, err := layer.Decompress(bytes.NewReader(gz), mediaType)
		require.True(t, errdefs.IsNotImplemented(err), "%q: %v", mediaType, err)
	}
}

func TestDamagedCompression(t *testing.T) {
	tarball := pack(t, file("f", strings.Repeat("some text ", 10_000)))
	broken := errors.New("broken")
	for _, a := range []layer.Algorithm{layer.Gzip, layer.Zstd} {
		blob := compress(t, layer.Compression{Algorithm: a}, tarball)
		read := func(r io.Reader) error {
			d, err := layer.Decompress(r, a.MediaType())
			if err != nil {
				return err
			}
			_, err = io.Copy(io.Discard, d)
			return errors.Join(err, d.Close())
		}
		for _, n := range []int{5, len(blob) / 2, len(blob) - 1} {
			err := read(bytes.NewReader(blob[:n]))
			require.True(t, errdefs.IsInvalidArgument(err), "%s cut at %d: %v", a, n, err)
			err = read(io.MultiReader(bytes.NewReader(blob[:n]), errReader{broken}))
			require.ErrorIs(t, err, broken)
			require.False(t, errdefs.IsInvalidArgument(err), "%v", err)
		}
		flipped := bytes.Clone(blob)
		flipped[len(blob)-2] ^= 1 // the checksum, or the length
		require.True(t, errdefs.IsInvalidArgument(read(bytes.NewReader(flipped))), a)
	}
	// A frame that wants 3.75 GiB of memory.
	_, err := io.Copy(io.Discard, must(layer.Decompress(strings.NewReader("\x28\xb5\x2f\xfd\x00\xaf\x01\x00\x00"), ocispec.MediaTypeImageLayerZstd)))
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
}

func must(r io.ReadCloser, err error) io.Reader {
	if err != nil {
		return errReader{err}
	}
	return r
}

func TestLevels(t *testing.T) {
	for _, c := range []layer.Compression{{Algorithm: 9}, {Level: 1}, {Algorithm: layer.Gzip, Level: 10}, {Algorithm: layer.Gzip, Level: -1}, {Algorithm: layer.Zstd, Level: 23}} {
		_, err := layer.Compress(io.Discard, c)
		require.True(t, errdefs.IsInvalidArgument(err), "%v: %v", c, err)
		_, err = layer.WriteBlob(t.Context(), io.Discard, layer.Trees{Upper: t.TempDir()}, c, layer.WriteOptions{})
		require.True(t, errdefs.IsInvalidArgument(err), "%v: %v", c, err)
	}
	_, err := layer.ParseAlgorithm("lz4")
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
}

func TestVerify(t *testing.T) {
	const text = "some text"
	d := digest.FromString(text)
	read := func(r io.Reader, want digest.Digest, size int64) (string, error) {
		v, err := layer.Verify(r, want, size)
		require.NoError(t, err)
		b, err := io.ReadAll(v)
		if err == nil {
			require.NoError(t, v.Finish())
		} else {
			require.Equal(t, err, v.Finish())
		}
		return string(b), err
	}
	got, err := read(strings.NewReader(text), d, int64(len(text)))
	require.NoError(t, err)
	require.Equal(t, text, got)
	for name, try := range map[string]func() (string, error){
		"short":  func() (string, error) { return read(strings.NewReader(text[1:]), d, int64(len(text))) },
		"long":   func() (string, error) { return read(strings.NewReader(text+"!"), d, int64(len(text))) },
		"other":  func() (string, error) { return read(strings.NewReader("same size"), d, int64(len(text))) },
		"larger": func() (string, error) { return read(strings.NewReader(text), d, 3) },
	} {
		_, err := try()
		require.True(t, errdefs.IsDataLoss(err), "%s: %v", name, err)
	}
	broken := errors.New("broken")
	_, err = read(errReader{broken}, d, 3)
	require.ErrorIs(t, err, broken)
	for _, bad := range []digest.Digest{"", "sha256:", "sha256:00", "md5:d41d8cd98f00b204e9800998ecf8427e"} {
		_, err := layer.Verify(strings.NewReader(text), bad, 1)
		require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
	_, err = layer.Verify(strings.NewReader(text), d, -1)
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
}

func TestBlobs(t *testing.T) {
	tree := mkdir(t)
	apply(t, tree, pack(t, file("d/f", "text"), hardlink("g", "d/f"), symlink("l", "x")), mine())
	for _, a := range []layer.Algorithm{layer.None, layer.Gzip, layer.Zstd} {
		var b bytes.Buffer
		out, err := layer.WriteBlob(t.Context(), &b, layer.Trees{Upper: tree}, layer.Compression{Algorithm: a}, layer.WriteOptions{Nanoseconds: true})
		require.NoError(t, err)
		require.Equal(t, ocispec.Descriptor{MediaType: a.MediaType(), Digest: digest.FromBytes(b.Bytes()), Size: int64(b.Len())}, out.Descriptor)

		// What follows the end of the tar inside of the blob counts, too.
		again := mkdir(t)
		applied, err := layer.ApplyBlob(t.Context(), again, bytes.NewReader(b.Bytes()), out.Descriptor, mine())
		require.NoError(t, err)
		require.Equal(t, out.DiffID, applied.DiffID)
		require.Equal(t, out.Size, applied.Size)
		require.Equal(t, dump(t, tree, dumpOptions{}), dump(t, again, dumpOptions{}))

		for i := range b.Len() {
			if i%97 != 0 && i < b.Len()-20 {
				continue
			}
			damaged := bytes.Clone(b.Bytes())
			damaged[i] ^= 0x20
			_, err := layer.ApplyBlob(t.Context(), mkdir(t), bytes.NewReader(damaged), out.Descriptor, mine())
			require.True(t, errdefs.IsDataLoss(err), "%s, byte %d: %v", a, i, err)
		}
		_, err = layer.ApplyBlob(t.Context(), mkdir(t), bytes.NewReader(append(b.Bytes(), 0)), out.Descriptor, mine())
		require.True(t, errdefs.IsDataLoss(err), "%s: %v", a, err)
		_, err = layer.ApplyBlob(t.Context(), mkdir(t), bytes.NewReader(b.Bytes()[:b.Len()-1]), out.Descriptor, mine())
		require.True(t, errdefs.IsDataLoss(err), "%s: %v", a, err)
	}
}

// The DiffID is that of the tar that was applied, also where it is not computed
// because the blob itself is held against a digest.
func TestDiffIDIsOfWhatIsApplied(t *testing.T) {
	raw := pack(t, file("f", "text"))
	z := compress(t, layer.Compression{Algorithm: layer.Gzip}, raw)
	// Whole blocks at the beginning that hold nothing.
	padded := append(make([]byte, 512), raw...)
	for name, try := range map[string]struct {
		blob  []byte
		of    digest.Algorithm
		early int // read before the blob is decompressed
		later int // read of what was decompressed
		want  []byte
	}{
		"plain":                 {blob: raw, of: digest.SHA256, want: raw},
		"plain, another digest": {blob: raw, of: digest.SHA512, want: raw},
		"gzip":                  {blob: z, of: digest.SHA256, want: raw},
		"begun before":          {blob: padded, of: digest.SHA256, early: 512, want: raw},
		"begun":                 {blob: padded, of: digest.SHA256, later: 512, want: raw},
	} {
		t.Run(name, func(t *testing.T) {
			v, err := layer.Verify(bytes.NewReader(try.blob), try.of.FromBytes(try.blob), int64(len(try.blob)))
			require.NoError(t, err)
			_, err = io.CopyN(io.Discard, v, int64(try.early))
			require.NoError(t, err)
			r, err := layer.Decompress(v, ocispec.MediaTypeImageLayer)
			require.NoError(t, err)
			_, err = io.CopyN(io.Discard, r, int64(try.later))
			require.NoError(t, err)
			done, err := layer.Apply(t.Context(), mkdir(t), r, mine())
			require.NoError(t, err)
			require.Equal(t, digest.FromBytes(try.want), done.DiffID)
			require.EqualValues(t, len(try.want), done.Size)
		})
	}
}

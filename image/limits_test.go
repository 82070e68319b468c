package image

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/layer"
)

// piped opens what a pipe gives as standard input, and says how much of it was
// read.
func piped(t *testing.T, data []byte, s Select) (*Image, int, error) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	saved := os.Stdin
	os.Stdin = r
	defer func() { os.Stdin = saved }()
	written := make(chan int)
	go func() {
		n, _ := w.Write(data) // ends when nobody reads
		_ = w.Close()
		written <- n
	}()
	img, err := Open(t.Context(), "-", s)
	_ = r.Close()
	return img, <-written, err
}

// TestArchivesHaveLimits: a file, a pipe, and what is packed in either.
func TestArchivesHaveLimits(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	var oci bytes.Buffer
	require.NoError(t, WriteTar(t.Context(), &oci, two(t)))
	exact := int64(oci.Len())
	bomb := zipped(t, append(oci.Bytes(), make([]byte, 32<<20)...))
	for name, c := range map[string]struct {
		data   []byte
		limits layer.Limits
		over   bool
	}{
		"as long as may be":       {oci.Bytes(), layer.Limits{Bytes: exact}, false},
		"a byte longer":           {oci.Bytes(), layer.Limits{Bytes: exact - 1}, true},
		"packed":                  {zipped(t, oci.Bytes()), layer.Limits{Bytes: exact}, false},
		"packed, a byte longer":   {zipped(t, oci.Bytes()), layer.Limits{Bytes: exact - 1}, true},
		"a bomb":                  {bomb, layer.Limits{Bytes: 1 << 20}, true},
		"as many files":           {oci.Bytes(), layer.Limits{Entries: entries(t, oci.Bytes())}, false},
		"a file more":             {oci.Bytes(), layer.Limits{Entries: entries(t, oci.Bytes()) - 1}, true},
		"packed, and a file more": {zipped(t, oci.Bytes()), layer.Limits{Entries: entries(t, oci.Bytes()) - 1}, true},
	} {
		t.Run(name, func(t *testing.T) {
			img, err := Open(t.Context(), save(t, c.data), Select{Limits: c.limits})
			require.Equal(t, c.over, errdefs.IsResourceExhausted(err), "%v", err)
			if !c.over {
				require.NoError(t, err)
				require.NoError(t, img.Close())
			}
			img, _, err = piped(t, c.data, Select{Limits: c.limits})
			require.Equal(t, c.over, errdefs.IsResourceExhausted(err), "%v", err)
			if !c.over {
				require.NoError(t, err)
				require.NoError(t, img.Close())
			}
		})
	}
	_, n, err := piped(t, make([]byte, 64<<20), Select{Limits: layer.Limits{Bytes: 1 << 20}})
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	require.ErrorContains(t, err, "1048576 bytes")
	require.Less(t, n, 4<<20, "no more is read than is needed to know")
	_, err = Open(t.Context(), save(t, oci.Bytes()), Select{Limits: layer.Limits{Bytes: -1}})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// entries counts those of a tar.
func entries(t *testing.T, archive []byte) (n int64) {
	for r := tar.NewReader(bytes.NewReader(archive)); ; n++ {
		if _, err := r.Next(); err == io.EOF {
			return n
		} else {
			require.NoError(t, err)
		}
	}
}

// TestLayerOfManyFiles: a layer may have more files than an image's archive, and
// such an archive is refused wherever in it the index comes.
func TestLayerOfManyFiles(t *testing.T) {
	var data bytes.Buffer
	w := tar.NewWriter(&data)
	s := Select{maxEntries: 50}
	for i := range s.maxEntries + 1 {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: strconv.FormatInt(i, 10), Typeflag: tar.TypeReg}))
	}
	require.NoError(t, w.Flush())
	files := slices.Clone(data.Bytes())

	name := save(t, append(files, tarOf(t, entry{name: "manifest.json", text: "{}"}, entry{name: "oci-layout"})...))
	img, err := Open(t.Context(), name, s)
	require.NoError(t, err)
	require.Len(t, img.Layers, 1)
	require.NoError(t, img.Close())

	for _, index := range [][]byte{
		tarOf(t, entry{name: "oci-layout"}, entry{name: "index.json"}),
		tarOf(t, entry{name: "manifest.json", text: `[{"Config":"c"}]`}),
	} {
		_, err = Open(t.Context(), save(t, append(files, index...)), s)
		require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	}
}

package layer_test

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/layer"
)

// zeroes is an endless stream that compresses to nothing.
type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// TestBombs: a blob of some KiB that unpacks to many times the limit ends there,
// wherever in it the bulk is, and what was unpacked by then is not much more.
func TestBombs(t *testing.T) {
	const size, limit = 64 << 20, 4 << 20
	// The first header of the first is that of the file, of the last that of its
	// extended header.
	large := pack(t, ent{name: "large", typ: '0', mode: 0o644, mtime: time.Unix(1, 0)})[:512]
	extended := pack(t, file(strings.Repeat("n", 200), ""))[:512]
	for _, b := range [][]byte{large, extended} {
		copy(b[124:], "10000000000\x00")
		checksum(b)
	}
	for what, begin := range map[string][]byte{
		"in a file":       large,
		"after the end":   pack(t, file("f", "x")),
		"in a PAX record": extended,
	} {
		for _, a := range []layer.Algorithm{layer.Gzip, layer.Zstd} {
			t.Run(what+"/"+a.String(), func(t *testing.T) {
				var small bytes.Buffer
				z, err := layer.Compress(&small, layer.Compression{Algorithm: a, Level: 1})
				require.NoError(t, err)
				_, err = io.Copy(z, io.MultiReader(bytes.NewReader(begin), io.LimitReader(zeroes{}, size)))
				require.NoError(t, err)
				require.NoError(t, z.Close())
				require.Less(t, small.Len(), limit*2)
				for _, form := range []layer.Form{layer.Plain, layer.OverlayUser} {
					d, err := layer.Decompress(bytes.NewReader(small.Bytes()), a.MediaType())
					require.NoError(t, err)
					read := &counting{r: d}
					o := mine()
					o.Form, o.Limits = form, layer.Limits{Bytes: limit}
					out, err := layer.Apply(t.Context(), mkdir(t), read, o)
					require.Error(t, err)
					require.True(t, errdefs.IsResourceExhausted(err) || what == "in a PAX record" && errdefs.IsInvalidArgument(err), "%v", err)
					require.LessOrEqual(t, out.Bytes, int64(limit))
					require.Less(t, read.n, int64(limit+4<<20), "it is not unpacked to find out how large it is")
					require.NoError(t, d.Close())
				}
			})
		}
	}
}

// checksum puts the sum of a tar header into it.
func checksum(block []byte) {
	copy(block[148:], "        ")
	sum := 0
	for _, c := range block[:512] {
		sum += int(c)
	}
	for i := 5; i >= 0; i-- {
		block[148+i] = byte('0' + sum&7)
		sum >>= 3
	}
	block[154], block[155] = 0, ' '
}

type counting struct {
	r io.Reader
	n int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// TestLimitOfACopy is exact.
func TestLimitOfACopy(t *testing.T) {
	for size, exceeds := range map[int64]bool{0: false, 9: false, 10: false, 11: true, 1 << 20: true} {
		var b bytes.Buffer
		n, err := layer.Limits{Bytes: 10}.Copy(&b, io.LimitReader(zeroes{}, size))
		require.Equal(t, exceeds, errdefs.IsResourceExhausted(err), "%d: %v", size, err)
		require.Equal(t, min(size, 10), n)
		require.EqualValues(t, n, b.Len())
	}
	_, err := layer.Limits{Bytes: 10}.Copy(io.Discard, io.MultiReader(io.LimitReader(zeroes{}, 10), errReader{errFull}))
	require.ErrorIs(t, err, errFull, "it is not known whether there is more")
	_, err = layer.Limits{Bytes: -1}.Copy(io.Discard, zeroes{})
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
}

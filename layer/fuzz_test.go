package layer_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/layer"
)

// FuzzApply applies whatever comes, to a tree and to an upper directory. It
// never leaves them, never makes more than it may, fails with a class, and
// what it makes can be removed. testdata/fuzz has the stored corpus.
func FuzzApply(f *testing.F) {
	for _, b := range hostile(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			t.Skip()
		}
		for _, form := range []layer.Form{layer.Plain, layer.OverlayUser} {
			applyHostile(t, form, b)
		}
	})
}

func applyHostile(t *testing.T, form layer.Form, b []byte) {
	top := mkdir(t)
	root, outside := filepath.Join(top, "root"), filepath.Join(top, "outside")
	for _, d := range []string{root, outside, filepath.Join(root, "below")} {
		require.NoError(t, os.Mkdir(d, 0o755))
	}
	require.NoError(t, os.WriteFile(filepath.Join(outside, "f"), []byte("sentinel"), 0o600))
	require.NoError(t, os.Symlink(outside, filepath.Join(root, "out")))
	require.NoError(t, os.Symlink("../outside", filepath.Join(root, "below", "out")))
	before := dump(t, outside, dumpOptions{})

	o := layer.ApplyOptions{
		Form: form, Owners: layer.OwnersCaller, Devices: layer.DevicesSkipped,
		Limits: layer.Limits{Entries: 1000, Bytes: 4 << 20},
	}
	if form != layer.Plain {
		o.Parents = []string{root}
		root = filepath.Join(top, "upper")
		require.NoError(t, os.Mkdir(root, 0o755))
	}
	d, err := layer.Decompress(bytes.NewReader(b), layer.Gzip.MediaType())
	if err == nil {
		var out layer.Applied
		out, err = layer.Apply(t.Context(), root, d, o)
		require.LessOrEqual(t, out.Entries, int64(1000))
		require.LessOrEqual(t, out.Bytes, int64(4<<20))
	}
	if err != nil {
		known := errdefs.IsInvalidArgument(err) || errdefs.IsResourceExhausted(err) || errdefs.IsPermissionDenied(err)
		require.True(t, known, "%v", err)
	}
	require.Equal(t, before, dump(t, outside, dumpOptions{}))
	list, err := os.ReadDir(top)
	require.NoError(t, err)
	require.LessOrEqual(t, len(list), 3)
	if err == nil && form == layer.Plain {
		// It can be written again, or is told why not.
		_, err := layer.Write(context.Background(), discard{}, layer.Trees{Upper: root}, layer.WriteOptions{})
		require.True(t, err == nil || errdefs.IsFailedPrecondition(err), "%v", err)
	}
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// hostile are the layers that the corpus starts from.
func hostile(t testing.TB) map[string][]byte {
	gz := func(b []byte) []byte { return compress(t, layer.Compression{Algorithm: layer.Gzip}, b) }
	deep := "d"
	for range 200 {
		deep += "/d"
	}
	return map[string][]byte{
		"dots":      pack(t, file("../outside/f", "x"), file("/../../outside/f", "x"), file("a/../../outside/g", "x")),
		"links":     pack(t, symlink("l", "../outside"), file("l/f", "x"), symlink("m", "l"), file("m/g", "x"), hardlink("h", "l/f"), hardlink("i", "../outside/f")),
		"below":     pack(t, file("out/f", "x"), whiteout("out/f"), opaque("out"), hardlink("h", "out/f"), file("below/out/f", "x"), hardlink("j", "below/out")),
		"swap":      pack(t, directory("d"), file("d/f", "x"), symlink("d", "../outside"), file("d/f", "y"), directory("d"), opaque("d")),
		"whiteouts": pack(t, whiteout("below"), file("below/f", "x"), opaque("below"), whiteout("out"), directory("out"), ent{name: ".wh..wh..opq", typ: '0'}),
		"later":     pack(t, hardlink("a", "b"), hardlink("b", "c"), symlink("c", "../outside/f"), file("a", "x")),
		"devices":   pack(t, ent{name: "c", typ: '3', major: 1, minor: 3}, ent{name: "w", typ: '3'}, ent{name: "p", typ: '6', mode: 0o644}),
		"xattrs": pack(t, ent{name: "d", typ: '5', mode: 0o700, pax: map[string]string{
			"SCHILY.xattr.user.overlay.redirect": "/outside", "SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.a": "b",
		}}, file("d/f", "x")),
		"deep":   pack(t, file(deep, "x")),
		"modes":  pack(t, ent{name: "d", typ: '5', mode: 0}, file("d/f", "x"), ent{name: "d/e", typ: '5', mode: 0o111}, file("d/e/f", "x"), opaque("d")),
		"sparse": gnuSparse(),
		"gzip":   gz(pack(t, file("f", "x"))),
		"bomb":   gz(pack(t, file("f", string(make([]byte, 5<<20))))),
		"cut":    pack(t, file("f", "xyz"))[:1100],
		"chunks": append(bytes.Clone(skippable), compress(t, layer.Compression{Algorithm: layer.Zstd}, pack(t, file("f", "x")))...),
	}
}

// TestHostile runs the corpus on every form, as root also with its rights.
func TestHostile(t *testing.T) {
	for name, b := range hostile(t) {
		t.Run(name, func(t *testing.T) {
			for _, form := range []layer.Form{layer.Plain, layer.OverlayUser} {
				applyHostile(t, form, b)
			}
		})
	}
}

// TestNothingIsLeftOpen: no descriptor stays, whether it went well or not.
func TestNothingIsLeftOpen(t *testing.T) {
	open := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(list)
	}
	before := open()
	for _, b := range hostile(t) {
		for _, form := range []layer.Form{layer.Plain, layer.OverlayUser} {
			lower, upper := mkdir(t), mkdir(t)
			require.NoError(t, unix.Mkdir(filepath.Join(lower, "below"), 0o755))
			_, err := layer.Apply(t.Context(), upper, bytes.NewReader(b), layer.ApplyOptions{Form: form, Parents: []string{lower}, Owners: layer.OwnersCaller})
			if err == nil {
				src := layer.Source(layer.Trees{Lower: lower, Upper: upper})
				if form != layer.Plain {
					src = layer.Upper{Dir: upper, Form: form, Parents: []string{lower}}
				}
				_, err = layer.Write(t.Context(), discard{}, src, layer.WriteOptions{})
				require.NoError(t, err)
				_, err = layer.Write(t.Context(), failing{}, src, layer.WriteOptions{})
				require.ErrorIs(t, err, errFull)
			}
		}
	}
	require.Equal(t, before, open())
}

var errFull = errors.New("full")

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errFull }

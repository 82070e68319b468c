package cache_test

import (
	"archive/tar"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

// limited opens the store anew with limits for layers.
func (w *world) limited(l layer.Limits) {
	w.Helper()
	w.opts = func(o *cache.Options) { o.LayerLimits = l }
	w.reopenStore()
}

// TestLayersBeyondALimit end where the limit is, whatever is done with them,
// leave nothing, and are what they are once more is allowed.
func TestLayersBeyondALimit(t *testing.T) {
	zeros := strings.Repeat("\x00", 1<<20)
	for name, tt := range map[string]struct {
		files  []file
		limits layer.Limits
		// unpacked is what more is said of whoever only unpacks it.
		unpacked bool
	}{
		"a bomb":        {[]file{{name: "f", text: zeros}}, layer.Limits{Bytes: 1 << 18}, true},
		"a large file":  {[]file{{name: "small", text: "1"}, {name: "f", text: zeros}}, layer.Limits{EntryBytes: 1<<20 - 1}, false},
		"many entries":  {[]file{{name: "1"}, {name: "2"}, {name: "3/4/5"}}, layer.Limits{Entries: 4}, false},
		"many links":    {[]file{{name: "1"}, {name: "2", typ: tar.TypeLink, text: "1"}, {name: "3", typ: tar.TypeLink, text: "1"}}, layer.Limits{Entries: 2}, false},
		"of whiteouts":  {[]file{{name: ".wh.1"}, {name: ".wh.2"}, {name: ".wh.3"}}, layer.Limits{Entries: 2}, false},
		"a long target": {[]file{{name: "f"}, {name: "l", typ: tar.TypeLink, text: strings.Repeat("./", 60) + "f"}}, layer.Limits{NameBytes: 100}, false},
	} {
		t.Run(name, func(t *testing.T) {
			forKinds(t, func(w *world) {
				b := pack(w, layer.Gzip, layerTar(w, tt.files...))
				w.store(b)
				w.limited(tt.limits)
				ref := w.byBlob(b, nil, nil)
				err := ref.Extract(w.ctx)
				require.True(w, errdefs.IsResourceExhausted(err) || tt.limits.NameBytes > 0 && errdefs.IsInvalidArgument(err), "%v", err)
				require.Equal(w, cache.Lazy, ref.Record().State)
				require.Empty(w, walk(w, w.driver))
				w.nothingLeft()
				if tt.unpacked {
					bare := b.desc
					bare.Annotations = nil
					_, err := w.GetByBlob(w.ctx, bare, nil, cache.BlobOptions{})
					require.True(w, errdefs.IsResourceExhausted(err), "%v", err)
					for _, o := range []cache.RemotesOptions{gzipped, {Create: true, Force: true, Compression: cache.Compression{Algorithm: layer.None}}} {
						_, err := ref.GetRemotes(w.ctx, o)
						require.True(w, errdefs.IsResourceExhausted(err), "%v", err)
						w.nothingLeft()
					}
				}
				id := ref.ID()
				w.release(ref)
				w.limited(layer.Limits{})
				ref = w.get(id)
				require.NoError(w, ref.Extract(w.ctx))
				r := w.remotes(ref, cache.RemotesOptions{Create: true, Force: true, Compression: cache.Compression{Algorithm: layer.None}})
				require.Equal(w, b.desc.Annotations["containerd.io/uncompressed"], r.Descriptors[0].Digest.String())
				require.NoError(w, r.Release(w.ctx))
				w.release(ref)
			})
		})
	}
}

package cache_test

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

func (w *world) remotes(ref *cache.ImmutableRef, o cache.RemotesOptions) *cache.Remote {
	w.Helper()
	r, err := ref.GetRemotes(w.ctx, o)
	require.NoError(w, err)
	return r
}

var gzipped = cache.RemotesOptions{Create: true, Compression: cache.Compression{Algorithm: layer.Gzip}}

// pull takes a remote into another store and gives the top.
func pull(w *world, r *cache.Remote) (ref *cache.ImmutableRef) {
	w.Helper()
	for _, desc := range r.Descriptors {
		next, err := w.GetByBlob(w.ctx, desc, ref, cache.BlobOptions{Provider: r.Provider})
		require.NoError(w, err)
		if ref != nil {
			w.release(ref)
		}
		ref = next
	}
	return ref
}

func TestWhatIsGivenOutUnpacksToWhatIsMounted(t *testing.T) {
	for _, to := range []kind{overlayKind, nativeKind} {
		forKinds(t, func(w *world) {
			base := w.sh(nil, "mkdir d", "write d/a 1", "write gone 1", "mkdir again", "write again/old 1")
			mid := w.sh(base, "rm gone", "rm again", "mkdir again", "write again/new 2", "link l d/a")
			top := w.sh(mid, "write d/b 3", "rm d/a", "mkdir .t", "write .t/x 1", "mv .t moved")
			other := w.sh(nil, "write other 1", "write gone 9")
			strange := w.sh(nil, "write d 5", "write z 1")
			d := w.diff(top, strange)
			merged := w.merge(other, top)
			child := w.sh(merged, "rm other", "write mine 1")
			into := newWorld(w, to)
			for _, ref := range []*cache.ImmutableRef{top, merged, child, w.merge(top, d)} {
				r := w.remotes(ref, gzipped)
				there := pull(into, r)
				require.Equal(w, w.paths(ref), into.paths(there))
				require.NoError(w, r.Release(w.ctx))
				into.release(there)
			}
		})
	}
}

func TestBlobComputation(t *testing.T) {
	forKinds(t, func(w *world) {
		base := w.sh(nil, "write a 1")
		top := w.sh(base, "write b 2")
		_, err := top.GetRemotes(w.ctx, cache.RemotesOptions{})
		require.ErrorIs(w, err, errdefs.ErrNotFound)
		require.Equal(w, cache.Committed, top.Record().State, "asking does not finalize")
		require.NoError(w, top.Finalize(w.ctx))

		require.Equal(w, 2, w.transactions(func() { require.NoError(w, w.remotes(top, gzipped).Release(w.ctx)) }))
		rec, brec := top.Record(), base.Record()
		require.NotEmpty(w, rec.DiffID)
		require.Equal(w, brec.DiffID, brec.ChainID)
		require.Equal(w, digest.FromString(string(brec.DiffID)+" "+string(rec.DiffID)), rec.ChainID)
		require.True(w, rec.Blobs[0].Stored)
		require.Equal(w, ocispec.MediaTypeImageLayerGzip, rec.Blobs[0].MediaType)
		w.nothingLeft()

		// Now they are there, in whatever form; another one is converted.
		require.Zero(w, w.transactions(func() {
			r := w.remotes(top, cache.RemotesOptions{Compression: cache.Compression{Algorithm: layer.Zstd}})
			require.Equal(w, rec.Blobs[0].Digest, r.Descriptors[1].Digest)
			require.NoError(w, r.Release(w.ctx))
		}))
		r := w.remotes(top, cache.RemotesOptions{Create: true, Force: true, Compression: cache.Compression{Algorithm: layer.Zstd, Level: 7}})
		for i, ref := range []*cache.ImmutableRef{base, top} {
			require.Equal(w, ocispec.MediaTypeImageLayerZstd, r.Descriptors[i].MediaType)
			require.Len(w, ref.Record().Blobs, 2)
			require.Equal(w, string(ref.Record().DiffID), r.Descriptors[i].Annotations["containerd.io/uncompressed"])
		}
		require.NoError(w, r.Release(w.ctx))
		require.Len(w, w.stored(), 4)
		w.release(base, top)
		out, err := w.Remove(w.ctx, top.ID())
		require.NoError(w, err)
		require.NoError(w, out[0].Err)
		require.Len(w, w.stored(), 2)
	})
}

// TestBlobsAreReproducible: two stores that hold the same files give the same
// digests.
func TestBlobsAreReproducible(t *testing.T) {
	at := time.Unix(1700000000, 123456789)
	make := func(w *world) *cache.ImmutableRef {
		return w.change(nil, func(dir string) {
			for _, name := range []string{"b", "a", "c"} {
				require.NoError(w, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644))
				require.NoError(w, os.Chtimes(filepath.Join(dir, name), at, at))
			}
			require.NoError(w, os.Chtimes(dir, at, at))
		})
	}
	var seen []digest.Digest
	for range 2 {
		forKinds(t, func(w *world) {
			ref := make(w)
			r := w.remotes(ref, gzipped)
			seen = append(seen, r.Descriptors[0].Digest)
			require.NoError(w, r.Release(w.ctx))
			w.release(ref)
		})
	}
	for _, d := range seen {
		require.Equal(t, seen[0], d)
	}
}

// TestSourceDateEpoch: blobs with other times are not the layer's own, and go
// when they are given back.
func TestSourceDateEpoch(t *testing.T) {
	w := newWorld(t, overlayKind)
	ref := w.sh(nil, "write a 1")
	epoch := time.Unix(1000, 0)
	o := gzipped
	o.SourceDateEpoch = &epoch
	r := w.remotes(ref, o)
	again := w.remotes(ref, o)
	require.Equal(t, r.Descriptors, again.Descriptors)
	require.Empty(t, ref.Record().Blobs)
	into := newWorld(t, overlayKind)
	there := pull(into, r)
	mnt, err := there.Mount(w.ctx)
	require.NoError(t, err)
	st, err := os.Stat(filepath.Join(mnt.Path(), "a"))
	require.NoError(t, err)
	require.True(t, st.ModTime().Equal(epoch))
	require.NoError(t, mnt.Unmount())
	into.release(there)
	require.NoError(t, again.Release(w.ctx))
	require.Len(t, w.stored(), 1)
	require.NoError(t, r.Release(w.ctx))
	require.NoError(t, r.Release(w.ctx))
	require.Empty(t, w.stored())
	w.nothingLeft()
	_, err = ref.GetRemotes(w.ctx, cache.RemotesOptions{SourceDateEpoch: &epoch})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	w.release(ref)
}

func TestRemotesThatNobodyReleasedAreSettled(t *testing.T) {
	w := newWorld(t, overlayKind)
	ref := w.sh(nil, "write a 1")
	epoch := time.Unix(1000, 0)
	o := gzipped
	o.SourceDateEpoch = &epoch
	w.remotes(ref, o)
	require.Len(t, w.stored(), 1)
	w.reopenStore()
	require.Empty(t, w.stored())
	w.nothingLeft()
}

func TestSeveralCompressionsAtATime(t *testing.T) {
	forKinds(t, func(w *world) {
		ref := w.sh(nil, "write a 1", "write b 2")
		var all sync.WaitGroup
		for _, how := range []layer.Algorithm{layer.None, layer.Gzip, layer.Zstd} {
			for range 4 {
				all.Go(func() {
					r, err := ref.GetRemotes(w.ctx, cache.RemotesOptions{Create: true, Force: true, Compression: cache.Compression{Algorithm: how}})
					require.NoError(w, err)
					require.Equal(w, how.MediaType(), r.Descriptors[0].MediaType)
					ra, err := r.Provider.ReaderAt(w.ctx, r.Descriptors[0])
					require.NoError(w, err)
					data := make([]byte, ra.Size())
					_, err = ra.ReadAt(data, 0)
					require.NoError(w, err)
					require.Equal(w, r.Descriptors[0].Digest, digest.FromBytes(data))
					require.NoError(w, ra.Close())
					require.NoError(w, r.Release(w.ctx))
				})
			}
		}
		all.Wait()
		require.Len(w, ref.Record().Blobs, 3)
		w.release(ref)
		w.nothingLeft()
	})
}

// TestABlobThatIsGoneIsNotReplacedByAnother: what a layer came as is its
// identity.
func TestABlobThatIsGoneIsNotReplacedByAnother(t *testing.T) {
	w := newWorld(t, overlayKind)
	b := pack(t, layer.Gzip, layerTar(t, file{name: "./a", text: "1"}))
	r := newRegistry(b)
	ref := w.byBlob(b, nil, r)
	require.NoError(t, ref.Extract(w.ctx))
	id := ref.ID()
	w.release(ref)
	w.closeStore()
	require.NoError(t, os.RemoveAll(filepath.Join(w.root, "content", "blobs")))
	w.reopenStore()
	ref = w.get(id)
	_, err := ref.GetRemotes(w.ctx, gzipped)
	var missing *cache.MissingBlobsError
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []digest.Digest{b.desc.Digest}, missing.Digests)
	require.Equal(t, "a=1", w.tree(ref))
	w.nothingLeft()

	w.release(ref, w.byBlob(b, nil, r))
	remote := w.remotes(ref2(w, id), gzipped)
	data, err := content.ReadBlob(context.Background(), remote.Provider, remote.Descriptors[0])
	require.NoError(t, err)
	require.Equal(t, b.data, data)
	require.NoError(t, remote.Release(w.ctx))
	w.broken = true // the loss is found by a check
}

func ref2(w *world, id cache.ID) *cache.ImmutableRef { return w.get(id) }

// TestALostSnapshotOfOursIsMadeAgainFromItsBlob, with its times.
func TestALostSnapshotOfOursIsMadeAgainFromItsBlob(t *testing.T) {
	w := newWorld(t, overlayKind)
	at := time.Unix(1700000000, 123456789)
	ref := w.change(nil, func(dir string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), []byte("1"), 0o640))
		require.NoError(t, os.Chtimes(filepath.Join(dir, "a"), at, at))
	})
	require.NoError(t, w.remotes(ref, gzipped).Release(w.ctx))
	id := ref.ID()
	w.release(ref)
	w.closeStore()
	require.NoError(t, os.RemoveAll(filepath.Join(w.root, "snapshots", "committed", string(id))))
	w.reopenStore()
	ref = w.get(id)
	require.NoError(t, ref.Extract(w.ctx))
	mnt, err := ref.Mount(w.ctx)
	require.NoError(t, err)
	st, err := os.Stat(filepath.Join(mnt.Path(), "a"))
	require.NoError(t, err)
	require.True(t, st.ModTime().Equal(at), st.ModTime())
	require.Equal(t, os.FileMode(0o640), st.Mode())
	require.NoError(t, mnt.Unmount())
	w.release(ref)
}

package cache_test

import (
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

// lie is a blob whose descriptor says that it holds the layer of another.
func lie(t testing.TB, about blob) blob {
	b := pack(t, layer.Gzip, layerTar(t, file{name: "evil", text: "evil"}))
	b.desc.Annotations = maps.Clone(about.desc.Annotations)
	return b
}

// inForms asks for the layers in every way and gives the digests of the top
// one's blobs that come back.
func (w *world) inForms(ref *cache.ImmutableRef) (out []digest.Digest) {
	w.Helper()
	for _, o := range []cache.RemotesOptions{
		{},
		{Compression: gzipped.Compression},
		{Create: true},
		gzipped,
		{Create: true, Force: true, Compression: gzipped.Compression},
		{Create: true, Force: true, Compression: cache.Compression{Algorithm: layer.Zstd}},
		{Create: true, Force: true, Compression: cache.Compression{Algorithm: layer.None}},
	} {
		r, err := ref.GetRemotes(w.ctx, o)
		if !o.Create && errdefs.IsNotFound(err) {
			continue
		}
		require.NoError(w, err)
		out = append(out, r.Descriptors[len(r.Descriptors)-1].Digest)
		// What is given out holds what it says.
		w.holds(r)
		require.NoError(w, r.Release(w.ctx))
	}
	return out
}

func (w *world) holds(r *cache.Remote) {
	w.Helper()
	for _, desc := range r.Descriptors {
		ra, err := r.Provider.ReaderAt(w.ctx, desc)
		require.NoError(w, err)
		z, err := layer.Decompress(content.NewReader(ra), desc.MediaType)
		require.NoError(w, err)
		d, err := digest.FromReader(z)
		require.NoError(w, err)
		require.NoError(w, z.Close())
		require.NoError(w, ra.Close())
		require.Equal(w, desc.Annotations["containerd.io/uncompressed"], d.String(), "of blob %s", desc.Digest)
	}
}

// TestALieJoinsALayerThatIsHere: somebody says of another blob that it holds a
// layer that is extracted. Nobody is given it, whatever becomes of the right
// one.
func TestALieJoinsALayerThatIsHere(t *testing.T) {
	forKinds(t, func(w *world) {
		honest := pack(w, layer.Gzip, layerTar(w, file{name: "a", text: "1"}))
		evil := lie(w, honest)
		r := newRegistry(honest, evil)
		ref := w.byBlob(honest, nil, r)
		require.True(w, ref.Record().Blobs[0].Claimed)
		require.NoError(w, ref.Extract(w.ctx))
		require.False(w, ref.Record().Blobs[0].Claimed, "it was applied")
		w.store(evil)
		joined := w.byBlob(evil, nil, r)
		require.Equal(w, ref.ID(), joined.ID())
		w.release(joined)
		require.Len(w, ref.Record().Blobs, 2)
		require.True(w, ref.Record().Blobs[1].Claimed)
		require.NotContains(w, w.inForms(ref), evil.desc.Digest)

		// A merge on a driver that copies takes the layer from a blob.
		other := w.layer(nil, "b", "2")
		merged := w.merge(other, ref)
		require.Equal(w, "a=1 b=2", w.tree(merged))
		w.release(other, merged)
		require.True(w, ref.Record().Blobs[1].Claimed)
		w.release(ref)
	})
}

// TestALieThatIsLeft: the right blob and every other proven one are gone, and the
// snapshot, too. Then there is no layer, rather than a wrong one.
func TestALieThatIsLeft(t *testing.T) {
	needRoot(t)
	w := newWorld(t, overlayKind)
	honest := pack(t, layer.Gzip, layerTar(t, file{name: "./a", text: "1"}))
	evil := lie(t, honest)
	ref := w.byBlob(honest, nil, newRegistry(honest))
	require.NoError(t, ref.Extract(w.ctx))
	w.store(evil)
	w.release(w.byBlob(evil, nil, nil))
	require.Len(t, w.stored(), 2)
	path := filepath.Join(w.root, "content", "blobs", "sha256", honest.desc.Digest.Encoded())
	require.NoError(t, os.Remove(path))
	id := ref.ID()
	w.release(ref)
	w.reopenStore()
	ref = w.get(id)
	_, err := ref.GetRemotes(w.ctx, cache.RemotesOptions{})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = ref.GetRemotes(w.ctx, gzipped)
	var missing *cache.MissingBlobsError
	require.ErrorAs(t, err, &missing, "what came as that blob would be written otherwise")
	require.Equal(t, []digest.Digest{honest.desc.Digest}, missing.Digests)
	require.Equal(t, "a=1", w.tree(ref), "the snapshot is what it was")
	require.NoError(t, os.RemoveAll(filepath.Join(w.root, "snapshots", "committed", string(id))))
	require.ErrorIs(t, ref.Extract(w.ctx), errdefs.ErrDataLoss)
	w.release(ref)
	w.crashInto(true)
	w.gone(id)
}

// TestALieComesFirst: a lazy layer is known by nothing but what somebody said.
func TestALieComesFirst(t *testing.T) {
	forKinds(t, func(w *world) {
		honest := pack(w, layer.Gzip, layerTar(w, file{name: "a", text: "1"}))
		evil := lie(w, honest)
		ref := w.byBlob(evil, nil, newRegistry(evil))
		require.ErrorIs(w, ref.Extract(w.ctx), errdefs.ErrDataLoss)
		require.True(w, ref.Record().Blobs[0].Claimed)
		w.nothingLeft()

		// Somebody who has the layer gets it, and never the other one.
		joined := w.byBlob(honest, nil, newRegistry(honest))
		require.Equal(w, ref.ID(), joined.ID())
		require.NotContains(w, w.inForms(joined), evil.desc.Digest)
		require.Equal(w, cache.Lazy, joined.Record().State, "a blob is proven without a snapshot")
		require.Equal(w, "a=1", w.tree(joined))
		require.NotContains(w, w.inForms(joined), evil.desc.Digest)
		w.release(ref, joined)
	})
}

// TestOneClaimIsPassedOn: what one descriptor says of a layer nobody else knows
// is given out without reading it, as it came.
func TestOneClaimIsPassedOn(t *testing.T) {
	needRoot(t)
	w := newWorld(t, overlayKind)
	r := newRegistry()
	ref, blobs := w.chainOf(3, r)
	for _, o := range []cache.RemotesOptions{{}, gzipped} {
		remote := w.remotes(ref, o)
		for i, desc := range remote.Descriptors {
			require.Equal(t, blobs[i].desc.Digest, desc.Digest)
		}
		require.NoError(t, remote.Release(w.ctx))
	}
	require.Zero(t, r.reads.Load())
	w.release(ref)
}

// TestOneClaimThatIsHere is read before it is given out: it costs no transfer.
func TestOneClaimThatIsHere(t *testing.T) {
	needRoot(t)
	w := newWorld(t, overlayKind)
	honest := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	evil := lie(t, honest)
	w.store(evil)
	ref := w.byBlob(evil, nil, nil)
	_, err := ref.GetRemotes(w.ctx, gzipped)
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
	w.store(honest)
	w.release(ref, w.byBlob(honest, nil, nil))
	ref = w.get(ref.ID())
	require.NotContains(t, w.inForms(ref), evil.desc.Digest)
	w.release(ref)
}

// TestClaimsAgainstWhatIsKnown: a blob that was decompressed once is not believed
// to hold another layer.
func TestClaimsAgainstWhatIsKnown(t *testing.T) {
	needRoot(t)
	w := newWorld(t, overlayKind)
	honest := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	r := newRegistry(honest)
	wrong := honest
	wrong.desc.Annotations = map[string]string{"containerd.io/uncompressed": digest.FromString("other").String()}

	// As long as nobody knows better it is another layer, which cannot be made.
	claimed := w.byBlob(wrong, nil, r)
	ref := w.byBlob(honest, nil, r)
	require.NotEqual(t, claimed.ID(), ref.ID())
	require.ErrorIs(t, claimed.Extract(w.ctx), errdefs.ErrDataLoss)
	require.NoError(t, ref.Extract(w.ctx))
	_, err := w.GetByBlob(w.ctx, wrong.desc, nil, cache.BlobOptions{})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, honest.desc.Annotations["containerd.io/uncompressed"])

	// And without an annotation it is known, here and after a restart.
	bare := honest.desc
	bare.Annotations = nil
	w.release(claimed, ref)
	w.reopenStore()
	ref, err = w.GetByBlob(w.ctx, bare, nil, cache.BlobOptions{})
	require.NoError(t, err)
	require.False(t, ref.Record().Blobs[0].Claimed)
	w.release(ref)
}

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

// exposed says that everybody knows of the lie that is the only blob of a lazy
// record: whatever is tried fails without reading it, now and after a restart.
func (w *world) exposed(ref *cache.ImmutableRef, evil, about blob) {
	w.Helper()
	holds := digest.FromBytes(layerTar(w, file{name: "evil", text: "evil"}))
	said := digest.Digest(about.desc.Annotations["containerd.io/uncompressed"])
	if ref.Record().Blobs[0].Claimed {
		require.ErrorIs(w, ref.Extract(w.ctx), errdefs.ErrDataLoss)
	}
	b := ref.Record().Blobs[0]
	require.False(w, b.Claimed)
	require.Equal(w, holds, b.DiffID)
	tw := w.reopened()
	ref = tw.get(ref.ID())
	r := newRegistry(evil)
	for _, try := range []func() error{
		func() error { return ref.Extract(w.ctx) },
		func() error { _, err := ref.GetRemotes(w.ctx, cache.RemotesOptions{}); return err },
		func() error { _, err := ref.GetRemotes(w.ctx, gzipped); return err },
	} {
		var wrong *cache.WrongLayerError
		err := try()
		require.ErrorAs(w, err, &wrong)
		require.Equal(w, cache.WrongLayerError{Blob: evil.desc.Digest, Holds: holds, Claimed: said}, *wrong)
		require.ErrorIs(w, err, errdefs.ErrDataLoss)
	}
	_, err := tw.GetByBlob(w.ctx, evil.desc, nil, cache.BlobOptions{Provider: r})
	require.ErrorIs(w, err, errdefs.ErrInvalidArgument)
	require.Zero(w, r.reads.Load())
	found := tw.findings()
	require.Len(w, found, 1)
	require.Equal(w, cache.FindingBlobLayer, found[0].Code)
	require.Equal(w, ref.ID(), found[0].ID)
	require.Equal(w, evil.desc.Digest.String(), found[0].Key)
	tw.release(ref)
	tw.closeStore()
}

// reopened is the store as another process sees it that opens a copy.
func (w *world) reopened() *world {
	w.Helper()
	twin := *w
	twin.root, twin.Manager = filepath.Join(w.TempDir(), "twin"), nil
	require.NoError(w, cloneTree(w.root, twin.root))
	twin.reopenStore()
	return &twin
}

// takesTheLieAway removes a record that cannot be made, which is a finding as
// long as it is there.
func (w *world) takesTheLieAway(ref *cache.ImmutableRef) {
	w.Helper()
	require.Equal(w, cache.FindingBlobLayer, w.findings()[0].Code)
	w.release(ref)
	out, err := w.Remove(w.ctx, ref.ID())
	require.NoError(w, err)
	require.NoError(w, out[0].Err)
}

// TestALieComesFirst: a lazy layer is known by nothing but what somebody said.
func TestALieComesFirst(t *testing.T) {
	forKinds(t, func(w *world) {
		honest := pack(w, layer.Gzip, layerTar(w, file{name: "a", text: "1"}))
		evil := lie(w, honest)
		ref := w.byBlob(evil, nil, newRegistry(evil))
		w.exposed(ref, evil, honest)
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

// TestALieAmongVariants is found out once, costs the layer nothing, and is not
// read again when the snapshot has to be made anew.
func TestALieAmongVariants(t *testing.T) {
	forKinds(t, func(w *world) {
		data := layerTar(w, file{name: "a", text: "1"})
		honest := pack(w, layer.Zstd, data)
		evil := lie(w, honest)
		lies, truth := newRegistry(evil), newRegistry(honest)
		ref := w.byBlob(evil, nil, lies)
		w.release(w.byBlob(honest, nil, truth))
		require.Equal(w, "a=1", w.tree(ref))
		require.EqualValues(w, 1, lies.reads.Load(), "it came first")
		blobs := ref.Record().Blobs
		require.Len(w, blobs, 2)
		require.NotEqual(w, blobs[0].DiffID, ref.Record().DiffID)
		require.Equal(w, []bool{false, false}, []bool{blobs[0].Claimed, blobs[1].Claimed})
		require.NotContains(w, w.inForms(ref), evil.desc.Digest)
		w.check()
		id := ref.ID()
		w.release(ref)
		w.reopenStore()
		require.NoError(w, w.driver.Remove(w.ctx, string(id)))
		require.NoError(w, w.driver.Cleanup(w.ctx))
		ref = w.get(id)
		require.NoError(w, ref.Extract(w.ctx))
		require.Equal(w, "a=1", w.tree(ref))
		require.EqualValues(w, 1, lies.reads.Load())
		w.release(ref)
	})
}

// TestALieFoundOutWhileConverting, of a layer that nobody extracted: the other
// blob is passed on again, as the one thing that is known.
func TestALieFoundOutWhileConverting(t *testing.T) {
	needRoot(t)
	w := newWorld(t, overlayKind)
	honest := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	evil := lie(t, honest)
	r := newRegistry(evil)
	ref := w.byBlob(evil, nil, r)
	w.release(w.byBlob(honest, nil, r))
	_, err := ref.GetRemotes(w.ctx, cache.RemotesOptions{})
	require.ErrorIs(t, err, errdefs.ErrNotFound, "one of two claims may be a lie")
	_, err = ref.GetRemotes(w.ctx, cache.RemotesOptions{Create: true, Force: true, Compression: cache.Compression{Algorithm: layer.Zstd}})
	require.ErrorIs(t, err, errdefs.ErrNotFound, "the other one cannot be read")
	require.False(t, ref.Record().Blobs[0].Claimed)
	require.True(t, ref.Record().Blobs[1].Claimed)
	w.release(w.byBlob(honest, nil, newRegistry(honest)))
	remote := w.remotes(ref, cache.RemotesOptions{})
	require.Equal(t, []digest.Digest{honest.desc.Digest}, remote.Claimed)
	require.NoError(t, remote.Release(w.ctx))
	require.Equal(t, "a=1", w.tree(ref))
	w.release(ref)
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
			require.Equal(t, desc.Digest, remote.Claimed[i])
		}
		require.NoError(t, remote.Release(w.ctx))
	}
	require.Zero(t, r.reads.Load())

	// Who wants to be sure has them read, and from then on they are no claims.
	sure := gzipped
	sure.Verify = true
	for _, o := range []cache.RemotesOptions{sure, {}} {
		remote := w.remotes(ref, o)
		require.Len(t, remote.Descriptors, 3)
		require.Empty(t, remote.Claimed)
		w.holds(remote)
		require.NoError(t, remote.Release(w.ctx))
	}
	require.Positive(t, r.reads.Load())
	require.Equal(t, cache.Lazy, ref.Record().State)
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
	remote := w.remotes(ref, cache.RemotesOptions{})
	require.Equal(t, []digest.Digest{evil.desc.Digest}, remote.Claimed, "nothing is read where nothing may be made")
	require.NoError(t, remote.Release(w.ctx))
	_, err := ref.GetRemotes(w.ctx, cache.RemotesOptions{Verify: true})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = ref.GetRemotes(w.ctx, gzipped)
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
	w.exposed(ref, evil, honest)
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
	w.takesTheLieAway(claimed)
	_, err := w.GetByBlob(w.ctx, wrong.desc, nil, cache.BlobOptions{})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, honest.desc.Annotations["containerd.io/uncompressed"])

	// And without an annotation it is known, here and after a restart.
	bare := honest.desc
	bare.Annotations = nil
	w.release(ref)
	w.reopenStore()
	ref, err = w.GetByBlob(w.ctx, bare, nil, cache.BlobOptions{})
	require.NoError(t, err)
	require.False(t, ref.Record().Blobs[0].Claimed)
	w.release(ref)
}

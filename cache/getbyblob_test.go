package cache_test

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

func TestLayerIsALazyRecordFoundByItsChainID(t *testing.T) {
	forKinds(t, func(w *world) {
		base := pack(w, layer.Gzip, layerTar(w, file{name: "a", text: "1"}))
		top := pack(w, layer.Gzip, layerTar(w, file{name: "b", text: "2"}))
		var lower, upper *cache.ImmutableRef
		require.Equal(w, 1, w.transactions(func() { lower = w.byBlob(base, nil, nil) }))
		require.Equal(w, 1, w.transactions(func() { upper = w.byBlob(top, lower, nil) }))

		rec := upper.Record()
		diffIDs := []digest.Digest{lower.Record().DiffID, rec.DiffID}
		require.Equal(w, cache.Lazy, rec.State)
		require.Equal(w, []cache.ID{lower.ID()}, rec.Parents)
		require.Equal(w, identity.ChainID(diffIDs), rec.ChainID)
		chain, err := upper.ChainID(w.ctx)
		require.NoError(w, err)
		require.Equal(w, rec.ChainID, chain)
		require.Equal(w, base.desc.Annotations["containerd.io/uncompressed"], string(lower.Record().ChainID))
		ids, err := w.Search(w.ctx, "chainid:"+string(rec.ChainID))
		require.NoError(w, err)
		require.Equal(w, []cache.ID{upper.ID()}, ids)

		require.Zero(w, w.transactions(func() {
			again := w.byBlob(top, lower, nil)
			require.Equal(w, upper.ID(), again.ID())
			w.release(again)
		}))
		w.release(lower, upper)
		w.reopenStore()
		lower = w.byBlob(base, nil, nil)
		upper = w.byBlob(top, lower, nil)
		require.Equal(w, rec.ID, upper.ID())
		w.release(lower, upper)
		_, err = os.Lstat(filepath.Join(w.root, "content"))
		require.ErrorIs(w, err, os.ErrNotExist, "nothing was stored")
	})
}

// What the first handle shows was not read back, and is what the store has.
func TestANewLayersRecordIsWhatWasWritten(t *testing.T) {
	w := newWorld(t, overlayKind)
	base := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	top := pack(t, layer.Gzip, layerTar(t, file{name: "b", text: "2"}))
	lower := w.byBlob(base, nil, nil)
	upper := w.byBlob(top, lower, nil)
	merge, err := w.Merge(w.ctx, []*cache.ImmutableRef{lower, upper}, cache.MergeOptions{Labels: map[string]string{"k": "v"}})
	require.NoError(t, err)
	diff, err := w.Diff(w.ctx, lower, upper, cache.MergeOptions{})
	require.NoError(t, err)
	same := cmp.Options{
		cmpopts.EquateEmpty(),
		cmpopts.IgnoreUnexported(cache.Record{}, cache.Blob{}, cache.Value{}),
	}
	for _, ref := range []*cache.ImmutableRef{lower, upper, merge, diff} {
		stored, err := w.Lookup(w.ctx, ref.ID())
		require.NoError(t, err)
		require.Empty(t, cmp.Diff(stored, ref.Record(), same))
	}
	w.release(lower, upper, merge, diff)
}

// An intent says that somebody is about to put its blob there.
func TestALayerWithoutItsBlobLeavesItsIntent(t *testing.T) {
	w := newWorld(t, overlayKind)
	b := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	intent := filepath.Join(w.root, "blobs", string(b.desc.Digest))
	require.NoError(t, os.MkdirAll(filepath.Dir(intent), 0o700))
	require.NoError(t, os.WriteFile(intent, nil, 0o600))
	w.release(w.byBlob(b, nil, nil))
	require.FileExists(t, intent)
	require.NoError(t, os.Remove(intent))
}

func TestVariantsOfALayerAreOneRecord(t *testing.T) {
	w := newWorld(t, overlayKind)
	data := layerTar(t, file{name: "a", text: "1"})
	var ids []cache.ID
	for _, how := range []layer.Algorithm{layer.Gzip, layer.Zstd, layer.None, layer.Gzip} {
		ref := w.byBlob(pack(t, how, data), nil, nil)
		ids = append(ids, ref.ID())
		if how == layer.None {
			require.Len(t, ref.Record().Blobs, 3)
		}
		w.release(ref)
	}
	require.Equal(t, []cache.ID{ids[0], ids[0], ids[0], ids[0]}, ids)

	// The same bytes before compression make the layer: an archive that
	// unpacks to the same files is another one.
	other := w.byBlob(pack(t, layer.Gzip, layerTar(t, file{name: "./a", text: "1"})), nil, nil)
	require.NotEqual(t, ids[0], other.ID())
	w.release(other)
}

func TestDiffIDWithoutAnAnnotation(t *testing.T) {
	w := newWorld(t, overlayKind)
	data := layerTar(t, file{name: "a", text: "1"})
	plain, zipped := pack(t, layer.None, data), pack(t, layer.Gzip, data)
	plain.desc.Annotations, zipped.desc.Annotations = nil, nil

	ref := w.byBlob(plain, nil, nil)
	require.Equal(t, digest.FromBytes(data), ref.Record().DiffID)
	_, err := w.GetByBlob(w.ctx, zipped.desc, nil, cache.BlobOptions{})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)

	// A blob that is here is read.
	w.store(zipped)
	again := w.byBlob(zipped, nil, nil)
	require.Equal(t, ref.ID(), again.ID())
	w.release(ref, again)
}

func TestBadDescriptorsMakeNothing(t *testing.T) {
	w := newWorld(t, overlayKind)
	good := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"})).desc
	for name, c := range map[string]struct {
		change func(*ocispec.Descriptor)
		class  error
	}{
		"no digest":       {func(d *ocispec.Descriptor) { d.Digest = "" }, errdefs.ErrInvalidArgument},
		"bad digest":      {func(d *ocispec.Descriptor) { d.Digest = "sha256:../../x" }, errdefs.ErrInvalidArgument},
		"negative size":   {func(d *ocispec.Descriptor) { d.Size = -1 }, errdefs.ErrInvalidArgument},
		"no layer":        {func(d *ocispec.Descriptor) { d.MediaType = ocispec.MediaTypeImageManifest }, errdefs.ErrNotImplemented},
		"encrypted":       {func(d *ocispec.Descriptor) { d.MediaType += "+encrypted" }, errdefs.ErrNotImplemented},
		"bad annotation":  {func(d *ocispec.Descriptor) { d.Annotations = map[string]string{"containerd.io/uncompressed": "x"} }, errdefs.ErrInvalidArgument},
		"other algorithm": {func(d *ocispec.Descriptor) { d.Digest = "md5:00000000000000000000000000000000" }, errdefs.ErrInvalidArgument},
	} {
		desc := good
		c.change(&desc)
		_, err := w.GetByBlob(w.ctx, desc, nil, cache.BlobOptions{})
		require.ErrorIs(t, err, c.class, name)
	}
	for rec, err := range w.Records(w.ctx) {
		require.NoError(t, err)
		t.Errorf("record %s was made", rec.ID)
	}
}

func TestEqualLayersAreMadeOnce(t *testing.T) {
	w := newWorld(t, overlayKind)
	b := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	refs := make([]*cache.ImmutableRef, 16)
	var all sync.WaitGroup
	for i := range refs {
		all.Go(func() {
			var err error
			refs[i], err = w.GetByBlob(w.ctx, b.desc, nil, cache.BlobOptions{})
			require.NoError(t, err)
		})
	}
	all.Wait()
	for _, ref := range refs {
		require.Equal(t, refs[0].ID(), ref.ID())
		w.release(ref)
	}
}

func TestLayerOverARecordOfOurs(t *testing.T) {
	w := newWorld(t, overlayKind)
	base := w.layer(nil, "base", "1")
	b := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	ref := w.byBlob(b, base, nil)
	require.Equal(t, cache.Finalized, base.Record().State)
	require.Empty(t, ref.Record().ChainID, "that of the base is not known")
	again := w.byBlob(b, base, nil)
	require.Equal(t, ref.ID(), again.ID())
	alone := w.byBlob(b, nil, nil)
	require.NotEqual(t, ref.ID(), alone.ID())
	w.release(again, alone)

	// The parent goes only with the layer.
	w.release(base, ref)
	out, err := w.Remove(w.ctx, base.ID())
	require.NoError(t, err)
	require.ErrorIs(t, out[0].Err, errdefs.ErrFailedPrecondition)
	out, err = w.Remove(w.ctx, base.ID(), ref.ID())
	require.NoError(t, err)
	require.NoError(t, errors.Join(out[0].Err, out[1].Err))
}

// TestGetOfALongLazyChainTouchesNoBlob: neither the content store nor a
// provider is asked, and nothing is written.
func TestGetOfALongLazyChainTouchesNoBlob(t *testing.T) {
	w := newWorld(t, overlayKind)
	r := newRegistry()
	top, blobs := w.chainOf(100, r)
	id := top.ID()
	w.release(top)
	w.reopenStore()
	require.Zero(t, w.transactions(func() {
		ref := w.get(id)
		require.Equal(t, cache.Lazy, ref.Record().State)
		list, err := ref.LayerChain(w.ctx)
		require.NoError(t, err)
		require.Len(t, list, 100)
		require.Equal(t, blobs[0].desc.Digest, list[0].Record().Blobs[0].Digest)
		for _, l := range list {
			w.release(l)
		}
		w.release(ref)
	}))
	require.Zero(t, r.reads.Load())
	_, err := os.Lstat(filepath.Join(w.root, "content"))
	require.ErrorIs(t, err, os.ErrNotExist)
}

// TestALayerIsFoundOnceItsParentHasAChainID: it was made when the parent had
// none, and keeps its record.
func TestALayerIsFoundOnceItsParentHasAChainID(t *testing.T) {
	w := newWorld(t, overlayKind)
	base := w.sh(nil, "write x 1")
	b := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	ref := w.byBlob(b, base, nil)
	require.Empty(t, ref.Record().ChainID)
	require.NoError(t, w.remotes(base, gzipped).Release(w.ctx))
	chain, err := base.ChainID(w.ctx)
	require.NoError(t, err)
	require.NotEmpty(t, chain)
	again := w.byBlob(b, base, nil)
	require.Equal(t, ref.ID(), again.ID())
	w.release(base, ref, again)
}

package cache_test

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// nothingLeft asserts that no half-made thing is there: no active name, no
// intent, no unfinished blob.
func (w *world) nothingLeft() {
	w.Helper()
	pending, err := w.driver.Pending(w.ctx)
	require.NoError(w, err)
	require.Empty(w, pending)
	for _, dir := range []string{"blobs", "content/ingest"} {
		names, err := os.ReadDir(filepath.Join(w.root, dir))
		if !os.IsNotExist(err) {
			require.NoError(w, err)
			require.Empty(w, names, dir)
		}
	}
}

func TestExtractAChain(t *testing.T) {
	forKinds(t, func(w *world) {
		r := newRegistry()
		ref, blobs := w.chainOf(5, r)
		require.Equal(w, 5, w.transactions(func() { require.NoError(w, ref.Extract(w.ctx)) }), "one for each layer")
		require.Equal(w, "f000=0 f001=1 f002=2 f003=3 f004=4", w.tree(ref))
		list, err := ref.LayerChain(w.ctx)
		require.NoError(w, err)
		for _, l := range list {
			rec := l.Record()
			require.Equal(w, cache.Finalized, rec.State)
			require.True(w, rec.Verified)
			require.Equal(w, string(rec.ID), rec.Key)
			require.True(w, rec.Blobs[0].Stored)
			w.release(l)
		}
		require.Len(w, w.stored(), 5)
		require.EqualValues(w, 5, r.reads.Load())
		w.nothingLeft()

		// Again it costs nothing; in another process the blobs are here.
		require.Zero(w, w.transactions(func() { require.NoError(w, ref.Extract(w.ctx)) }))
		id := ref.ID()
		w.release(ref)
		w.reopenStore()
		ref = w.get(id)
		require.Equal(w, "f000=0 f001=1 f002=2 f003=3 f004=4", w.tree(ref))
		w.release(ref)
		ids := idsOf(w)
		out, err := w.Remove(w.ctx, ids...)
		require.NoError(w, err)
		for _, o := range out {
			require.NoError(w, o.Err)
		}
		require.Empty(w, w.stored(), "blobs go with their records")
		require.NotEmpty(w, blobs)
		w.nothingLeft()
	})
}

func idsOf(w *world) (ids []cache.ID) {
	for rec, err := range w.Records(w.ctx) {
		require.NoError(w, err)
		ids = append(ids, rec.ID)
	}
	return ids
}

func TestWhateverNeedsALazySnapshotExtractsIt(t *testing.T) {
	forKinds(t, func(w *world) {
		r := newRegistry()
		for name, use := range map[string]func(ref *cache.ImmutableRef){
			"mount": func(ref *cache.ImmutableRef) { w.tree(ref) },
			"new": func(ref *cache.ImmutableRef) {
				child := w.layer(ref, "mine", "x")
				require.Contains(w, w.tree(child), "mine=x")
				w.release(child)
			},
			"finalize": func(ref *cache.ImmutableRef) { require.NoError(w, ref.Finalize(w.ctx)) },
		} {
			base := pack(w, layer.Zstd, layerTar(w, file{name: name, text: "1"}))
			top := pack(w, layer.None, layerTar(w, file{name: name + "2", text: "2"}))
			for _, b := range []blob{base, top} {
				r.blobs[b.desc.Digest] = b.data
			}
			lower := w.byBlob(base, nil, r)
			ref := w.byBlob(top, lower, r)
			use(ref)
			require.Equal(w, cache.Finalized, ref.Record().State, name)
			require.Equal(w, cache.Finalized, lower.Record().State, name)
			require.Equal(w, name+"=1 "+name+"2=2", w.tree(ref))
			w.release(lower, ref)
		}
	})
}

func TestWhiteoutsOfALayer(t *testing.T) {
	forKinds(t, func(w *world) {
		dir := func(name string) file { return file{name: name, typ: tar.TypeDir} }
		base := pack(w, layer.Gzip, layerTar(w, dir("d"), file{name: "d/old", text: "1"}, file{name: "gone", text: "1"}, file{name: "kept", text: "1"}))
		top := pack(w, layer.Gzip, layerTar(w, dir("d"), file{name: "d/.wh..wh..opq"}, file{name: "d/new", text: "2"}, file{name: ".wh.gone"}))
		r := newRegistry(base, top)
		lower := w.byBlob(base, nil, r)
		upper := w.byBlob(top, lower, r)
		mnt, err := upper.Mount(w.ctx)
		require.NoError(w, err)
		require.Equal(w, "new=2", readTree(w, filepath.Join(mnt.Path(), "d")))
		require.NoError(w, mnt.Unmount())
		mnt, err = lower.Mount(w.ctx)
		require.NoError(w, err)
		require.Equal(w, "old=1", readTree(w, filepath.Join(mnt.Path(), "d")))
		require.NoError(w, mnt.Unmount())
		w.release(lower, upper)
	})
}

// TestVariantsShareOneSnapshot: the layer came as gzip and as zstd before
// anything was extracted.
func TestVariantsShareOneSnapshot(t *testing.T) {
	forKinds(t, func(w *world) {
		data := layerTar(w, file{name: "a", text: "1"})
		zipped, zst := pack(w, layer.Gzip, data), pack(w, layer.Zstd, data)
		r := newRegistry(zipped, zst)
		one, two := w.byBlob(zipped, nil, r), w.byBlob(zst, nil, r)
		require.NoError(w, two.Extract(w.ctx))
		require.Equal(w, "a=1", w.tree(one))
		require.Len(w, walk(w, w.driver), 1)
		require.Len(w, w.stored(), 1, "one form is enough")
		w.release(one, two)
	})
}

func TestAWrongLayerLeavesNothing(t *testing.T) {
	good := layerTar(t, file{name: "a", text: "1"})
	for name, damage := range map[string]func(b *blob, r *registry){
		"other bytes": func(b *blob, r *registry) { r.blobs[b.desc.Digest] = pack(t, layer.Gzip, append(good, 0)).data },
		"cut off":     func(b *blob, r *registry) { r.blobs[b.desc.Digest] = b.data[:len(b.data)-9] },
		"too long":    func(b *blob, r *registry) { r.blobs[b.desc.Digest] = append(b.data[:len(b.data):len(b.data)], 'x') },
		"no gzip":     func(b *blob, r *registry) { r.blobs[b.desc.Digest] = []byte("<html>not found</html>") },
		"another DiffID": func(b *blob, _ *registry) {
			b.desc.Annotations = map[string]string{"containerd.io/uncompressed": "sha256:" + string(b.desc.Digest.Encoded())}
		},
	} {
		t.Run(name, func(t *testing.T) {
			forKinds(t, func(w *world) {
				b := pack(w, layer.Gzip, good)
				r := newRegistry(b)
				damage(&b, r)
				ref := w.byBlob(b, nil, r)
				err := ref.Extract(w.ctx)
				require.ErrorIs(w, err, errdefs.ErrDataLoss)
				require.Equal(w, cache.Lazy, ref.Record().State)
				require.Empty(w, walk(w, w.driver))
				require.Empty(w, w.stored())
				w.nothingLeft()
				require.Len(w, idsOf(w), 1)
				if name == "another DiffID" {
					w.takesTheLieAway(ref)
				} else {
					w.release(ref)
				}
			})
		})
	}
}

func TestADamagedVariantIsNoReasonToGiveUp(t *testing.T) {
	w := newWorld(t, overlayKind)
	data := layerTar(t, file{name: "a", text: "1"})
	zipped, zst := pack(t, layer.Gzip, data), pack(t, layer.Zstd, data)
	r := newRegistry(zst)
	damaged := zipped
	damaged.data = append([]byte("x"), zipped.data[1:]...)
	w.store(damaged)
	ref := w.byBlob(zipped, nil, nil)
	other := w.byBlob(zst, nil, r)
	require.Equal(t, "a=1", w.tree(ref))
	w.release(ref, other)
	w.broken = true // the damaged blob is found
}

func TestMissingProvidersAreListed(t *testing.T) {
	w := newWorld(t, overlayKind)
	r := newRegistry()
	ref, blobs := w.chainOf(3, r)
	id := ref.ID()
	w.release(ref)
	w.reopenStore()

	first := w.byBlob(blobs[0], nil, r) // only this one has a provider again
	ref = w.get(id)
	err := ref.Extract(w.ctx)
	var missing *cache.MissingBlobsError
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{blobs[1].desc.Digest.String(), blobs[2].desc.Digest.String()}, []string{missing.Digests[0].String(), missing.Digests[1].String()})
	require.Zero(t, r.reads.Load(), "nothing was begun")
	require.Equal(t, cache.Lazy, first.Record().State)
	_, err = ref.Mount(w.ctx)
	require.ErrorAs(t, err, &missing)
	_, err = w.New(w.ctx, ref, cache.NewOptions{})
	require.ErrorAs(t, err, &missing)
	w.nothingLeft()

	// Usage and prune go on, and the parent goes only with the child.
	_, err = w.DiskUsage(w.ctx, nil)
	require.NoError(t, err)
	out, err := w.Remove(w.ctx, first.ID())
	require.NoError(t, err)
	require.ErrorIs(t, out[0].Err, cache.ErrLocked)
	w.release(first)
	out, err = w.Remove(w.ctx, first.ID())
	require.NoError(t, err)
	require.ErrorIs(t, out[0].Err, errdefs.ErrFailedPrecondition)

	second := w.byBlob(blobs[1], w.get(first.ID()), r)
	third := w.byBlob(blobs[2], second, r)
	require.Equal(t, id, third.ID())
	require.Equal(t, "f000=0 f001=1 f002=2", w.tree(third))
}

// TestManyExtractOneLayer: they share one run, and the one who came first may
// leave.
func TestManyExtractOneLayer(t *testing.T) {
	forKinds(t, func(w *world) {
		b := pack(w, layer.Gzip, layerTar(w, file{name: "a", text: "1"}))
		r := newRegistry(b)
		r.gate, r.began = make(chan struct{}), make(chan struct{}, 1)
		ref := w.byBlob(b, nil, r)
		ctx, cancel := context.WithCancel(w.ctx)
		first := make(chan error, 1)
		go func() { first <- ref.Extract(ctx) }()
		<-r.began
		var others sync.WaitGroup
		asked := make(chan struct{}, 8)
		for range 8 {
			others.Go(func() {
				mine, err := ref.Clone()
				require.NoError(w, err)
				asked <- struct{}{}
				require.NoError(w, mine.Extract(w.ctx))
				require.NoError(w, mine.Release(w.ctx))
			})
		}
		for range 8 {
			<-asked
		}
		cancel()
		require.ErrorIs(w, <-first, context.Canceled)
		close(r.gate)
		others.Wait()
		require.Equal(w, "a=1", w.tree(ref))
		w.release(ref)
		w.nothingLeft()
	})
}

func TestExtractEndsWithTheLastAsker(t *testing.T) {
	w := newWorld(t, overlayKind)
	b := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	r := newRegistry(b)
	r.gate, r.began = make(chan struct{}), make(chan struct{}, 2)
	ref := w.byBlob(b, nil, r)
	ctx, cancel := context.WithCancel(w.ctx)
	done := make(chan error, 1)
	go func() { done <- ref.Extract(ctx) }()
	<-r.began
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	// Nobody opens the gate: only the end of the run lets the next begin.
	go func() { done <- ref.Extract(w.ctx) }()
	<-r.began
	close(r.gate)
	require.NoError(t, <-done)
	require.Equal(t, "a=1", w.tree(ref))
	w.release(ref)
	w.nothingLeft()
}

// TestALostSnapshotIsMadeAgain: somebody removed it behind the cache's back.
func TestALostSnapshotIsMadeAgain(t *testing.T) {
	for _, k := range []kind{overlayKind, nativeKind} {
		t.Run(k.name, func(t *testing.T) {
			for _, settled := range []bool{true, false} {
				w := newWorld(t, k)
				r := newRegistry()
				ref, _ := w.chainOf(2, r)
				child := w.layer(ref, "mine", "x")
				require.NoError(t, child.Finalize(w.ctx))
				list, err := ref.LayerChain(w.ctx)
				require.NoError(t, err)
				lost := list[1].ID()
				w.release(list[0], list[1], ref, child)
				w.closeStore()
				// Not even a removal: the directory goes.
				require.NoError(t, os.RemoveAll(filepath.Join(w.root, "snapshots", "committed", string(lost))))
				if settled {
					w.tamper(func(snapshot.Driver, *metadata.Store) {})
				}
				w.reopenStore()
				top := w.get(child.ID())
				if settled {
					require.Equal(t, cache.Lazy, must(w.Lookup(w.ctx, lost)).State)
				}
				require.NoError(t, top.Extract(w.ctx))
				require.Equal(t, "f000=0 f001=1 mine=x", w.tree(top))
				state := cache.Finalized
				if k.name == nativeKind.name {
					state = cache.Lazy // the child is a whole tree, and needs no other
				}
				require.Equal(t, state, must(w.Lookup(w.ctx, lost)).State)
				w.release(top)
			}
		})
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// The blob of two layers is fetched for both at once: the one that is later
// finds that it is there.
func TestOneBlobIsFetchedForTwoLayersAtOnce(t *testing.T) {
	for _, k := range []kind{overlayKind, nativeKind} {
		t.Run(k.name, func(t *testing.T) {
			needRoot(t)
			var other func() error
			w := newWorldIn(t, k, filepath.Join(t.TempDir(), "store"), func(name string) error {
				if do := other; name == "blob ingest" && do != nil {
					other = nil
					return do()
				}
				return nil
			})
			b := pack(w, layer.Gzip, layerTar(w, file{name: "a", text: "1"}))
			r := newRegistry(b)
			base := w.sh(nil, "write b 2")
			one, two := w.byBlob(b, nil, r), w.byBlob(b, base, r)
			other = func() error { return one.Extract(w.ctx) }
			require.NoError(t, two.Extract(w.ctx))
			require.Nil(t, other)
			require.EqualValues(t, 2, r.reads.Load())
			require.Equal(t, "a=1 b=2", w.tree(two))
			require.Len(t, w.stored(), 1)
			require.True(t, two.Record().Blobs[0].Stored)
			w.nothingLeft()

			// It stays until the last that names it goes.
			w.release(one, two, base)
			out, err := w.Remove(w.ctx, one.ID())
			require.NoError(t, errors.Join(err, out[0].Err))
			require.Len(t, w.stored(), 1)
			out, err = w.Remove(w.ctx, two.ID())
			require.NoError(t, errors.Join(err, out[0].Err))
			require.Empty(t, w.stored())
		})
	}
}

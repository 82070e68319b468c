package cache_test

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

// removeAll removes records for good.
func (w *world) removeAll(ids ...cache.ID) {
	w.Helper()
	out, err := w.Remove(w.ctx, ids...)
	require.NoError(w, err)
	for _, o := range out {
		require.NoError(w, o.Err)
	}
}

func TestABlobGoesWithItsLastRecord(t *testing.T) {
	w := newWorld(t, overlayKind)
	b := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	r := newRegistry(b)
	base := w.sh(nil, "write x 1")
	alone, over := w.byBlob(b, nil, r), w.byBlob(b, base, r)
	require.NotEqual(t, alone.ID(), over.ID())
	require.NoError(t, alone.Extract(w.ctx))
	require.NoError(t, over.Extract(w.ctx))
	require.EqualValues(t, 1, r.reads.Load(), "the second finds the blob here")
	w.release(alone, over, base)
	w.removeAll(alone.ID())
	require.Equal(t, []digest.Digest{b.desc.Digest}, w.stored())
	u, err := w.DiskUsage(w.ctx, nil)
	require.NoError(t, err)
	out, err := w.Remove(w.ctx, over.ID())
	require.NoError(t, err)
	require.NoError(t, out[0].Err)
	after, err := w.DiskUsage(w.ctx, nil)
	require.NoError(t, err)
	require.Greater(t, u.Blobs, after.Blobs)
	require.Equal(t, u.Snapshots+u.Blobs-after.Snapshots-after.Blobs, out[0].Freed)
	require.Empty(t, w.stored())
	w.nothingLeft()
}

// TestAnEmptiedStoreHasNothingToReclaim: the directories of the content store
// stay, and count as what they are.
func TestAnEmptiedStoreHasNothingToReclaim(t *testing.T) {
	w := newWorld(t, overlayKind)
	b := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	ref := w.byBlob(b, nil, newRegistry(b))
	require.NoError(t, ref.Extract(w.ctx))
	w.release(ref)
	w.removeAll(ref.ID())
	u, err := w.DiskUsage(w.ctx, nil)
	require.NoError(t, err)
	require.Zero(t, u.Snapshots+u.Blobs+u.Reclaimable)
	var content, store unix.Stat_t
	require.NoError(t, unix.Stat(filepath.Join(w.root, "content", "blobs", "sha256"), &content))
	require.NoError(t, unix.Stat(filepath.Join(w.root, cache.StoreFile), &store))
	require.GreaterOrEqual(t, u.Database, (store.Blocks+content.Blocks)*512)
	require.Equal(t, u.Database, u.Total)
}

func TestUsageCountsBlobsOnce(t *testing.T) {
	w := newWorld(t, overlayKind)
	data := layerTar(t, file{name: "a", text: strings.Repeat("x", 100_000)})
	b := pack(t, layer.None, data)
	r := newRegistry(b)
	base := w.sh(nil, "write x 1")
	alone, over := w.byBlob(b, nil, r), w.byBlob(b, base, r)
	require.NoError(t, alone.Extract(w.ctx))
	require.NoError(t, over.Extract(w.ctx))
	u, err := w.DiskUsage(w.ctx, nil)
	require.NoError(t, err)
	require.GreaterOrEqual(t, u.Blobs, int64(len(data)))
	require.Less(t, u.Blobs, 2*int64(len(data)), "both records have it")
	require.Equal(t, u.Snapshots+u.Blobs, u.InUse+u.Reclaimable)
	require.GreaterOrEqual(t, u.InUse, u.Blobs-int64(16<<10), "it is in use by a handle")
	w.release(alone, over, base)
	u, err = w.DiskUsage(w.ctx, nil)
	require.NoError(t, err)
	require.Zero(t, u.InUse)
	require.GreaterOrEqual(t, u.Reclaimable, int64(len(data)))
}

func (w *world) readData(percent float64, found func(cache.Finding)) (cache.DataReport, error) {
	s, err := w.SampleData(w.ctx, percent)
	if err != nil {
		return cache.DataReport{}, err
	}
	return s.Read(w.ctx, found)
}

func TestFindingsAboutBlobs(t *testing.T) {
	for code, damage := range map[string]func(path string) error{
		cache.FindingBlobMissing: os.Remove,
		cache.FindingBlobSize:    func(path string) error { return os.Truncate(path, 7) },
		cache.FindingBlobDigest: func(path string) error {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			data[len(data)/2] ^= 1
			return os.WriteFile(path, data, 0o600)
		},
	} {
		t.Run(code, func(t *testing.T) {
			w := newWorld(t, overlayKind)
			ref, bare := w.sh(nil, "write a 1"), w.sh(nil, "write b 1")
			require.NoError(t, w.remotes(ref, gzipped).Release(w.ctx))
			var found []cache.Finding
			report, err := w.readData(1, func(f cache.Finding) { found = append(found, f) })
			require.NoError(t, err)
			require.Empty(t, append(found, w.findings()...))
			require.Equal(t, 1, report.Read)
			require.Equal(t, 1, report.Blobs)
			require.Equal(t, ref.Record().Blobs[0].Size, report.Bytes)
			require.Equal(t, 1, report.Unreferenced)

			d := w.stored()[0]
			require.NoError(t, damage(filepath.Join(w.root, "content", "blobs", "sha256", d.Encoded())))
			w.broken = true
			found = w.findings()
			if code == cache.FindingBlobDigest {
				require.Empty(t, found)
				_, err = w.readData(100, func(f cache.Finding) { found = append(found, f) })
				require.NoError(t, err)
			}
			require.Len(t, found, 1)
			require.Equal(t, cache.Finding{Code: code, ID: ref.ID(), Key: string(d), Message: found[0].Message}, found[0])
			w.release(ref, bare)
		})
	}
	w := newWorld(t, overlayKind)
	for _, percent := range []float64{0, -1, 101} {
		_, err := w.readData(percent, nil)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
}

// labels keeps the labels of a content store in memory.
type labels struct {
	mu sync.Mutex
	of map[digest.Digest]map[string]string
}

func (l *labels) Get(d digest.Digest) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.of[d]), nil
}

func (l *labels) Set(d digest.Digest, to map[string]string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of[d] = maps.Clone(to)
	return nil
}

func (l *labels) Update(d digest.Digest, change map[string]string) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of[d] == nil {
		l.of[d] = map[string]string{}
	}
	for k, v := range change {
		if v == "" {
			delete(l.of[d], k)
		} else {
			l.of[d][k] = v
		}
	}
	return maps.Clone(l.of[d]), nil
}

const gcRoot = "containerd.io/gc.root"

// sharedWorlds are two caches on one content store.
func sharedWorlds(t *testing.T, gc bool) (one, two *world, store content.Store, of *labels) {
	of = &labels{of: map[digest.Digest]map[string]string{}}
	store, err := local.NewLabeledStore(t.TempDir(), of)
	require.NoError(t, err)
	open := func() *world {
		w := newWorld(t, overlayKind)
		w.opts = func(o *cache.Options) { o.Content, o.ContentGC = store, gc }
		w.reopenStore()
		return w
	}
	return open(), open(), store, of
}

func has(t testing.TB, s content.Store, d digest.Digest) bool {
	_, err := s.Info(t.Context(), d)
	if errdefs.IsNotFound(err) {
		return false
	}
	require.NoError(t, err)
	return true
}

func TestASharedContentStore(t *testing.T) {
	one, two, store, of := sharedWorlds(t, false)
	put := func(b blob, l map[string]string) {
		require.NoError(t, content.WriteBlob(t.Context(), store, b.desc.Digest.String(), bytes.NewReader(b.data), b.desc, content.WithLabels(l)))
	}
	ours := pack(t, layer.Gzip, layerTar(t, file{name: "ours", text: "1"}))
	theirs := pack(t, layer.Gzip, layerTar(t, file{name: "theirs", text: "1"}))
	rooted := pack(t, layer.Gzip, layerTar(t, file{name: "rooted", text: "1"}))
	stray := pack(t, layer.Gzip, layerTar(t, file{name: "stray", text: "1"}))
	put(theirs, map[string]string{"somebody": "else"})
	put(rooted, map[string]string{gcRoot: "long ago"})
	put(stray, map[string]string{"somebody": "else"})

	r := newRegistry(ours)
	var refs []*cache.ImmutableRef
	for _, w := range []*world{one, two} {
		for _, b := range []blob{ours, theirs, rooted} {
			ref := w.byBlob(b, nil, r)
			require.NoError(t, ref.Extract(w.ctx))
			refs = append(refs, ref)
		}
	}
	require.EqualValues(t, 1, r.reads.Load())
	for _, b := range []blob{ours, theirs, rooted} {
		require.NotEmpty(t, of.of[b.desc.Digest][gcRoot], "the collector keeps it")
	}
	require.Equal(t, map[string]string{"somebody": "else"}, of.of[stray.desc.Digest])
	_, err := os.Lstat(filepath.Join(one.root, "content"))
	require.ErrorIs(t, err, os.ErrNotExist)

	for i, w := range []*world{one, two} {
		w.release(refs[3*i], refs[3*i+1], refs[3*i+2])
		w.removeAll(idsOf(w)...)
		require.Equal(t, i == 0, has(t, store, ours.desc.Digest), "the last one deletes what one of them wrote")
		require.True(t, has(t, store, theirs.desc.Digest))
	}
	require.Equal(t, map[string]string{"somebody": "else"}, of.of[theirs.desc.Digest], "as it was")
	require.Equal(t, map[string]string{gcRoot: "long ago"}, of.of[rooted.desc.Digest])
	require.True(t, has(t, store, stray.desc.Digest))
}

// TestAStoreWithACollector: nothing is deleted, only given up.
func TestAStoreWithACollector(t *testing.T) {
	one, _, store, of := sharedWorlds(t, true)
	b := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	ref := one.byBlob(b, nil, newRegistry(b))
	require.NoError(t, ref.Extract(one.ctx))
	require.NotEmpty(t, of.of[b.desc.Digest][gcRoot])
	one.release(ref)
	one.removeAll(ref.ID())
	require.True(t, has(t, store, b.desc.Digest))
	require.Empty(t, of.of[b.desc.Digest])
}

// TestForeignIngestsAreLeftAlone: of a shared store, and of a directory that
// was a daemon's before.
func TestForeignIngestsAreLeftAlone(t *testing.T) {
	one, _, store, _ := sharedWorlds(t, false)
	w, err := store.Writer(t.Context(), content.WithRef("layer-sha256:somebody"))
	require.NoError(t, err)
	_, err = w.Write([]byte("half"))
	require.NoError(t, err)
	one.crash()
	one.reopenStore()
	list, err := store.ListStatuses(t.Context())
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.NoError(t, w.Close())

	own := newWorld(t, overlayKind)
	dir := filepath.Join(own.root, "content", "ingest", "deadbeef")
	require.NoError(t, os.MkdirAll(dir, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "ref"), []byte("buildkit-pull"), 0o600))
	own.crash()
	own.reopenStore()
	_, err = os.Lstat(filepath.Join(own.root, "content", "ingest", "deadbeef", "ref"))
	require.NoError(t, err)
}

// TestBlobWriter writes blobs while the store is closed, and others use it.
func TestBlobWriter(t *testing.T) {
	w := newWorld(t, overlayKind)
	kept, lost := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"})), pack(t, layer.Gzip, layerTar(t, file{name: "b", text: "1"}))
	out, err := w.BlobWriter(w.ctx)
	require.NoError(t, err)
	w.closeStore()
	for _, b := range []blob{kept, lost} {
		require.NoError(t, out.Put(w.ctx, b.desc, bytes.NewReader(b.data)))
	}
	require.ErrorIs(t, out.Put(w.ctx, pack(t, layer.Gzip, nil).desc, bytes.NewReader(kept.data)), errdefs.ErrDataLoss)
	w.reopenStore() // as another process would
	require.Len(t, w.stored(), 2, "they are left alone while somebody writes")
	w.closeStore()
	w.reopenStore()
	ref := w.byBlob(kept, nil, nil)
	require.True(t, ref.Record().Blobs[0].Stored)
	require.Equal(t, "a=1", w.tree(ref))
	w.release(ref)
	require.NoError(t, out.Release())
	require.NoError(t, out.Release())
	require.ErrorIs(t, out.Put(w.ctx, lost.desc, nil), errdefs.ErrFailedPrecondition)
	w.closeStore()
	require.Equal(t, []digest.Digest{kept.desc.Digest}, w.stored(), "what no record named is gone")
	_, err = os.Lstat(filepath.Join(w.root, "clean"))
	require.NoError(t, err)
}

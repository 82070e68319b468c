package integration

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/layer"
)

// load is what the workers of the soak share: a store, the layers that they
// get, and the ids that they may meet.
type load struct {
	*cache.Manager
	sums *checksum.Keeper
	layers

	mu sync.Mutex
	// Guarded by mu.
	ids     []cache.ID
	digests map[cache.ID]digest.Digest
	done    map[string]int
}

// layers are blobs, as a registry would serve them.
type layers struct {
	descs []ocispec.Descriptor
	data  map[digest.Digest][]byte
}

func newLayers(t testing.TB, n int) (l layers) {
	l.data = map[digest.Digest][]byte{}
	for i := range n {
		var plain, packed bytes.Buffer
		w := tar.NewWriter(&plain)
		for _, name := range []string{"common", fmt.Sprint("layer", i)} {
			text := bytes.Repeat([]byte(fmt.Sprintf("%s of %d\n", name, i)), 100)
			require.NoError(t, w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(text))}))
			_, err := w.Write(text)
			require.NoError(t, err)
		}
		require.NoError(t, w.Close())
		z := gzip.NewWriter(&packed)
		_, err := z.Write(plain.Bytes())
		require.NoError(t, errors.Join(err, z.Close()))
		d := ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(packed.Bytes()), Size: int64(packed.Len()),
			Annotations: map[string]string{"containerd.io/uncompressed": digest.FromBytes(plain.Bytes()).String()},
		}
		l.descs, l.data[d.Digest] = append(l.descs, d), packed.Bytes()
	}
	return l
}

// ReaderAt implements content.Provider.
func (l layers) ReaderAt(_ context.Context, d ocispec.Descriptor) (content.ReaderAt, error) {
	data, there := l.data[d.Digest]
	if !there {
		return nil, errdefs.ErrNotFound
	}
	return servedLayer{bytes.NewReader(data)}, nil
}

type servedLayer struct{ *bytes.Reader }

func (servedLayer) Close() error { return nil }

func (l *load) heard(id cache.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ids = append(l.ids, id)
}

func (l *load) some(rng *rand.Rand) (cache.ID, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.ids) == 0 {
		return "", false
	}
	return l.ids[rng.IntN(len(l.ids))], true
}

func (l *load) count(what string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.done[what]++
}

// lost says whether an operation lost against another one, as it may.
func lost(err error) bool {
	return errors.Is(err, cache.ErrLocked) || errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err)
}

// deed is one thing that a worker does. What it loses against others is no
// failure of the soak.
type deed struct {
	name string
	do   func(ctx context.Context, l *load, rng *rand.Rand) error
}

var soakDeeds = []deed{
	{"write", func(ctx context.Context, l *load, rng *rand.Rand) error { return l.write(ctx, nil, rng) }},
	{"child", with(func(ctx context.Context, l *load, rng *rand.Rand, ref *cache.ImmutableRef) error {
		return l.write(ctx, ref, rng)
	})},
	{"read", with(func(ctx context.Context, _ *load, _ *rand.Rand, ref *cache.ImmutableRef) error {
		twin, err := ref.Clone()
		if err != nil {
			return err
		}
		mnt, err := twin.Mount(ctx)
		if err != nil {
			return errors.Join(err, twin.Release(ctx))
		}
		err = filepath.WalkDir(mnt.Path(), func(string, fs.DirEntry, error) error { return nil })
		return errors.Join(err, mnt.Unmount(), twin.Release(ctx), twin.Release(ctx))
	})},
	{"finalize", with(func(ctx context.Context, _ *load, _ *rand.Rand, ref *cache.ImmutableRef) error {
		return ref.Finalize(ctx)
	})},
	{"edit", with(func(ctx context.Context, _ *load, rng *rand.Rand, ref *cache.ImmutableRef) error {
		return ref.Edit(ctx, func(e *cache.Edit) error {
			return errors.Join(e.SetValue(cache.Value{Name: "w", Index: fmt.Sprint("key", rng.IntN(5))}), e.Attach("log", make([]byte, rng.IntN(2000))))
		})
	})},
	{"reopen", reopenSome},
	{"layer", getLayer},
	{"merge", twoOf(func(ctx context.Context, l *load, a, b *cache.ImmutableRef) (*cache.ImmutableRef, error) {
		return l.Merge(ctx, []*cache.ImmutableRef{a, b}, cache.MergeOptions{})
	})},
	{"diff", twoOf(func(ctx context.Context, l *load, a, b *cache.ImmutableRef) (*cache.ImmutableRef, error) {
		return l.Diff(ctx, a, b, cache.MergeOptions{})
	})},
	{"blobs", with(func(ctx context.Context, _ *load, _ *rand.Rand, ref *cache.ImmutableRef) error {
		r, err := ref.GetRemotes(ctx, cache.RemotesOptions{Create: true, Compression: cache.Compression{Algorithm: layer.Gzip}})
		if err != nil {
			return err
		}
		return r.Release(ctx)
	})},
	{"hash", with(func(ctx context.Context, l *load, _ *rand.Rand, ref *cache.ImmutableRef) error {
		d, err := l.sums.Checksum(ctx, ref, "/", contenthash.Options{})
		if err != nil {
			return err
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if first, known := l.digests[ref.ID()]; known && first != d {
			return fmt.Errorf("record %s had the digest %s and has %s", ref.ID(), first, d)
		}
		l.digests[ref.ID()] = d
		return nil
	})},
	{"cache directory", useDirectory},
	{"search", func(ctx context.Context, l *load, rng *rand.Rand) error {
		_, err := l.Search(ctx, fmt.Sprint("key", rng.IntN(5)))
		return err
	}},
	{"usage", func(ctx context.Context, l *load, _ *rand.Rand) error {
		u, err := l.DiskUsage(ctx, nil)
		if err == nil && (u.Total != u.Snapshots+u.Blobs+u.Database+u.Pending || u.InUse+u.Reclaimable != u.Snapshots+u.Blobs) {
			err = fmt.Errorf("the usage does not add up: %+v", u)
		}
		return err
	}},
	{"sync", func(ctx context.Context, l *load, _ *rand.Rand) error {
		_, err := l.Sync(ctx)
		return err
	}},
	{"prune", func(ctx context.Context, l *load, rng *rand.Rand) error {
		p := policy.Policy{All: true, MaxUsed: policy.Bytes(int64(rng.IntN(500_000)))}
		if rng.IntN(2) == 0 {
			p = policy.Policy{Types: []string{cache.TypeCacheMount}}
		}
		out, err := l.Prune(ctx, p)
		for _, r := range out.Failed {
			if !lost(r.Err) {
				err = errors.Join(err, r.Err)
			}
		}
		return err
	}},
	{"remove", func(ctx context.Context, l *load, rng *rand.Rand) error {
		id, there := l.some(rng)
		if !there {
			return nil
		}
		out, err := l.Remove(ctx, id)
		if err == nil {
			err = out[0].Err
		}
		return err
	}},
}

// with runs fn on a handle of a record that somebody made.
func with(fn func(context.Context, *load, *rand.Rand, *cache.ImmutableRef) error) func(context.Context, *load, *rand.Rand) error {
	return func(ctx context.Context, l *load, rng *rand.Rand) error {
		id, there := l.some(rng)
		if !there {
			return nil
		}
		ref, err := l.Get(ctx, id, cache.GetOptions{})
		if err != nil {
			return err
		}
		return errors.Join(fn(ctx, l, rng, ref), ref.Release(ctx))
	}
}

// twoOf makes a record of two, and its snapshot now and then.
func twoOf(join func(ctx context.Context, l *load, a, b *cache.ImmutableRef) (*cache.ImmutableRef, error)) func(context.Context, *load, *rand.Rand) error {
	return with(func(ctx context.Context, l *load, rng *rand.Rand, a *cache.ImmutableRef) error {
		return with(func(ctx context.Context, l *load, rng *rand.Rand, b *cache.ImmutableRef) error {
			ref, err := join(ctx, l, a, b)
			if err != nil {
				return err
			}
			l.heard(ref.ID())
			if rng.IntN(2) == 0 {
				err = ref.Extract(ctx)
			}
			return errors.Join(err, ref.Release(ctx))
		})(ctx, l, rng)
	})
}

// write makes a record with a few files.
func (l *load) write(ctx context.Context, parent *cache.ImmutableRef, rng *rand.Rand) error {
	mut, err := l.New(ctx, parent, cache.NewOptions{
		Retain: rng.IntN(3) == 0, Values: []cache.Value{{Name: "k", Index: fmt.Sprint("key", rng.IntN(5))}},
	})
	if err != nil {
		return err
	}
	return l.fill(ctx, mut, rng)
}

// fill writes into a mutable record and commits it, or gives it up.
func (l *load) fill(ctx context.Context, mut *cache.MutableRef, rng *rand.Rand) error {
	mnt, err := mut.Mount(ctx, cache.MountOptions{})
	if err == nil {
		err = errors.Join(
			os.WriteFile(filepath.Join(mnt.Path(), "id"), []byte(mut.ID()), 0o644),
			os.WriteFile(filepath.Join(mnt.Path(), fmt.Sprint("file", rng.IntN(4))), make([]byte, rng.IntN(20_000)), 0o644),
			os.MkdirAll(filepath.Join(mnt.Path(), fmt.Sprint("dir", rng.IntN(3))), 0o755),
			os.RemoveAll(filepath.Join(mnt.Path(), fmt.Sprint("dir", rng.IntN(3)))),
			mnt.Unmount(),
		)
	}
	if err != nil || rng.IntN(5) == 0 {
		l.heard(mut.ID())
		return errors.Join(err, mut.Release(ctx))
	}
	ref, err := mut.Commit(ctx)
	if err != nil {
		return errors.Join(err, mut.Release(ctx))
	}
	l.heard(ref.ID())
	return ref.Release(ctx)
}

func reopenSome(ctx context.Context, l *load, rng *rand.Rand) error {
	id, there := l.some(rng)
	if !there {
		return nil
	}
	mut, err := l.GetMutable(ctx, id)
	if err != nil {
		return err
	}
	if mut.ID() != id {
		if _, err := l.Get(ctx, id, cache.GetOptions{}); !errdefs.IsNotFound(err) {
			return errors.Join(fmt.Errorf("record %s was reopened as %s and is still there: %w", id, mut.ID(), err), mut.Release(ctx))
		}
	}
	return l.fill(ctx, mut, rng)
}

// getLayer makes a chain of one to three layers, and its snapshots now and
// then.
func getLayer(ctx context.Context, l *load, rng *rand.Rand) error {
	var parent *cache.ImmutableRef
	for range 1 + rng.IntN(3) {
		ref, err := l.GetByBlob(ctx, l.descs[rng.IntN(len(l.descs))], parent, cache.BlobOptions{Provider: l.layers})
		if parent != nil {
			err = errors.Join(err, parent.Release(ctx))
		}
		if err != nil {
			return err
		}
		l.heard(ref.ID())
		parent = ref
	}
	var err error
	if rng.IntN(2) == 0 {
		err = parent.Extract(ctx)
	}
	return errors.Join(err, parent.Release(ctx))
}

// useDirectory works in a cache directory, as a build command does that has
// one mounted.
func useDirectory(ctx context.Context, l *load, rng *rand.Rand) error {
	name := fmt.Sprint("tool", rng.IntN(3))
	ids, err := l.Search(ctx, cache.DirectoryIndex(name))
	if err != nil {
		return err
	}
	if len(ids) == 0 {
		mut, err := l.New(ctx, nil, cache.DirectoryOptions(name))
		if err != nil {
			return err
		}
		ids = []cache.ID{mut.ID()}
		if err := mut.Release(ctx); err != nil {
			return err
		}
	}
	hold, dir, err := l.HoldDirectory(ctx, ids[0], rng.IntN(2) == 0)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(dir, fmt.Sprint("entry", rng.IntN(9))), make([]byte, 4000), 0o644), hold.Release())
}

package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Operations on layers: taken in as blobs, extracted, merged, compared, written
// as blobs. What they make is removed after each sample, and the disk is at rest
// before the next.

const (
	// layerFiles is how many files a layer of an image has here, imageLayers
	// how many layers, and mergeInputs how many records one merge has.
	layerFiles  = 1000
	imageLayers = 3
	mergeInputs = 5
	// manyFiles are those of a layer that is extracted by itself.
	manyFiles = 50_000
)

// someLayers are the files of an image of several layers and, where there is
// time for it, of one large layer.
func someLayers(c *Config) []int {
	ns := []int{imageLayers * min(c.Files, layerFiles)}
	if c.Files >= manyFiles {
		ns = append(ns, c.Files)
	}
	return ns
}

func oneLayer(c *Config) []int    { return []int{min(c.Files, layerFiles)} }
func largeLayer(c *Config) []int  { return []int{min(c.Files, 5*layerFiles)} }
func mergeLayers(c *Config) []int { return []int{mergeInputs * min(c.Files, layerFiles)} }

func layerOperations() []operation {
	return []operation{
		{
			name: "getbyblob", batch: 1, prepare: prepareGetByBlob, limit: limitSetValue,
			note: "a record for a layer that nobody had, its blob not here; limit: one bbolt put in a transaction of its own",
		},
		{
			name: "getbyblob-known", batch: 20, prepare: prepareGetByBlobKnown, limit: limitGet,
			note: "a layer that has a record, and its release; limit: one bbolt get, its checksum and a copy",
		},
		{
			name: "extract", batch: 1, rounds: 6, sizes: someLayers, footprint: true, tool: "tar",
			prepare: prepareExtract(false), limit: limitExtract(false, "tar", "-xf"),
			note: "n files of 3.5 KB in three layers, 50,000 in one, uncompressed blobs in the content store; limit: tar -xf of each",
		},
		{
			name: "extract-gzip", batch: 1, rounds: 6, sizes: someLayers, footprint: true, tool: "tar",
			prepare: prepareExtract(true), limit: limitExtract(true, "tar", "-xzf"),
			note: "the same from gzip; limit: tar -xzf",
		},
		{
			name: "extract-bsdtar", batch: 1, rounds: 6, sizes: someLayers, ownOnly: true, tool: "bsdtar",
			prepare: prepareExtract(false), limit: limitExtract(false, "bsdtar", "-xf"),
			note: "as extract; in the place of the limit: bsdtar -xf",
		},
		{
			name: "merge", batch: 1, rounds: 8, sizes: mergeLayers, footprint: true, prepare: prepareMerge, limit: limitMerge,
			note: "of five finalized records with n files in all, and its extraction; limit: a directory with a hard link for each input, and one bbolt put",
		},
		{
			name: "diff", batch: 1, rounds: 8, sizes: oneLayer, footprint: true, prepare: prepareDiff, limit: limitMerge,
			note: "of a record and its child with n more files, and its extraction; limit: as of merge",
		},
		{
			name: "blob", batch: 1, rounds: 6, sizes: largeLayer, footprint: true, tool: "tar", prepare: prepareBlob(false), limit: limitBlob("-cf"),
			note: "the uncompressed layer blob of a finalized record with n files; limit: tar -cf",
		},
		{
			name: "blob-gzip", batch: 1, rounds: 6, sizes: largeLayer, footprint: true, tool: "tar", prepare: prepareBlob(true), limit: limitBlob("-czf"),
			note: "the same, gzip; limit: tar -czf",
		},
	}
}

// LayerBlob is the blob of a layer in a file. Its descriptor says by the
// annotation containerd.io/uncompressed what it is before compression.
type LayerBlob struct {
	ocispec.Descriptor
	Path string
}

// image is a directory with the blobs of layers of n files in all, made when it
// is first asked for.
func image(dir string, n int, gzip bool) ([]LayerBlob, error) {
	layers := imageLayers
	if n >= manyFiles {
		layers = 1
	}
	dir = filepath.Join(dir, fmt.Sprintf("image-%d-%t", n, gzip))
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	blobs := make([]LayerBlob, layers)
	for i := range blobs {
		var err error
		if blobs[i], err = layerBlob(filepath.Join(dir, strconv.Itoa(i)), n/layers, i, gzip); err != nil {
			return nil, err
		}
	}
	return blobs, nil
}

// lazyImage puts the blobs of an image into the subject's content store and
// gives the record of the topmost one.
func (w *world) lazyImage(ctx context.Context, blobs []LayerBlob) (top Immutable, err error) {
	for _, b := range blobs {
		var next Immutable
		if err = w.subject.PutBlob(ctx, b); err == nil {
			next, err = w.subject.GetByBlob(ctx, b, top)
		}
		if top != nil {
			err = errors.Join(err, top.Release(ctx))
		}
		if err != nil {
			return nil, err
		}
		top = next
	}
	return top, nil
}

// gone releases handles on victims and removes these.
func (w *world) gone(refs ...Immutable) func(context.Context) error {
	return func(ctx context.Context) error {
		var errs []error
		for _, ref := range refs {
			errs = append(errs, ref.Release(ctx))
		}
		_, err := w.subject.Prune(ctx, Victims, nil)
		return errors.Join(append(errs, err)...)
	}
}

// atRest writes what is dirty on the disk of dir, so that a sample does not wait
// for what the one before it left.
func atRest(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// unseen describes a layer that nobody has.
func (w *world) unseen() LayerBlob {
	w.turn++
	return LayerBlob{Descriptor: ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerGzip,
		Digest:    digest.FromString(fmt.Sprintf("blob %d", w.turn)), Size: 1,
		Annotations: map[string]string{uncompressed: string(digest.FromString(fmt.Sprintf("layer %d", w.turn)))},
	}}
}

func prepareGetByBlob(_ context.Context, w *world, _ int) (sample, error) {
	blob := w.unseen()
	var ref Immutable
	return sample{
		run: func(ctx context.Context) (err error) {
			ref, err = w.subject.GetByBlob(ctx, blob, nil)
			return err
		},
		after: func(ctx context.Context) error { return w.gone(ref)(ctx) },
	}, nil
}

func prepareGetByBlobKnown(ctx context.Context, w *world, _ int) (sample, error) {
	blob := w.unseen()
	first, err := w.subject.GetByBlob(ctx, blob, nil)
	if err != nil {
		return sample{}, err
	}
	return sample{
		run: func(ctx context.Context) error {
			again, err := w.subject.GetByBlob(ctx, blob, nil)
			if err != nil {
				return err
			}
			return again.Release(ctx)
		},
		after: w.gone(first),
	}, nil
}

// extracted measures the extraction of what get gives.
func (w *world) extracted(get func(ctx context.Context) (Immutable, error)) (sample, error) {
	var ref Immutable
	return sample{
		run: func(ctx context.Context) (err error) {
			if ref, err = get(ctx); err != nil {
				return err
			}
			return ref.Extract(ctx)
		},
		after: func(ctx context.Context) error { return w.gone(ref)(ctx) },
	}, atRest(w.dir)
}

func prepareExtract(gzip bool) func(context.Context, *world, int) (sample, error) {
	return func(ctx context.Context, w *world, n int) (sample, error) {
		blobs, err := image(filepath.Dir(w.dir), n, gzip)
		if err != nil {
			return sample{}, err
		}
		top, err := w.lazyImage(ctx, blobs)
		if err != nil {
			return sample{}, err
		}
		return w.extracted(func(context.Context) (Immutable, error) { return top, nil })
	}
}

func prepareMerge(ctx context.Context, w *world, n int) (sample, error) {
	for len(w.inputs) < mergeInputs {
		imm, err := w.filled(ctx, nil, fmt.Sprintf("input-%d", len(w.inputs)), n/mergeInputs)
		if err != nil {
			return sample{}, err
		}
		w.inputs = append(w.inputs, imm)
	}
	return w.extracted(func(ctx context.Context) (Immutable, error) { return w.subject.Merge(ctx, w.inputs) })
}

func prepareDiff(ctx context.Context, w *world, n int) (sample, error) {
	if w.child == nil {
		var err error
		if w.child, err = w.filled(ctx, w.base, "more", n); err != nil {
			return sample{}, err
		}
	}
	return w.extracted(func(ctx context.Context) (Immutable, error) { return w.subject.Diff(ctx, w.base, w.child) })
}

func prepareBlob(gzip bool) func(context.Context, *world, int) (sample, error) {
	return func(ctx context.Context, w *world, n int) (sample, error) {
		imm, err := w.filled(ctx, nil, "files", n)
		if err != nil {
			return sample{}, err
		}
		return sample{
			run:   func(ctx context.Context) error { return imm.Blob(ctx, gzip) },
			after: w.gone(imm),
		}, atRest(w.dir)
	}
}

// filled makes a finalized victim with n files below the directory sub.
func (w *world) filled(ctx context.Context, parent Immutable, sub string, n int) (Immutable, error) {
	mut, err := w.subject.NewVictim(ctx, parent)
	if err != nil {
		return nil, err
	}
	err = mut.Change(ctx, func(dir string) error { return writeTree(filepath.Join(dir, sub), n) })
	if err != nil {
		return nil, errors.Join(err, mut.Release(ctx))
	}
	imm, err := mut.Commit(ctx)
	if err != nil {
		return nil, errors.Join(err, mut.Release(ctx))
	}
	if err := imm.Finalize(ctx); err != nil {
		return nil, errors.Join(err, imm.Release(ctx))
	}
	return imm, nil
}

// limitExtract has a program extract each layer into a directory.
func limitExtract(gzip bool, program string, args ...string) func(context.Context, *limits, int) (sample, error) {
	return func(_ context.Context, l *limits, n int) (sample, error) {
		blobs, err := image(filepath.Dir(l.dir), n, gzip)
		if err != nil {
			return sample{}, err
		}
		dir := l.name("new", l.next())
		return sample{
			run: func(ctx context.Context) error {
				for i, b := range blobs {
					into := filepath.Join(dir, strconv.Itoa(i))
					if err := os.MkdirAll(into, 0o700); err != nil {
						return err
					}
					if err := execute(ctx, into, program, append(args, b.Path)...); err != nil {
						return err
					}
				}
				return nil
			},
			after: func(context.Context) error { return os.RemoveAll(dir) },
		}, atRest(l.dir)
	}
}

// limitMerge makes a directory with a hard link for each of the inputs.
func limitMerge(_ context.Context, l *limits, _ int) (sample, error) {
	i := l.next()
	dir, input := l.name("new", i), filepath.Join(l.dir, "input")
	if err := os.WriteFile(input, nil, 0o600); err != nil {
		return sample{}, err
	}
	return sample{run: func(context.Context) error {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		for at := range mergeInputs {
			if err := os.Link(input, filepath.Join(dir, strconv.Itoa(at))); err != nil {
				return err
			}
		}
		return errors.Join(os.Rename(dir, l.name("committed", i)), l.put(i))
	}}, nil
}

// limitBlob has tar write an archive of n files.
func limitBlob(flag string) func(context.Context, *limits, int) (sample, error) {
	return func(_ context.Context, l *limits, n int) (sample, error) {
		dir, err := l.tree(n)
		if err != nil {
			return sample{}, err
		}
		archive := l.name("new", l.next())
		return sample{
			run:   func(ctx context.Context) error { return execute(ctx, dir, "tar", flag, archive, ".") },
			after: func(context.Context) error { return os.Remove(archive) },
		}, atRest(l.dir)
	}
}

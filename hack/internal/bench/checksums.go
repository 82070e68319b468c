package bench

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"
)

// Operations on the content hashes of a record with n files, 50 in a
// directory, of 3.5 KB each.

// filesPerDir and treeFileSize make 50,000 files a source tree of 175 MB.
const (
	filesPerDir  = 50
	treeFileSize = 3500
)

// allFiles are as many files as Config.Files says, someFiles a fifth of that:
// for operations that need a new tree for each sample.
func allFiles(c *Config) []int  { return []int{c.Files} }
func someFiles(c *Config) []int { return []int{max(c.Files/5, filesPerDir)} }

func checksumOperations() []operation {
	return []operation{
		{
			name: "checksum-cold", batch: 1, rounds: 6, sizes: allFiles, prepare: prepareChecksumCold, limit: limitReadTree,
			note: "of the whole tree, nothing known of it, page cache warm; what is learned is stored later, by both; " +
				"limit: all files are read and hashed by as many goroutines as there are processors",
		},
		{
			name: "checksum-memory", batch: 20, sizes: allFiles, prepare: prepareChecksumMemory, limit: limitRelease,
			note: "again; limit: a look into memory under a lock",
		},
		{
			name: "checksum-stored", batch: 1, sizes: allFiles, prepare: prepareChecksumStored, limit: limitReadPages,
			note: "nothing in memory, but all of it stored, as after a restart; limit: 60 bytes for each file are read from bbolt",
		},
		{
			name: "checksum-after-finalize", batch: 1, rounds: 3, sizes: someFiles, prepare: prepareChecksumFinalized, limit: limitRelease,
			note: "of a record whose digest was known when it was finalized; limit: a look into memory under a lock",
		},
		{
			name: "checksum-child", batch: 1, rounds: 5, sizes: allFiles, prepare: prepareChecksumChild, limit: limitReadFile,
			note: "of a new child of a known record in which one file changed; limit: one file is read and hashed",
		},
		{
			name: "checksum-one-change", batch: 1, sizes: allFiles, prepare: prepareChecksumChange, limit: limitPutPage,
			note: "one file is reported with its digest, the digest of the whole is computed, and what changed is stored; " +
				"limit: one bbolt put of 16 KiB in a transaction of its own",
		},
	}
}

// tree is a finalized record with n files whose digest is known, made when
// first asked for.
func (w *world) tree(ctx context.Context, n int) (Immutable, error) {
	if imm, ok := w.trees[n]; ok {
		return imm, nil
	}
	imm, err := w.newTree(ctx, n)
	if err != nil {
		return nil, err
	}
	w.trees[n] = imm
	if err := imm.Finalize(ctx); err != nil {
		return nil, err
	}
	_, err = imm.Checksum(ctx)
	return imm, err
}

// newTree is a committed record with n files.
func (w *world) newTree(ctx context.Context, n int) (Immutable, error) {
	mut, err := w.subject.New(ctx, nil)
	if err != nil {
		return nil, err
	}
	err = mut.Change(ctx, func(dir string) error { return writeTree(dir, n) })
	if err != nil {
		return nil, errors.Join(err, mut.Release(ctx))
	}
	imm, err := mut.Commit(ctx)
	if err != nil {
		return nil, errors.Join(err, mut.Release(ctx))
	}
	return imm, nil
}

func treeFile(i int) string {
	return fmt.Sprintf("dir%02d/sub%04d/file%02d.go", i/filesPerDir%25, i/filesPerDir, i%filesPerDir)
}

func writeTree(dir string, n int) error {
	for i := range n {
		path := filepath.Join(dir, treeFile(i))
		if i%filesPerDir == 0 {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(path, treeContent(i), 0o644); err != nil { //nolint:gosec // a source file
			return err
		}
	}
	return nil
}

func treeContent(i int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "%d ", i), treeFileSize)[:treeFileSize]
}

// stored has what is learned from a question stored before anything else is
// measured, and ends with then.
func stored(imm Immutable, then func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		return errors.Join(imm.ForgetChecksum(ctx, false), then(ctx))
	}
}

// checksum asks for a digest and looks that there is one.
func checksum(imm Immutable) func(context.Context) error {
	return func(ctx context.Context) error {
		d, err := imm.Checksum(ctx)
		if err == nil && d == "" {
			err = errors.New("the digest is empty")
		}
		return err
	}
}

func prepareChecksumCold(ctx context.Context, w *world, n int) (sample, error) {
	imm, err := w.tree(ctx, n)
	if err != nil {
		return sample{}, err
	}
	keep := func(context.Context) error { return nil }
	return sample{run: checksum(imm), after: stored(imm, keep)}, imm.ForgetChecksum(ctx, true)
}

func prepareChecksumMemory(ctx context.Context, w *world, n int) (sample, error) {
	imm, err := w.tree(ctx, n)
	if err != nil {
		return sample{}, err
	}
	return sample{run: checksum(imm)}, checksum(imm)(ctx)
}

func prepareChecksumStored(ctx context.Context, w *world, n int) (sample, error) {
	imm, err := w.tree(ctx, n)
	if err != nil {
		return sample{}, err
	}
	if err := checksum(imm)(ctx); err != nil {
		return sample{}, err
	}
	return sample{run: checksum(imm)}, imm.ForgetChecksum(ctx, false)
}

func prepareChecksumFinalized(ctx context.Context, w *world, n int) (sample, error) {
	imm, err := w.newTree(ctx, n)
	if err != nil {
		return sample{}, err
	}
	if err := checksum(imm)(ctx); err != nil {
		return sample{}, err
	}
	return sample{run: checksum(imm), after: stored(imm, imm.Release)}, imm.Finalize(ctx)
}

func prepareChecksumChild(ctx context.Context, w *world, n int) (sample, error) {
	base, err := w.tree(ctx, n)
	if err != nil {
		return sample{}, err
	}
	if err := checksum(base)(ctx); err != nil {
		return sample{}, err
	}
	mut, err := w.subject.New(ctx, base)
	if err != nil {
		return sample{}, err
	}
	w.turn++
	path := treeFile(w.turn * 7919 % n)
	err = mut.Change(ctx, func(dir string) error {
		return os.WriteFile(filepath.Join(dir, path), treeContent(w.turn), 0o644) //nolint:gosec // a source file
	})
	if err != nil {
		return sample{}, errors.Join(err, mut.Release(ctx))
	}
	imm, err := mut.Commit(ctx)
	if err != nil {
		return sample{}, errors.Join(err, mut.Release(ctx))
	}
	return sample{run: checksum(imm), after: stored(imm, imm.Release)}, nil
}

func prepareChecksumChange(ctx context.Context, w *world, n int) (sample, error) {
	imm, err := w.tree(ctx, n)
	if err != nil {
		return sample{}, err
	}
	if err := checksum(imm)(ctx); err != nil {
		return sample{}, err
	}
	w.turn++
	path, data := treeFile(w.turn*7919%n), treeContent(w.turn)
	return sample{run: func(ctx context.Context) error { return imm.ReportChange(ctx, path, data) }}, nil
}

// tree is a directory with n files, made when first asked for.
func (l *limits) tree(n int) (string, error) {
	dir := filepath.Join(l.dir, fmt.Sprintf("tree-%d", n))
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, fs.ErrExist) {
		return dir, nil
	}
	if err == nil {
		err = writeTree(dir, n)
	}
	return dir, err
}

// limitReadTree reads and hashes all files with all processors.
func limitReadTree(_ context.Context, l *limits, n int) (sample, error) {
	dir, err := l.tree(n)
	if err != nil {
		return sample{}, err
	}
	var g errgroup.Group
	return sample{run: func(context.Context) error {
		g.SetLimit(runtime.GOMAXPROCS(0))
		for from := 0; from < n; from += filesPerDir {
			g.Go(func() error {
				for i := from; i < min(from+filesPerDir, n); i++ {
					data, err := os.ReadFile(filepath.Join(dir, treeFile(i)))
					if err != nil {
						return err
					}
					sha256.Sum256(data)
				}
				return nil
			})
		}
		return g.Wait()
	}}, nil
}

func limitReadFile(_ context.Context, l *limits, n int) (sample, error) {
	dir, err := l.tree(n)
	if err != nil {
		return sample{}, err
	}
	path := filepath.Join(dir, treeFile(l.next()*7919%n))
	return sample{run: func(context.Context) error {
		data, err := os.ReadFile(path)
		sha256.Sum256(data)
		return err
	}}, nil
}

// pageBytes is the size of the pages that what is known of a tree is stored
// in, pageEntry what a file takes of it.
const (
	pageBytes = 16 << 10
	pageEntry = 60
)

var pageBucket = []byte("page")

// pages makes as many pages as n files take.
func (l *limits) pages(n int) (count int, err error) {
	count = max(n*pageEntry/pageBytes, 1)
	return count, l.db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(pageBucket)
		if err != nil || b.Get(recordKey(count-1)) != nil {
			return err
		}
		for i := range count {
			if err := b.Put(recordKey(i), bytes.Repeat([]byte{byte(i)}, pageBytes)); err != nil {
				return err
			}
		}
		return nil
	})
}

func limitReadPages(_ context.Context, l *limits, n int) (sample, error) {
	count, err := l.pages(n)
	return sample{run: func(context.Context) error {
		return l.db.View(func(tx *bolt.Tx) error {
			for i := range count {
				crc32.Checksum(tx.Bucket(pageBucket).Get(recordKey(i)), castagnoli())
			}
			return nil
		})
	}}, err
}

func limitPutPage(_ context.Context, l *limits, n int) (sample, error) {
	count, err := l.pages(n)
	i := l.next()
	return sample{run: func(context.Context) error {
		return l.db.Update(func(tx *bolt.Tx) error {
			return tx.Bucket(pageBucket).Put(recordKey(i%count), bytes.Repeat([]byte{byte(i)}, pageBytes))
		})
	}}, err
}

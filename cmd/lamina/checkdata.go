package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
)

// dataView is what check --read-data read.
type dataView struct {
	// Files and Bytes were read and are what they were; Differ counts files
	// that are not.
	Files  uint64 `json:"files"`
	Bytes  uint64 `json:"bytes"`
	Differ int    `json:"differ"`
	// UnknownFiles and UnknownRecords have no digest to compare with: files
	// of records that have some, and records that have none at all.
	UnknownFiles   uint64 `json:"unknown_files"`
	UnknownRecords int    `json:"unknown_records"`
	// Blobs were read again, BlobBytes bytes of them; Differ counts those
	// that are damaged, too.
	Blobs     int   `json:"blobs"`
	BlobBytes int64 `json:"blob_bytes"`
	// Skipped are records that somebody held or removed meanwhile.
	Skipped int `json:"skipped"`
}

func (v *dataView) String() string {
	s := fmt.Sprintf("read %s, %s, and %s, %s; %d differ; without a stored digest: %s, %s",
		plural(int(v.Files), "file"), size(int64(v.Bytes)), plural(v.Blobs, "blob"), size(v.BlobBytes), v.Differ, plural(int(v.UnknownFiles), "file"), plural(v.UnknownRecords, "whole record"))
	if v.Skipped > 0 {
		s += fmt.Sprintf("; %s skipped, held or removed", plural(v.Skipped, "record"))
	}
	return s
}

// readData reads files of all records that have stored digests. The store is
// open only between records.
func (a *app) readData(ctx context.Context, percent float64) (found []finding, v *dataView, err error) {
	v = &dataView{}
	ids, blobs, err := a.withDigests(ctx, percent, v)
	if err != nil {
		return nil, nil, err
	}
	stop := a.progress("reading data", func() string { return size(int64(v.Bytes)) })
	defer stop()
	read, err := blobs.Read(ctx, func(f cache.Finding) { found = append(found, finding{Finding: f}) })
	if err != nil {
		return nil, nil, err
	}
	v.Blobs, v.BlobBytes = read.Read, read.Bytes
	for _, id := range ids {
		differ, err := a.readRecord(ctx, id, percent, v)
		if errors.Is(err, cache.ErrLocked) || errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
			v.Skipped++
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		for _, path := range differ {
			found = append(found, finding{Finding: cache.Finding{
				Code: checksum.FindingContent, ID: id, Key: printable([]byte("/" + path)), Message: "the file is not the one whose digest is stored",
			}})
		}
	}
	v.Differ = len(found)
	return found, v, nil
}

// withDigests lists the records of which digests are stored, counts the others,
// and chooses blobs.
func (a *app) withDigests(ctx context.Context, percent float64, v *dataView) (ids []cache.ID, blobs *cache.DataSample, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return nil, nil, err
	}
	defer shut(m, &err)
	if blobs, err = m.SampleData(ctx, percent); err != nil {
		return nil, nil, err
	}
	with, without, err := checksum.Stored(ctx, m)
	v.UnknownRecords = len(without)
	return with, blobs, err
}

// readRecord reads files of one record, with the store closed.
func (a *app) readRecord(ctx context.Context, id cache.ID, percent float64, v *dataView) (differ []string, err error) {
	tree, h, err := a.takeTree(ctx, id)
	if err != nil {
		return nil, err
	}
	got, err := tree.Verify(ctx, contenthash.Dir(h.path), percent)
	v.Files += got.Files
	v.Bytes += got.Bytes
	v.UnknownFiles += got.Unknown
	return got.Differ, errors.Join(err, h.end())
}

// takeTree mounts a record and loads its tree.
func (a *app) takeTree(ctx context.Context, id cache.ID) (tree *checksum.Tree, h *held, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return nil, nil, err
	}
	defer shut(m, &err)
	ref, err := m.Get(ctx, id, cache.GetOptions{NoUpdate: true})
	if err != nil {
		return nil, nil, err
	}
	if tree, err = checksum.Load(ctx, m, ref); err != nil {
		return nil, nil, errors.Join(err, ref.Release(ctx))
	}
	h, err = a.keep(ctx, ref, func() (*cache.Mount, error) { return ref.Mount(ctx) })
	return tree, h, err
}

// dropTrees removes stored content hashes that are damaged: they are computed
// anew when somebody wants them.
func (a *app) dropTrees(ctx context.Context, findings []finding) (err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return err
	}
	defer shut(m, &err)
	for _, f := range findings {
		if f.Code != checksum.FindingTreeDamaged {
			continue
		}
		if err := checksum.Drop(ctx, m, f.ID); err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, cache.ErrLocked) {
			return err
		}
	}
	return nil
}

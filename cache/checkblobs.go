package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"slices"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
)

// Codes of findings about blobs. Their Key is the digest.
const (
	// FindingBlobMissing: a blob that was in the content store is not there.
	FindingBlobMissing = "blob-missing"
	// FindingBlobSize: a blob has another size than its record says.
	FindingBlobSize = "blob-size"
	// FindingBlobDigest: a blob's bytes are not those of its digest. Only a
	// DataSample finds it.
	FindingBlobDigest = "blob-digest"
	// FindingBlobLayer: a lazy record has no blob but one that was found to hold
	// another layer than was said, so its snapshot cannot be made.
	FindingBlobLayer = "blob-layer"
)

// blobs compares records with the content store.
func (c *checking) blobs(ctx context.Context) error {
	for _, id := range slices.Sorted(maps.Keys(c.byID)) {
		rec := c.byID[id]
		if list, wrong := candidates(rec); wrong != nil && len(list) == 0 && rec.State == metadata.Lazy {
			c.report(Finding{Code: FindingBlobLayer, ID: id, Key: string(rec.Blobs[0].Digest), Message: wrong.Error()})
		}
		for _, blob := range rec.Blobs {
			if !blob.Stored {
				continue
			}
			size, there, err := c.m.blobs.size(ctx, blob.Digest)
			switch {
			case err != nil:
				return err
			case !there:
				c.report(Finding{Code: FindingBlobMissing, ID: id, Key: string(blob.Digest), Message: "a blob of the record is not in the content store"})
			case blob.Size > 0 && size != blob.Size:
				c.report(Finding{Code: FindingBlobSize, ID: id, Key: string(blob.Digest), Message: fmt.Sprintf("the blob has %d bytes, not %d", size, blob.Size)})
			}
		}
	}
	return nil
}

// DataReport says what a DataSample read.
type DataReport struct {
	// Blobs is how many there are, Read how many of them were read, with
	// Bytes bytes.
	Blobs, Read int
	Bytes       int64
	// Unreferenced is the number of snapshots whose layer has no blob that it
	// could be held against.
	Unreferenced int
}

// DataSample is a random sample of the blobs that are here.
type DataSample struct {
	m      *Manager
	sample []ownedBlob
	report DataReport
}

type ownedBlob struct {
	id   ID
	blob Blob
}

// SampleData chooses percent of the blobs at random, but at least one, to be
// read again. Files in snapshots are not among them: what they should hold is
// known to blobs alone.
func (m *Manager) SampleData(ctx context.Context, percent float64) (*DataSample, error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	if !(percent > 0 && percent <= 100) {
		return nil, fmt.Errorf("%v percent of the data: %w", percent, errdefs.ErrInvalidArgument)
	}
	s := &DataSample{m: m}
	blobs := map[digest.Digest]ownedBlob{}
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		for rec, err := range tx.Records() {
			if err != nil {
				continue // Check reports it
			}
			if rec.Key != "" && len(rec.Blobs) == 0 {
				s.report.Unreferenced++
			}
			for _, b := range rec.Blobs {
				blobs[b.Digest] = ownedBlob{rec.ID, b}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list blobs: %w", err)
	}
	for d, b := range blobs {
		if _, there, err := m.blobs.size(ctx, d); err != nil {
			return nil, err
		} else if there {
			s.sample = append(s.sample, b)
		}
	}
	s.report.Blobs = len(s.sample)
	rand.Shuffle(len(s.sample), func(i, j int) { s.sample[i], s.sample[j] = s.sample[j], s.sample[i] })
	most := int(math.Ceil(float64(len(s.sample)) * percent / 100))
	s.sample = s.sample[:min(most, len(s.sample))]
	return s, nil
}

// Read reads the blobs of the sample, and hands found each whose bytes do not
// have its digest. It changes nothing and does not need the cache to be open.
func (s *DataSample) Read(ctx context.Context, found func(Finding)) (DataReport, error) {
	out := s.report
	for _, b := range s.sample {
		n, err := s.m.readBlob(ctx, b.blob)
		out.Bytes += n
		if is(err, errdefs.ErrDataLoss) {
			found(Finding{Code: FindingBlobDigest, ID: b.id, Key: string(b.blob.Digest), Message: err.Error()})
		} else if err != nil {
			return out, err
		}
		out.Read++
	}
	return out, nil
}

// readBlob reads a blob of the store to its end and compares it.
func (m *Manager) readBlob(ctx context.Context, b Blob) (n int64, err error) {
	ra, err := m.blobs.reader(ctx, ocispec.Descriptor{MediaType: b.MediaType, Digest: b.Digest, Size: b.Size})
	if is(err, errdefs.ErrNotFound) {
		return 0, nil // removed meanwhile
	}
	if err != nil {
		return 0, fmt.Errorf("open blob %s: %w", b.Digest, err)
	}
	defer func() { err = errors.Join(err, ra.Close()) }()
	size := b.Size
	if size <= 0 {
		size = ra.Size()
	}
	v, err := layer.Verify(sequential(ctx, ra), b.Digest, size)
	if err != nil {
		return 0, err
	}
	return io.Copy(io.Discard, v)
}

// measureBlobs is what blobs occupy, in bytes on the disk, each once: all, and
// those of records that are in use; and what the directories that they lie in do.
func (m *Manager) measureBlobs(ctx context.Context, entries []UsageEntry) (all, inUse, dirs int64, err error) {
	seen := map[digest.Digest]bool{} // true: it counts as in use
	for i := range entries {
		for _, b := range entries[i].Record.Blobs {
			seen[b.Digest] = seen[b.Digest] || entries[i].InUse
		}
	}
	for d, used := range seen {
		size, err := m.blobs.occupied(ctx, d)
		if err != nil {
			return 0, 0, 0, fmt.Errorf("measure blob %s: %w", d, err)
		}
		all += size
		if used {
			inUse += size
		}
	}
	if m.blobs.given() == nil {
		// With what is being written, and what others left there.
		all, dirs, err = filesBelow(ctx, m.blobs.dir)
	}
	return all, inUse, dirs, err
}

// occupied is what a blob takes of the disk.
func (b *blobStore) occupied(ctx context.Context, d digest.Digest) (int64, error) {
	size, there, err := b.size(ctx, d)
	if is(err, errdefs.ErrInvalidArgument) || err == nil && !there {
		return 0, nil
	}
	if err != nil || b.given() != nil {
		return size, err
	}
	var st unix.Stat_t
	switch err := unix.Stat(b.path(d), &st); {
	case errors.Is(err, unix.ENOENT):
		return 0, nil // it went meanwhile
	case err != nil:
		return 0, fmt.Errorf("size of blob %s: %w", d, err)
	}
	return st.Blocks * 512, nil
}

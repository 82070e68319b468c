package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
)

// RemotesOptions say in which form GetRemotes gives layers out.
type RemotesOptions struct {
	// Compression is how layers are compressed for which a blob has to be
	// made, with the algorithm's default level if that is zero.
	Compression Compression
	// Force asks for this algorithm even where a layer has a blob in another
	// one: that is converted, and kept beside.
	Force bool
	// Create makes the blobs that are missing. Without it they are an error,
	// and the record is not even finalized.
	Create bool
	// Verify asks for blobs that somebody has decompressed. One of which only
	// a descriptor says what it holds is read first, which may take a transfer,
	// or without Create is an error, as if it were missing.
	Verify bool
	// SourceDateEpoch, if not nil, is the latest time that a file in the
	// layers may have. Such blobs are made each time, from the snapshots, and
	// go with Release, unless they are the layer's own: a layer is found by
	// what it really holds.
	SourceDateEpoch *time.Time
}

// Remote is a tree as layer blobs, to be pushed or exported. Release it when
// done; until then its blobs stay, and so does the record.
type Remote struct {
	// Descriptors has one layer each, bottom first, with its DiffID in the
	// annotation containerd.io/uncompressed.
	Descriptors []ocispec.Descriptor
	// Claimed are the blobs among them of which nobody has seen yet whether they
	// hold the layer that the annotation names: each is the one blob of a layer
	// that was never extracted here, passed on as it came. Whoever answers for
	// DiffIDs, by an image's configuration, checks them, or sets Verify.
	Claimed []digest.Digest
	// Provider reads the blobs: those that are here, and those for which a
	// provider was handed in.
	Provider content.Provider

	ref  *ImmutableRef
	mu   sync.Mutex
	made []*published // belong to no record
}

// Release gives the blobs back. Releasing twice is harmless.
func (r *Remote) Release(ctx context.Context) error {
	r.mu.Lock()
	made := r.made
	r.made = nil
	r.mu.Unlock()
	var errs []error
	for _, pub := range made {
		errs = append(errs, pub.end(ctx, false))
	}
	return errors.Join(append(errs, r.ref.Release(ctx))...)
}

// GetRemotes gives the layers of the tree as blobs. A layer that has none is
// written from its snapshot, or converted, and its blob, DiffID and ChainID are
// kept in one transaction. Two computations give the same bytes. Those who ask
// for one layer in one form at a time share the work.
//
// A blob of which only a descriptor said what layer it holds is decompressed
// before it stands for a layer of which more is known, and before it is given
// out if it is here and Create is set. Else it is passed on as it came, without
// a transfer, and listed in Remote.Claimed.
//
// Errors: NotFound for a layer without a blob if Create is not set;
// *MissingBlobsError for one whose blob would have to come from somewhere;
// *WrongLayerError for one whose blobs are all known to hold others;
// InvalidArgument for a level that does not exist.
func (r *ImmutableRef) GetRemotes(ctx context.Context, o RemotesOptions) (_ *Remote, err error) {
	m := r.h.m
	begin := r.h.begin
	if o.Create {
		begin = r.h.beginChange
	}
	e, done, err := begin()
	if err != nil {
		return nil, err
	}
	defer done()
	if o.Create {
		z, err := layer.Compress(io.Discard, o.Compression)
		if err != nil {
			return nil, err
		}
		if err := z.Close(); err != nil {
			return nil, err
		}
		if _, err := m.immutable(ctx, e); err != nil {
			return nil, err
		}
	}
	list, err := m.layers(ctx, e)
	if err != nil {
		return nil, err
	}
	ref, err := r.Clone()
	if err != nil {
		return nil, err
	}
	out := &Remote{ref: ref, Provider: provider{m.blobs}}
	defer func() {
		if err != nil {
			err = errors.Join(err, out.Release(context.WithoutCancel(ctx)))
		}
	}()
	for _, id := range list {
		if err := out.add(ctx, m, id, o); err != nil {
			return nil, fmt.Errorf("layer %s: %w", short(id), err)
		}
	}
	return out, nil
}

// add adds one layer.
func (r *Remote) add(ctx context.Context, m *Manager, id ID, o RemotesOptions) error {
	if o.SourceDateEpoch != nil {
		if !o.Create {
			return fmt.Errorf("a source date epoch needs blobs to be made: %w", errdefs.ErrInvalidArgument)
		}
		b := &blobbing{m: m, id: id, o: o}
		desc, err := b.make(ctx)
		if b.pub != nil {
			r.made = append(r.made, b.pub)
		}
		r.Descriptors = append(r.Descriptors, desc)
		return err
	}
	desc, claimed, err := m.layerBlob(ctx, id, o)
	if err != nil {
		return err
	}
	r.Descriptors = append(r.Descriptors, desc)
	if claimed {
		r.Claimed = append(r.Claimed, desc.Digest)
	}
	return nil
}

// provider reads blobs of the cache, wherever they are.
type provider struct{ b *blobStore }

// ReaderAt implements content.Provider.
func (p provider) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ra, err := p.b.reader(ctx, desc)
	if !is(err, errdefs.ErrNotFound) {
		return ra, err
	}
	if from := p.b.provider(desc.Digest); from != nil {
		return from.ReaderAt(ctx, desc)
	}
	return nil, errors.Join(&MissingBlobsError{Digests: []digest.Digest{desc.Digest}}, err)
}

// blobKey names the making of one blob.
type blobKey struct {
	id    ID
	how   Compression
	force bool
}

// layerBlob finds a blob of a layer, or makes one. What is claimed is not known
// to hold it.
func (m *Manager) layerBlob(ctx context.Context, id ID, o RemotesOptions) (desc ocispec.Descriptor, claimed bool, err error) {
	rec, err := m.read(ctx, id)
	if err != nil {
		return desc, false, err
	}
	src, ok, err := m.blobs.choose(ctx, rec, o)
	if err != nil {
		return desc, false, err
	}
	if ok {
		return descriptor(rec, &src.blob), src.blob.Claimed, nil
	}
	if !o.Create {
		if err := m.requireBlobs(ctx, []*Record{rec}); err != nil && len(rec.Blobs) > 0 {
			return desc, false, err
		}
		return desc, false, fmt.Errorf("it has no blob like that which is known to hold it: %w", errdefs.ErrNotFound)
	}
	desc, err = m.blobbing.do(ctx, &m.running, blobKey{id, o.Compression, o.Force}, func(ctx context.Context) (ocispec.Descriptor, error) {
		b := &blobbing{m: m, id: id, o: o}
		return b.make(ctx)
	})
	return desc, false, err
}

// choose picks a blob that the record has and that can be read: one in the
// algorithm that is asked for or, unless that is forced, any. What is only
// claimed to hold the layer is given out where nothing else is known of it, of a
// layer that has one blob and no snapshot, and not if it can be read here.
func (b *blobStore) choose(ctx context.Context, rec *Record, o RemotesOptions) (source, bool, error) {
	list, err := b.sources(ctx, rec)
	if err != nil {
		return source{}, false, err
	}
	all, _ := candidates(rec)
	list = slices.DeleteFunc(list, func(src source) bool {
		return src.blob.Claimed && (o.Verify || rec.State != metadata.Lazy || len(all) > 1 || o.Create && src.stored)
	})
	for _, src := range list {
		if src.has(o.Compression.Algorithm) {
			return src, true, nil
		}
	}
	if len(list) > 0 && !o.Force {
		return list[0], true, nil
	}
	return source{}, false, nil
}

// has says whether the blob is in that algorithm.
func (s *source) has(a layer.Algorithm) bool {
	how, err := layer.CompressionOf(s.blob.MediaType)
	return err == nil && how == a
}

// blobbing is the making of one blob of a layer.
type blobbing struct {
	m  *Manager
	id ID
	o  RemotesOptions
	// pub is a blob that belongs to no record.
	pub *published
}

func (b *blobbing) make(ctx context.Context) (desc ocispec.Descriptor, err error) {
	m := b.m
	e, err := m.find(ctx, b.id, func(e *entry) error { m.useLocked(e); return nil })
	if err != nil {
		return desc, err
	}
	defer m.drop(e)
	defer m.unuse(e)
	rec := m.current(e)
	if b.o.SourceDateEpoch == nil {
		// Somebody may have made it since we looked. That is not said of what
		// is made, so it is never a claim.
		o := b.o
		o.Verify = true
		src, ok, err := m.blobs.choose(ctx, rec, o)
		if err != nil || ok {
			return descriptor(rec, &src.blob), err
		}
	}
	if b.o.SourceDateEpoch == nil {
		desc, done, err := b.fromBlobs(ctx, e)
		if done || err != nil {
			return desc, err
		}
	}
	return b.put(ctx, e, func(w io.Writer) (madeBlob, error) { return b.write(ctx, e, w) })
}

// fromBlobs makes the blob from another one of the layer, which keeps every byte
// of the tar, or finds that one of those that are only claimed to hold it is
// what is wanted. One that turns out to be wrong is passed over. done is false
// if there is no other.
func (b *blobbing) fromBlobs(ctx context.Context, e *entry) (desc ocispec.Descriptor, done bool, err error) {
	m := b.m
	list, err := m.blobs.sources(ctx, m.current(e))
	if err != nil {
		return desc, false, err
	}
	for _, src := range list {
		if src.blob.Claimed && (!b.o.Force || src.has(b.o.Compression.Algorithm)) {
			desc, err = b.prove(ctx, e, src)
		} else {
			desc, err = b.put(ctx, e, func(w io.Writer) (madeBlob, error) { return b.convert(ctx, m.current(e), src, w) })
		}
		if eerr := m.expose(ctx, e, err); eerr != nil {
			return desc, true, errors.Join(err, eerr)
		}
		if !src.blob.Claimed || !is(err, errdefs.ErrDataLoss, errdefs.ErrNotFound, errdefs.ErrInvalidArgument) {
			return desc, true, err
		}
		m.log.Warn("a blob was said to hold a layer, and it could not be found there", "id", e.id, "error", err)
	}
	return ocispec.Descriptor{}, false, nil
}

// prove reads a blob that is only claimed to hold the layer, and notes that it
// does.
func (b *blobbing) prove(ctx context.Context, e *entry, src source) (desc ocispec.Descriptor, err error) {
	ra, err := src.open(ctx, b.m.blobs)
	if err != nil {
		return desc, fmt.Errorf("open blob %s: %w", src.blob.Digest, err)
	}
	d, err := b.m.readDiffID(ctx, src.descriptor(), ra)
	if err = errors.Join(err, ra.Close()); err != nil {
		return desc, err
	}
	if want := b.m.current(e).DiffID; d != want {
		return desc, &WrongLayerError{Blob: src.blob.Digest, Holds: d, Claimed: want}
	}
	rec, err := b.m.change(ctx, e, func(_ *metadata.Tx, edit *Edit) error {
		for i := range edit.rec.Blobs {
			if edit.rec.Blobs[i].Digest == src.blob.Digest {
				edit.rec.Blobs[i].Claimed = false
			}
		}
		return nil
	})
	if err != nil {
		return desc, err
	}
	return descriptor(rec, &src.blob), nil
}

// put writes a blob and records it.
func (b *blobbing) put(ctx context.Context, e *entry, write func(io.Writer) (madeBlob, error)) (desc ocispec.Descriptor, err error) {
	in, err := b.m.blobs.ingest(ctx)
	if err != nil {
		return desc, err
	}
	made, err := write(in)
	if rec := b.m.current(e); err == nil && b.o.SourceDateEpoch == nil && rec.DiffID != "" && rec.DiffID != made.DiffID {
		// It came as a blob that has gone, and what it held is not what we
		// would write.
		err = b.m.requireOriginal(rec)
	}
	if err != nil {
		return desc, errors.Join(err, in.abort(ctx))
	}
	return b.record(ctx, e, in, made)
}

// requireOriginal says that the blob of a layer is needed that it came as.
func (m *Manager) requireOriginal(rec *Record) error {
	missing := &MissingBlobsError{}
	list, _ := candidates(rec)
	for _, blob := range list[:min(1, len(list))] {
		missing.Digests = append(missing.Digests, blob.Digest)
	}
	return fmt.Errorf("the layer %s cannot be written again from its snapshot: %w", rec.DiffID, missing)
}

// record publishes the blob, and writes that the layer has it.
func (b *blobbing) record(ctx context.Context, e *entry, in *ingest, made madeBlob) (desc ocispec.Descriptor, err error) {
	m := b.m
	pub, err := in.publish(ctx, made.desc.Digest)
	if err != nil {
		return desc, err
	}
	blob := blobOf(made.desc, made.DiffID, true)
	if rec := m.current(e); b.o.SourceDateEpoch != nil && rec.DiffID != made.DiffID {
		b.pub = pub
		return descriptor(&Record{DiffID: made.DiffID}, &blob), nil
	}
	rec, err := m.change(ctx, e, func(tx *metadata.Tx, edit *Edit) error {
		rec := edit.rec
		if rec.DiffID == "" {
			if err := identify(tx, rec, made.DiffID); err != nil {
				return err
			}
		}
		if rec.DiffID != made.DiffID {
			return fmt.Errorf("it has DiffID %s by now, not %s: %w", rec.DiffID, made.DiffID, errdefs.ErrAborted)
		}
		withBlob(rec, blob)
		return nil
	})
	err = errors.Join(err, pub.end(ctx, err == nil))
	if err != nil {
		return desc, err
	}
	return descriptor(rec, &blob), nil
}

// identify gives a layer its DiffID and, if that of what lies below it is
// known, its ChainID.
func identify(tx *metadata.Tx, rec *Record, diffID digest.Digest) error {
	rec.DiffID = diffID
	if rec.Op == metadata.Diff || len(rec.Parents) == 0 {
		rec.ChainID = diffID
		return nil
	}
	parent, err := tx.Get(rec.Parents[0])
	if err != nil {
		return err
	}
	below, err := newLister(tx).chain(parent)
	if err == nil && below != "" {
		rec.ChainID = chainOver(below, diffID)
	}
	return err
}

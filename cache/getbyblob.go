package cache

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
)

// BlobOptions say how GetByBlob finds or makes the record of a layer.
type BlobOptions struct {
	// Provider is where the blob can be had from when it is needed and is not
	// in the content store. It is remembered for the blob's digest until the
	// cache is closed or the blob's last record is removed.
	Provider content.Provider
	// NoUpdate keeps this use out of the record's last-used time and count.
	NoUpdate bool

	// The rest is for a record that is made; one that is there keeps its own.

	// Type is the record type, TypeRegular if empty.
	Type        string
	Description string
	Labels      map[string]string
	Values      []Value
	// ImageRefs say for people where the layer comes from.
	ImageRefs []string
}

// GetByBlob gives a handle on the record of a layer blob over parent, which may
// be nil. A new record is lazy: its snapshot is made by Extract, or when it is
// needed. Records are found by their ChainID, so gzip, zstd and uncompressed
// forms of one layer are one record with several blobs. A parent that is
// committed is finalized first; its handle stays the caller's.
//
// The DiffID is taken from the annotation containerd.io/uncompressed of desc;
// without it an uncompressed blob is its own, and for one that is in the content
// store it is computed. What the annotation says is a claim until somebody has
// decompressed the blob: Extract takes nothing else, and GetRemotes gives such a
// blob out only where nothing but the claim is known of the layer.
//
// Errors: InvalidArgument for a descriptor whose DiffID cannot be known, or is
// known to be another; NotImplemented for one that is no layer's, or an encrypted one's.
func (m *Manager) GetByBlob(ctx context.Context, desc ocispec.Descriptor, parent *ImmutableRef, o BlobOptions) (*ImmutableRef, error) {
	end, err := m.beginChange()
	if err != nil {
		return nil, err
	}
	defer end()
	ref, err := m.getByBlob(ctx, desc, parent, o, callerOf(1))
	if err != nil {
		return nil, fmt.Errorf("get layer %s: %w", clip(string(desc.Digest)), err)
	}
	m.lock()
	defer m.unlock()
	ref.h.noTouch = o.NoUpdate
	return ref, nil
}

func (m *Manager) getByBlob(ctx context.Context, desc ocispec.Descriptor, parent *ImmutableRef, o BlobOptions, from caller) (_ *ImmutableRef, err error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if desc.Size < 0 {
		return nil, fmt.Errorf("size %d: %w", desc.Size, errdefs.ErrInvalidArgument)
	}
	diffID, claimed, err := m.diffIDOf(ctx, desc)
	if err != nil {
		return nil, err
	}
	l := &layerSought{m: m, desc: desc, diffID: diffID, claimed: claimed, o: o, from: from}
	if parent != nil {
		if parent.h.m != m {
			return nil, fmt.Errorf("parent %s belongs to another cache: %w", short(parent.ID()), errdefs.ErrInvalidArgument)
		}
		e, done, err := parent.h.use()
		if err != nil {
			return nil, err
		}
		defer done()
		if err := m.requireDepth(ctx, e); err != nil {
			return nil, err
		}
		if l.parent, err = m.immutable(ctx, e); err != nil {
			return nil, fmt.Errorf("finalize the parent: %w", err)
		}
	}
	if err := l.draft(); err != nil {
		return nil, err
	}
	ref, err := l.get(ctx)
	if err == nil {
		m.blobs.provide(desc.Digest, o.Provider)
	}
	return ref, err
}

// immutable brings the record of e, which the caller uses, to a state in which
// it can be a parent or an input: finalized, or lazy as it is.
func (m *Manager) immutable(ctx context.Context, e *entry) (*Record, error) {
	if rec := m.current(e); rec.State == metadata.Lazy {
		return rec, nil
	}
	return m.finalize(ctx, e)
}

// layerSought is a call of GetByBlob.
type layerSought struct {
	m      *Manager
	desc   ocispec.Descriptor
	diffID digest.Digest
	// claimed says that nobody knows whether diffID is right.
	claimed bool
	parent  *Record // nil for none
	o       BlobOptions
	from    caller

	edit  Edit // the record to be made if there is none
	chain digest.Digest
}

// draft prepares the record that is made if there is none.
func (l *layerSought) draft() error {
	rec := &Record{
		State: metadata.Lazy, Op: metadata.Layer, DiffID: l.diffID,
		Type: l.o.Type, Description: l.o.Description, Labels: maps.Clone(l.o.Labels),
		ImageRefs: slices.Clone(l.o.ImageRefs),
		Created:   l.m.now(), Size: metadata.SizeUnknown,
	}
	if rec.Type == "" {
		rec.Type = TypeRegular
	}
	if l.parent != nil {
		rec.Parents = []ID{l.parent.ID}
	}
	l.edit = Edit{rec: rec}
	for _, v := range l.o.Values {
		if err := l.edit.SetValue(v); err != nil {
			return err
		}
	}
	return validate(rec)
}

// get finds the record, or makes it. A record that is found may be gone the
// moment after: then it is sought again.
func (l *layerSought) get(ctx context.Context) (*ImmutableRef, error) {
	for {
		var found *Record
		err := l.m.store.View(ctx, func(tx *metadata.Tx) (err error) {
			found, err = l.find(tx)
			return err
		})
		if err != nil {
			return nil, err
		}
		ref, err := (*ImmutableRef)(nil), error(nil)
		if found != nil {
			ref, err = l.m.get(ctx, found.ID, GetOptions{NoUpdate: true}, l.from)
		} else {
			ref, err = l.make(ctx)
		}
		if is(err, errdefs.ErrNotFound) {
			continue
		}
		if err == nil {
			if err = l.addBlob(ctx, ref); err == nil {
				return ref, nil
			}
			err = errors.Join(err, ref.Release(ctx))
		}
		return nil, err
	}
}

// find looks for a layer that is equal: by its ChainID or, over a parent that
// has none, among the children of that. A merge with the same ChainID is not
// meant.
func (l *layerSought) find(tx *metadata.Tx) (found *Record, err error) {
	below := digest.Digest("")
	if l.parent != nil {
		parent, err := tx.Get(l.parent.ID)
		if err != nil {
			return nil, err
		}
		if below, err = newLister(tx).chain(parent); err != nil {
			return nil, err
		}
	}
	if l.parent == nil || below != "" {
		l.chain = chainOver(below, l.diffID)
		found, err = l.equal(tx, tx.ByIndex("chainid:"+string(l.chain)))
		if found != nil || err != nil || l.parent == nil {
			return found, err
		}
	}
	// One that was made before the parent's ChainID was known has none.
	return l.equal(tx, tx.Children(parentID(l.parent)))
}

// equal picks from some records one of the layer that is sought.
func (l *layerSought) equal(tx *metadata.Tx, ids iter.Seq[ID]) (found *Record, err error) {
	for id := range ids {
		rec, err := tx.Get(id)
		if err != nil || rec.Op != metadata.Layer && rec.Op != metadata.Base || rec.DiffID != l.diffID {
			continue
		}
		if rec.State != metadata.Lazy && rec.State != metadata.Finalized {
			continue
		}
		// Records of one tree over several parents may exist: that over this
		// one, if there is one.
		if slices.Equal(rec.Parents, l.edit.rec.Parents) {
			return rec, nil
		}
		if found == nil && l.chain != "" {
			found = rec
		}
	}
	return found, nil
}

// blob is the blob as the record is to have it.
func (l *layerSought) blob() Blob {
	b := blobOf(l.desc, l.diffID, false)
	b.Claimed = l.claimed
	return b
}

// make writes the record, unless somebody was faster.
func (l *layerSought) make(ctx context.Context) (_ *ImmutableRef, err error) {
	m := l.m
	var made *Record
	blob := l.blob()
	if pub, err := m.blobs.adopt(ctx, l.desc.Digest); err == nil {
		blob.Stored = true
		defer func() { err = errors.Join(err, pub.end(ctx, made != nil)) }()
	} else if !is(err, errdefs.ErrNotFound) {
		return nil, err
	}
	l.edit.rec.ID = m.store.NewID()
	e, done := m.announce(l.edit.rec.ID)
	defer done()
	l.edit.rec.Blobs = []Blob{blob}
	err = m.store.Update(ctx, func(tx *metadata.Tx) error {
		found, err := l.find(tx)
		if made = found; err != nil || found != nil {
			return err
		}
		made = l.edit.rec.Clone()
		made.ChainID = l.chain
		return tx.Create(made)
	})
	if err != nil {
		made = nil
		return nil, err
	}
	if made.ID == e.id {
		m.created(e, made)
	}
	return m.get(ctx, made.ID, GetOptions{NoUpdate: true}, l.from)
}

// addBlob makes sure that the record has the blob that was asked for, and says
// so if that is here.
func (l *layerSought) addBlob(ctx context.Context, ref *ImmutableRef) (err error) {
	m, d := l.m, l.desc.Digest
	rec := ref.Record()
	if rec.ID == l.edit.rec.ID {
		return nil // it was made with it
	}
	at := slices.IndexFunc(rec.Blobs, func(b Blob) bool { return b.Digest == d })
	if at >= 0 && rec.Blobs[at].Stored && (l.claimed || !rec.Blobs[at].Claimed) {
		return nil
	}
	blob := l.blob()
	recorded := false
	pub, err := m.blobs.adopt(ctx, d)
	switch {
	case err == nil:
		blob.Stored = true
		defer func() { err = errors.Join(err, pub.end(ctx, recorded)) }()
	case !is(err, errdefs.ErrNotFound):
		return err
	case at >= 0 && (l.claimed || !rec.Blobs[at].Claimed):
		return nil
	}
	_, err = m.change(ctx, ref.h.e, func(_ *metadata.Tx, edit *Edit) error {
		withBlob(edit.rec, blob)
		return nil
	})
	recorded = err == nil
	return err
}

// diffIDOf is the digest of the layer that desc describes, as it is before
// compression. It is claimed if only the descriptor says so.
func (m *Manager) diffIDOf(ctx context.Context, desc ocispec.Descriptor) (d digest.Digest, claimed bool, err error) {
	how, err := layer.CompressionOf(desc.MediaType)
	if err != nil {
		return "", false, err
	}
	known, err := m.knownDiffID(ctx, desc)
	if err != nil {
		return "", false, err
	}
	if text, ok := desc.Annotations[labelUncompressed]; ok {
		d := digest.Digest(text)
		if err := d.Validate(); err != nil {
			return "", false, fmt.Errorf("annotation %s: %w: %w", labelUncompressed, err, errdefs.ErrInvalidArgument)
		}
		if known != "" && known != d {
			return "", false, fmt.Errorf("annotation %s says %s, and the blob is known to hold the layer %s: %w", labelUncompressed, d, known, errdefs.ErrInvalidArgument)
		}
		return d, known == "" && (how != layer.None || d != desc.Digest), nil
	}
	if known != "" {
		return known, false, nil
	}
	if how == layer.None {
		return desc.Digest, false, nil
	}
	ra, err := m.blobs.reader(ctx, desc)
	if is(err, errdefs.ErrNotFound) {
		return "", false, fmt.Errorf("its descriptor has no annotation %s, and the blob is not here: %w", labelUncompressed, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return "", false, err
	}
	d, err = m.readDiffID(ctx, desc, ra)
	return d, false, errors.Join(err, ra.Close())
}

// knownDiffID is what was found when somebody decompressed the blob: this cache,
// or whoever labelled it in a content store that was handed in. Empty if nobody
// has.
func (m *Manager) knownDiffID(ctx context.Context, desc ocispec.Descriptor) (d digest.Digest, err error) {
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		for id := range tx.ByBlob(desc.Digest) {
			rec, err := tx.Get(id)
			if err != nil {
				continue // another one may say it
			}
			for _, b := range rec.Blobs {
				if b.Digest == desc.Digest && !b.Claimed && b.DiffID != "" {
					d = b.DiffID
					return nil
				}
			}
		}
		return nil
	})
	if s := m.blobs.given(); s != nil && d == "" && err == nil {
		info, ierr := s.Info(ctx, desc.Digest)
		if l := digest.Digest(info.Labels[labelUncompressed]); ierr == nil && l.Validate() == nil {
			d = l
		}
	}
	return d, err
}

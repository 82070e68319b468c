package checksum

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
)

// Codes of findings. They are stable.
const (
	// FindingTreeDamaged: stored content hashes cannot be read. They are
	// computed anew when they are wanted.
	FindingTreeDamaged = "hashes-damaged"
	// FindingContent: a file is not the one whose digest is stored.
	FindingContent = "content-differs"
)

// Check reads the stored trees of all records and reports those that are
// damaged. It reads no files. An error ends the sequence.
func Check(ctx context.Context, m *cache.Manager) iter.Seq2[cache.Finding, error] {
	return func(yield func(cache.Finding, error) bool) {
		var ids []cache.ID // nothing is read while the records are
		for rec, err := range m.Records(ctx) {
			if errors.Is(err, errdefs.ErrDataLoss) {
				continue // the cache's own check reports it
			}
			if err != nil {
				yield(cache.Finding{}, fmt.Errorf("check content hashes: %w", err))
				return
			}
			ids = append(ids, rec.ID)
		}
		for _, id := range ids {
			f, err := checkTree(ctx, m, id)
			if errors.Is(err, errdefs.ErrNotFound) {
				continue // removed meanwhile
			}
			if err != nil {
				yield(cache.Finding{}, fmt.Errorf("check content hashes: %w", err))
				return
			}
			if f != nil && !yield(*f, nil) {
				return
			}
		}
	}
}

func checkTree(ctx context.Context, m *cache.Manager, id cache.ID) (*cache.Finding, error) {
	var t *Tree
	page := ""
	err := m.ViewAttachments(ctx, id, func(a *cache.Attachments) (err error) {
		if t, err = loadTree(id, a); err != nil || t != nil {
			return err
		}
		// Without an index no page counts, but there should be none.
		for page = range a.Names(cache.TreePrefix) {
			break
		}
		return nil
	})
	if err != nil || page == "" && (t == nil || t.Damage == nil) {
		return nil, err
	}
	f := &cache.Finding{Code: FindingTreeDamaged, ID: id, Key: cache.TreeIndex}
	var damaged *contenthash.DamagedError
	switch {
	case t == nil:
		f.Key, f.Message = page, "a page without an index"
	case errors.As(t.Damage, &damaged):
		f.Key, f.Message = cache.TreePrefix+damaged.Page, damaged.Err.Error()
	default:
		f.Message = t.Damage.Error()
	}
	return f, nil
}

// Drop removes the stored tree of a record, whatever state it is in; it is
// computed anew when it is wanted. A mutable record must not be held.
func Drop(ctx context.Context, m *cache.Manager, id cache.ID) (err error) {
	rec, err := m.Lookup(ctx, id)
	if err != nil {
		return err
	}
	if rec.State != cache.Mutable {
		return m.EditAttachments(ctx, rec.ID, func(a *cache.Attachments) error { return a.DeleteAll(cache.TreePrefix) })
	}
	ref, err := m.GetMutable(ctx, rec.ID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ref.Release(ctx)) }()
	return ref.Edit(ctx, func(e *cache.Edit) error {
		e.DetachAll(cache.TreePrefix)
		return nil
	})
}

// Verify reads percent of a record's files again, chosen at random, through
// open, and compares them with the digests in its tree. What is found is in
// Differ; files of which no digest holds are counted in Unknown.
func (t *Tree) Verify(ctx context.Context, open contenthash.Opener, percent float64) (contenthash.Verified, error) {
	pick := func(string) bool { return rand.Float64()*100 < percent }
	if percent >= 100 {
		pick = nil
	}
	v, err := t.Tree.Verify(ctx, open, pick)
	if err != nil {
		err = fmt.Errorf("verify record %s: %w", t.id, err)
	}
	return v, err
}

// Stored lists the immutable records that have snapshots: those with stored
// content hashes, and those without, sorted by id.
func Stored(ctx context.Context, m *cache.Manager) (with, without []cache.ID, err error) {
	var ids []cache.ID
	for rec, err := range m.Records(ctx) {
		if errors.Is(err, errdefs.ErrDataLoss) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		if rec.State == cache.Committed || rec.State == cache.Finalized {
			ids = append(ids, rec.ID)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		_, err := m.Attachment(ctx, id, cache.TreeIndex)
		switch {
		case err == nil:
			with = append(with, id)
		case errors.Is(err, errdefs.ErrNotFound), errors.Is(err, errdefs.ErrDataLoss):
			without = append(without, id)
		default:
			return nil, nil, err
		}
	}
	return with, without, nil
}

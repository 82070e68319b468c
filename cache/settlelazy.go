package cache

import (
	"context"
	"maps"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// lost decides what becomes of a record whose snapshot is gone, or may be
// damaged: lazy again, if what it was made of is here, else it is dropped.
func (s *settling) lost(ctx context.Context, rec *metadata.Record, why string) error {
	can, err := s.m.canMakeAgain(ctx, rec)
	if err != nil {
		return err
	}
	if !can {
		s.doomed[rec.ID] = why
		return nil
	}
	s.again[rec.ID] = why
	if s.sameBoot {
		return nil // the name is gone; children go on with what is made again
	}
	// The name is there and goes, so what stands on it goes, too.
	family, err := s.family(ctx, rec.ID)
	if err != nil {
		return err
	}
	for _, id := range family {
		if s.doomed[id] != "" || s.again[id] != "" {
			continue
		}
		member, err := s.m.read(ctx, id)
		if is(err, errdefs.ErrDataLoss) {
			s.doomed[id] = "it cannot be read"
			continue
		}
		if err != nil {
			return err
		}
		if member.State == metadata.Lazy {
			continue
		}
		if can, err = s.m.canMakeAgain(ctx, member); err != nil {
			return err
		}
		if can {
			s.again[id] = "the snapshot below it has to be made again"
		} else {
			s.doomed[id] = "the snapshot below it was lost"
		}
	}
	return nil
}

// canMakeAgain says whether the snapshot of a record can be made again, as it
// was, from what is here.
func (m *Manager) canMakeAgain(ctx context.Context, rec *Record) (bool, error) {
	if rec.State != metadata.Finalized {
		return false, nil
	}
	if rec.Op == metadata.Merge || rec.Op == metadata.Diff {
		return true, nil
	}
	if rec.DiffID == "" {
		return false, nil
	}
	_, ok, err := m.blobs.proven(ctx, rec)
	return ok, err
}

// unmade turns a record into one whose snapshot is to be made.
func unmade(rec *Record) {
	rec.State = metadata.Lazy
	rec.Key, rec.Was = "", ""
	rec.Size = metadata.SizeUnknown
	rec.Durable, rec.Verified, rec.Raw = false, false, false
}

// makeLazy writes which records are lazy again. Names that this leaves without
// a record are removed after it, so that a settling that is cut off in between
// finds them.
func (s *settling) makeLazy(ctx context.Context) error {
	ids := slices.Sorted(maps.Keys(s.again))
	if len(ids) == 0 {
		return nil
	}
	return s.m.store.Update(ctx, func(tx *metadata.Tx) error {
		for _, id := range ids {
			if s.doomed[id] != "" {
				continue
			}
			rec, err := tx.Get(id)
			if err != nil {
				return err
			}
			s.m.log.Warn("settled: record is lazy again", "id", id, "reason", s.again[id])
			unmade(rec)
			if _, err := tx.Put(rec); err != nil {
				return err
			}
		}
		return nil
	})
}

// settleBlobs removes blobs that were being written or removed.
func (s *settling) settleBlobs(ctx context.Context) error {
	left, err := s.m.blobs.settleAll(ctx)
	if err != nil {
		s.leave("unfinished blobs cannot be removed", "error", err)
	} else if left {
		s.undone = true
	}
	return nil
}

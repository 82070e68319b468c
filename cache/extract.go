package cache

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/metadata"
)

// Extract makes the snapshot of a lazy record, and before it those of all that
// its tree is made of. Any other record is left as it is, but for a snapshot
// that was removed behind the cache's back and can be made again: that one is,
// if the record cannot be mounted without it, and lazy otherwise.
//
// A layer's blob is verified while it is read and its DiffID after it was
// applied, and only then does the snapshot get its name; a wrong one is
// DataLoss and leaves nothing. Blobs that were not here are kept. Those who
// extract one layer at a time share the work, which ends when the last of them
// has left. Errors: *MissingBlobsError before anything is done;
// *WrongLayerError where all blobs of a layer turned out to be of others.
func (r *ImmutableRef) Extract(ctx context.Context) error {
	m := r.h.m
	e, done, err := r.h.beginChange()
	if err != nil {
		return err
	}
	defer done()
	if m.current(e).State == metadata.Finalized {
		if err := m.unmakeMissing(ctx, e); err != nil {
			return fmt.Errorf("extract record %s: %w", short(e.id), err)
		}
	}
	return m.mountable(ctx, e)
}

// extract makes the snapshot of one lazy record whose ground is there.
func (m *Manager) extract(ctx context.Context, id ID) error {
	_, err := m.extracting.do(ctx, &m.running, id, func(ctx context.Context) (struct{}, error) {
		e, err := m.find(ctx, id, func(e *entry) error { m.useLocked(e); return nil })
		if err == nil {
			defer m.drop(e)
			defer m.unuse(e)
			err = m.extractAlone(ctx, e)
		}
		if err != nil {
			err = fmt.Errorf("extract record %s: %w", short(id), fullDisk(err))
		}
		return struct{}{}, err
	})
	return err
}

func (m *Manager) extractAlone(ctx context.Context, e *entry) error {
	release, err := m.drive(ctx, e, "extract")
	if err != nil {
		return err
	}
	defer release()
	rec := m.current(e)
	if rec.State != metadata.Lazy {
		return nil
	}
	x := &extraction{m: m, rec: rec}
	defer func() {
		if err := x.end(ctx); err != nil {
			m.log.Warn("what an extraction needed could not be given back", "id", rec.ID, "error", err)
		}
	}()
	there, err := m.hasCommitted(ctx, rec.ID)
	if err != nil {
		return err
	}
	if there {
		// An earlier extraction got that far; in another boot the name would
		// not have survived the open.
		x.verified = rec.Op != metadata.Merge && rec.Op != metadata.Diff
	} else if err := x.make(ctx, e); err != nil {
		return err
	}
	m.setUnswapped(rec.ID, true)
	return x.swap(ctx, e)
}

// hasCommitted says whether the driver has a committed snapshot of that name.
func (m *Manager) hasCommitted(ctx context.Context, id ID) (bool, error) {
	st, err := m.driver.Stat(ctx, string(id))
	if is(err, errdefs.ErrNotFound) {
		return false, nil
	}
	return err == nil && st.Kind == snapshots.KindCommitted, err
}

// extraction makes the snapshot of one lazy record.
type extraction struct {
	m   *Manager
	rec *Record
	// was is the name that the snapshot had before its commit, if any.
	was string
	// verified says that it was made from a blob whose DiffID is right, which is
	// from if that is known.
	verified bool
	from     digest.Digest
	// blob was not here before and is now.
	blob     *published
	recorded bool
}

func (x *extraction) make(ctx context.Context, e *entry) error {
	if err := x.m.marks.setDirty(); err != nil {
		return err
	}
	if err := x.m.step("extract"); err != nil {
		return err
	}
	if x.rec.Op != metadata.Merge && x.rec.Op != metadata.Diff {
		return x.makeLayer(ctx, e)
	}
	var list []ID
	err := x.m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		list, err = newLister(tx).of(x.rec)
		return err
	})
	switch {
	case err != nil:
		return err
	case len(list) == 1 && list[0] == x.rec.ID:
		return x.makeDiff(ctx)
	}
	return x.makeStack(ctx, list)
}

// fresh makes an active snapshot over parent for fill, and commits it under the
// record's id when that has filled it.
func (x *extraction) fresh(ctx context.Context, parent string, fill func(key string) error, opts ...snapshots.Opt) (err error) {
	m, key := x.m, activeKey(x.rec.ID)
	_, err = m.driver.Prepare(ctx, key, parent)
	if is(err, errdefs.ErrAlreadyExists) {
		// Left by an attempt that could not take it back.
		if err := m.discardKey(ctx, key); err != nil {
			return err
		}
		_, err = m.driver.Prepare(ctx, key, parent)
	}
	if err == nil {
		err = fill(key)
	}
	if err == nil {
		err = m.step("extract commit")
	}
	if err == nil {
		err = x.commit(ctx, key, opts)
	}
	if err != nil {
		return errors.Join(err, m.discardKey(ctx, key))
	}
	x.was = key
	return nil
}

// commit gives the snapshot its name.
func (x *extraction) commit(ctx context.Context, key string, opts []snapshots.Opt) error {
	return x.landed(ctx, x.m.driver.Commit(ctx, string(x.rec.ID), key, opts...))
}

// landed turns the outcome of a call that makes the name into that of its
// work: it may fail after the name was there.
func (x *extraction) landed(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	there, serr := x.m.hasCommitted(context.WithoutCancel(ctx), x.rec.ID)
	if serr != nil {
		x.m.setUnswapped(x.rec.ID, false)
		return errors.Join(err, serr)
	}
	if there {
		return nil
	}
	return err
}

// swap writes that the record has a snapshot. It is done even if all who asked
// have gone: the driver's half is done.
func (x *extraction) swap(ctx context.Context, e *entry) error {
	m := x.m
	raw, err := m.isRaw(ctx, string(e.id))
	if err != nil {
		return err
	}
	rec, err := m.change(context.WithoutCancel(ctx), e, func(_ *metadata.Tx, edit *Edit) error {
		rec := edit.rec
		rec.State = metadata.Finalized
		rec.Was, rec.Key = x.was, string(rec.ID)
		rec.Size, rec.Durable = metadata.SizeUnknown, false
		rec.Verified, rec.Raw = x.verified, raw
		for i := range rec.Blobs {
			if x.blob != nil && rec.Blobs[i].Digest == x.blob.digest {
				rec.Blobs[i].Stored = true
			}
			if rec.Blobs[i].Digest == x.from {
				rec.Blobs[i].Claimed = false
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	x.recorded = true
	m.syncer.committed()
	m.sizer.add(e.id)
	m.collector.poke()
	m.lock()
	delete(m.unswapped, rec.ID)
	m.unlock()
	return nil
}

// end gives up the blob's pin.
func (x *extraction) end(ctx context.Context) error {
	if x.blob == nil {
		return nil
	}
	// The record names the blob in any case.
	return x.blob.end(ctx, true)
}

// keyOf is the driver key of a record that has a snapshot.
func (m *Manager) keyOf(ctx context.Context, id ID) (string, error) {
	rec, err := m.read(ctx, id)
	if err != nil {
		return "", err
	}
	if rec.State != metadata.Finalized {
		return "", fmt.Errorf("record %s is %s: %w", short(id), rec.State, errdefs.ErrFailedPrecondition)
	}
	return rec.Key, nil
}

// unmakeMissing makes a finalized record lazy again whose snapshot, or one that
// it is made of, is gone although nobody here removed it, if it can be made
// again.
func (m *Manager) unmakeMissing(ctx context.Context, e *entry) error {
	rec := m.current(e)
	var ids []ID
	err := m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		ids, err = m.newGround(tx).allBelow(rec)
		return err
	})
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := m.unmakeOne(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

func (m *Manager) unmakeOne(ctx context.Context, id ID) error {
	e, err := m.find(ctx, id, func(e *entry) error { m.useLocked(e); return nil })
	if err != nil {
		return err
	}
	defer m.drop(e)
	defer m.unuse(e)
	release, err := m.drive(ctx, e, "extract")
	if err != nil {
		return err
	}
	defer release()
	rec := m.current(e)
	if rec.State != metadata.Finalized {
		return nil
	}
	if _, err := m.driver.Stat(ctx, rec.Key); !is(err, errdefs.ErrNotFound) {
		return err
	}
	can, err := m.canMakeAgain(ctx, rec)
	if err != nil {
		return err
	}
	if !can {
		return fmt.Errorf("the snapshot of record %s is gone and cannot be made again: %w", short(id), errdefs.ErrDataLoss)
	}
	m.log.Warn("a snapshot was removed behind the cache's back and is made again when it is needed", "id", id)
	_, err = m.change(ctx, e, func(_ *metadata.Tx, edit *Edit) error {
		unmade(edit.rec)
		return nil
	})
	m.lock()
	defer m.unlock()
	for _, other := range m.entries {
		other.grounded = false
	}
	return err
}

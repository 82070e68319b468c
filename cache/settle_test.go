package cache_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

// These tests walk the table by which an open settles what a kill or a power
// cut left: each row in the same boot and in another one.

// forBoots runs the test in each kind of driver and in both boots. The next
// opening of the world is in that boot.
func forBoots(t *testing.T, fn func(w *world, sameBoot bool)) {
	for _, boot := range []string{"this boot", "another boot"} {
		t.Run(boot, func(t *testing.T) {
			forKinds(t, func(w *world) { fn(w, boot == "this boot") })
		})
	}
}

// crashInto crashes and opens again, in the same boot or another.
func (w *world) crashInto(sameBoot bool) {
	w.Helper()
	w.crash()
	w.nextBoot(sameBoot)
}

func (w *world) nextBoot(sameBoot bool) {
	w.Helper()
	if !sameBoot {
		w.boot = "another boot"
	}
	w.reopenStore()
}

// names are all snapshots of the driver with their kinds.
func (w *world) names() map[string]snapshots.Kind {
	w.Helper()
	return driverNames(w, w.driver)
}

func driverNames(w *world, d snapshot.Driver) map[string]snapshots.Kind {
	w.Helper()
	out := map[string]snapshots.Kind{}
	for _, info := range walk(w, d) {
		out[info.Name] = info.Kind
	}
	return out
}

func (w *world) gone(id cache.ID) {
	w.Helper()
	_, err := w.Get(w.ctx, id, cache.GetOptions{})
	require.ErrorIs(w, err, errdefs.ErrNotFound)
	rec, err := w.Lookup(w.ctx, id)
	require.ErrorIs(w, err, errdefs.ErrNotFound, "%+v", rec)
}

func (w *world) state(id cache.ID) cache.State {
	w.Helper()
	rec, err := w.Lookup(w.ctx, id)
	require.NoError(w, err)
	return rec.State
}

func (w *world) treeOf(id cache.ID) string {
	w.Helper()
	imm := w.get(id)
	defer w.release(imm)
	return w.tree(imm)
}

func (w *world) sync() {
	w.Helper()
	_, err := w.Sync(w.ctx)
	require.NoError(w, err)
}

func TestSettleUnrecordedNameIsRemoved(t *testing.T) {
	forBoots(t, func(w *world, sameBoot bool) {
		base := w.layer(nil, "a", "1")
		w.new(base, cache.NewOptions{}, "b", "2")
		w.new(nil, cache.NewOptions{}, "c", "3")
		w.sync()
		w.crashInto(sameBoot)
		require.Equal(w, map[string]snapshots.Kind{string(base.ID()): snapshots.KindCommitted}, w.names())
		require.Equal(w, "a=1", w.treeOf(base.ID()))
	})
}

func TestSettleMutableAndCommittedAreKeptWhereTheirDataIs(t *testing.T) {
	forBoots(t, func(w *world, sameBoot bool) {
		durable := w.layer(nil, "a", "1")
		w.sync()
		fresh := w.layer(nil, "b", "2")
		dropped := w.new(nil, cache.NewOptions{Retain: true}, "c", "3")
		kept := w.new(nil, cache.NewOptions{Retain: true, KeepOnPowerCut: true}, "d", "4")
		old := w.layer(nil, "e", "5")
		w.sync()
		w.release(old)
		reopened, err := w.GetMutable(w.ctx, old.ID())
		require.NoError(w, err)
		again := w.layer(nil, "f", "6") // committed after the sync
		w.crashInto(sameBoot)

		require.Equal(w, "a=1", w.treeOf(durable.ID()))
		require.Equal(w, cache.Mutable, w.state(kept.ID()))
		w.gone(old.ID())
		if sameBoot {
			require.Equal(w, "b=2", w.treeOf(fresh.ID()))
			require.Equal(w, "f=6", w.treeOf(again.ID()))
			require.Equal(w, cache.Mutable, w.state(dropped.ID()))
			require.Equal(w, cache.Mutable, w.state(reopened.ID()))
			return
		}
		// fresh was synced with old.
		require.Equal(w, "b=2", w.treeOf(fresh.ID()))
		w.gone(again.ID())
		w.gone(dropped.ID())
		w.gone(reopened.ID())
		require.Len(w, w.names(), 3)
	})
}

// removeName takes a snapshot away without a word to anybody.
func removeName(t testing.TB, d snapshot.Driver, key string) {
	p, err := d.Detach(t.Context(), key)
	require.NoError(t, err)
	require.NoError(t, d.Discard(t.Context(), p))
}

func TestSettleRecordWithoutSnapshotIsRemoved(t *testing.T) {
	forBoots(t, func(w *world, sameBoot bool) {
		kept := w.layer(nil, "a", "1")
		committed := w.layer(nil, "b", "2")
		finalized := w.layer(nil, "c", "3")
		child := w.layer(finalized, "d", "4")
		grandchild := w.layer(child, "e", "5")
		mut := w.new(nil, cache.NewOptions{Retain: true, KeepOnPowerCut: true}, "f", "6")
		w.release(kept, committed, finalized, child, grandchild, mut)
		w.sync()
		// Not synced since: it says of itself that it is to be looked at.
		w.tamper(func(d snapshot.Driver, s *metadata.Store) {
			for _, ref := range []interface{ Record() *cache.Record }{grandchild, child, finalized, committed, mut} {
				removeName(w, d, ref.Record().Key)
			}
			require.NoError(w, s.Update(w.ctx, func(tx *metadata.Tx) error {
				rec, err := tx.Get(finalized.ID())
				if err != nil {
					return err
				}
				rec.Durable = !sameBoot
				_, err = tx.Put(rec)
				return err
			}))
		})
		w.nextBoot(sameBoot)
		require.Equal(w, "a=1", w.treeOf(kept.ID()))
		for _, id := range []cache.ID{committed.ID(), finalized.ID(), child.ID(), grandchild.ID(), mut.ID()} {
			w.gone(id)
		}
	})
}

func TestSettleLostSwapIsFinished(t *testing.T) {
	forBoots(t, func(w *world, sameBoot bool) {
		imm := w.layer(nil, "a", "1")
		w.sync()
		id, key := imm.ID(), imm.Record().Key
		w.release(imm)
		w.tamper(func(d snapshot.Driver, _ *metadata.Store) {
			require.NoError(w, d.Commit(w.ctx, string(id), key))
		})
		w.nextBoot(sameBoot)
		rec, err := w.Lookup(w.ctx, id)
		require.NoError(w, err)
		require.Equal(w, cache.Finalized, rec.State)
		require.Equal(w, string(id), rec.Key)
		require.Equal(w, key, rec.Was)
		require.Equal(w, "a=1", w.treeOf(id))
		_, err = w.GetMutable(w.ctx, id)
		require.ErrorIs(w, err, errdefs.ErrFailedPrecondition)
	})
}

// The swap of a record is finished even if a process reads it: once that is
// gone a reopen must not take the record for one whose snapshot is active.
func TestSettleLostSwapOfAHeldRecord(t *testing.T) {
	w := newWorld(t, overlayKind)
	imm := w.layer(nil, "a", "1")
	id, key := imm.ID(), imm.Record().Key
	w.release(imm)
	reader, path := startHolder(w, id, false, true)
	w.tamper(func(d snapshot.Driver, _ *metadata.Store) {
		require.NoError(w, d.Commit(w.ctx, string(id), key))
	})
	w.reopenStore()
	require.Equal(t, cache.Finalized, w.state(id))
	require.Equal(t, "a=1", readTree(w, path), "the reader's mount is still there")
	reader.quit()
	_, err := w.GetMutable(w.ctx, id)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

func TestSettleLostRenameIsRepeated(t *testing.T) {
	forBoots(t, func(w *world, sameBoot bool) {
		if w.kind.name == containerdKind.name {
			return // its names are in a database, which loses no rename
		}
		imm := w.layer(nil, "a", "1")
		w.sync()
		require.NoError(w, imm.Finalize(w.ctx))
		rec := imm.Record()
		require.True(w, rec.Durable)
		w.release(imm)
		w.tamper(func(snapshot.Driver, *metadata.Store) {
			dir := filepath.Join(w.root, "snapshots")
			require.NoError(w, os.Rename(filepath.Join(dir, "committed", rec.Key), filepath.Join(dir, "active", rec.Was)))
		})
		w.nextBoot(sameBoot)
		require.Equal(w, cache.Finalized, w.state(rec.ID))
		require.Equal(w, map[string]snapshots.Kind{rec.Key: snapshots.KindCommitted}, w.names())
		require.Equal(w, "a=1", w.treeOf(rec.ID))
		w.sync()
		after, err := w.Lookup(w.ctx, rec.ID)
		require.NoError(w, err)
		require.Empty(w, after.Was, "a sync after the rename has it on the disk")
	})
}

// detachName leaves a removal between its two halves.
func detachName(t testing.TB, d snapshot.Driver, key string) {
	_, err := d.Detach(t.Context(), key)
	require.NoError(t, err)
}

func TestSettleRemovalIsFinished(t *testing.T) {
	forBoots(t, func(w *world, sameBoot bool) {
		committed := w.layer(nil, "a", "1")
		finalized := w.layer(nil, "b", "2")
		child := w.layer(finalized, "c", "3")
		w.sync()
		w.release(committed, finalized, child)
		w.tamper(func(d snapshot.Driver, _ *metadata.Store) {
			detachName(w, d, committed.Record().Key)
			detachName(w, d, child.Record().Key)
		})
		w.nextBoot(sameBoot)
		w.gone(committed.ID())
		w.gone(child.ID())
		require.Equal(w, "b=2", w.treeOf(finalized.ID()))
		require.Len(w, w.names(), 1)
	})
}

func TestSettleRefusedRemovalIsTakenBack(t *testing.T) {
	forBoots(t, func(w *world, sameBoot bool) {
		parent := w.layer(nil, "a", "1")
		require.NoError(w, parent.Finalize(w.ctx))
		w.sync()
		w.release(parent)
		id := parent.ID()
		var child cache.ID
		w.tamper(func(d snapshot.Driver, s *metadata.Store) {
			// A child that has no snapshot, so that the driver lets go.
			detachName(w, d, string(id))
			child = s.NewID()
			require.NoError(w, s.Update(w.ctx, func(tx *metadata.Tx) error {
				return tx.Create(&cache.Record{ID: child, State: cache.Lazy, Op: metadata.Layer, Parents: []cache.ID{id}})
			}))
		})
		w.nextBoot(sameBoot)
		require.Equal(w, "a=1", w.treeOf(id))
		require.Equal(w, cache.Lazy, w.state(child))
	})
}

func TestSettleBytesWithoutRecordAreDeleted(t *testing.T) {
	forBoots(t, func(w *world, sameBoot bool) {
		imm := w.layer(nil, "a", "1")
		w.sync()
		id, key := imm.ID(), imm.Record().Key
		w.release(imm)
		w.tamper(func(d snapshot.Driver, s *metadata.Store) {
			detachName(w, d, key)
			require.NoError(w, s.Update(w.ctx, func(tx *metadata.Tx) error { return tx.Delete(id) }))
		})
		w.nextBoot(sameBoot)
		w.gone(id)
		pending, err := w.driver.Pending(w.ctx)
		require.NoError(w, err)
		require.Empty(w, pending)
	})
}

// Data that nobody synced may be gone after another boot although its names
// are there: such records are a miss, with all that stands on them.
func TestSettleUnsyncedRecordsAreDroppedWithTheirDescendants(t *testing.T) {
	forKinds(t, func(w *world) {
		durable := w.layer(nil, "a", "1")
		require.NoError(w, durable.Finalize(w.ctx))
		w.sync()
		parent := w.layer(durable, "b", "2")
		require.NoError(w, parent.Finalize(w.ctx))
		child := w.layer(parent, "c", "3")
		// In use by names that no record names: a mutable over each.
		w.new(parent, cache.NewOptions{}, "d", "4")
		w.new(child, cache.NewOptions{}, "e", "5")
		w.new(durable, cache.NewOptions{}, "f", "6")
		w.crashInto(false)
		w.gone(parent.ID())
		w.gone(child.ID())
		require.Equal(w, "a=1", w.treeOf(durable.ID()))
		require.Len(w, w.names(), 1)
	})
}

// What is dropped takes its blobs along, but for those that others have, too.
func TestSettleDroppedRecordsTakeTheirBlobs(t *testing.T) {
	forKinds(t, func(w *world) {
		own := pack(w, layer.Gzip, layerTar(w, file{name: "a", text: "1"}))
		common := pack(w, layer.Gzip, layerTar(w, file{name: "b", text: "2"}))
		r := newRegistry(own, common)
		elsewhere := w.byBlob(common, nil, r)
		base := w.layer(nil, "c", "3")
		first := w.byBlob(own, base, r)
		second := w.byBlob(common, first, r)
		require.NoError(w, errors.Join(elsewhere.Extract(w.ctx), second.Extract(w.ctx)))
		require.Len(w, w.stored(), 2)
		w.crashInto(false)
		w.gone(base.ID())
		w.gone(first.ID())
		w.gone(second.ID())
		require.Equal(w, []digest.Digest{common.desc.Digest}, w.stored())
		require.Equal(w, "b=2", w.treeOf(elsewhere.ID()))
		require.NoFileExists(w, filepath.Join(w.root, "blobs", own.desc.Digest.String()))
	})
}

// A record whose finalize was cut off can be dropped with an ancestor.
func TestSettleLostSwapUnderADroppedParent(t *testing.T) {
	forKinds(t, func(w *world) {
		parent := w.layer(nil, "a", "1")
		child := w.layer(parent, "b", "2")
		w.sync()
		key := child.Record().Key
		w.release(parent, child)
		w.tamper(func(d snapshot.Driver, s *metadata.Store) {
			require.NoError(w, d.Commit(w.ctx, string(child.ID()), key))
			require.NoError(w, s.Update(w.ctx, func(tx *metadata.Tx) error {
				rec, err := tx.Get(parent.ID())
				if err == nil {
					rec.Durable = false
					_, err = tx.Put(rec)
				}
				return err
			}))
		})
		w.nextBoot(false)
		w.gone(parent.ID())
		w.gone(child.ID())
		require.Empty(w, w.names())
	})
}

// In another boot committed names are compared, too: whole lines of them that
// no record names go.
func TestSettleCommittedNamesWithoutRecord(t *testing.T) {
	forBoots(t, func(w *world, sameBoot bool) {
		base := w.layer(nil, "a", "1")
		top := w.layer(base, "b", "2")
		require.NoError(w, top.Finalize(w.ctx))
		other := w.layer(nil, "c", "3")
		w.sync()
		w.release(base, top, other)
		w.tamper(func(_ snapshot.Driver, s *metadata.Store) {
			require.NoError(w, s.Update(w.ctx, func(tx *metadata.Tx) error {
				return errors.Join(tx.Delete(top.ID()), tx.Delete(base.ID()))
			}))
		})
		// A damage, not a crash: the same boot does not look for it, Check
		// finds it.
		w.nextBoot(sameBoot)
		if sameBoot {
			require.Len(w, w.findings(), 2)
			w.closeStore()
			w.nextBoot(false)
		}
		require.Equal(w, map[string]snapshots.Kind{other.Record().Key: snapshots.KindActive}, w.names())
	})
}

// What a living process works in is left alone, whatever is wrong with it.
func TestSettleRespectsLivingHolders(t *testing.T) {
	forKinds(t, func(w *world) {
		unnamed := w.new(nil, cache.NewOptions{Retain: true}, "a", "1")
		removed := w.layer(nil, "b", "2")
		w.release(unnamed, removed)
		writer, path := startHolder(w, unnamed.ID(), true, true)
		reader, _ := startHolder(w, removed.ID(), false, false)
		key := removed.Record().Key
		w.tamper(func(d snapshot.Driver, s *metadata.Store) {
			require.NoError(w, s.Update(w.ctx, func(tx *metadata.Tx) error { return tx.Delete(unnamed.ID()) }))
			detachName(w, d, key)
		})
		w.reopenStore()
		require.Equal(w, "a=1", readTree(w, path), "its mount is still there")
		require.NoError(w, os.WriteFile(filepath.Join(path, "x"), nil, 0o600))
		require.Contains(w, w.names(), unnamed.Record().Key)
		require.Equal(w, "b=2", w.treeOf(removed.ID()), "a removal of what is held is taken back")
		w.check()
		w.closeStore()
		_, err := os.Lstat(filepath.Join(w.root, "dirty"))
		require.NoError(w, err, "a store with holders stays dirty")

		writer.kill()
		reader.kill()
		w.reopenStore()
		require.NotContains(w, w.names(), unnamed.Record().Key, "nobody holds it any more")
		require.Equal(w, "b=2", w.treeOf(removed.ID()))
		left, err := os.ReadDir(filepath.Join(w.root, "mounts"))
		require.NoError(w, err)
		require.Empty(w, left, "the killed writer's mount is cleaned")
		left, err = os.ReadDir(filepath.Join(w.root, "holds"))
		require.NoError(w, err)
		require.Empty(w, left)
	})
}

// A broken record that a living process holds stays, and the store stays dirty
// until it can be settled.
func TestSettleLeavesABrokenHeldRecord(t *testing.T) {
	w := newWorld(t, overlayKind)
	parent := w.layer(nil, "a", "1")
	child := w.layer(parent, "b", "2")
	w.release(parent, child)
	reader, _ := startHolder(w, child.ID(), false, false)
	w.tamper(func(d snapshot.Driver, _ *metadata.Store) {
		removeName(w, d, child.Record().Key)
	})
	w.reopenStore()
	require.Equal(t, cache.Committed, w.state(child.ID()))
	reader.quit()
	w.reopenStore()
	w.gone(child.ID())
	require.Equal(t, "a=1", w.treeOf(parent.ID()))
}

// The boot id is written last: a settling that is cut off starts over.
func TestSettleInAnotherBootStartsOverWhenItIsCutOff(t *testing.T) {
	w := newWorld(t, overlayKind)
	parent := w.layer(nil, "a", "1")
	child := w.layer(parent, "b", "2")
	w.release(parent, child)
	w.closeStore()
	w.boot = "another boot"
	for n := 1; ; n++ {
		failed := false
		steps := 0
		w.opts = func(o *cache.Options) {
			o.Step = func(string) error {
				if steps++; steps == n {
					failed = true
					return errors.New("the machine goes down")
				}
				return nil
			}
		}
		if err := w.tryOpen(); !failed {
			require.NoError(t, err)
			require.Greater(t, n, 3)
			break
		} else {
			require.Error(t, err)
		}
		w.opts = nil
		w.tamper(func(_ snapshot.Driver, s *metadata.Store) {
			require.NoError(t, s.View(w.ctx, func(tx *metadata.Tx) error {
				meta, err := tx.Meta()
				require.Equal(t, "this boot", meta.BootID, "step %d", n)
				return err
			}))
		})
	}
	w.opts = nil
	w.gone(parent.ID())
	w.gone(child.ID())
	require.Empty(t, w.names())
}

// Bytes that cannot be deleted are no reason to keep the store closed, and no
// reason to forget them.
func TestSettleWhatCannotBeDeletedIsLeft(t *testing.T) {
	w := newWorld(t, overlayKind)
	w.new(nil, cache.NewOptions{}, "a", "1")
	w.crash()
	d, err := w.kind.open(w.root)
	require.NoError(t, err)
	faulty := snapshottest.NewFaulty(d)
	faulty.FailOp("Discard", "", errors.New("cannot be deleted"))
	m, err := cache.Open(w.ctx, cache.Options{Root: w.root, Driver: faulty, BootID: w.boot})
	require.NoError(t, err)
	found := 0
	for f, err := range m.Check(w.ctx) {
		require.NoError(t, err)
		require.Equal(t, cache.FindingRemovalPending, f.Code)
		found++
	}
	require.Equal(t, 1, found)
	require.NoError(t, errors.Join(m.Close(), d.Close()))
	w.reopenStore()
	w.check()
}

package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// Finding is something that Check found wrong. Code is stable; the codes of
// the store itself are in package metadata.
type Finding = metadata.Finding

// Codes of findings about records and the driver's names.
const (
	// FindingSnapshotMissing: a record names a snapshot that is not there.
	FindingSnapshotMissing = "snapshot-missing"
	// FindingSnapshotKind: the snapshot is active where it should be
	// committed, or the other way round.
	FindingSnapshotKind = "snapshot-kind"
	// FindingSnapshotParent: the snapshot's parent in the driver is not the
	// snapshot of the record's parent.
	FindingSnapshotParent = "snapshot-parent"
	// FindingSnapshotDamaged: what the driver wrote down about some snapshots
	// cannot be read. The message names them all.
	FindingSnapshotDamaged = "snapshot-damaged"
	// FindingSnapshotUnrecorded: a snapshot that no record and no handle of
	// this process names.
	FindingSnapshotUnrecorded = "snapshot-unrecorded"
	// FindingRemovalPending: the bytes of a removed snapshot are still there.
	FindingRemovalPending = "removal-pending"
)

// Check proves the store: it recomputes everything that is derived from
// records, and compares the records with the driver's names and with the
// content store. It changes
// nothing and counts no use. An error ends the sequence; findings do not.
// While others change the cache it may report what they are just doing.
func (m *Manager) Check(ctx context.Context) iter.Seq2[Finding, error] {
	return func(yield func(Finding, error) bool) {
		end, err := m.begin()
		if err != nil {
			yield(Finding{}, err)
			return
		}
		defer end()
		c := &checking{m: m, yield: yield, records: map[string]*Record{}, byID: map[ID]*Record{}}
		err = m.store.View(ctx, func(tx *metadata.Tx) error { return c.store(ctx, tx) })
		if err == nil && !c.stopped {
			err = c.names(ctx)
		}
		if err == nil && !c.stopped {
			err = c.blobs(ctx)
		}
		if err != nil && !c.stopped {
			yield(Finding{}, fmt.Errorf("check: %w", err))
		}
	}
}

type checking struct {
	m       *Manager
	yield   func(Finding, error) bool
	stopped bool
	records map[string]*Record // by driver key
	byID    map[ID]*Record
	// unswapped are records that are known to wait for a swap.
	unswapped map[ID]bool
}

func (c *checking) report(f Finding) {
	if !c.stopped && !c.yield(f, nil) {
		c.stopped = true
	}
}

// store hands on what the store finds and collects the records.
func (c *checking) store(ctx context.Context, tx *metadata.Tx) error {
	for f, err := range tx.Check() {
		if err != nil {
			return err
		}
		if c.report(f); c.stopped || ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	for rec, err := range tx.Records() {
		if err != nil {
			continue // reported above
		}
		c.byID[rec.ID] = rec
		if rec.Key != "" {
			c.records[rec.Key] = rec
		}
	}
	return nil
}

// names compares records with the driver, both ways.
func (c *checking) names(ctx context.Context) error {
	inMemory := c.m.unrecordedKeys()
	c.m.lock()
	c.unswapped = maps.Clone(c.m.unswapped)
	c.m.unlock()
	found := map[string]snapshots.Info{}
	err := c.m.driver.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		found[info.Name] = info
		return nil
	})
	if is(err, errdefs.ErrDataLoss) {
		c.report(Finding{Code: FindingSnapshotDamaged, Message: err.Error()})
	} else if err != nil {
		return err
	}
	var odd []Finding // that they come in some order should not be luck
	for key, rec := range c.records {
		info, ok := found[key]
		if _, swapping := c.unswapped[rec.ID]; !ok && swapping {
			// A finalize whose swap is to come.
			info, ok = found[string(rec.ID)]
		}
		if !ok {
			odd = append(odd, Finding{Code: FindingSnapshotMissing, ID: rec.ID, Key: key, Message: fmt.Sprintf("%s record has no snapshot", rec.State)})
			continue
		}
		odd = append(odd, c.compare(rec, info)...)
	}
	for key := range found {
		rec := c.records[key]
		if _, swapping := c.unswapped[ID(key)]; rec == nil && swapping {
			rec = c.byID[ID(key)]
		}
		if rec == nil && !inMemory[key] && !c.derived(key) && !c.m.heldByProcess(key) {
			odd = append(odd, Finding{Code: FindingSnapshotUnrecorded, Key: key, Message: "no record names this snapshot"})
		}
	}
	slices.SortFunc(odd, func(a, b Finding) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), strings.Compare(a.Code, b.Code))
	})
	for _, f := range odd {
		c.report(f)
	}
	return c.removals(ctx)
}

// derived says whether a snapshot that no record names belongs to one all the
// same: a cleaned copy of its layer, or what an extraction made that was cut off
// before the record said so.
func (c *checking) derived(key string) bool {
	if rec := c.byID[ID(key)]; rec != nil && rec.State == metadata.Lazy {
		return true
	}
	id, ok := copiedFrom(key)
	return ok && c.byID[id] != nil
}

func (c *checking) compare(rec *Record, info snapshots.Info) (odd []Finding) {
	want := snapshots.KindActive
	if rec.State == metadata.Finalized || info.Name == string(rec.ID) {
		want = snapshots.KindCommitted
	}
	if info.Kind != want {
		odd = append(odd, Finding{Code: FindingSnapshotKind, ID: rec.ID, Key: info.Name, Message: fmt.Sprintf("%s record has a snapshot that is %s", rec.State, info.Kind)})
	}
	parent := ""
	if len(rec.Parents) == 1 {
		if p := c.byID[rec.Parents[0]]; p != nil {
			if parent = p.Key; p.State == metadata.Lazy {
				return odd // it was lost, and is made again under its id
			}
		}
	}
	if rec.Op != metadata.Merge && rec.Op != metadata.Diff && info.Parent != parent {
		odd = append(odd, Finding{Code: FindingSnapshotParent, ID: rec.ID, Key: info.Name, Message: fmt.Sprintf("parent in the driver is %q, by the records %q", info.Parent, parent)})
	}
	return odd
}

func (c *checking) removals(ctx context.Context) error {
	pending, err := c.m.driver.Pending(ctx)
	if errors.Is(err, errdefs.ErrNotImplemented) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, p := range pending {
		if p.Kind == snapshot.PendingRemoval {
			c.report(Finding{Code: FindingRemovalPending, Key: p.Key, Message: "the bytes of a removed snapshot are still there"})
		}
	}
	return nil
}

// unrecordedKeys are the snapshots of mutables that are in memory only.
func (m *Manager) unrecordedKeys() map[string]bool {
	m.lock()
	defer m.unlock()
	out := map[string]bool{}
	for _, e := range m.entries {
		if e.rec != nil && !e.recorded {
			out[e.rec.Key] = true
		}
	}
	return out
}

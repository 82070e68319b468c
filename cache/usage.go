package cache

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/metadata"
)

// Count is a number of records and the bytes that they occupy.
type Count struct {
	Records int64
	Bytes   int64
}

// Usage is what a store occupies on the disk, in bytes of allocated blocks.
type Usage struct {
	// Total is Snapshots + Blobs + Database + Pending.
	Total     int64
	Snapshots int64
	Blobs     int64
	Database  int64
	// Pending is what removals that are under way will free.
	Pending int64
	// InUse + Reclaimable is Snapshots + Blobs: what somebody holds or what
	// has children, and the rest.
	InUse       int64
	Reclaimable int64
	// Shared is the part of Snapshots that has two children or more.
	Shared  int64
	Records int64
	ByType  map[string]Count
	ByState map[string]Count
	// FSTotal and FSFree describe the file system of the store.
	FSTotal int64
	FSFree  int64
	// Entries has each record, sorted by id.
	Entries []UsageEntry
}

// UsageEntry is one record's part of Usage.
type UsageEntry struct {
	Record   *Record
	Size     int64
	Children int
	InUse    bool
}

// DiskUsage measures the store. It takes no handle and changes no counter.
// Records whose size is not known yet are measured, several at once; keep, if
// not nil, picks the records that are counted.
func (m *Manager) DiskUsage(ctx context.Context, keep func(*Record) bool) (*Usage, error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	u := &Usage{ByType: map[string]Count{}, ByState: map[string]Count{}}
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		for rec, err := range tx.Records() {
			if err != nil {
				m.log.Warn("record cannot be read", "error", err)
				continue
			}
			if keep == nil || keep(rec) {
				u.Entries = append(u.Entries, UsageEntry{Record: rec, Size: rec.Size, Children: tx.ChildCount(rec.ID)})
			}
		}
		return ctx.Err()
	})
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	if err := m.measure(ctx, u.Entries); err != nil {
		return nil, err
	}
	for i := range u.Entries {
		u.add(m, &u.Entries[i])
	}
	u.Reclaimable = u.Snapshots + u.Blobs - u.InUse
	if err := m.measureRest(ctx, u); err != nil {
		return nil, err
	}
	u.Total = u.Snapshots + u.Blobs + u.Database + u.Pending
	return u, nil
}

func (u *Usage) add(m *Manager, e *UsageEntry) {
	e.InUse = e.Children > 0 || len(m.Refs(e.Record.ID)) > 0
	u.Records++
	u.Snapshots += e.Size
	if e.InUse {
		u.InUse += e.Size
	}
	if e.Children > 1 {
		u.Shared += e.Size
	}
	t := u.ByType[e.Record.Type]
	u.ByType[e.Record.Type] = Count{t.Records + 1, t.Bytes + e.Size}
	s := u.ByState[e.Record.State.String()]
	u.ByState[e.Record.State.String()] = Count{s.Records + 1, s.Bytes + e.Size}
}

// measure fills in the sizes that the records do not have.
func (m *Manager) measure(ctx context.Context, entries []UsageEntry) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range entries {
		e := &entries[i]
		if e.Size != metadata.SizeUnknown {
			continue
		}
		if e.Size = 0; e.Record.Key == "" {
			continue
		}
		g.Go(func() error {
			size, err := m.sizeOf(ctx, e.Record)
			if err != nil {
				return fmt.Errorf("measure record %s: %w", short(e.Record.ID), err)
			}
			e.Size = size
			return nil
		})
	}
	return g.Wait()
}

// sizeOf asks the driver, under the name that the snapshot has by then. One
// that is gone occupies nothing.
func (m *Manager) sizeOf(ctx context.Context, rec *Record) (int64, error) {
	for _, key := range []string{rec.Key, string(rec.ID)} {
		u, err := m.driver.Usage(ctx, key)
		if err == nil {
			return u.Size, nil
		}
		if !is(err, errdefs.ErrNotFound) {
			return 0, err
		}
	}
	return 0, nil
}

// measureRest measures what no record stands for.
func (m *Manager) measureRest(ctx context.Context, u *Usage) error {
	var db unix.Stat_t
	if err := unix.Stat(filepath.Join(m.root, StoreFile), &db); err != nil {
		return &os.PathError{Op: "stat", Path: filepath.Join(m.root, StoreFile), Err: err}
	}
	u.Database = db.Blocks * 512
	trash := filepath.Join(m.root, "snapshots", "trash")
	names, err := os.ReadDir(trash)
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return fmt.Errorf("list pending removals: %w", err)
	}
	for _, n := range names {
		pending, err := fs.DiskUsage(ctx, filepath.Join(trash, n.Name()))
		if err != nil && !errors.Is(err, iofs.ErrNotExist) {
			return fmt.Errorf("measure pending removals: %w", err)
		}
		u.Pending += pending.Size
	}
	var st unix.Statfs_t
	if err := unix.Statfs(m.root, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: m.root, Err: err}
	}
	u.FSTotal = int64(st.Blocks) * st.Bsize
	u.FSFree = int64(st.Bavail) * st.Bsize
	return nil
}

// Used is the bytes of all records whose size is known, read from the store's
// totals: it costs the same whatever the number of records.
func (m *Manager) Used(ctx context.Context) (bytes int64, err error) {
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		totals, err := tx.Totals()
		for _, t := range totals {
			bytes += t.Bytes
		}
		return err
	})
	return bytes, err
}

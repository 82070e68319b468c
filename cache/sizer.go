package cache

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

const (
	// measureGather is how long a commit may wait to be measured, so that the
	// sizes of many are written in one transaction.
	measureGather = time.Second
	// measureParallel bounds the walks at one time: they wait for the disk,
	// and more of them only take it away from builds.
	measureParallel = 4
	// measureBatch is how many sizes one transaction writes, so that no other
	// one waits long for it.
	measureBatch = 512
)

// sizer measures committed snapshots in the background. It is there when the
// syncer is.
type sizer struct {
	m     *Manager
	kick  chan struct{} // has room for one: something is waiting
	stop  context.CancelFunc
	once  sync.Once
	ended chan struct{}

	// mu is a leaf.
	mu sync.Mutex
	// waiting are the records to be measured; guarded by mu.
	waiting map[ID]struct{}
}

// startSizer begins to measure in the background, unless that is left to
// callers. A collector needs sizes in any case.
func (m *Manager) startSizer(interval time.Duration, collects bool) {
	if m.readOnly || interval < 0 && !collects {
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	m.sizer = &sizer{
		m: m, kick: make(chan struct{}, 1), stop: stop,
		ended: make(chan struct{}), waiting: map[ID]struct{}{},
	}
	go m.sizer.loop(ctx)
}

// add asks for the size of a record.
func (s *sizer) add(id ID) {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.waiting[id] = struct{}{}
	s.mu.Unlock()
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

func (s *sizer) loop(ctx context.Context) {
	defer close(s.ended)
	timer := time.NewTimer(measureGather)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.kick:
		}
		timer.Reset(measureGather)
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		s.mu.Lock()
		waiting := s.waiting
		s.waiting = map[ID]struct{}{}
		s.mu.Unlock()
		_, err := s.m.measureRecords(ctx, func(tx *metadata.Tx) (out []*Record) {
			for id := range waiting {
				if rec, err := tx.Get(id); err == nil && rec.ID == id {
					out = append(out, rec)
				}
			}
			return out
		})
		if err != nil && ctx.Err() == nil && !errors.Is(err, errClosed) {
			s.m.log.Warn("records could not be measured; it is tried again when somebody asks for their size", "error", err)
		}
	}
}

// end stops the background work. What was not measured by then is measured
// when somebody asks for it.
func (s *sizer) end() {
	if s == nil {
		return
	}
	s.once.Do(func() {
		s.stop()
		<-s.ended
	})
}

// Measure measures all snapshots that nobody writes to and whose size is not
// known yet, several at once, and says how many sizes it wrote. Managers that
// sync in the background do it by themselves soon after each commit.
func (m *Manager) Measure(ctx context.Context) (int, error) {
	return m.measureRecords(ctx, func(tx *metadata.Tx) (out []*Record) {
		for rec, err := range tx.Records() {
			if err == nil {
				out = append(out, rec)
			}
		}
		return out
	})
}

// measureRecords measures those of some records that need it.
func (m *Manager) measureRecords(ctx context.Context, list func(*metadata.Tx) []*Record) (n int, err error) {
	end, err := m.beginChange()
	if err != nil {
		return 0, err
	}
	defer end()
	var recs []*Record
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		recs = slices.DeleteFunc(list(tx), func(rec *Record) bool {
			return rec.Size != metadata.SizeUnknown || rec.State == metadata.Mutable || rec.Key == ""
		})
		return ctx.Err()
	})
	if err != nil {
		return 0, fmt.Errorf("list what is to be measured: %w", err)
	}
	began := m.copies.began()
	sizes, err := m.measure(ctx, recs)
	if err != nil {
		return 0, err
	}
	return m.writeSizes(ctx, recs, sizes, began)
}

// copies counts the cleaned copies of layers that are made, so that no size is
// written that was measured while one appeared.
type copies struct{ begun, ended atomic.Uint64 }

func (c *copies) begin() { c.begun.Add(1) }
func (c *copies) end()   { c.ended.Add(1) }

// began is how many had begun when none was being made; zero is none.
func (c *copies) began() *uint64 {
	ended := c.ended.Load()
	if c.begun.Load() != ended {
		return nil
	}
	return &ended
}

// forgetSize makes the size of a record unknown, as it is about to change.
func (m *Manager) forgetSize(ctx context.Context, id ID) error {
	var forgot []*Record
	err := m.store.Update(ctx, func(tx *metadata.Tx) error {
		forgot = nil
		rec, err := tx.Get(id)
		if err != nil || rec.Size == metadata.SizeUnknown {
			return err
		}
		rec.Size = metadata.SizeUnknown
		forgot = []*Record{rec}
		return tx.Mark(rec)
	})
	if err != nil {
		return fmt.Errorf("note that the size of record %s changes: %w", short(id), err)
	}
	m.publishMarks(forgot, func(rec, marked *Record) { rec.Size = marked.Size })
	return nil
}

// measure gives the sizes of the records' snapshots, in their order.
func (m *Manager) measure(ctx context.Context, recs []*Record) ([]int64, error) {
	sizes := make([]int64, len(recs))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(measureParallel)
	for i, rec := range recs {
		g.Go(func() (err error) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if sizes[i], err = m.sizeOf(ctx, rec); err != nil {
				err = fmt.Errorf("measure record %s: %w", short(rec.ID), err)
			}
			return err
		})
	}
	return sizes, g.Wait()
}

// sizeOf asks the driver, under the name that the snapshot has by then. One
// that is gone occupies nothing. With it counts the cleaned copy of its layer.
func (m *Manager) sizeOf(ctx context.Context, rec *Record) (size int64, err error) {
	for _, key := range snapshotKeys(rec) {
		size, err = m.sizeOfKey(ctx, key)
		if !is(err, errdefs.ErrNotFound) {
			break
		}
	}
	if err == nil && rec.Raw {
		var more int64
		more, err = m.sizeOfKey(ctx, cleanKey(rec.ID))
		size += more
	}
	if is(err, errdefs.ErrNotFound) {
		err = nil
	}
	return size, err
}

// sizeOfKey is what a removal of a driver key frees.
func (m *Manager) sizeOfKey(ctx context.Context, key string) (int64, error) {
	u, err := m.driver.Usage(ctx, key)
	if err != nil {
		return 0, err
	}
	if f, ok := m.driver.(snapshot.Footprinter); ok {
		more, err := f.Footprint(ctx, key)
		return u.Size + more, err
	}
	return u.Size, nil
}

// writeSizes writes sizes that were measured, leaving out records that have
// moved on. It says how many were written. began is of before they were
// measured.
func (m *Manager) writeSizes(ctx context.Context, recs []*Record, sizes []int64, began *uint64) (n int, err error) {
	for from := 0; from < len(recs); from += measureBatch {
		to := min(from+measureBatch, len(recs))
		var marked []*Record
		err := m.store.Update(ctx, func(tx *metadata.Tx) error {
			marked = marked[:0]
			for i := from; i < to; i++ {
				rec, err := tx.Get(recs[i].ID)
				if is(err, errdefs.ErrNotFound) || err == nil && (rec.ID != recs[i].ID || rec.Revision != recs[i].Revision) {
					continue
				}
				if err != nil {
					return err
				}
				if rec.Size == sizes[i] || rec.Raw && (began == nil || m.copies.begun.Load() != *began) {
					continue
				}
				rec.Size = sizes[i]
				if err := tx.Mark(rec); err != nil {
					return err
				}
				marked = append(marked, rec)
			}
			return nil
		})
		if err != nil {
			return n, fmt.Errorf("write what was measured: %w", err)
		}
		n += len(marked)
		m.publishMarks(marked, func(rec, marked *Record) { rec.Size = marked.Size })
	}
	if n > 0 {
		m.collector.poke()
	}
	return n, nil
}

// publishMarks shows what was found out about records to those who hold them.
func (m *Manager) publishMarks(marked []*Record, set func(rec, marked *Record)) {
	m.lock()
	defer m.unlock()
	for _, rec := range marked {
		e := m.entries[rec.ID]
		if e == nil || e.rec == nil || e.rec.Revision != rec.Revision {
			continue
		}
		now := *e.rec // others may be reading it
		set(&now, rec)
		e.rec = &now
	}
}

package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// DefaultSyncInterval is how long committed data may wait for its sync. The
// kernel writes data back after thirty seconds by itself; within ten, a power
// cut costs little, and a busy daemon pays one sync for thousands of commits.
const DefaultSyncInterval = 10 * time.Second

// ErrSync is returned by all changing calls once a sync of the snapshots has
// failed: the kernel has dropped what it could not write, so a later sync that
// succeeds says nothing about it. The next Open drops the records whose data
// was not known to be on the disk, as after a power cut.
var ErrSync = fmt.Errorf("data could not be written to the disk: %w", errdefs.ErrDataLoss)

// syncer syncs committed snapshots in the background, many at once.
type syncer struct {
	m        *Manager
	interval time.Duration
	kick     chan struct{} // has room for one: something was committed
	stop     chan struct{}
	once     sync.Once
	ended    chan struct{}
}

// startSyncer begins to sync in the background. A negative interval leaves it
// to the callers of Sync.
func (m *Manager) startSyncer(interval time.Duration) {
	if m.readOnly || interval < 0 {
		return
	}
	if interval == 0 {
		interval = DefaultSyncInterval
	}
	m.syncer = &syncer{
		m: m, interval: interval, kick: make(chan struct{}, 1),
		stop: make(chan struct{}), ended: make(chan struct{}),
	}
	go m.syncer.loop()
}

// committed tells the syncer that there is something to do.
func (s *syncer) committed() {
	if s == nil {
		return
	}
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

func (s *syncer) loop() {
	defer close(s.ended)
	timer := time.NewTimer(s.interval)
	defer timer.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-s.kick:
		}
		timer.Reset(s.interval)
		select {
		case <-s.stop:
			s.committed() // not done yet: the end does it
			return
		case <-timer.C:
		}
		s.sync()
	}
}

func (s *syncer) sync() {
	_, err := s.m.Sync(context.Background())
	if err != nil && !errors.Is(err, errClosed) {
		s.m.log.Error("committed data is not known to be on the disk", "error", err)
	}
}

// end stops the background work and syncs what is left.
func (s *syncer) end() {
	if s == nil {
		return
	}
	s.once.Do(func() {
		close(s.stop)
		<-s.ended
		select {
		case <-s.kick:
			s.sync()
		default:
		}
	})
}

// syncFailed turns the store read-only, now and for good: the boot id goes,
// so that the next Open settles as after a power cut.
func (m *Manager) syncFailed(ctx context.Context, cause error) error {
	err := fmt.Errorf("%w: %w", ErrSync, cause)
	m.lock()
	first := m.broken == nil
	if first {
		m.broken = err
	}
	m.unlock()
	if !first {
		return err
	}
	return errors.Join(err, m.store.Update(context.WithoutCancel(ctx), func(tx *metadata.Tx) error {
		meta, err := tx.Meta()
		if err != nil {
			return err
		}
		meta.BootID = ""
		return tx.SetMeta(meta)
	}))
}

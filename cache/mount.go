package cache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// MountOptions say how a MutableRef is mounted.
type MountOptions struct {
	// ReadOnly refuses writes. Made while a writable mount is there, it shows
	// what that one writes; made alone it has no upper directory and does not
	// follow a writer that comes later.
	ReadOnly bool
}

// Mount is a mounted record. The record cannot be removed or reopened until
// Unmount, even when its handle was released.
type Mount struct {
	m        *Manager
	e        *entry
	key      poolKey
	path     string
	readOnly bool
	since    time.Time
	caller   caller

	// mu is a leaf, held across the unmount call.
	mu   sync.Mutex
	done bool
}

// Path is the directory where the tree is visible.
func (t *Mount) Path() string { return t.path }

// Mounts describes the mount for an OCI runtime: a bind mount of Path.
func (t *Mount) Mounts() []mount.Mount {
	mode := "rw"
	if t.readOnly {
		mode = "ro"
	}
	return []mount.Mount{{Type: "bind", Source: t.path, Options: []string{"rbind", mode}}}
}

// Unmount ends the mount; with the last user of a tree its kernel mount goes.
// While files in it are open it fails with EBUSY and can be tried again.
// Unmounting twice is harmless.
func (t *Mount) Unmount() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return nil
	}
	if err := t.m.pool.put(t.key); err != nil {
		return fmt.Errorf("unmount record %s: %w", short(t.e.id), err)
	}
	t.done = true
	t.m.lock()
	defer t.m.unlock()
	delete(t.e.mounts, t)
	t.m.unuseLocked(t.e)
	return nil
}

// Mount mounts the record's tree read-only. Mounts of one record share one
// kernel mount.
func (r *ImmutableRef) Mount(ctx context.Context) (*Mount, error) {
	return r.h.mount(ctx, true)
}

// Mount mounts the record's tree. All writable mounts of a record are one
// kernel mount: each sees what the others write.
func (r *MutableRef) Mount(ctx context.Context, o MountOptions) (*Mount, error) {
	return r.h.mount(ctx, o.ReadOnly)
}

func (h *handle) mount(ctx context.Context, readOnly bool) (*Mount, error) {
	m := h.m
	e, done, err := h.begin()
	if err != nil {
		return nil, err
	}
	defer done()
	if err := m.mountable(ctx, e); err != nil {
		return nil, fmt.Errorf("mount record %s: %w", short(e.id), err)
	}
	if !readOnly {
		// A commit must not overlook a writable mount that is being made.
		release, err := m.drive(ctx, e, "mount")
		if err != nil {
			return nil, err
		}
		defer release()
		m.lock()
		err = h.aliveLocked()
		m.unlock()
		if err != nil {
			return nil, err
		}
	}
	if !m.pool.private && !m.pool.plain {
		if m.readOnly {
			return nil, fmt.Errorf("store %s is open read-only, and a mount that others see would have to be noted: %w", m.root, errdefs.ErrFailedPrecondition)
		}
		if err := m.marks.setDirty(); err != nil {
			return nil, err
		}
	}
	key := poolKey{id: e.id, readOnly: readOnly}
	path, err := m.pool.get(ctx, key, func(target string) error {
		return m.mountSnapshot(ctx, e, target, readOnly)
	}, func() (string, error) {
		return m.plainDir(ctx, e)
	})
	if err != nil {
		return nil, fmt.Errorf("mount record %s: %w", short(e.id), fullDisk(err))
	}
	m.lock()
	defer m.unlock()
	m.useLocked(e)
	if !readOnly {
		// The driver refuses a second writer, so from here on it is us.
		m.written[e.rec.Key] = struct{}{}
	}
	t := &Mount{m: m, e: e, key: key, path: path, readOnly: readOnly, since: m.now(), caller: callerOf(2)}
	e.mounts[t] = struct{}{}
	return t, nil
}

// mountSnapshot asks the driver for the tree of e.
func (m *Manager) mountSnapshot(ctx context.Context, e *entry, target string, readOnly bool) error {
	return m.byName(e, func(key string) error {
		err := m.driver.Mount(ctx, key, target, readOnly)
		if errors.Is(err, errdefs.ErrFailedPrecondition) && !readOnly {
			busy, perr := m.driver.InUse(ctx, key)
			if perr == nil && busy {
				return errors.Join(&LockedError{ID: e.id, Holders: []Holder{{Kind: HolderWriter}}}, err)
			}
			if perr == nil {
				// If it was a writer, it has left since.
				return m.driver.Mount(ctx, key, target, readOnly)
			}
		}
		return err
	})
}

// plainDir is the directory that has the tree of e, empty if the driver keeps
// no such thing.
func (m *Manager) plainDir(ctx context.Context, e *entry) (dir string, err error) {
	err = m.byName(e, func(key string) (err error) {
		dir, _, err = m.driver.Dir(ctx, key)
		return err
	})
	return dir, err
}

// byName calls fn with the driver key of e, and once more if that is not
// found: a finalize may rename it meanwhile.
func (m *Manager) byName(e *entry, fn func(key string) error) error {
	rec := m.current(e)
	if rec.State == metadata.Lazy {
		return fmt.Errorf("it has no snapshot: %w", errdefs.ErrFailedPrecondition)
	}
	err := fn(rec.Key)
	if !errors.Is(err, errdefs.ErrNotFound) {
		return err
	}
	// Renamed: either the record says so by now, or the swap is under way.
	again := m.current(e).Key
	if again == rec.Key {
		again = string(e.id)
	}
	if err2 := fn(again); err2 != nil {
		return errors.Join(err, err2)
	}
	return nil
}

package snapshottest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/snapshot"
)

// Memory is a driver whose snapshots are in memory: flat directories of small
// files. Nothing of it can be mounted, so it needs no privileges and a cache
// on it must be opened with NoMounts. It is for tests that need many
// snapshots fast. Closing it changes nothing: a test that opens a cache again
// hands the same Memory in. It is safe for concurrent use.
//
// A key that was detached is taken until its removal was discarded.
type Memory struct {
	mu sync.Mutex
	// Guarded by mu.
	snaps   map[string]*memorySnapshot
	removed map[string]*memorySnapshot
	// held are removals that Cleanup leaves alone.
	held map[string]bool
	// dirs are the trees by what Dir calls them.
	dirs   map[string]map[string]string
	serial int
}

type memorySnapshot struct {
	info snapshots.Info
	dir  string
}

// NewMemory makes a driver without snapshots.
func NewMemory() *Memory {
	return &Memory{
		snaps: map[string]*memorySnapshot{}, removed: map[string]*memorySnapshot{},
		held: map[string]bool{}, dirs: map[string]map[string]string{},
	}
}

var _ snapshot.Driver = (*Memory)(nil)

// WriteFile writes a file of the tree that Dir calls dir. NotFound if that
// tree is gone.
func (m *Memory) WriteFile(dir, name, text string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	tree, ok := m.dirs[dir]
	if !ok {
		return fmt.Errorf("tree %q: %w", dir, errdefs.ErrNotFound)
	}
	tree[name] = text
	return nil
}

// ReadTree is the content of each file of the tree that Dir calls dir, by
// name. NotFound if that tree is gone.
func (m *Memory) ReadTree(dir string) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	tree, ok := m.dirs[dir]
	if !ok {
		return nil, fmt.Errorf("tree %q: %w", dir, errdefs.ErrNotFound)
	}
	return maps.Clone(tree), nil
}

// Info implements snapshot.Driver.
func (m *Memory) Info() snapshot.Info {
	return snapshot.Info{Name: "memory", Reason: "for tests", Features: map[string]bool{}}
}

// find is the snapshot of key. mu is held.
func (m *Memory) find(key string) (*memorySnapshot, error) {
	if key == "" {
		return nil, fmt.Errorf("empty key: %w", errdefs.ErrInvalidArgument)
	}
	s := m.snaps[key]
	if s == nil {
		return nil, fmt.Errorf("snapshot %q: %w", key, errdefs.ErrNotFound)
	}
	return s, nil
}

// free refuses a key that is taken. mu is held.
func (m *Memory) free(key string) error {
	if key == "" {
		return fmt.Errorf("empty key: %w", errdefs.ErrInvalidArgument)
	}
	if m.snaps[key] != nil || m.removed[key] != nil {
		return fmt.Errorf("snapshot %q: %w", key, errdefs.ErrAlreadyExists)
	}
	return nil
}

// Stat implements snapshots.Snapshotter.
func (m *Memory) Stat(_ context.Context, key string) (snapshots.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, err := m.find(key)
	if err != nil {
		return snapshots.Info{}, err
	}
	return s.copy(), nil
}

func (s *memorySnapshot) copy() snapshots.Info {
	info := s.info
	info.Labels = maps.Clone(info.Labels)
	return info
}

// Update implements snapshots.Snapshotter.
func (m *Memory) Update(_ context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, err := m.find(info.Name)
	if err != nil {
		return snapshots.Info{}, err
	}
	labels := maps.Clone(s.info.Labels)
	if len(fieldpaths) == 0 {
		fieldpaths = []string{"labels"}
	}
	for _, path := range fieldpaths {
		name, one := strings.CutPrefix(path, "labels.")
		switch {
		case path == "labels":
			labels = maps.Clone(info.Labels)
		case !one:
			return snapshots.Info{}, fmt.Errorf("field %q of a snapshot is fixed: %w", path, errdefs.ErrInvalidArgument)
		case info.Labels[name] == "":
			delete(labels, name)
		default:
			if labels == nil {
				labels = map[string]string{}
			}
			labels[name] = info.Labels[name]
		}
	}
	s.info.Labels, s.info.Updated = labels, time.Now().UTC()
	return s.copy(), nil
}

// Usage implements snapshots.Snapshotter: what the files that the parent does
// not have would take in blocks of 4 KiB.
func (m *Memory) Usage(_ context.Context, key string) (snapshots.Usage, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, err := m.find(key)
	if err != nil || s.info.Kind == snapshots.KindView {
		return snapshots.Usage{}, err
	}
	const block = 4096
	var below map[string]string
	if p := m.snaps[s.info.Parent]; p != nil {
		below = m.dirs[p.dir]
	}
	u := snapshots.Usage{Inodes: 1, Size: block}
	for name, text := range m.dirs[s.dir] {
		if was, ok := below[name]; !ok || was != text {
			u.Inodes++
			u.Size += (int64(len(text)) + block - 1) / block * block
		}
	}
	return u, nil
}

// Mounts implements snapshots.Snapshotter: there are none.
func (m *Memory) Mounts(_ context.Context, key string) ([]mount.Mount, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, err := m.find(key)
	if err != nil {
		return nil, err
	}
	if s.info.Kind == snapshots.KindCommitted {
		return nil, fmt.Errorf("snapshot %q is committed: %w", key, errdefs.ErrFailedPrecondition)
	}
	return nil, nil
}

// Prepare implements snapshots.Snapshotter.
func (m *Memory) Prepare(_ context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return nil, m.create(snapshots.KindActive, key, parent, opts)
}

// View implements snapshots.Snapshotter.
func (m *Memory) View(_ context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return nil, m.create(snapshots.KindView, key, parent, opts)
}

func (m *Memory) create(kind snapshots.Kind, key, parent string, opts []snapshots.Opt) error {
	now := time.Now().UTC()
	info := snapshots.Info{Created: now, Updated: now}
	for _, o := range opts {
		if err := o(&info); err != nil {
			return err
		}
	}
	info.Kind, info.Name, info.Parent = kind, key, parent
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.free(key); err != nil {
		return err
	}
	files := map[string]string{}
	if parent != "" {
		p, err := m.committed(parent, errdefs.ErrInvalidArgument)
		if err != nil {
			return err
		}
		maps.Copy(files, m.dirs[p.dir])
	}
	m.serial++
	s := &memorySnapshot{info: info, dir: fmt.Sprintf("memory:%d", m.serial)}
	m.snaps[key], m.dirs[s.dir] = s, files
	return nil
}

// committed is the snapshot of name, which must be committed, or else the
// error is of class. mu is held.
func (m *Memory) committed(name string, class error) (*memorySnapshot, error) {
	s, err := m.find(name)
	if err != nil {
		return nil, fmt.Errorf("parent: %w", err)
	}
	if s.info.Kind != snapshots.KindCommitted {
		return nil, fmt.Errorf("parent %q is not committed: %w", name, class)
	}
	return s, nil
}

// Commit implements snapshots.Snapshotter. A snapshot cannot be put on another
// parent than it was made on.
func (m *Memory) Commit(_ context.Context, name, key string, opts ...snapshots.Opt) error {
	now := time.Now().UTC()
	info := snapshots.Info{Created: now, Updated: now}
	for _, o := range opts {
		if err := o(&info); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s, err := m.find(key)
	if err != nil {
		return err
	}
	if s.info.Kind != snapshots.KindActive {
		return fmt.Errorf("snapshot %q is not active: %w", key, errdefs.ErrFailedPrecondition)
	}
	if err := m.free(name); err != nil {
		return err
	}
	if info.Parent != "" && info.Parent != s.info.Parent {
		if _, err := m.committed(info.Parent, errdefs.ErrFailedPrecondition); err != nil {
			return err
		}
		if s.info.Parent != "" {
			return fmt.Errorf("snapshot %q has another parent: %w", key, errdefs.ErrInvalidArgument)
		}
		return fmt.Errorf("a copying driver cannot put a parent below a snapshot: %w", errdefs.ErrNotImplemented)
	}
	info.Kind, info.Name, info.Parent = snapshots.KindCommitted, name, s.info.Parent
	delete(m.snaps, key)
	m.snaps[name] = &memorySnapshot{info: info, dir: s.dir}
	return nil
}

// Remove implements snapshots.Snapshotter.
func (m *Memory) Remove(ctx context.Context, key string) error {
	p, err := m.Detach(ctx, key)
	if err != nil {
		return err
	}
	return m.Discard(ctx, p)
}

// Walk implements snapshots.Snapshotter, in the order of the keys. It knows no
// filters.
func (m *Memory) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	if len(filters) > 0 {
		return fmt.Errorf("filters: %w", errdefs.ErrNotImplemented)
	}
	m.mu.Lock()
	var all []snapshots.Info
	for _, key := range slices.Sorted(maps.Keys(m.snaps)) {
		all = append(all, m.snaps[key].copy())
	}
	m.mu.Unlock()
	for _, info := range all {
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// Close implements snapshots.Snapshotter: everything stays.
func (m *Memory) Close() error { return nil }

// Cleanup implements snapshots.Cleaner.
func (m *Memory) Cleanup(ctx context.Context) error {
	pending, err := m.Pending(ctx)
	errs := []error{err}
	for _, p := range pending {
		m.mu.Lock()
		held := m.held[p.Key]
		m.mu.Unlock()
		if p.Kind == snapshot.PendingRemoval && !held {
			errs = append(errs, m.Discard(ctx, p))
		}
	}
	return errors.Join(errs...)
}

// Stacker implements snapshot.Driver: each snapshot has a whole tree.
func (m *Memory) Stacker() (snapshot.Stacker, bool) { return nil, false }

// Settle implements snapshot.Driver: nothing is ever half done.
func (m *Memory) Settle(context.Context) error { return nil }

// Pending implements snapshot.Driver.
func (m *Memory) Pending(context.Context) (out []snapshot.Pending, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(m.snaps)) {
		if m.snaps[key].info.Kind != snapshots.KindCommitted {
			out = append(out, snapshot.Pending{Key: key, Kind: snapshot.PendingActive})
		}
	}
	for _, key := range slices.Sorted(maps.Keys(m.removed)) {
		out = append(out, snapshot.Pending{Key: key, Kind: snapshot.PendingRemoval})
	}
	return out, nil
}

// Committed implements snapshot.Driver.
func (m *Memory) Committed(context.Context) (keys []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(m.snaps)) {
		if m.snaps[key].info.Kind == snapshots.KindCommitted {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// Detach implements snapshot.Driver.
func (m *Memory) Detach(_ context.Context, key string) (snapshot.Pending, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, err := m.find(key)
	if err != nil {
		return snapshot.Pending{}, err
	}
	for name, other := range m.snaps {
		if other.info.Parent == key {
			return snapshot.Pending{}, fmt.Errorf("snapshot %q is the parent of %q: %w", key, name, errdefs.ErrFailedPrecondition)
		}
	}
	delete(m.snaps, key)
	m.removed[key], m.held[key] = s, true
	return snapshot.Pending{Key: key, Kind: snapshot.PendingRemoval}, nil
}

// Discard implements snapshot.Driver.
func (m *Memory) Discard(_ context.Context, p snapshot.Pending) error {
	if p.Kind != snapshot.PendingRemoval {
		return fmt.Errorf("%q is no removal: %w", p.Key, errdefs.ErrInvalidArgument)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if s := m.removed[p.Key]; s != nil {
		delete(m.removed, p.Key)
		delete(m.held, p.Key)
		delete(m.dirs, s.dir)
	}
	return nil
}

// Restore implements snapshot.Driver.
func (m *Memory) Restore(_ context.Context, p snapshot.Pending) error {
	if p.Kind != snapshot.PendingRemoval {
		return fmt.Errorf("%q is no removal: %w", p.Key, errdefs.ErrInvalidArgument)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.removed[p.Key]
	if s == nil {
		return fmt.Errorf("removal of %q: %w", p.Key, errdefs.ErrNotFound)
	}
	if s.info.Parent != "" && m.snaps[s.info.Parent] == nil {
		return fmt.Errorf("the parent of %q was removed: %w", p.Key, errdefs.ErrFailedPrecondition)
	}
	delete(m.removed, p.Key)
	delete(m.held, p.Key)
	m.snaps[p.Key] = s
	return nil
}

// Mount implements snapshot.Driver: nothing can be mounted.
func (m *Memory) Mount(_ context.Context, key, _ string, _ bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, err := m.find(key); err != nil {
		return err
	}
	return fmt.Errorf("snapshot %q is in memory and cannot be mounted: %w", key, errdefs.ErrNotImplemented)
}

// Dir implements snapshot.Driver: it is a name for WriteFile and ReadTree.
func (m *Memory) Dir(_ context.Context, key string) (string, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, err := m.find(key)
	if err != nil {
		return "", false, err
	}
	return s.dir, true, nil
}

// InUse implements snapshot.Driver: there are no mounts.
func (m *Memory) InUse(_ context.Context, key string) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, err := m.find(key)
	return false, err
}

// Sync implements snapshot.Driver.
func (m *Memory) Sync(ctx context.Context) error { return context.Cause(ctx) }

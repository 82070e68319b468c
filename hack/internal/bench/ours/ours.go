// Package ours puts Lamina's cache under the bench.
package ours

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/hack/internal/bench"
)

// Opener opens Lamina as a daemon would: the store stays open, and mounts are
// its own.
func Opener() bench.Opener {
	return bench.Opener{
		Name:     bench.Ours,
		Portable: true,
		Open: func(ctx context.Context, dir string) (bench.Subject, error) {
			m, err := cache.Open(ctx, cache.Options{Root: dir, SyncInterval: -1})
			if err != nil {
				return nil, err
			}
			return subject{m}, nil
		},
		Databases: func(dir string) []string { return []string{filepath.Join(dir, "lamina.db")} },
	}
}

type subject struct{ m *cache.Manager }

func (s subject) New(ctx context.Context, parent bench.Immutable, values ...bench.Value) (bench.Mutable, error) {
	var o cache.NewOptions
	for _, v := range values {
		o.Values = append(o.Values, value(v))
	}
	return s.new(ctx, parent, o)
}

func (s subject) NewVictim(ctx context.Context, parent bench.Immutable) (bench.Mutable, error) {
	return s.new(ctx, parent, cache.NewOptions{Description: bench.Victims})
}

func (s subject) new(ctx context.Context, parent bench.Immutable, o cache.NewOptions) (bench.Mutable, error) {
	var ref *cache.ImmutableRef
	if parent != nil {
		ref = parent.(immutable).ref
	}
	mut, err := s.m.New(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	return mutable{mut}, nil
}

func (s subject) Get(ctx context.Context, id string) (bench.Immutable, error) {
	return s.get(ctx, id, cache.GetOptions{})
}

func (s subject) Look(ctx context.Context, id string) (bench.Immutable, error) {
	return s.get(ctx, id, cache.GetOptions{NoUpdate: true})
}

func (s subject) get(ctx context.Context, id string, o cache.GetOptions) (bench.Immutable, error) {
	ref, err := s.m.Get(ctx, cache.ID(id), o)
	if err != nil {
		return nil, err
	}
	return immutable{ref}, nil
}

func (s subject) GetMutable(ctx context.Context, id string) (bench.Mutable, error) {
	mut, err := s.m.GetMutable(ctx, cache.ID(id))
	if err != nil {
		return nil, err
	}
	return mutable{mut}, nil
}

func (s subject) Search(ctx context.Context, key string) ([]string, error) {
	found, err := s.m.Search(ctx, key)
	if err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(found))
	for _, id := range found {
		ids = append(ids, string(id))
	}
	return ids, nil
}

func (s subject) Prune(ctx context.Context, description string, maxUsed *int64) (int, error) {
	p := policy.Policy{All: true}
	if description != "" {
		p.Filters = []string{"description==" + description}
	}
	if maxUsed != nil {
		p.MaxUsed = policy.Bytes(*maxUsed)
	}
	sum, err := s.m.Prune(ctx, p)
	return sum.Removed, err
}

func (s subject) Used(ctx context.Context) (int64, error) { return s.m.Used(ctx) }

func (s subject) List(ctx context.Context) (int, error) {
	u, err := s.m.DiskUsage(ctx, nil)
	if err != nil {
		return 0, err
	}
	return len(u.Entries), nil
}

// Close marks what was made as durable first, as a daemon has long done in the
// background with a state of some age.
func (s subject) Close() error {
	// So are sizes.
	_, merr := s.m.Measure(context.Background())
	_, err := s.m.Sync(context.Background())
	err = errors.Join(err, merr)
	return errors.Join(err, s.m.Close())
}

type mutable struct{ ref *cache.MutableRef }

func (m mutable) ID() string { return string(m.ref.ID()) }

func (m mutable) WriteFile(ctx context.Context, name string, data []byte) error {
	mnt, err := m.ref.Mount(ctx, cache.MountOptions{})
	if err != nil {
		return err
	}
	err = os.WriteFile(filepath.Join(mnt.Path(), name), data, 0o600)
	return errors.Join(err, mnt.Unmount())
}

func (m mutable) Commit(ctx context.Context) (bench.Immutable, error) {
	ref, err := m.ref.Commit(ctx)
	if err != nil {
		return nil, err
	}
	return immutable{ref}, nil
}

func (m mutable) Release(ctx context.Context) error { return m.ref.Release(ctx) }

type immutable struct{ ref *cache.ImmutableRef }

func (i immutable) ID() string { return string(i.ref.ID()) }

// ReopenID is the id itself: one record owns the snapshot.
func (i immutable) ReopenID() string { return i.ID() }

func (i immutable) Finalize(ctx context.Context) error { return i.ref.Finalize(ctx) }

func (i immutable) SetValue(ctx context.Context, v bench.Value) error {
	return i.ref.SetValue(ctx, value(v))
}

func (i immutable) Release(ctx context.Context) error { return i.ref.Release(ctx) }

func value(v bench.Value) cache.Value {
	return cache.Value{Name: v.Name, Data: []byte(v.Data), Index: v.Index}
}

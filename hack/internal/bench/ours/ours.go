// Package ours puts Lamina's cache under the bench.
package ours

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/hack/internal/bench"
	"github.com/lamina-build/lamina/layer"
)

// Opener opens Lamina as a daemon would: the store stays open, and mounts are
// its own.
func Opener() bench.Opener {
	return bench.Opener{
		Name:     bench.Ours,
		Portable: true,
		Open: func(ctx context.Context, dir string) (bench.Subject, error) {
			m, err := cache.Open(ctx, cache.Options{Root: dir, SyncInterval: -1, Unconfirm: contenthash.UnconfirmStored})
			if err != nil {
				return nil, err
			}
			s := &subject{m: m, reported: map[cache.ID]*checksum.Tree{}}
			s.sums = checksum.New(m, checksum.Options{})
			return s, nil
		},
		Databases: func(dir string) []string { return []string{filepath.Join(dir, "lamina.db")} },
	}
}

type subject struct {
	m    *cache.Manager
	sums *checksum.Keeper
	// reported are the trees that changes were reported to.
	reported map[cache.ID]*checksum.Tree
}

func (s *subject) New(ctx context.Context, parent bench.Immutable, values ...bench.Value) (bench.Mutable, error) {
	var o cache.NewOptions
	for _, v := range values {
		o.Values = append(o.Values, value(v))
	}
	return s.new(ctx, parent, o)
}

func (s *subject) NewVictim(ctx context.Context, parent bench.Immutable) (bench.Mutable, error) {
	return s.new(ctx, parent, cache.NewOptions{Description: bench.Victims})
}

func (s *subject) new(ctx context.Context, parent bench.Immutable, o cache.NewOptions) (bench.Mutable, error) {
	var ref *cache.ImmutableRef
	if parent != nil {
		ref = parent.(immutable).ref
	}
	mut, err := s.m.New(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	return mutable{s, mut}, nil
}

func (s *subject) Get(ctx context.Context, id string) (bench.Immutable, error) {
	return s.get(ctx, id, cache.GetOptions{})
}

func (s *subject) Look(ctx context.Context, id string) (bench.Immutable, error) {
	return s.get(ctx, id, cache.GetOptions{NoUpdate: true})
}

func (s *subject) get(ctx context.Context, id string, o cache.GetOptions) (bench.Immutable, error) {
	ref, err := s.m.Get(ctx, cache.ID(id), o)
	if err != nil {
		return nil, err
	}
	return immutable{s, ref}, nil
}

func (s *subject) GetMutable(ctx context.Context, id string) (bench.Mutable, error) {
	mut, err := s.m.GetMutable(ctx, cache.ID(id))
	if err != nil {
		return nil, err
	}
	return mutable{s, mut}, nil
}

func (s *subject) Search(ctx context.Context, key string) ([]string, error) {
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

func (s *subject) Prune(ctx context.Context, description string, maxUsed *int64) (int, error) {
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

func (s *subject) Used(ctx context.Context) (int64, error) { return s.m.Used(ctx) }

func (s *subject) List(ctx context.Context) (int, error) {
	u, err := s.m.DiskUsage(ctx, nil)
	if err != nil {
		return 0, err
	}
	return len(u.Entries), nil
}

func (s *subject) PutBlob(ctx context.Context, b bench.LayerBlob) error {
	w, err := s.m.BlobWriter(ctx)
	if err != nil {
		return err
	}
	f, err := os.Open(b.Path)
	if err != nil {
		return errors.Join(err, w.Release())
	}
	return errors.Join(w.Put(ctx, b.Descriptor, f), f.Close(), w.Release())
}

func (s *subject) GetByBlob(ctx context.Context, b bench.LayerBlob, parent bench.Immutable) (bench.Immutable, error) {
	var p *cache.ImmutableRef
	if parent != nil {
		p = parent.(immutable).ref
	}
	ref, err := s.m.GetByBlob(ctx, b.Descriptor, p, cache.BlobOptions{Description: bench.Victims})
	if err != nil {
		return nil, err
	}
	return immutable{s, ref}, nil
}

func (s *subject) Merge(ctx context.Context, inputs []bench.Immutable) (bench.Immutable, error) {
	refs := make([]*cache.ImmutableRef, len(inputs))
	for i, in := range inputs {
		refs[i] = in.(immutable).ref
	}
	ref, err := s.m.Merge(ctx, refs, cache.MergeOptions{Description: bench.Victims})
	if err != nil {
		return nil, err
	}
	return immutable{s, ref}, nil
}

func (s *subject) Diff(ctx context.Context, lower, upper bench.Immutable) (bench.Immutable, error) {
	ref, err := s.m.Diff(ctx, lower.(immutable).ref, upper.(immutable).ref, cache.MergeOptions{Description: bench.Victims})
	if err != nil {
		return nil, err
	}
	return immutable{s, ref}, nil
}

// Close marks what was made as durable first, as a daemon has long done in the
// background with a state of some age.
func (s *subject) Close() error {
	err := s.sums.Close()
	// So are sizes.
	_, merr := s.m.Measure(context.Background())
	_, serr := s.m.Sync(context.Background())
	return errors.Join(err, merr, serr, s.m.Close())
}

type mutable struct {
	s   *subject
	ref *cache.MutableRef
}

func (m mutable) ID() string { return string(m.ref.ID()) }

func (m mutable) Change(ctx context.Context, change func(dir string) error) error {
	mnt, err := m.ref.Mount(ctx, cache.MountOptions{})
	if err != nil {
		return err
	}
	return errors.Join(change(mnt.Path()), mnt.Unmount())
}

func (m mutable) Commit(ctx context.Context) (bench.Immutable, error) {
	ref, err := m.ref.Commit(ctx)
	if err != nil {
		return nil, err
	}
	return immutable{m.s, ref}, nil
}

func (m mutable) Release(ctx context.Context) error { return m.ref.Release(ctx) }

type immutable struct {
	s   *subject
	ref *cache.ImmutableRef
}

func (i immutable) ID() string { return string(i.ref.ID()) }

// ReopenID is the id itself: one record owns the snapshot.
func (i immutable) ReopenID() string { return i.ID() }

func (i immutable) Finalize(ctx context.Context) error { return i.ref.Finalize(ctx) }

func (i immutable) SetValue(ctx context.Context, v bench.Value) error {
	return i.ref.SetValue(ctx, value(v))
}

func (i immutable) Release(ctx context.Context) error { return i.ref.Release(ctx) }

func (i immutable) Extract(ctx context.Context) error { return i.ref.Extract(ctx) }

func (i immutable) Blob(ctx context.Context, gzip bool) error {
	c := cache.Compression{Algorithm: layer.None}
	if gzip {
		c.Algorithm = layer.Gzip
	}
	remote, err := i.ref.GetRemotes(ctx, cache.RemotesOptions{Create: true, Compression: c})
	if err != nil {
		return err
	}
	return remote.Release(ctx)
}

func (i immutable) Checksum(ctx context.Context) (string, error) {
	d, err := i.s.sums.Checksum(ctx, i.ref, "/", contenthash.Options{})
	return d.String(), err
}

// ForgetChecksum forgets all trees that are in memory: they come back when they
// are asked for.
func (i immutable) ForgetChecksum(ctx context.Context, all bool) error {
	err := i.s.sums.Close()
	if all {
		err = errors.Join(err, checksum.Drop(ctx, i.s.m, i.ref.ID()))
	}
	i.s.sums = checksum.New(i.s.m, checksum.Options{})
	return err
}

func (i immutable) ReportChange(ctx context.Context, name string, data []byte) (err error) {
	tree := i.s.reported[i.ref.ID()]
	if tree == nil {
		if tree, err = checksum.Load(ctx, i.s.m, i.ref); err != nil {
			return err
		}
		i.s.reported[i.ref.ID()] = tree
	}
	h := contenthash.NewHash(contenthash.Header{Mode: 0o644, Size: int64(len(data))})
	if _, err := h.Write(data); err != nil {
		return err
	}
	if err := tree.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: name, Mode: 0o644, Digest: h.Digest()}); err != nil {
		return err
	}
	if _, err := tree.Checksum(ctx, checksum.Files(i.ref), "/", contenthash.Options{}); err != nil {
		return err
	}
	return tree.Save(ctx, i.s.m)
}

func value(v bench.Value) cache.Value {
	return cache.Value{Name: v.Name, Data: []byte(v.Data), Index: v.Index}
}

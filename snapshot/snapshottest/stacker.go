package snapshottest

import (
	"context"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/lamina-build/lamina/snapshot"
)

// Stacker implements snapshot.Driver; it is not counted.
func (f *Faulty) Stacker() (snapshot.Stacker, bool) {
	s, ok := f.d.Stacker()
	if !ok {
		return nil, false
	}
	return faultyStacker{f, s}, true
}

// faultyStacker passes calls on under the rules of f.
type faultyStacker struct {
	f *Faulty
	s snapshot.Stacker
}

func (s faultyStacker) Stack(ctx context.Context, name string, layers []string, opts ...snapshots.Opt) error {
	return s.f.call(ctx, "Stack", name, "", func() error { return s.s.Stack(ctx, name, layers, opts...) })
}

func (s faultyStacker) Layers(ctx context.Context, key string) ([]snapshot.Layer, error) {
	return get(ctx, s.f, "Layers", key, func() ([]snapshot.Layer, error) { return s.s.Layers(ctx, key) })
}

func (s faultyStacker) Clean(ctx context.Context, key string) (snapshots.Usage, error) {
	return get(ctx, s.f, "Clean", key, func() (snapshots.Usage, error) { return s.s.Clean(ctx, key) })
}

func (s faultyStacker) CleanCopy(ctx context.Context, name, layer string, opts ...snapshots.Opt) error {
	return s.f.call(ctx, "CleanCopy", layer, name, func() error { return s.s.CleanCopy(ctx, name, layer, opts...) })
}

func (s faultyStacker) Diff(ctx context.Context, name, lower, upper string, opts ...snapshots.Opt) error {
	return s.f.call(ctx, "Diff", upper, name, func() error { return s.s.Diff(ctx, name, lower, upper, opts...) })
}

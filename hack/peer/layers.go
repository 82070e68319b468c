package peer

import (
	"context"
	"errors"
	"os"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/config"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/compression"

	"github.com/lamina-build/lamina/hack/internal/bench"
)

// PutBlob writes a blob that no lease keeps: nothing is collected until a prune.
func (s *subject) PutBlob(ctx context.Context, b bench.LayerBlob) error {
	f, err := os.Open(b.Path)
	if err != nil {
		return err
	}
	return errors.Join(content.WriteBlob(ctx, s.content, b.Digest.String(), f, b.Descriptor), f.Close())
}

func (s *subject) GetByBlob(ctx context.Context, b bench.LayerBlob, parent bench.Immutable) (bench.Immutable, error) {
	var p cache.ImmutableRef
	if parent != nil {
		p = parent.(*immutable).ref
	}
	// Without a handler it asks the content store whether it has the blob.
	handlers := cache.DescHandlers{b.Digest: {Provider: func(session.Group) content.Provider { return s.content }}}
	ref, err := s.Manager.GetByBlob(ctx, b.Descriptor, p, cache.WithDescription(bench.Victims), handlers)
	if err != nil {
		return nil, err
	}
	return &immutable{s, ref}, nil
}

func (s *subject) Merge(ctx context.Context, inputs []bench.Immutable) (bench.Immutable, error) {
	refs := make([]cache.ImmutableRef, len(inputs))
	for i, in := range inputs {
		refs[i] = in.(*immutable).ref
	}
	ref, err := s.Manager.Merge(ctx, refs, nil, cache.WithDescription(bench.Victims))
	if err != nil {
		return nil, err
	}
	return &immutable{s, ref}, nil
}

func (s *subject) Diff(ctx context.Context, lower, upper bench.Immutable) (bench.Immutable, error) {
	ref, err := s.Manager.Diff(ctx, lower.(*immutable).ref, upper.(*immutable).ref, nil, cache.WithDescription(bench.Victims))
	if err != nil {
		return nil, err
	}
	return &immutable{s, ref}, nil
}

func (i *immutable) Extract(ctx context.Context) error { return i.ref.Extract(ctx, nil) }

func (i *immutable) Blob(ctx context.Context, gzip bool) error {
	var how compression.Type = compression.Uncompressed
	if gzip {
		how = compression.Gzip
	}
	_, err := i.ref.GetRemotes(ctx, true, config.RefConfig{Compression: compression.New(how)}, false, nil)
	return err
}

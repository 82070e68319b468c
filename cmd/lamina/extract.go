package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

func newExtract(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "extract ID",
		Short: "Make the snapshot of a lazy record",
		Example: `  lamina extract 01JCXM
  lamina extract "$(lamina import image.tar)"
  lamina extract "$id" --json`,
		Long: `Make now what a lazy record puts off: apply its layer, stack the layers of a
merge, or compare the inputs of a diff, after extracting what it is made of. It
happens by itself when a record is mounted or becomes a parent. Blobs are verified
while they are read, and what they held after they were applied; a wrong one
leaves nothing. A record that has its snapshot is left as it is; the id stays.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeIDs(1),
		Annotations:       map[string]string{annotateProbes: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.transition(cmd, args[0], extract)
		},
	}
}

func extract(ctx context.Context, m *cache.Manager, id cache.ID) (_ stateView, err error) {
	ref, err := m.Get(ctx, id, cache.GetOptions{})
	if err != nil {
		return stateView{}, err
	}
	defer func() { err = errors.Join(err, ref.Release(ctx)) }()
	if err := ref.Extract(ctx); err != nil {
		return stateView{}, err
	}
	return stateOf(ref.Record(), ref.ID()), nil
}

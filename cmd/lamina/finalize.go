package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

func newFinalize(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "finalize ID",
		Short: "Commit a record in the snapshot driver",
		Example: `  lamina finalize 01JCXM
  lamina finalize key:app
  lamina finalize "$id" --json`,
		Long: `Do now what a commit puts off: commit the snapshot in the driver under the
record's id. It happens by itself when a record becomes a parent. A finalized
record cannot be reopened, only continued in a child; the id stays.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeIDs(1),
		Annotations:       map[string]string{annotateProbes: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.transition(cmd, args[0], finalize)
		},
	}
}

func finalize(ctx context.Context, m *cache.Manager, id cache.ID) (_ stateView, err error) {
	ref, err := m.Get(ctx, id, cache.GetOptions{})
	if err != nil {
		return stateView{}, err
	}
	defer func() { err = errors.Join(err, ref.Release(ctx)) }()
	if err := ref.Finalize(ctx); err != nil {
		return stateView{}, err
	}
	rec := ref.Record()
	return stateOf(rec, rec.ID), nil
}

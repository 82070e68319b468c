package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

func newCommit(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "commit ID",
		Short: "Freeze a mutable record",
		Example: `  lamina commit 01JCXM
  lamina new --parent "$(lamina commit "$id")"
  lamina commit "$id" --json`,
		Long: `Freeze a mutable record: nobody changes its content any more, unless it is
reopened under another id (lamina exec --rw). The id stays, nothing is copied.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeIDs(1),
		Annotations:       map[string]string{annotateProbes: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.transition(cmd, args[0], commit)
		},
	}
}

func commit(ctx context.Context, m *cache.Manager, id cache.ID) (stateView, error) {
	rec, err := m.Lookup(ctx, id)
	if err != nil {
		return stateView{}, err
	}
	// GetMutable would reopen a committed record under a new id.
	if rec.State != cache.Mutable {
		return stateView{}, fmt.Errorf("record %s is %s, and only a mutable one can be committed: %w", id, rec.State, errdefs.ErrFailedPrecondition)
	}
	mut, err := m.GetMutable(ctx, rec.ID)
	if err != nil {
		return stateView{}, err
	}
	imm, err := mut.Commit(ctx)
	if err != nil {
		return stateView{}, errors.Join(err, mut.Release(ctx))
	}
	return stateOf(imm.Record(), rec.ID), imm.Release(ctx)
}

// transition opens the store for one change of a record's state, and prints
// what became of it. It waits for processes that are dying in the snapshot.
func (a *app) transition(cmd *cobra.Command, arg string, change func(context.Context, *cache.Manager, cache.ID) (stateView, error)) error {
	ctx := cmd.Context()
	var v stateView
	err := a.patiently(ctx, func() (err error) {
		m, err := a.open(ctx, changing)
		if err != nil {
			return err
		}
		defer shut(m, &err)
		id, err := resolve(ctx, m, arg)
		if err != nil {
			return err
		}
		v, err = change(ctx, m, id)
		return about(id, err)
	})
	if err != nil {
		return err
	}
	return a.printState(v)
}

package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

func newMerge(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "merge ID ID...",
		Short: "Make a record that shows several one over the other",
		Example: `  lamina merge 01JCXM 01JCXN
  lamina extract "$(lamina merge "$base" "$tools" "$app")"
  lamina merge key:lib key:app --json`,
		Long: `Make a record whose tree is that of the records applied one after the other as
image layers, the first at the bottom: what a later one has replaces what an
earlier one has, and what it deleted is gone. Committed records are finalized;
none is copied. The merge is lazy: its snapshot is made when it is needed, on the
overlay driver as a list of layers, whatever the number of files. An equal merge
that is there is found again.`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeIDs(0),
		Annotations:       map[string]string{annotateProbes: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.combine(cmd, args, func(ctx context.Context, m *cache.Manager, refs []*cache.ImmutableRef) (*cache.ImmutableRef, error) {
				return m.Merge(ctx, refs, cache.MergeOptions{})
			})
		},
	}
}

func newDiff(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "diff LOWER UPPER",
		Short: "Make a record of what one has more than another",
		Example: `  lamina diff "$base" "$result"
  lamina merge "$other" "$(lamina diff "$base" "$result")"
  lamina diff 01JCXM 01JCXN --json`,
		Long: `Make a record that holds the difference of two: merged over LOWER it gives
UPPER. Where LOWER is an ancestor of UPPER these are the layers between them, and
nothing is read; else the trees are compared when the difference is needed. The
record is lazy, and both inputs stay as long as it does. An equal difference that
is there is found again.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeIDs(2),
		Annotations:       map[string]string{annotateProbes: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.combine(cmd, args, func(ctx context.Context, m *cache.Manager, refs []*cache.ImmutableRef) (*cache.ImmutableRef, error) {
				return m.Diff(ctx, refs[0], refs[1], cache.MergeOptions{})
			})
		},
	}
}

// combine makes a record of others, and prints it.
func (a *app) combine(cmd *cobra.Command, args []string, make func(context.Context, *cache.Manager, []*cache.ImmutableRef) (*cache.ImmutableRef, error)) error {
	var v stateView
	err := a.patiently(cmd.Context(), func() (err error) {
		v, err = a.combined(cmd.Context(), args, make)
		return err
	})
	if err != nil {
		return err
	}
	return a.printState(v)
}

func (a *app) combined(ctx context.Context, args []string, make func(context.Context, *cache.Manager, []*cache.ImmutableRef) (*cache.ImmutableRef, error)) (v stateView, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return v, err
	}
	defer shut(m, &err)
	var refs []*cache.ImmutableRef
	defer func() {
		for _, r := range refs {
			err = errors.Join(err, r.Release(ctx))
		}
	}()
	for _, arg := range args {
		id, err := resolve(ctx, m, arg)
		if err != nil {
			return v, err
		}
		ref, err := m.Get(ctx, id, cache.GetOptions{})
		if err != nil {
			return v, about(id, err)
		}
		refs = append(refs, ref)
	}
	ref, err := make(ctx, m, refs)
	if err != nil {
		return v, err
	}
	return stateOf(ref.Record(), ref.ID()), ref.Release(ctx)
}

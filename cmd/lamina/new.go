package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

func newNew(a *app) *cobra.Command {
	var o newOptions
	cmd := &cobra.Command{
		Use:   "new [--parent ID] [--type T] [--desc TEXT] [--label K=V]... [--index KEY]...",
		Short: "Make a mutable record",
		Example: `  id=$(lamina new --desc 'a sysroot')
  lamina exec "$id" --rw -- tar -xf /tmp/sysroot.tar
  lamina new --parent "$(lamina commit "$id")" --label stage=2`,
		Long: `Make a record with a writable snapshot, empty or over a parent, and print its id.
It stays until lamina rm. A parent that is committed is finalized first, so it
cannot be reopened any more; a mutable one is refused.

--index KEY lets lamina ls --index find the record.`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		Annotations:       map[string]string{annotateProbes: ""},
		RunE: func(cmd *cobra.Command, _ []string) error {
			labels, err := parseLabels(o.labels)
			if err != nil {
				return usage(cmd, err)
			}
			for _, name := range []string{"parent", "type"} {
				if f := cmd.Flags().Lookup(name); f.Changed && f.Value.String() == "" {
					return usagef(cmd, "--%s is empty", name)
				}
			}
			for _, key := range o.indexes {
				if key == "" {
					return usagef(cmd, "--index is empty")
				}
			}
			v, err := a.new(cmd.Context(), o, labels)
			if err != nil {
				return err
			}
			return a.printState(v)
		},
	}
	cmd.Flags().StringVar(&o.parent, "parent", "", "the record `ID` below it")
	cmd.Flags().StringVar(&o.kind, "type", cache.TypeRegular, "record type `T`, which filters select by")
	cmd.Flags().StringVar(&o.desc, "desc", "", "description `TEXT` for people")
	cmd.Flags().StringArrayVar(&o.labels, "label", nil, "label `K=V`")
	cmd.Flags().StringArrayVar(&o.indexes, "index", nil, "index `KEY` to find it by")
	_ = cmd.RegisterFlagCompletionFunc("parent", a.completeIDs(1))
	return cmd
}

type newOptions struct {
	parent, kind, desc string
	labels, indexes    []string
}

// parseLabels reads K=V pairs; of a name that is there twice the last counts.
func parseLabels(pairs []string) (map[string]string, error) {
	out := map[string]string{}
	for _, p := range pairs {
		name, value, ok := strings.Cut(p, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("--label %q: it takes K=V", clip(p))
		}
		out[name] = value
	}
	return out, nil
}

func (a *app) new(ctx context.Context, o newOptions, labels map[string]string) (_ stateView, err error) {
	m, err := a.open(ctx, making)
	if err != nil {
		return stateView{}, err
	}
	defer shut(m, &err)
	var parent *cache.ImmutableRef
	if o.parent != "" {
		id, err := resolve(ctx, m, o.parent)
		if err != nil {
			return stateView{}, fmt.Errorf("--parent: %w", err)
		}
		if parent, err = m.Get(ctx, id, cache.GetOptions{}); err != nil {
			return stateView{}, about(id, fmt.Errorf("--parent: %w", err))
		}
		defer func() { err = errors.Join(err, parent.Release(ctx)) }()
	}
	var values []cache.Value
	for i, key := range o.indexes {
		values = append(values, cache.Value{Name: fmt.Sprintf("index.%d", i), Index: key})
	}
	ref, err := m.New(ctx, parent, cache.NewOptions{
		Type: o.kind, Description: o.desc, Labels: labels, Values: values, Retain: true,
	})
	if err != nil {
		return stateView{}, err
	}
	return stateOf(ref.Record(), ref.ID()), ref.Release(ctx)
}

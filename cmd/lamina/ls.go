package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

func newLs(a *app) *cobra.Command {
	var o lsOptions
	cmd := &cobra.Command{
		Use:   "ls [--filter F] [--index KEY [--prefix]]",
		Short: "List records",
		Example: `  lamina ls
  lamina ls --filter 'state==mutable' --filter 'type~=^exec'
  lamina ls --index workspace: --prefix --json`,
		Long: `List the records of the store, in the order of their ids, which for those made
here is the order in which they were made; a reopened one has the place of its
first id. The store is opened read-only.

--index KEY lists those that declare exactly this index key; with --prefix those
with a key that begins with KEY.

` + filterHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.prefix && !cmd.Flags().Changed("index") {
				return usagef(cmd, "--prefix needs --index")
			}
			keep, err := parseFilter(o.filters)
			if err != nil {
				return usage(cmd, err)
			}
			o.byIndex = cmd.Flags().Changed("index")
			return a.ls(cmd.Context(), o, keep)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().StringArrayVar(&o.filters, "filter", nil, "only records that match `F`")
	cmd.Flags().StringVar(&o.index, "index", "", "only records with the index `KEY`")
	cmd.Flags().BoolVar(&o.prefix, "prefix", false, "--index gives the beginning of keys")
	return cmd
}

type lsOptions struct {
	filters         []string
	index           string
	byIndex, prefix bool
}

func (a *app) ls(ctx context.Context, o lsOptions, keep func(*cache.Record) bool) (err error) {
	m, err := a.open(ctx, looking)
	if err != nil {
		return err
	}
	defer shut(m, &err)
	var damaged []error
	records, err := a.pick(ctx, m, o, keep, &damaged)
	if err != nil {
		return err
	}
	if a.json {
		for _, rec := range records {
			v, err := view(ctx, m, rec)
			if err != nil {
				return err
			}
			if err := printJSON(a.out, v); err != nil {
				return err
			}
		}
	} else {
		a.lsTable(records)
	}
	if len(damaged) > 0 {
		return hintf(errors.Join(damaged...), "lamina check names all that is damaged")
	}
	return nil
}

// pick reads the records to list. Damaged ones do not keep the rest from
// being shown.
func (a *app) pick(ctx context.Context, m *cache.Manager, o lsOptions, keep func(*cache.Record) bool, damaged *[]error) ([]*cache.Record, error) {
	var out []*cache.Record
	add := func(rec *cache.Record, err error) error {
		switch {
		case errors.Is(err, errdefs.ErrDataLoss):
			*damaged = append(*damaged, err)
		case err != nil:
			return err
		case keep(rec):
			out = append(out, rec)
		}
		return nil
	}
	if !o.byIndex {
		for rec, err := range m.Records(ctx) {
			if err := add(rec, err); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	ids, err := search(ctx, m, o.index, o.prefix)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if err := add(m.Lookup(ctx, id)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// search lists the ids with an index key, sorted, each once.
func search(ctx context.Context, m *cache.Manager, key string, prefix bool) ([]cache.ID, error) {
	if !prefix {
		return m.Search(ctx, key)
	}
	matches, err := m.SearchPrefix(ctx, key)
	var ids []cache.ID
	for _, match := range matches {
		ids = append(ids, match.ID)
	}
	slices.Sort(ids)
	return slices.Compact(ids), err
}

func (a *app) lsTable(records []*cache.Record) {
	t := newTable(a.out, "id", "state", "type", "size", "created", "used", "key", "description")
	rightAligned(t, 4)
	now := time.Now()
	for _, rec := range records {
		t.AppendRow([]any{
			safe(string(rec.ID)), rec.State.String(), safe(rec.Type), size(rec.Size),
			ago(rec.Created, now), used(rec, now), safe(keyOf(rec)), safe(rec.Description),
		})
	}
	t.Render()
}

// used says how often and when last a record was used.
func used(rec *cache.Record, now time.Time) string {
	if rec.UsageCount == 0 {
		return "never"
	}
	return fmt.Sprintf("%dx, %s", rec.UsageCount, ago(rec.LastUsed, now))
}

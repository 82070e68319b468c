package main

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

func newSync(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "sync [ID]",
		Short: "Make sure that a power cut loses nothing",
		Example: `  lamina sync
  lamina sync key:app
  lamina sync --json`,
		Long: `Write everything that is committed to the disk, and mark it as safe. No other
command waits for the disk unless it must, so after a power cut what was made a
moment before may be gone; it is then a miss, never a wrong result.

One sync serves all records. With ID the command also makes sure that this record
is among them: a mutable one is not.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeIDs(1),
		Annotations:       map[string]string{annotateProbes: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			arg := ""
			if len(args) > 0 {
				if arg = args[0]; arg == "" {
					return usagef(cmd, "an id is empty")
				}
			}
			return a.sync(cmd.Context(), arg)
		},
	}
}

type syncView struct {
	ID         cache.ID `json:"id,omitempty"`
	Synced     int      `json:"synced"`
	DurationMS int64    `json:"duration_ms"`
}

// sync has the store open before and after, but not while the disk works.
func (a *app) sync(ctx context.Context, arg string) error {
	began := time.Now()
	id, list, err := a.unsynced(ctx, arg)
	if err != nil {
		return err
	}
	v := syncView{ID: id}
	if list.Len() > 0 {
		stop := a.progress("syncing "+plural(list.Len(), "record"), nil)
		err = list.Sync(ctx)
		stop()
		if err != nil {
			return err
		}
		if v.Synced, err = a.markSynced(ctx, list); err != nil {
			return err
		}
	}
	v.DurationMS = time.Since(began).Milliseconds()
	if a.json {
		return printJSON(a.out, v)
	}
	fmt.Fprintf(a.out, "%s synced, %d ms\n", plural(v.Synced, "record"), v.DurationMS)
	return nil
}

// unsynced lists what is to be synced, and looks at the record that the caller
// is concerned with.
func (a *app) unsynced(ctx context.Context, arg string) (id cache.ID, list *cache.Unsynced, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return "", nil, err
	}
	defer shut(m, &err)
	if arg != "" {
		if id, err = resolve(ctx, m, arg); err != nil {
			return "", nil, err
		}
		rec, err := m.Lookup(ctx, id)
		if err != nil {
			return id, nil, about(id, err)
		}
		if rec.State == cache.Mutable {
			err := fmt.Errorf("record %s is mutable: commit it first: %w", id, errdefs.ErrFailedPrecondition)
			return id, nil, about(id, err)
		}
	}
	list, err = m.Unsynced(ctx)
	return id, list, err
}

func (a *app) markSynced(ctx context.Context, list *cache.Unsynced) (n int, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return 0, err
	}
	defer shut(m, &err)
	return m.MarkSynced(ctx, list)
}

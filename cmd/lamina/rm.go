package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

func newRm(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "rm ID...",
		Short: "Remove records with their snapshots",
		Example: `  lamina rm 01JCXM
  lamina rm key:app key:docs
  lamina rm "$child" "$parent"`,
		Long: `Remove records for good, with their snapshots. Children go before their parents
whatever the order in which they are given. A record that somebody holds, or that
has other children, stays; if some went and some stayed the exit code is 3.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeIDs(-1),
		Annotations:       map[string]string{annotateProbes: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.rm(cmd, args)
		},
	}
}

type removedView struct {
	ID    cache.ID `json:"id"`
	Freed int64    `json:"freed"`
}

func (a *app) rm(cmd *cobra.Command, args []string) error {
	var removed []removedView
	var errs []error
	err := a.patiently(cmd.Context(), func() error {
		gone, failed, err := a.remove(cmd.Context(), args)
		if err != nil {
			return err
		}
		removed, errs = append(removed, gone...), failed
		// What is left of a killed command goes soon: try these again.
		args = leftovers(failed)
		if len(args) > 0 && len(args) == len(failed) {
			return errors.Join(failed...)
		}
		return nil
	})
	if err != nil && (len(errs) == 0 || cmd.Context().Err() != nil) {
		return err
	}
	for _, v := range removed {
		if a.json {
			err = printJSON(a.out, v)
		} else {
			err = printLine(a.out, fmt.Sprintf("%s  %s", v.ID, size(v.Freed)))
		}
		if err != nil {
			return err
		}
	}
	if len(errs) == 0 {
		return nil
	}
	code := exitCode(errs[0])
	for _, err := range errs {
		a.complain(cmd, err)
		if exitCode(err) != code {
			code = exitError
		}
	}
	if len(removed) > 0 {
		code = exitPartly
	}
	return statusError(code)
}

// leftovers are the ids whose removal met nothing but dying processes.
func leftovers(errs []error) (ids []string) {
	for _, err := range errs {
		if isLeftover(err) {
			ids = append(ids, string(idOf(err)))
		}
	}
	return ids
}

// remove gives what was removed and, for each other argument, why not.
func (a *app) remove(ctx context.Context, args []string) (removed []removedView, errs []error, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return nil, nil, err
	}
	defer shut(m, &err)
	var ids []cache.ID
	seen := map[cache.ID]bool{}
	for _, arg := range args {
		id, err := resolve(ctx, m, arg)
		if err != nil {
			errs = append(errs, err)
		} else if !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
	}
	results, err := m.Remove(ctx, ids...)
	if err != nil {
		return nil, nil, err
	}
	for _, r := range results {
		if r.Err != nil {
			errs = append(errs, about(r.ID, r.Err))
		} else {
			removed = append(removed, removedView{ID: r.ID, Freed: r.Freed})
		}
	}
	return removed, errs, nil
}

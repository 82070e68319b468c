package main

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace/runlog"
)

func newLog(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "log ID",
		Short: "Print what the command that made a record printed",
		Example: `  lamina log key:app
  lamina log key:app 2>/dev/null
  lamina log 01JCXM | less -R`,
		Long: `Print the output of the command that made the content of a record: its standard
output on standard output, its standard error on standard error, in the order in
which they came, byte by byte. The store is opened read-only.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeIDs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, data, err := a.readLog(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if err := runlog.Replay(data, a.out, a.err); err != nil {
				return about(id, fmt.Errorf("log of record %s: %w", id, err))
			}
			return nil
		},
	}
}

// readLog gives the log of a record, with the store closed again.
func (a *app) readLog(ctx context.Context, arg string) (id cache.ID, data []byte, err error) {
	m, err := a.open(ctx, looking)
	if err != nil {
		return "", nil, err
	}
	defer shut(m, &err)
	if id, err = resolve(ctx, m, arg); err != nil {
		return "", nil, err
	}
	// An alias is found through its record.
	rec, err := m.Lookup(ctx, id)
	if err != nil {
		return id, nil, about(id, err)
	}
	data, err = m.Attachment(ctx, rec.ID, runlog.Attachment)
	if errdefs.IsNotFound(err) {
		err = fmt.Errorf("record %s has no log: only lamina run keeps one: %w", id, errdefs.ErrNotFound)
	}
	return id, data, about(id, err)
}

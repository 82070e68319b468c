package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/workspace/sandbox"
)

func newExec(a *app) *cobra.Command {
	var write bool
	cmd := &cobra.Command{
		Use:   "exec ID [--rw] -- CMD ARGS...",
		Short: "Run a command in a record",
		Example: `  lamina exec key:app -- ls -l
  lamina exec key:app -- sh -c 'du -a | sort -n | tail'
  lamina exec "$id" --rw -- tar -xf /tmp/sysroot.tar`,
		Long: `Run a command with the record mounted as its working directory, and end with its
exit code. Without --rw the tree refuses changes, in whatever state the record is,
and neither tree nor id change; a record that another process writes is locked.

With --rw a mutable record is written under its id. A committed one is reopened:
it stays mutable under a new id, the old id is gone, and lamina commit freezes it
again. A finalized one cannot be written; make a child with lamina new --parent.

The command has the environment and the standard files of lamina. No process of it
outlives lamina. With --json the last line of standard error is one object with
the record's id, and previous_id if that changed.`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch at := cmd.ArgsLenAtDash(); {
			case len(args) == 0 || at == 0:
				return errors.New("which record? The ID comes first")
			case at < 0:
				return errors.New("the command stands after --: lamina exec ID -- CMD")
			case at > 1:
				return errors.New("one ID stands before --")
			case len(args) < 2 || args[1] == "":
				return errors.New("which command? It stands after --")
			}
			return nil
		},
		ValidArgsFunction: a.completeIDs(1),
		Annotations:       map[string]string{annotateMounts: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.exec(cmd, args[0], args[1:], write)
		},
	}
	cmd.Flags().BoolVar(&write, "rw", false, "let the command change the tree")
	return cmd
}

type execView struct {
	stateView
	ExitCode int `json:"exit_code"`
}

func (a *app) exec(cmd *cobra.Command, arg string, command []string, write bool) (err error) {
	ctx := cmd.Context()
	h, err := a.take(ctx, arg, write, true)
	if err != nil {
		return err
	}
	if !write && !a.namespace.Private {
		fmt.Fprintf(a.err, "lamina: %s: nothing keeps the command from changing the tree\n", a.namespace.Reason)
	}
	status, err := runIn(ctx, h.path, command, a.namespace.Private)
	if endErr := h.end(); endErr != nil {
		err = errors.Join(err, fmt.Errorf("leave record %s: %w", h.state.ID, endErr))
	}
	var start *sandbox.StartError
	if errors.As(err, &start) {
		a.complain(cmd, err)
		status, err = start.Status(), nil
	}
	if err != nil {
		return about(h.state.ID, err)
	}
	if a.json {
		if err := printJSON(a.err, execView{h.state, status}); err != nil {
			return err
		}
	}
	if status != 0 {
		return statusError(status)
	}
	return nil
}

// runIn runs a command with this process's environment and standard files.
func runIn(ctx context.Context, dir string, command []string, private bool) (status int, err error) {
	exit, err := sandbox.Run(ctx, sandbox.Spec{
		Args: command, Env: os.Environ(), Dir: dir,
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Private: private,
	})
	return exit.Status(), err
}

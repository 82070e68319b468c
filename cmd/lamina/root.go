package main

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/workspace/sandbox"
)

// defaultWait is how long a command waits for another process that has the
// store open: those have it for moments only, unless a daemon keeps it.
const defaultWait = 5 * time.Second

// app is one call of the command: the global flags, and where output goes.
type app struct {
	rootDir string
	driver  string
	json    bool
	wait    time.Duration

	out, err io.Writer // data, and talk

	// began is set when the command line was understood: errors before it
	// are errors of usage.
	began bool
	// namespace is what the sandbox gave, nil for verbs that need none.
	namespace *sandbox.Namespace
	// stopSignals gives the error of the verb back, with the signal that was the
	// reason.
	stopSignals func(error) error
}

func newApp() *app { return &app{out: &stdoutFile{File: os.Stdout}, err: os.Stderr} }

// Annotations of a command that say what has to happen before it runs.
const (
	// annotateMounts marks verbs that mount, or run commands in a mount.
	annotateMounts = "lamina.mounts"
	// annotateProbes marks verbs that ask the kernel about mounts or look into
	// trees, for which an ordinary user needs a namespace, but not root.
	annotateProbes = "lamina.probes"
)

// Groups of the verbs in the help of the command itself.
const (
	groupMain     = "main"
	groupLook     = "look"
	groupPlumbing = "plumbing"
)

const rootExamples = `  lamina run --key app --src . --out bin/app -- make
  lamina ls
  lamina exec key:app -- ls -l`

func newRoot(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "lamina",
		Short:   "Run builds in warm workspaces, and look into the snapshots they live in",
		Example: rootExamples,
		Long: `Lamina keeps file system snapshots as records in a store. "lamina run" runs a
build command in a warm workspace: a snapshot that holds the products of the
last run, so that only what changed is built again. If nothing changed, nothing
runs. The other verbs look into the store or work on single records.

The store lies in --root, else in $LAMINA_ROOT, else in /var/lib/lamina, or for
an ordinary user in $XDG_DATA_HOME/lamina. Several commands share one store; it
is open only for moments, and who meets an open store waits (--wait).

Wherever a verb takes ID it takes an id, the unique beginning of one, or key:KEY
for the workspace of that key.

Exit codes: 0 ok, 1 error, 2 wrong usage, 3 partly done, 5 damage found that is
still there, 10 no store, 11 locked by somebody else, 12 store newer than this
program, 129, 130 and 143 ended by SIGHUP, SIGINT and SIGTERM. run and exec end
with the code of their command; 127 and 126 mean that it could not be started.
With --json an error is one JSON object on stderr.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		PersistentPreRunE: a.begin,
		Args:              cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef(cmd, "unknown command %q", args[0])
			}
			return cmd.Help()
		},
	}
	cmd.SetOut(a.out)
	cmd.SetErr(a.err)
	cmd.SetHelpTemplate(helpTemplate)
	cmd.SetUsageTemplate(usageTemplate)
	cmd.SetFlagErrorFunc(flagError)
	flags := cmd.PersistentFlags()
	flags.StringVar(&a.rootDir, "root", "", "`DIR` that holds the store")
	flags.StringVar(&a.driver, "driver", "", "snapshot `DRIVER` of a new store: overlay or native")
	flags.BoolVar(&a.json, "json", false, "print JSON, a schema that only grows")
	a.wait = defaultWait
	flags.Var(durationFlag(&a.wait), "wait", "wait so long for another process that has the store open")
	_ = cmd.RegisterFlagCompletionFunc("driver", cobra.FixedCompletions([]cobra.Completion{snapshot.Overlay, snapshot.Native}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.MarkPersistentFlagDirname("root")

	cmd.AddGroup(
		&cobra.Group{ID: groupMain, Title: "The main job:"},
		&cobra.Group{ID: groupLook, Title: "Looking:"},
		&cobra.Group{ID: groupPlumbing, Title: "Working on records:"},
	)
	add := func(group string, verbs ...*cobra.Command) {
		for _, v := range verbs {
			v.GroupID = group
			v.DisableFlagsInUseLine = true
			cmd.AddCommand(v)
		}
	}
	add(groupMain, newRun(a))
	add(groupLook, newLs(a), newShow(a), newLog(a), newDu(a), newHash(a), newCompare(a), newCheck(a), newSync(a), newExport(a), newInfo(a))
	add(groupPlumbing, newNew(a), newExec(a), newCommit(a), newFinalize(a), newExtract(a), newMerge(a), newDiff(a), newImport(a), newRm(a), newPrune(a), newMigrate(a))
	add("", newVersion(a), newCompletion(a), newCommands(a))
	cmd.SetHelpCommand(newHelp(a))
	return cmd
}

// begin runs before each verb, once the command line is understood. The
// namespace comes first: entering it may start the program anew.
func (a *app) begin(cmd *cobra.Command, _ []string) error {
	switch {
	case a.driver != "" && a.driver != snapshot.Overlay && a.driver != snapshot.Native:
		return fmt.Errorf("--driver %q: there are %s and %s", a.driver, snapshot.Overlay, snapshot.Native)
	case cmd.Flags().Changed("root") && a.rootDir == "":
		return fmt.Errorf("--root is empty")
	}
	a.began = true
	_, mounts := cmd.Annotations[annotateMounts]
	_, probes := cmd.Annotations[annotateProbes]
	if mounts || probes && os.Geteuid() != 0 {
		ns := sandbox.Enter()
		a.namespace = &ns
	}
	a.useLog()
	ctx, stop := withSignals(cmd.Context())
	a.stopSignals = func(err error) error {
		err = bySignal(ctx, err)
		stop()
		return err
	}
	cmd.SetContext(ctx)
	return nil
}

// newHelp is cobra's help command, but one that fails for an unknown verb.
func newHelp(*app) *cobra.Command {
	return &cobra.Command{
		Use:               "help [COMMAND]",
		Short:             "Print the help of a command",
		ValidArgsFunction: completeVerbs,
		RunE: func(cmd *cobra.Command, args []string) error {
			target, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return usagef(cmd, "unknown command %q", args)
			}
			target.InitDefaultHelpFlag()
			return target.Help()
		},
	}
}

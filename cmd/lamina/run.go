package main

import (
	"slices"

	"github.com/spf13/cobra"
)

// runOptions are the flags of run as they were given.
type runOptions struct {
	key       string
	src       string   // empty: no source
	exclude   []string // patterns
	out       []string // PATH[:DEST]
	env       []string // K or K=V
	ignoreEnv []string
	mounts    []string // SPEC
	labels    []string // K=V
	noMemo    bool
	noWait    bool
	args      []string // the command
}

func newRun(a *app) *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run --key KEY [--src DIR] [--exclude P]... [--out PATH[:DEST]]... [--env K[=V]]... [--ignore-env K]... [--mount SPEC]... [--label K=V]... [--no-memo] [--no-wait] -- CMD ARGS...",
		Short: "Run a build command in a warm workspace",
		Example: `  lamina run --key app --src . --out bin/app -- make
  lamina run --key docs --src . --exclude .git --out public:/srv/docs -- hugo
  lamina run --key js --src . --mount type=cache,target=.npm -- npm ci`,
		Long: `Run a build command in the workspace of KEY: a snapshot that holds the products
of the last run. The source tree is synced in first: only what changed is copied,
what is gone is deleted, build products stay. If the command, the environment and
the source are those that made the workspace's present content, and that run
succeeded, nothing runs: its output and the outputs named by --out come from the
cache. A command that fails keeps the workspace for the next try, but nothing is
remembered of it.

PATH in --out is relative to the workspace, DEST to the present directory; both
may be files or directories. An output that the command did not make is an error.

The command inherits the environment, and all of it counts, but for variables
that name a session, such as TERM and SSH_AUTH_SOCK, and those of --ignore-env,
where a name may end in *. Its standard input is /dev/null. No process of it
outlives lamina.

SPEC is SOURCE:TARGET[:ro], or type=cache,id=ID,target=PATH[,sharing=MODE] for a
directory that outlives the workspace and that any run finds by ID. PATH, which is
the ID if none is given, is relative to the workspace. With MODE shared, the
default, several runs use it at once; with locked they take turns in the order of
arrival; with private a run that finds it in use gets another. A SPEC counts; what
is in the directory does not, and nothing of it is in the workspace or an output.

--label sets a label of the workspace, for filters and quotas; K= removes one. It
does not count.

Two runs of one key take turns, unless --no-wait is given; runs of different keys
do not wait for each other. With --json the last line of standard error is one
object that says what was done, and why; its source_digest is that of the source
as lamina hash --ignore-owners gives it.`,
		Args:        cobra.ArbitraryArgs,
		Annotations: map[string]string{annotateMounts: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case o.key == "":
				return usagef(cmd, "--key is missing")
			case cmd.Flags().Changed("src") && o.src == "":
				return usagef(cmd, "--src is empty")
			case slices.Contains(o.ignoreEnv, ""):
				return usagef(cmd, "--ignore-env is empty")
			case len(args) == 0 || args[0] == "":
				return usagef(cmd, "which command? It stands after --")
			}
			o.args = args
			return a.run(cmd.Context(), cmd, o)
		},
	}
	flags := cmd.Flags()
	flags.SetInterspersed(false)
	flags.StringVar(&o.key, "key", "", "name of the workspace, `KEY`")
	flags.StringVar(&o.src, "src", "", "source tree `DIR` to sync into it")
	flags.StringArrayVar(&o.exclude, "exclude", nil, "leave out what matches `P`, as in .dockerignore")
	flags.StringArrayVar(&o.out, "out", nil, "output `PATH[:DEST]` to copy out")
	flags.StringArrayVar(&o.env, "env", nil, "set `K[=V]` in the command's environment")
	flags.StringArrayVar(&o.ignoreEnv, "ignore-env", nil, "variable `K` does not count for the memo")
	flags.StringArrayVar(&o.mounts, "mount", nil, "further mount `SPEC`")
	flags.StringArrayVar(&o.labels, "label", nil, "set the label `K=V` of the workspace")
	flags.BoolVar(&o.noMemo, "no-memo", false, "run even if nothing changed")
	flags.BoolVar(&o.noWait, "no-wait", false, "fail where another run would be waited for")
	_ = cmd.MarkFlagDirname("src")
	_ = cmd.RegisterFlagCompletionFunc("key", a.completeKeys)
	return cmd
}

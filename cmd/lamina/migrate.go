package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/migrate"
)

func newMigrate(a *app) *cobra.Command {
	var dryRun, rollback bool
	cmd := &cobra.Command{
		Use:   "migrate [--dry-run|--rollback] DIR",
		Short: "Take over the state of a BuildKit daemon",
		Example: `  lamina migrate --dry-run /var/lib/buildkit
  lamina migrate /var/lib/buildkit
  lamina migrate --rollback /var/lib/buildkit`,
		Long: `Make a store of the state of a BuildKit daemon, where it stands. DIR is the root
of a daemon, or the directory of one worker in it. The daemon must be stopped.
Each worker's directory (runc-overlayfs, runc-native) is a root for lamina
afterwards: use it with --root.

Records, layers, cache mounts, sizes, use counts and content hashes come over
under their ids; no snapshot is moved or copied. Two records of BuildKit for one
snapshot become one. BuildKit's databases are only read. What does not come over
is named, with the reason. If it is interrupted, run it again; on a directory
that is a store already it does nothing.

--dry-run prints what would happen with each record, and changes nothing.
--rollback takes the store away again, so that BuildKit finds its state as it
left it. That is possible until lamina finalizes, reopens, extracts, writes to
or removes one of BuildKit's snapshots, or BuildKit has worked in the directory;
it is refused with the reason afterwards. What lamina made meanwhile is listed
and kept aside.

With --json one object a worker is printed. Exit code 3: one of several workers
failed.`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) != 1:
				return usagef(cmd, "name one directory")
			case args[0] == "":
				return usagef(cmd, "the directory's name is empty")
			case dryRun && rollback:
				return usagef(cmd, "--dry-run and --rollback exclude each other")
			}
			return nil
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		Annotations: map[string]string{annotateMounts: ""},
		RunE: func(cmd *cobra.Command, args []string) error {
			if rollback {
				return a.rollback(cmd, args[0])
			}
			return a.migrate(cmd, args[0], dryRun)
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print the plan and change nothing")
	cmd.Flags().BoolVar(&rollback, "rollback", false, "give the directory back to BuildKit")
	return cmd
}

// migrateView is what became of one worker, in JSON. Fields are only added.
type migrateView struct {
	Worker     string           `json:"worker"`
	Root       string           `json:"root"`
	Status     string           `json:"status"`
	Records    int              `json:"records"`
	Folded     int              `json:"folded"`
	Kept       int              `json:"kept"`
	Aliases    int              `json:"aliases"`
	Dropped    []droppedView    `json:"dropped"`
	Bytes      int64            `json:"bytes"`
	DurationMS int64            `json:"duration_ms"`
	Driver     string           `json:"driver,omitempty"`
	Freed      int64            `json:"freed"`
	Left       int64            `json:"left"`
	Rollback   string           `json:"rollback,omitempty"`
	Reason     string           `json:"reason,omitempty"`
	Warnings   []string         `json:"warnings"`
	Plan       []migrateStep    `json:"plan,omitempty"`
	Error      *errorDetailView `json:"error,omitempty"`
}

type droppedView struct {
	ID     string `json:"id"`
	Reason string `json:"reason"`
}

type migrateStep struct {
	Action string `json:"action"`
	ID     string `json:"id"`
	Into   string `json:"into,omitempty"`
	State  string `json:"state,omitempty"`
	Op     string `json:"op,omitempty"`
	Size   *int64 `json:"size"`
	Reason string `json:"reason"`
}

type errorDetailView struct {
	Class   string `json:"class"`
	Message string `json:"message"`
}

func (a *app) migrate(cmd *cobra.Command, dir string, dryRun bool) error {
	reports, err := a.runMigration(cmd.Context(), func(progress func(migrate.Progress)) ([]migrate.Report, error) {
		return migrate.Run(cmd.Context(), dir, migrate.Options{DryRun: dryRun, Progress: progress})
	})
	if err != nil {
		return err
	}
	var failed []error
	for _, r := range reports {
		if r.Err != nil {
			failed = append(failed, r.Err)
		}
		if a.json && (r.Err == nil || len(reports) > 1) {
			if err := printJSON(a.out, migrateViewOf(r, dryRun)); err != nil {
				return err
			}
		} else if !a.json && r.Err == nil {
			a.printMigration(r, dryRun)
		}
	}
	return a.endMigration(cmd, failed, len(reports))
}

// endMigration is the error of a run over several workers: that of the only
// one, or each said and exit code 3.
func (a *app) endMigration(cmd *cobra.Command, failed []error, workers int) error {
	switch {
	case len(failed) == 0:
		return nil
	case workers == 1:
		return failed[0]
	}
	for _, err := range failed {
		a.complain(cmd, err)
	}
	if len(failed) < workers {
		return statusError(exitPartly)
	}
	return statusError(exitCode(failed[0]))
}

// runMigration shows how far it got.
func (a *app) runMigration(_ context.Context, run func(func(migrate.Progress)) ([]migrate.Report, error)) ([]migrate.Report, error) {
	var mu sync.Mutex
	var last migrate.Progress
	stop := a.progress("migrating", func() string {
		mu.Lock()
		defer mu.Unlock()
		return bar(last)
	})
	defer stop()
	return run(func(p migrate.Progress) {
		mu.Lock()
		defer mu.Unlock()
		last = p
	})
}

// bar draws how far a migration is.
func bar(p migrate.Progress) string {
	const width = 30
	if p.Total == 0 {
		return fmt.Sprintf("%s: %s", safe(p.Worker), p.Stage)
	}
	n := min(width*p.Done/p.Total, width)
	return fmt.Sprintf("%s: %s [%s%s] %d/%d", safe(p.Worker), p.Stage, strings.Repeat("#", n), strings.Repeat(".", width-n), p.Done, p.Total)
}

func migrateViewOf(r migrate.Report, dryRun bool) migrateView {
	v := migrateView{
		Worker: r.Worker, Root: r.Root, Status: string(r.Status), Reason: r.Reason, DurationMS: r.Duration.Milliseconds(),
		Dropped: []droppedView{}, Warnings: []string{},
	}
	if r.Err != nil {
		v.Error = &errorDetailView{Class: classOf(r.Err), Message: oneLine(r.Err.Error())}
	}
	p := r.Plan
	if p == nil || r.Err != nil {
		return v
	}
	v.Records, v.Folded, v.Kept, v.Aliases = p.Records, p.Folded, p.Records-p.Folded, p.Aliases
	v.Bytes, v.Freed, v.Left, v.Driver = p.Bytes, p.Freed, p.Left, p.Driver
	v.Rollback, v.Warnings = p.Rollback(), list(p.Warnings)
	for _, s := range p.Dropped() {
		v.Dropped = append(v.Dropped, droppedView{s.ID, s.Reason})
	}
	for _, s := range p.Steps {
		if !dryRun {
			break
		}
		step := migrateStep{Action: string(s.Action), ID: s.ID, Into: s.Into, State: s.State, Op: s.Op, Reason: s.Reason}
		if s.Bytes >= 0 {
			step.Size = &s.Bytes
		}
		v.Plan = append(v.Plan, step)
	}
	return v
}

func (a *app) printMigration(r migrate.Report, dryRun bool) {
	p := r.Plan
	if p == nil {
		reason := r.Reason
		if r.Status == migrate.Already {
			reason = "a store already, nothing to do"
		}
		fmt.Fprintf(a.out, "%s: %s\n", safe(r.Worker), safe(reason))
		return
	}
	t := newTable(a.out, "action", "id", "state", "size", "why")
	rightAligned(t, 4)
	rows := 0
	for _, s := range p.Steps {
		if dryRun || s.Action == migrate.Drop {
			t.AppendRow([]any{string(s.Action), safe(s.ID), s.State, size(s.Bytes), safe(s.Reason)})
			rows++
		}
	}
	if rows > 0 {
		t.Render()
		fmt.Fprintln(a.out)
	}
	for _, w := range p.Warnings {
		fmt.Fprintf(a.out, "warning: %s\n", safe(w))
	}
	verb := map[bool]string{true: "would become", false: "is now"}[dryRun]
	fmt.Fprintf(a.out, "%s %s a store with driver %s: %s, %s\n", safe(r.Root), verb, p.Driver, plural(p.Records, "record"), sizeOfAll(p))
	fmt.Fprintf(a.out, "  %s of a pair folded into one, %s for a second name, %s dropped\n",
		plural(p.Folded, "record"), plural(p.Aliases, "alias"), plural(len(p.Dropped()), "record"))
	if p.Freed > 0 || p.Left > 0 {
		fmt.Fprintf(a.out, "  %s of garbage go with the first opening, %s stay for the old daemon's sake\n", size(p.Freed), size(p.Left))
	}
	fmt.Fprintf(a.out, "  rollback: %s\n", p.Rollback())
	if !dryRun {
		fmt.Fprintf(a.out, "  took %s; look at it with lamina --root %s ls\n", r.Duration.Round(time.Millisecond), safe(r.Root))
	}
}

// sizeOfAll is the size of the records, as far as the old daemon had measured
// them.
func sizeOfAll(p *migrate.Plan) string {
	unknown := 0
	for _, s := range p.Steps {
		if s.Bytes < 0 && (s.Action == migrate.Keep || s.Action == migrate.Fold) {
			unknown++
		}
	}
	switch {
	case unknown == 0:
		return size(p.Bytes)
	case p.Bytes == 0:
		return "sizes not known yet"
	}
	return fmt.Sprintf("%s and %d of a size not known yet", size(p.Bytes), unknown)
}

// rollbackView is what a rollback did to one worker.
type rollbackView struct {
	Worker  string           `json:"worker"`
	Root    string           `json:"root"`
	Status  string           `json:"status"`
	Reason  string           `json:"reason,omitempty"`
	Aside   string           `json:"aside,omitempty"`
	Records []asideView      `json:"kept_aside"`
	Error   *errorDetailView `json:"error,omitempty"`
}

type asideView struct {
	ID          cache.ID `json:"id"`
	State       string   `json:"state"`
	Description string   `json:"description"`
}

func (a *app) rollback(cmd *cobra.Command, dir string) error {
	reports, err := migrate.Rollback(cmd.Context(), dir, migrate.Options{})
	if err != nil {
		return err
	}
	var failed []error
	for _, r := range reports {
		if r.Err != nil {
			failed = append(failed, r.Err)
		}
		if a.json && (r.Err == nil || len(reports) > 1) {
			if err := printJSON(a.out, rollbackViewOf(r)); err != nil {
				return err
			}
		} else if !a.json && r.Err == nil {
			a.printRollback(r)
		}
	}
	return a.endMigration(cmd, failed, len(reports))
}

func rollbackViewOf(r migrate.RollbackReport) rollbackView {
	v := rollbackView{
		Worker: r.Worker, Root: r.Root, Status: string(r.Status), Reason: r.Reason, Aside: r.Aside, Records: []asideView{},
	}
	for _, rec := range r.Records {
		v.Records = append(v.Records, asideView{rec.ID, rec.State.String(), rec.Description})
	}
	if r.Err != nil {
		v.Error = &errorDetailView{Class: classOf(r.Err), Message: oneLine(r.Err.Error())}
	}
	return v
}

func (a *app) printRollback(r migrate.RollbackReport) {
	if r.Status != migrate.RolledBack {
		fmt.Fprintf(a.out, "%s: %s\n", safe(r.Worker), safe(r.Reason))
		return
	}
	if len(r.Records) > 0 {
		t := newTable(a.out, "kept aside", "state", "description")
		for _, rec := range r.Records {
			t.AppendRow([]any{safe(string(rec.ID)), rec.State.String(), safe(rec.Description)})
		}
		t.Render()
		fmt.Fprintln(a.out)
	}
	fmt.Fprintf(a.out, "%s is BuildKit's again; what lamina made is in %s\n", safe(r.Root), safe(r.Aside))
}

// takeOver migrates the worker's directory that a store was about to be made
// in.
func (a *app) takeOver(ctx context.Context, root string) error {
	fmt.Fprintf(a.err, "lamina: %s holds the state of a BuildKit worker; taking it over\n", safe(root))
	reports, err := a.runMigration(ctx, func(progress func(migrate.Progress)) ([]migrate.Report, error) {
		return migrate.Run(ctx, root, migrate.Options{Progress: progress})
	})
	for _, r := range reports {
		err = errors.Join(err, r.Err)
	}
	if err != nil {
		return hintf(err, "nothing was changed; lamina migrate --dry-run %s says what there is", safe(root))
	}
	return nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
)

type pruneOptions struct {
	dryRun, yes          bool
	planFile, policyFile string
	rule                 policy.Policy
}

func newPrune(a *app) *cobra.Command {
	var o pruneOptions
	cmd := &cobra.Command{
		Use:   "prune [--dry-run|--plan FILE] [--yes] [LIMITS]",
		Short: "Remove what nobody needs, by limits and filters",
		Example: `  lamina prune --keep-duration 7d
  lamina prune --max-used-space 20GB --target-space 15GB --yes
  lamina prune --dry-run --json > plan && lamina prune --plan plan --yes`,
		Long: `Remove records that nobody holds, with their snapshots. On a terminal the plan is
shown first and you are asked; elsewhere nothing is removed without --yes.

Without limits all goes that is selected and not held. With limits nothing goes
as long as the store keeps them; else what was used longest ago goes first, leaf
first, until it is below the lowest limit, or at --target-space. Nothing goes
that would take the store below --reserved-space. The types internal and
frontend, and what images name, go only with --all. Amounts are bytes, with a
unit (GB, GiB) or a part of the disk (20%); durations have units from ms to w.

With --by-label the limits hold for the records of each value of that label, or of
those that --label-value and --unlabelled name: quotas. A cache directory that is
in use and that a --filter picks goes when it is released.

--dry-run prints what would go and what would stay, and why. What it prints with
--json can be executed later with --plan: wholly, or not at all if a record has
changed since. --policy reads an ordered list of such rules from a file.

` + filterHelp,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		Annotations:       map[string]string{annotateProbes: ""},
		RunE: func(cmd *cobra.Command, _ []string) error {
			policies, err := o.policies(cmd)
			if err != nil {
				return usage(cmd, err)
			}
			return a.prune(cmd, o, policies)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.dryRun, "dry-run", false, "print the plan and remove nothing")
	f.StringVar(&o.planFile, "plan", "", "execute the plan in `FILE`, from --dry-run --json")
	f.BoolVar(&o.yes, "yes", false, "do not ask")
	f.Var(optionalFlag("duration", &o.rule.KeepDuration, parseDuration), "keep-duration", "spare what was used within `D`, e.g. 48h or 7d")
	f.Var(optionalFlag("amount", &o.rule.Reserved, policy.ParseAmount), "reserved-space", "let the store have `S` in any case")
	f.Var(optionalFlag("amount", &o.rule.MaxUsed, policy.ParseAmount), "max-used-space", "let the store use at most `S`")
	f.Var(optionalFlag("amount", &o.rule.MinFree, policy.ParseAmount), "min-free-space", "have `S` free on the disk")
	f.Var(optionalFlag("amount", &o.rule.Target, policy.ParseAmount), "target-space", "if a limit is not kept, shrink to `S`")
	f.StringArrayVar(&o.rule.Filters, "filter", nil, "only records that match `F`")
	f.StringArrayVar(&o.rule.Types, "type", nil, "only records of type `T`")
	f.BoolVar(&o.rule.All, "all", false, "protected records, too")
	f.StringVar(&o.rule.ByLabel, "by-label", "", "let the limits hold for each value of the label `NAME`")
	f.StringArrayVar(&o.rule.LabelValues, "label-value", nil, "with --by-label, only for the value `V`")
	f.BoolVar(&o.rule.Unlabelled, "unlabelled", false, "with --by-label, only for records without the label")
	f.StringVar(&o.policyFile, "policy", "", "take the rules from `FILE`")
	return cmd
}

// policies makes rules of the flags. It is nil with --plan.
func (o *pruneOptions) policies(cmd *cobra.Command) ([]policy.Policy, error) {
	given := func(names ...string) (out []string) {
		for _, n := range names {
			if cmd.Flags().Changed(n) {
				out = append(out, "--"+n)
			}
		}
		return out
	}
	rules := given("keep-duration", "reserved-space", "max-used-space", "min-free-space", "target-space", "filter", "type", "all", "by-label", "label-value", "unlabelled")
	if cmd.Flags().Changed("plan") {
		if others := append(rules, given("policy", "dry-run")...); len(others) > 0 {
			return nil, fmt.Errorf("--plan says all: %s cannot be beside it", strings.Join(others, ", "))
		}
		return nil, nil
	}
	if cmd.Flags().Changed("policy") {
		if len(rules) > 0 {
			return nil, fmt.Errorf("--policy says all: %s cannot be beside it", strings.Join(rules, ", "))
		}
		file, err := os.Open(o.policyFile)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		return policy.Read(file)
	}
	if _, err := policy.ParseFilters(o.rule.Filters...); err != nil {
		return nil, fmt.Errorf("--filter: %w", err)
	}
	return []policy.Policy{o.rule}, nil
}

func (a *app) prune(cmd *cobra.Command, o pruneOptions, policies []policy.Policy) error {
	ctx := cmd.Context()
	ask := !o.dryRun && !o.yes
	if ask && (a.json || !isTerminal(os.Stdin) || !isTerminal(a.out)) {
		return usagef(cmd, "nothing is removed without being asked for: use --yes, or --dry-run to see what would go")
	}
	if o.planFile != "" {
		plan, err := readPlan(o.planFile)
		if err != nil {
			return usage(cmd, err)
		}
		if ask {
			if yes, err := a.confirm(ctx, plan); err != nil || !yes {
				return err
			}
		}
		return a.execute(cmd, plan, true)
	}
	if o.yes && !o.dryRun {
		return a.planAndExecute(cmd, policies)
	}
	plan, err := a.plan(ctx, policies)
	if err != nil {
		return pruneUsage(cmd, err)
	}
	if o.dryRun {
		return a.printPlan(plan)
	}
	if err := a.printPlan(plan); err != nil || plan.Removed == 0 && !leavesToUsers(plan) {
		return err
	}
	if yes, err := a.confirm(ctx, plan); err != nil || !yes {
		return err
	}
	return a.execute(cmd, plan, false)
}

// leavesToUsers says whether something goes when it is released.
func leavesToUsers(plan *policy.Plan) bool {
	return slices.ContainsFunc(plan.Kept(), func(s policy.Step) bool { return s.Reason == policy.OnRelease })
}

// plan looks only.
func (a *app) plan(ctx context.Context, policies []policy.Policy) (_ *policy.Plan, err error) {
	m, err := a.open(ctx, looking)
	if err != nil {
		return nil, err
	}
	defer shut(m, &err)
	defer a.progress("measuring", nil)()
	return m.Plan(ctx, policies...)
}

// planAndExecute opens the store once.
func (a *app) planAndExecute(cmd *cobra.Command, policies []policy.Policy) (err error) {
	m, err := a.open(cmd.Context(), changing)
	if err != nil {
		return err
	}
	defer shut(m, &err)
	stop := a.progress("measuring", nil)
	plan, err := m.Plan(cmd.Context(), policies...)
	stop()
	if err != nil {
		return pruneUsage(cmd, err)
	}
	return a.carryOut(cmd, m, plan)
}

// execute opens the store for a plan that was made before. whole refuses a plan
// of which not all can be done.
func (a *app) execute(cmd *cobra.Command, plan *policy.Plan, whole bool) (err error) {
	m, err := a.open(cmd.Context(), changing)
	if err != nil {
		return err
	}
	defer shut(m, &err)
	if whole {
		if err := m.Verify(cmd.Context(), plan); err != nil {
			return fmt.Errorf("the plan does not fit the store any more, nothing was removed: %w", err)
		}
	}
	return a.carryOut(cmd, m, plan)
}

// pruneUsage makes an error of the rules one of the command line.
func pruneUsage(cmd *cobra.Command, err error) error {
	if classOf(err) == "invalid_argument" {
		return usage(cmd, err)
	}
	return err
}

// carryOut executes a plan and prints what becomes of each record.
func (a *app) carryOut(cmd *cobra.Command, m *cache.Manager, plan *policy.Plan) error {
	var sum pruneSum
	code, messages := 0, map[string]policy.Step{}
	for _, s := range plan.Steps {
		messages[s.Record.ID] = s
	}
	kept := slices.Clone(plan.Kept())
	for r, err := range m.Execute(cmd.Context(), plan) {
		if err != nil {
			// What was done until then is done.
			sum.Kept = len(plan.Steps) - sum.Removed - sum.Failed
			return errors.Join(err, a.printPruned(sum))
		}
		s := messages[string(r.ID)]
		if s.Action == policy.Keep {
			// It was to go when it is released, and was just now.
			s.Action = policy.Remove
			kept = slices.DeleteFunc(kept, func(k policy.Step) bool { return k.Record.ID == s.Record.ID })
		}
		if r.Err == nil {
			sum.Removed++
			sum.Freed += r.Freed
		} else {
			sum.Failed++
			if c := exitCode(r.Err); code == 0 || code == c {
				code = c
			} else {
				code = exitError
			}
		}
		if err := a.printOutcome(s, r); err != nil {
			return err
		}
	}
	sum.Kept = len(kept)
	if a.json {
		for _, s := range kept {
			if err := printJSON(a.out, stepViewOf(s)); err != nil {
				return err
			}
		}
	}
	if err := a.printPruned(sum); err != nil {
		return err
	}
	switch {
	case sum.Failed == 0:
		return nil
	case sum.Removed > 0:
		return statusError(exitPartly)
	}
	return statusError(code)
}

// printPruned ends what a prune prints.
func (a *app) printPruned(sum pruneSum) error {
	if a.json {
		return printJSON(a.out, sum)
	}
	return printLine(a.out, fmt.Sprintf("removed %s, freed %s, kept %d", plural(sum.Removed, "record"), size(sum.Freed), sum.Kept+sum.Failed))
}

func (a *app) printOutcome(s policy.Step, r cache.Removed) error {
	v := stepViewOf(s)
	if r.Err != nil {
		v.Action, v.Reason, v.Message = "failed", classOf(r.Err), oneLine(r.Err.Error())
	}
	switch {
	case a.json:
		return printJSON(a.out, v)
	case r.Err != nil:
		fmt.Fprintf(a.err, "lamina prune: %s\n", safe(v.Message))
		return nil
	}
	return printLine(a.out, fmt.Sprintf("%s  %s", r.ID, size(r.Freed)))
}

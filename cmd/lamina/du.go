package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
)

func newDu(a *app) *cobra.Command {
	var o duOptions
	cmd := &cobra.Command{
		Use:   "du [--verbose|--tree] [--by FIELD] [--sort ORDER] [--filter F]",
		Short: "Measure what the store occupies",
		Example: `  lamina du
  lamina du --by labels.team
  lamina du --verbose --filter 'type==regular'`,
		Long: `Measure what the store occupies on the disk: snapshots, blobs, the database, and
what removals under way will free. Records that nobody measured yet are walked.
The store is opened read-only and no record counts as used.

In use is what somebody holds, with all that lies below it; the rest could be
removed.
--verbose adds a line for each record, --tree draws them below their parents. They
are sorted by --sort: size, the largest first; prune, in the order in which prune
takes them; or id. What is equal goes by id.

--by adds a sum for each type, state, or value of a label (labels.NAME); records
without the label are a group of their own. The groups add up to the snapshots.

` + filterHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.verbose && o.tree {
				return usagef(cmd, "--verbose and --tree exclude each other")
			}
			keep, err := parseFilter(o.filters)
			if err != nil {
				return usage(cmd, err)
			}
			if _, ok := duOrders()[o.sort]; !ok {
				return usagef(cmd, "--sort %q: there are %s", o.sort, strings.Join(sortedKeys(duOrders()), ", "))
			}
			if err := checkBy(o.by); err != nil {
				return usage(cmd, err)
			}
			return a.du(cmd.Context(), o, keep)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
		// A user may own directories that are closed even to that user.
		Annotations: map[string]string{annotateProbes: ""},
	}
	cmd.Flags().StringArrayVar(&o.filters, "filter", nil, "count only records that match `F`")
	cmd.Flags().BoolVar(&o.verbose, "verbose", false, "list the records")
	cmd.Flags().BoolVar(&o.tree, "tree", false, "list the records below their parents")
	cmd.Flags().StringVar(&o.sort, "sort", "size", "sort the records by `ORDER`: size, prune or id")
	cmd.Flags().StringVar(&o.by, "by", "", "add sums by `FIELD`: type, state or labels.NAME")
	_ = cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(sortedKeys(duOrders()), cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("by", cobra.FixedCompletions([]string{"type", "state", "labels."}, cobra.ShellCompDirectiveNoFileComp|cobra.ShellCompDirectiveNoSpace))
	return cmd
}

type duOptions struct {
	filters       []string
	verbose, tree bool
	sort, by      string
}

// duOrders are what --sort takes.
func duOrders() map[string]func(x, y *cache.UsageEntry) int {
	id := func(x, y *cache.UsageEntry) int { return cmp.Compare(x.Record.ID, y.Record.ID) }
	return map[string]func(x, y *cache.UsageEntry) int{
		"id":   id,
		"size": func(x, y *cache.UsageEntry) int { return cmp.Or(cmp.Compare(y.Size, x.Size), id(x, y)) },
		"prune": func(x, y *cache.UsageEntry) int {
			a, b := cache.PolicyRecord(x.Record), cache.PolicyRecord(y.Record)
			switch {
			case policy.Before(&a, &b):
				return -1
			case policy.Before(&b, &a):
				return 1
			}
			return 0
		},
	}
}

// checkBy refuses what --by does not know.
func checkBy(by string) error {
	label, isLabel := strings.CutPrefix(by, "labels.")
	if by == "" || by == "type" || by == "state" || isLabel && label != "" {
		return nil
	}
	return fmt.Errorf("--by %q: there are type, state and labels.NAME, for example labels.team", by)
}

// usageView is what du prints in JSON; all numbers are bytes but for records.
type usageView struct {
	Total       int64                `json:"total"`
	Snapshots   int64                `json:"snapshots"`
	Blobs       int64                `json:"blobs"`
	Database    int64                `json:"database"`
	Pending     int64                `json:"pending"`
	InUse       int64                `json:"in_use"`
	Reclaimable int64                `json:"reclaimable"`
	Shared      int64                `json:"shared"`
	Records     int64                `json:"records"`
	ByType      map[string]countView `json:"by_type"`
	ByState     map[string]countView `json:"by_state"`
	FSTotal     int64                `json:"fs_total"`
	FSFree      int64                `json:"fs_free"`
	// Groups are there with --by.
	Groups  []groupView      `json:"groups,omitempty"`
	Entries []usageEntryView `json:"entries,omitempty"`
}

// groupView is the sum of one value of --by; the value is null for records that
// have none.
type groupView struct {
	Value   *string `json:"value"`
	Records int64   `json:"records"`
	Bytes   int64   `json:"bytes"`
}

type countView struct {
	Records int64 `json:"records"`
	Bytes   int64 `json:"bytes"`
}

// usageEntryView is one record, with --verbose and --tree.
type usageEntryView struct {
	ID       cache.ID   `json:"id"`
	State    string     `json:"state"`
	Type     string     `json:"type"`
	Size     int64      `json:"size"`
	InUse    bool       `json:"in_use"`
	Children int        `json:"children"`
	Parents  []cache.ID `json:"parents"`
}

func (a *app) du(ctx context.Context, o duOptions, keep func(*cache.Record) bool) (err error) {
	m, err := a.open(ctx, looking)
	if err != nil {
		return err
	}
	defer shut(m, &err)
	stop := a.progress("measuring", nil)
	u, err := m.DiskUsage(ctx, keep)
	stop()
	if err != nil {
		return err
	}
	order := duOrders()[o.sort]
	slices.SortFunc(u.Entries, func(x, y cache.UsageEntry) int { return order(&x, &y) })
	groups := groupsOf(u, o.by)
	if a.json {
		v := usageViewOf(u, o.verbose || o.tree)
		v.Groups = groups
		return printJSON(a.out, v)
	}
	switch {
	case o.tree:
		a.duTree(u)
	case o.verbose:
		a.duEntries(u)
	}
	if o.by != "" {
		a.duGroups(groups, o.by)
	}
	a.duTotals(u)
	return nil
}

// groupsOf sums up by a field, sorted by its value.
func groupsOf(u *cache.Usage, by string) (out []groupView) {
	counts := map[string]map[string]cache.Count{"type": u.ByType, "state": u.ByState}[by]
	for _, name := range sortedKeys(counts) {
		out = append(out, groupView{&name, counts[name].Records, counts[name].Bytes})
	}
	if label, ok := strings.CutPrefix(by, "labels."); ok {
		for _, c := range u.ByLabel(unquoteLabel(label)) {
			g := groupView{nil, c.Records, c.Bytes}
			if c.Set {
				g.Value = &c.Value
			}
			out = append(out, g)
		}
	}
	return out
}

// unquoteLabel reads the name of a label as filters have it.
func unquoteLabel(name string) string {
	if unquoted, err := strconv.Unquote(name); err == nil {
		return unquoted
	}
	return name
}

func (a *app) duGroups(groups []groupView, by string) {
	t := newTable(a.out, by, "records", "size")
	rightAligned(t, 2, 3)
	for _, g := range groups {
		value := "(none)"
		if g.Value != nil {
			value = safe(*g.Value)
		}
		t.AppendRow(table.Row{value, g.Records, size(g.Bytes)})
	}
	t.Render()
	fmt.Fprintln(a.out)
}

func usageViewOf(u *cache.Usage, entries bool) usageView {
	v := usageView{
		Total: u.Total, Snapshots: u.Snapshots, Blobs: u.Blobs, Database: u.Database, Pending: u.Pending,
		InUse: u.InUse, Reclaimable: u.Reclaimable, Shared: u.Shared, Records: u.Records,
		ByType: countViews(u.ByType), ByState: countViews(u.ByState), FSTotal: u.FSTotal, FSFree: u.FSFree,
	}
	if entries {
		for _, e := range u.Entries {
			v.Entries = append(v.Entries, usageEntryView{
				ID: e.Record.ID, State: e.Record.State.String(), Type: e.Record.Type,
				Size: e.Size, InUse: e.InUse, Children: e.Children, Parents: list(e.Record.Parents),
			})
		}
	}
	return v
}

func countViews(counts map[string]cache.Count) map[string]countView {
	out := map[string]countView{}
	for name, c := range counts {
		out[name] = countView(c)
	}
	return out
}

func (a *app) duTotals(u *cache.Usage) {
	t := newTable(a.out)
	rightAligned(t, 2)
	for _, line := range []struct {
		name  string
		bytes int64
		note  string
	}{
		{"snapshots", u.Snapshots, plural(int(u.Records), "record")},
		{"blobs", u.Blobs, ""},
		{"database", u.Database, ""},
		{"pending", u.Pending, "removals under way"},
		{"total", u.Total, ""},
		{"in use", u.InUse, "held, or below what is held"},
		{"reclaimable", u.Reclaimable, ""},
		{"shared", u.Shared, "with two children or more"},
		{"file system", u.FSTotal, size(u.FSFree) + " free"},
	} {
		t.AppendRow(table.Row{line.name, size(line.bytes), line.note})
	}
	t.Render()
}

func (a *app) duEntries(u *cache.Usage) {
	t := newTable(a.out, "id", "state", "type", "size", "in use", "key", "description")
	rightAligned(t, 4)
	for _, e := range u.Entries {
		t.AppendRow(duRow(e, safe(string(e.Record.ID))))
	}
	t.Render()
	fmt.Fprintln(a.out)
}

func duRow(e cache.UsageEntry, first string) table.Row {
	use := ""
	if e.InUse {
		use = "yes"
	}
	return table.Row{first, e.Record.State.String(), safe(e.Record.Type), size(e.Size), use, safe(keyOf(e.Record)), safe(e.Record.Description)}
}

// duTree draws each record below its first parent that is listed, too.
func (a *app) duTree(u *cache.Usage) {
	listed := map[cache.ID]cache.UsageEntry{}
	for _, e := range u.Entries {
		listed[e.Record.ID] = e
	}
	below := map[cache.ID][]cache.ID{}
	var tops []cache.ID
	for _, e := range u.Entries {
		at := slices.IndexFunc(e.Record.Parents, func(p cache.ID) bool { _, ok := listed[p]; return ok })
		if at < 0 {
			tops = append(tops, e.Record.ID)
		} else {
			p := e.Record.Parents[at]
			below[p] = append(below[p], e.Record.ID)
		}
	}
	t := newTable(a.out, "id", "state", "type", "size", "in use", "key", "description")
	rightAligned(t, 4)
	// Chains can be deep: a stack of our own, not the program's.
	type item struct {
		id    cache.ID
		depth int
	}
	var stack []item
	push := func(ids []cache.ID, depth int) {
		for _, id := range slices.Backward(ids) {
			stack = append(stack, item{id, depth})
		}
	}
	push(tops, 0)
	for len(stack) > 0 {
		top := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		t.AppendRow(duRow(listed[top.id], strings.Repeat("  ", top.depth)+safe(string(top.id))))
		push(below[top.id], top.depth+1)
	}
	t.Render()
	fmt.Fprintln(a.out)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

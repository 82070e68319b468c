package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/jedib0t/go-pretty/v6/table"

	"github.com/lamina-build/lamina/cache/policy"
)

// stepView is a line of a plan, or of its execution, in JSON.
type stepView struct {
	ID       string `json:"id"`
	Action   string `json:"action"`
	Size     int64  `json:"size"`
	Revision uint64 `json:"revision"`
	Reason   string `json:"reason"`
	Message  string `json:"message"`
}

func stepViewOf(s policy.Step) stepView {
	return stepView{
		ID: s.Record.ID, Action: string(s.Action), Size: max(s.Record.Size, 0),
		Revision: s.Record.Revision, Reason: string(s.Reason), Message: s.Message,
	}
}

// pruneSum is the last line in JSON.
type pruneSum struct {
	Removed int   `json:"removed"`
	Kept    int   `json:"kept"`
	Failed  int   `json:"failed"`
	Freed   int64 `json:"freed"`
}

// printPlan prints a plan that nobody executed yet.
func (a *app) printPlan(plan *policy.Plan) error {
	if a.json {
		w := bufio.NewWriter(a.out)
		for _, s := range plan.Steps {
			if err := printJSON(w, stepViewOf(s)); err != nil {
				return err
			}
		}
		if err := printJSON(w, pruneSum{Removed: plan.Removed, Kept: len(plan.Kept()), Freed: plan.Freed}); err != nil {
			return err
		}
		return w.Flush()
	}
	if plan.Removed > 0 {
		t := newTable(a.out, "id", "size", "last used", "uses", "rebuild", "why")
		rightAligned(t, 2, 4, 5)
		for _, s := range plan.Victims() {
			r := s.Record
			rebuild := "-"
			if r.Cost > 0 {
				rebuild = r.Cost.Round(time.Millisecond).String()
			}
			t.AppendRow(table.Row{safe(r.ID), size(r.Size), ago(r.LastUsed, plan.Time), r.Uses, rebuild, safe(s.Message)})
		}
		t.Render()
		fmt.Fprintln(a.out)
	}
	type group struct {
		records int
		bytes   int64
	}
	kept := map[string]group{}
	for _, s := range plan.Kept() {
		g := kept[string(s.Reason)]
		kept[string(s.Reason)] = group{g.records + 1, g.bytes + max(s.Record.Size, 0)}
	}
	for _, why := range sortedKeys(kept) {
		fmt.Fprintf(a.out, "keeps %s, %s: %s\n", plural(kept[why].records, "record"), size(kept[why].bytes), why)
	}
	_, err := fmt.Fprintf(a.out, "would remove %s, and free %s\n", plural(plan.Removed, "record"), size(plan.Freed))
	return err
}

// readPlan reads what printPlan printed in JSON. Of a plan that is cut off
// nothing is taken: its last line has the sums.
func readPlan(path string) (*policy.Plan, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	plan, whole := &policy.Plan{}, false
	var kept []policy.Step
	dec := json.NewDecoder(f)
	for n := 1; ; n++ {
		var line struct {
			stepView
			Removed *int  `json:"removed"`
			Freed   int64 `json:"freed"`
		}
		err := dec.Decode(&line)
		if errors.Is(err, io.EOF) {
			break
		}
		bad := func(why any) error {
			return fmt.Errorf("plan %s, line %d: %v; make one with lamina prune --dry-run --json: %w", path, n, why, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return nil, bad(err)
		}
		if whole {
			return nil, bad("there is something behind the sums")
		}
		step := policy.Step{
			Record: &policy.Record{ID: line.ID, Revision: line.Revision, Size: line.Size},
			Action: policy.Action(line.Action), Reason: policy.Reason(line.Reason), Message: line.Message,
		}
		switch {
		case line.Removed != nil:
			whole = true
			if *line.Removed != plan.Removed || line.Freed != plan.Freed {
				return nil, bad("the sums are not those of the lines")
			}
		case line.ID == "" || line.Revision == 0:
			return nil, bad("a record needs an id and a revision")
		case step.Action == policy.Remove:
			plan.Steps = append(plan.Steps, step)
			plan.Removed++
			plan.Freed += line.Size
		case step.Action == policy.Keep:
			kept = append(kept, step)
		default:
			return nil, bad(fmt.Sprintf("there is no action %q", line.Action))
		}
	}
	if !whole {
		return nil, fmt.Errorf("plan %s is cut off: its last line has no sums: %w", path, errdefs.ErrInvalidArgument)
	}
	plan.Steps = append(plan.Steps, kept...)
	return plan, nil
}

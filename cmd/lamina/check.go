package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

func newCheck(a *app) *cobra.Command {
	var o checkOptions
	cmd := &cobra.Command{
		Use:   "check [--repair] [--read-data PERCENT]",
		Short: "Prove that the store is whole",
		Example: `  lamina check
  lamina check --json
  lamina check --root /var/lib/lamina && echo whole`,
		Long: `Prove the store: read every record, compute again all that is derived from
records, and compare the records with the snapshots on the disk. Findings are
printed one a line, each with a stable code; if there is any the exit code is 5.

Opening the store settles what a killed command left half done, as every command
does that may write. Beyond that check repairs nothing yet, and says so with
--repair. --read-data reads data again and compares it with digests; no record
has a digest of its data yet, so it reads nothing, and says that, too.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("read-data") {
				if err := checkPercent(o.readData); err != nil {
					return usage(cmd, err)
				}
				fmt.Fprintf(a.err, "lamina: --read-data: no record has a digest of its data yet; nothing is read\n")
			}
			return a.check(cmd, o)
		},
		Annotations:       map[string]string{annotateProbes: ""},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().BoolVar(&o.repair, "repair", false, "settle what can be settled")
	cmd.Flags().StringVar(&o.readData, "read-data", "", "read `PERCENT` of the data again")
	return cmd
}

type checkOptions struct {
	repair   bool
	readData string
}

// checkPercent refuses what is not a percentage above 0 and up to 100.
func checkPercent(s string) error {
	p, err := strconv.ParseFloat(strings.TrimSuffix(s, "%"), 64)
	if err != nil || math.IsNaN(p) || p <= 0 || p > 100 {
		return fmt.Errorf("--read-data %q: it takes a percentage above 0 and up to 100", clip(s))
	}
	return nil
}

type findingView struct {
	Code     string   `json:"code"`
	ID       cache.ID `json:"id"`
	Key      string   `json:"key"`
	Message  string   `json:"message"`
	Repaired bool     `json:"repaired"`
}

type checkView struct {
	Records    int64 `json:"records"`
	Findings   int   `json:"findings"`
	DurationMS int64 `json:"duration_ms"`
}

func (a *app) check(cmd *cobra.Command, o checkOptions) (err error) {
	ctx, began := cmd.Context(), time.Now()
	m, err := a.open(ctx, changing)
	if err != nil {
		return err
	}
	defer shut(m, &err)
	stop := a.progress("checking", nil)
	findings, err := collect(ctx, m)
	stop()
	if err != nil {
		return err
	}
	records, err := countRecords(ctx, m)
	if err != nil && len(findings) == 0 {
		return err
	}
	if err := a.printFindings(findings); err != nil {
		return err
	}
	sum := checkView{Records: records, Findings: len(findings), DurationMS: time.Since(began).Milliseconds()}
	if a.json {
		if err := printJSON(a.out, sum); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(a.out, "%s, %s, %d ms\n", plural(int(sum.Records), "record"), plural(sum.Findings, "finding"), sum.DurationMS)
	}
	if len(findings) == 0 {
		return nil
	}
	if o.repair {
		fmt.Fprintf(a.err, "lamina: --repair: opening the store has settled what it could; what is listed stays\n")
	}
	return statusError(exitDamage)
}

// collect gathers findings, so that nothing is printed while the store is read.
func collect(ctx context.Context, m *cache.Manager) ([]cache.Finding, error) {
	var out []cache.Finding
	for f, err := range m.Check(ctx) {
		if err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	return out, nil
}

// countRecords counts what can be read, one by one: a check trusts no totals.
func countRecords(ctx context.Context, m *cache.Manager) (n int64, err error) {
	for _, err := range m.Records(ctx) {
		if err != nil && !errors.Is(err, errdefs.ErrDataLoss) {
			return n, err
		}
		n++
	}
	return n, nil
}

func (a *app) printFindings(findings []cache.Finding) error {
	if !a.json && len(findings) > 0 {
		t := newTable(a.out, "code", "record", "key", "finding")
		for _, f := range findings {
			t.AppendRow(table.Row{f.Code, safe(string(f.ID)), safe(f.Key), safe(f.Message)})
		}
		t.Render()
		return nil
	}
	for _, f := range findings {
		if err := printJSON(a.out, findingView{Code: f.Code, ID: f.ID, Key: f.Key, Message: f.Message}); err != nil {
			return err
		}
	}
	return nil
}

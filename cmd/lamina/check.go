package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/metadata"
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
does that may write. With --repair, what is found is repaired as far as it can
be: every record that can be read goes into a new store file, all that is derived
is computed again, the former file is kept beside it, and records are compared
with snapshots anew. A finding that is gone then is printed as repaired; the exit
code is 5 if one stays. A record in quarantine is one that was damaged and has
been set aside: it is listed, and counts as repaired.

--read-data reads so much of the data again, chosen at random, and compares it
with the digests that are stored: those of layer blobs, and of files whose hash
was asked for once (see lamina hash). Data that differ are a finding that no
repair can mend. What has no stored digest is counted, not read.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("read-data") {
				percent, err := parsePercent(o.readData)
				if err != nil {
					return usage(cmd, err)
				}
				o.percent = percent
			}
			return a.check(cmd, o)
		},
		Annotations:       map[string]string{annotateMounts: ""},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().BoolVar(&o.repair, "repair", false, "repair what can be repaired")
	cmd.Flags().StringVar(&o.readData, "read-data", "", "read `PERCENT` of the data again")
	return cmd
}

type checkOptions struct {
	repair   bool
	readData string
	// percent is what readData says, 0 if nothing is to be read.
	percent float64
}

// parsePercent refuses what is not a percentage above 0 and up to 100.
func parsePercent(s string) (float64, error) {
	p, err := strconv.ParseFloat(strings.TrimSuffix(s, "%"), 64)
	if err != nil || math.IsNaN(p) || p <= 0 || p > 100 {
		return 0, fmt.Errorf("--read-data %q: it takes a percentage above 0 and up to 100, for example 5 or 0.5", clip(s))
	}
	return p, nil
}

type findingView struct {
	Code     string   `json:"code"`
	ID       cache.ID `json:"id"`
	Key      string   `json:"key"`
	Message  string   `json:"message"`
	Repaired bool     `json:"repaired"`
}

type checkView struct {
	Records    int64     `json:"records"`
	Findings   int       `json:"findings"`
	DurationMS int64     `json:"duration_ms"`
	Data       *dataView `json:"data,omitempty"`
}

func (a *app) check(cmd *cobra.Command, o checkOptions) error {
	ctx, began := cmd.Context(), time.Now()
	findings, records, err := a.examine(ctx)
	if o.repair && (err == nil && !handled(findings) || isDamage(err)) {
		findings, records, err = a.repair(ctx, findings)
	}
	if err != nil {
		return err
	}
	var data *dataView
	if o.percent > 0 {
		var differ []finding
		if differ, data, err = a.readData(ctx, o.percent); err != nil {
			return err
		}
		findings = append(findings, differ...)
	}
	if err := a.printFindings(findings); err != nil {
		return err
	}
	sum := checkView{Records: records, Findings: len(findings), DurationMS: time.Since(began).Milliseconds(), Data: data}
	if a.json {
		if err := printJSON(a.out, sum); err != nil {
			return err
		}
	} else {
		if data != nil {
			fmt.Fprintln(a.out, data)
		}
		fmt.Fprintf(a.out, "%s, %s, %d ms\n", plural(int(sum.Records), "record"), plural(sum.Findings, "finding"), sum.DurationMS)
	}
	if handled(findings) {
		return nil
	}
	if o.repair {
		fmt.Fprintf(a.err, "lamina: --repair: what is not listed as repaired stays\n")
	}
	return statusError(exitDamage)
}

// examine opens the store, which settles it, and checks it.
func (a *app) examine(ctx context.Context) (findings []finding, records int64, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return nil, 0, err
	}
	defer shut(m, &err)
	stop := a.progress("checking", nil)
	findings, err = collect(ctx, m)
	stop()
	if err != nil {
		return nil, 0, err
	}
	records, err = countRecords(ctx, m)
	if len(findings) > 0 {
		err = nil // that is why
	}
	return findings, records, err
}

// repair repairs and says which findings are gone.
func (a *app) repair(ctx context.Context, before []finding) (findings []finding, records int64, err error) {
	root, err := a.root()
	if err != nil {
		return nil, 0, err
	}
	stop := a.progress("repairing", nil)
	report, err := cache.Repair(ctx, a.options(root))
	stop()
	if err != nil {
		return nil, 0, err
	}
	if !report.Whole {
		fmt.Fprintf(a.err, "lamina: --repair: %s kept, %d lost, %d set aside, %d without an ancestor; the former file is %s\n",
			plural(report.Records, "record"), len(report.Lost), len(report.Quarantined), len(report.Descendants), safe(report.Kept))
	}
	if err := a.dropTrees(ctx, before); err != nil {
		return nil, 0, err
	}
	after, records, err := a.examine(ctx)
	if err != nil {
		return nil, 0, err
	}
	stays := map[string]bool{}
	for _, f := range after {
		stays[f.name()] = true
	}
	for _, f := range report.Findings {
		before = append(before, finding{Finding: f})
	}
	seen := map[string]bool{}
	for _, f := range before {
		if !stays[f.name()] && !seen[f.name()] {
			f.repaired, seen[f.name()] = true, true
			findings = append(findings, f)
		}
	}
	return append(findings, after...), records, nil
}

func isDamage(err error) bool { return errors.Is(err, metadata.ErrDamaged) }

// finding is one with what became of it.
type finding struct {
	cache.Finding
	repaired bool
}

// name tells findings apart.
func (f finding) name() string { return fmt.Sprintf("%s %q %q %q", f.Code, f.ID, f.Bucket, f.Key) }

// handled says whether no damage is still there.
func handled(findings []finding) bool {
	return !slices.ContainsFunc(findings, func(f finding) bool { return !f.repaired })
}

// collect gathers findings, so that nothing is printed while the store is read.
func collect(ctx context.Context, m *cache.Manager) ([]finding, error) {
	var out []finding
	for f, err := range m.Check(ctx) {
		if err != nil {
			return nil, err
		}
		out = append(out, finding{Finding: f, repaired: f.Code == metadata.CodeRecordQuarantined})
	}
	for f, err := range checksum.Check(ctx, m) {
		if err != nil {
			return nil, err
		}
		out = append(out, finding{Finding: f})
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

func word(yes bool) string {
	if yes {
		return "yes"
	}
	return "no"
}

func (a *app) printFindings(findings []finding) error {
	if !a.json && len(findings) > 0 {
		t := newTable(a.out, "code", "record", "key", "finding", "repaired")
		for _, f := range findings {
			t.AppendRow(table.Row{f.Code, safe(string(f.ID)), safe(f.Key), safe(f.Message), word(f.repaired)})
		}
		t.Render()
		return nil
	}
	for _, f := range findings {
		if err := printJSON(a.out, findingView{Code: f.Code, ID: f.ID, Key: f.Key, Message: f.Message, Repaired: f.repaired}); err != nil {
			return err
		}
	}
	return nil
}

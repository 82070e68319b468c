package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// jsonSchema is the version of what --json prints. Fields are only added; a
// change of what one means would raise it.
const jsonSchema = 1

func newInfo(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "info",
		Short: "Say where the store is and how it works",
		Example: `  lamina info
  lamina info --json
  lamina info --root ~/.local/share/lamina`,
		Long: `Say where the store is, which driver keeps its snapshots and why, and what the
kernel can do. The driver and the class of the overlay's attributes were fixed
when the store was made. The store is opened read-only.

In JSON, schema is the version of the store and json_schema that of what all
commands print with --json.`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := a.info(cmd.Context())
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(a.out, v)
			}
			a.infoTable(v)
			return nil
		},
	}
}

type infoView struct {
	Root         string          `json:"root"`
	Driver       string          `json:"driver"`
	DriverReason string          `json:"driver_reason"`
	Attributes   string          `json:"attributes"`
	Kernel       string          `json:"kernel"`
	Features     map[string]bool `json:"features"`
	MaxDepth     int             `json:"max_depth"`
	Schema       uint32          `json:"schema"`
	JSONSchema   int             `json:"json_schema"`
	Created      *string         `json:"created"`
	MigratedFrom string          `json:"migrated_from"`
	Records      int64           `json:"records"`
	Version      string          `json:"version"`
}

func (a *app) info(ctx context.Context) (_ infoView, err error) {
	m, err := a.open(ctx, looking)
	if err != nil {
		return infoView{}, err
	}
	defer shut(m, &err)
	meta, err := m.Meta(ctx)
	if err != nil {
		return infoView{}, err
	}
	totals, err := m.Totals(ctx)
	if err != nil {
		return infoView{}, err
	}
	d := m.Driver()
	v := infoView{
		Root: m.Root(), Driver: d.Name, DriverReason: d.Reason, Attributes: d.Attributes, Kernel: kernel(),
		Features: d.Features, MaxDepth: d.MaxDepth, Schema: meta.Schema, JSONSchema: jsonSchema,
		Created: jsonTime(meta.Created), MigratedFrom: meta.MigratedFrom, Version: buildVersion().Version,
	}
	if v.Features == nil {
		v.Features = map[string]bool{}
	}
	for _, t := range totals {
		v.Records += t.Count
	}
	return v, nil
}

func (a *app) infoTable(v infoView) {
	var can, cannot []string
	for _, name := range sortedKeys(v.Features) {
		if v.Features[name] {
			can = append(can, name)
		} else {
			cannot = append(cannot, name)
		}
	}
	t := newTable(a.out)
	row := func(name, value string) {
		if value != "" {
			t.AppendRow(table.Row{name, safe(value)})
		}
	}
	row("root", v.Root)
	row("driver", v.Driver)
	row("because", v.DriverReason)
	row("attributes", v.Attributes)
	row("kernel", v.Kernel)
	row("can", strings.Join(can, ", "))
	row("cannot", strings.Join(cannot, ", "))
	row("store schema", fmt.Sprint(v.Schema))
	row("migrated from", v.MigratedFrom)
	row("records", fmt.Sprint(v.Records))
	row("lamina", v.Version)
	t.Render()
}

// kernel is the running kernel's release.
func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/spf13/cobra"

	"github.com/lamina-build/lamina/cache"
)

func newShow(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "show ID",
		Short: "Print all that is known of a record",
		Example: `  lamina show 01JCXM
  lamina show key:app
  lamina show key:app --json | jq .parents`,
		Long: `Print all that is known of a record: its state, parents and children, sizes and
times, values, and who holds it. The store is opened read-only.

In JSON the attachments are given as SHA-256 digests, values as text, or as
base64:... where they are no UTF-8. The size is null until somebody measured it.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeIDs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.show(cmd.Context(), args[0])
		},
	}
}

func (a *app) show(ctx context.Context, arg string) (err error) {
	m, err := a.open(ctx, looking)
	if err != nil {
		return err
	}
	defer shut(m, &err)
	id, err := resolve(ctx, m, arg)
	if err != nil {
		return err
	}
	rec, err := m.Lookup(ctx, id)
	if err != nil {
		return about(id, err)
	}
	v, err := view(ctx, m, rec)
	if err != nil {
		return about(id, err)
	}
	if a.json {
		return printJSON(a.out, v)
	}
	a.showTable(rec, v)
	return nil
}

// showTable prints what is set, one line each.
func (a *app) showTable(rec *cache.Record, v *recordView) {
	t := newTable(a.out)
	row := func(name, value string) {
		if value != "" {
			t.AppendRow(table.Row{name, safe(value)})
		}
	}
	now := time.Now()
	row("id", v.ID)
	row("state", stateText(v))
	row("op", v.Op)
	row("type", v.Type)
	row("key", v.Key)
	row("description", v.Description)
	row("parents", idText(v.Parents))
	row("children", idText(v.Children))
	row("aliases", idText(v.Aliases))
	row("size", sizeText(rec.Size))
	row("created", timeText(rec.Created, now))
	row("used", used(rec, now))
	row("cost", costText(rec.Cost))
	row("retained", fmt.Sprint(v.Retained))
	row("on disk", durableText(v.Durable))
	row("driver", strings.TrimSpace(v.Driver+" "+v.DriverKey))
	row("chain id", v.ChainID)
	row("diff id", v.DiffID)
	for _, b := range v.Blobs {
		row("blob", fmt.Sprintf("%s %s %s, present: %t%s", b.Digest, b.MediaType, size(b.Size), b.Present, proof(b, v.DiffID)))
	}
	for _, name := range sortedKeys(v.Labels) {
		row("label", name+"="+v.Labels[name])
	}
	for _, key := range v.Indexes {
		row("index", key)
	}
	for _, name := range sortedKeys(v.Values) {
		row("value", name+"="+clip(v.Values[name]))
	}
	for _, name := range sortedKeys(v.Attachments) {
		row("attachment", name+" sha256:"+v.Attachments[name])
	}
	for _, ref := range v.ImageRefs {
		row("image", ref)
	}
	for _, h := range v.Holders {
		row("held by", fmt.Sprintf("pid %d (%s)", h.PID, h.Command))
	}
	t.Render()
}

func stateText(v *recordView) string {
	if v.Interrupted {
		return v.State + ", reopened and not committed again"
	}
	return v.State
}

func idText(ids []cache.ID) string {
	words := make([]string, len(ids))
	for i, id := range ids {
		words[i] = string(id)
	}
	return strings.Join(words, " ")
}

func sizeText(n int64) string {
	if n < 0 {
		return "not measured yet"
	}
	return fmt.Sprintf("%s (%d bytes)", size(n), n)
}

func timeText(t, now time.Time) string {
	return fmt.Sprintf("%s (%s)", t.Local().Format(time.DateTime), ago(t, now))
}

func costText(d time.Duration) string {
	if d == 0 {
		return ""
	}
	return d.Round(time.Millisecond).String()
}

func durableText(durable bool) string {
	if durable {
		return "synced"
	}
	return "not synced: a power cut may lose it (lamina sync)"
}

// proof says of a blob whether it is known to hold the layer, where it is not.
func proof(b blobView, diffID string) string {
	switch {
	case b.Claimed:
		return ", claimed to hold the layer"
	case b.DiffID != "" && diffID != "" && string(b.DiffID) != diffID:
		return ", holds another layer: " + string(b.DiffID)
	}
	return ""
}

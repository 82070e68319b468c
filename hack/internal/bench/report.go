package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
)

// Names of subjects that reports know.
const (
	Ours  = "ours"
	Peer  = "peer"
	Limit = "limit"
)

// unit is that of all times in JSON.
const unit = "us"

// line is one result with --json. Fields are only ever added.
type line struct {
	Name string   `json:"name"`
	N    int      `json:"n"`
	Unit string   `json:"unit"`
	Ours *float64 `json:"ours,omitempty"`
	// Tx are write transactions of one operation.
	Tx *float64 `json:"tx,omitempty"`

	Peer       *float64 `json:"peer,omitempty"`
	Limit      *float64 `json:"limit,omitempty"`
	RatioPeer  *float64 `json:"ratio_peer,omitempty"`
	RatioLimit *float64 `json:"ratio_limit,omitempty"`
	PeerTx     *float64 `json:"peer_tx,omitempty"`
}

// writeJSON writes a result as one object on a line of its own.
func writeJSON(out io.Writer, r Result) error {
	l := line{Name: r.Name, N: r.N, Unit: unit}
	for _, f := range r.Figures {
		took, tx := micros(f.Median), round(f.Transactions)
		switch f.Subject {
		case Ours:
			l.Ours, l.Tx = &took, &tx
		case Peer:
			l.Peer, l.PeerTx = &took, &tx
		case Limit:
			l.Limit = &took
		}
	}
	l.RatioPeer = ratio(l.Ours, l.Peer)
	l.RatioLimit = ratio(l.Ours, l.Limit)
	return json.NewEncoder(out).Encode(l)
}

func micros(d time.Duration) float64 { return round(float64(d) / float64(time.Microsecond)) }

// round keeps three places after the point: nanoseconds.
func round(v float64) float64 { return math.Round(v*1000) / 1000 }

func ratio(a, b *float64) *float64 {
	if a == nil || b == nil || *b == 0 {
		return nil
	}
	r := math.Round(*a / *b * 1e5) / 1e5
	return &r
}

// writeTable writes all results for people.
func writeTable(out io.Writer, results []Result) {
	if len(results) == 0 {
		return
	}
	t := table.NewWriter()
	t.SetOutputMirror(out)
	t.SetStyle(table.StyleLight)
	t.Style().Format.Header = text.FormatDefault
	t.Style().Options.DrawBorder = false

	head := table.Row{"operation", "n"}
	columns := []table.ColumnConfig{{Number: 2, Align: text.AlignRight}}
	for _, f := range results[0].Figures {
		for _, title := range []string{f.Subject, "10 % – 90 %", "tx"} {
			head = append(head, title)
			columns = append(columns, table.ColumnConfig{Number: len(head), Align: text.AlignRight, AlignHeader: text.AlignRight})
		}
	}
	compared := len(results[0].Figures) > 1
	if compared {
		for _, f := range results[0].Figures[1:] {
			head = append(head, "/ "+f.Subject)
			columns = append(columns, table.ColumnConfig{Number: len(head), Align: text.AlignRight})
		}
	}
	t.AppendHeader(head)
	t.SetColumnConfigs(columns)
	for _, r := range results {
		row := table.Row{r.Name, r.N}
		for _, f := range r.Figures {
			row = append(row, show(f.Median), show(f.Low)+" – "+show(f.High), fmt.Sprintf("%.4g", f.Transactions))
		}
		if compared {
			for _, f := range r.Figures[1:] {
				row = append(row, fmt.Sprintf("%.3g", float64(r.Figures[0].Median)/float64(max(f.Median, 1))))
			}
		}
		t.AppendRow(row)
	}
	t.Render()
}

// show prints a duration with three digits.
func show(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%.3g µs", float64(d)/float64(time.Microsecond))
	case d < time.Second:
		return fmt.Sprintf("%.3g ms", float64(d)/float64(time.Millisecond))
	default:
		return fmt.Sprintf("%.3g s", d.Seconds())
	}
}

package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
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

// line is one result with --json. Fields are only ever added. What was not
// measured is null.
type line struct {
	Name  string   `json:"name"`
	N     int      `json:"n"`
	Unit  string   `json:"unit"`
	Ours  *float64 `json:"ours"`
	Peer  *float64 `json:"peer"`
	Limit *float64 `json:"limit"`
	// RatioPeer and RatioLimit are ours divided by theirs.
	RatioPeer  *float64 `json:"ratio_peer"`
	RatioLimit *float64 `json:"ratio_limit"`
	// Tx and Syncs are the write transactions and the fsync, fdatasync and
	// syncfs calls of one operation.
	Tx        *float64 `json:"tx"`
	Syncs     *float64 `json:"syncs"`
	PeerTx    *float64 `json:"peer_tx"`
	PeerSyncs *float64 `json:"peer_syncs"`
	// Made, PeerMade and LimitMade are what one operation left on the disk.
	Made      *made  `json:"made"`
	PeerMade  *made  `json:"peer_made"`
	LimitMade *made  `json:"limit_made"`
	Note      string `json:"note"`
}

// made is a Footprint in JSON: files, further names of them, and bytes.
type made struct {
	Inodes int64 `json:"inodes"`
	Links  int64 `json:"links"`
	Bytes  int64 `json:"bytes"`
}

func madeOf(f *Figure) *made {
	if f == nil || f.Made == nil {
		return nil
	}
	return (*made)(f.Made)
}

// writeJSON writes a result as one object on a line of its own.
func writeJSON(out io.Writer, r Result) error {
	l := line{Name: r.Name, N: r.N, Unit: unit, Note: r.Note}
	l.Ours, l.Tx, l.Syncs = fields(r.of(Ours))
	l.Peer, l.PeerTx, l.PeerSyncs = fields(r.of(Peer))
	l.Limit, _, _ = fields(r.of(Limit))
	l.Made, l.PeerMade, l.LimitMade = madeOf(r.of(Ours)), madeOf(r.of(Peer)), madeOf(r.of(Limit))
	l.RatioPeer = ratio(l.Ours, l.Peer)
	l.RatioLimit = ratio(l.Ours, l.Limit)
	return json.NewEncoder(out).Encode(l)
}

func fields(f *Figure) (took, tx, syncs *float64) {
	if f == nil {
		return nil, nil, nil
	}
	took, tx = new(micros(f.Median)), new(round(f.Transactions))
	if f.Syncs != nil {
		syncs = new(round(*f.Syncs))
	}
	return took, tx, syncs
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

// writeTable writes all results for people: first the figures, then the notes.
func writeTable(out io.Writer, results []Result) {
	if len(results) == 0 {
		return
	}
	t := table.NewWriter()
	t.SetOutputMirror(out)
	t.SetStyle(table.StyleLight)
	t.Style().Format.Header = text.FormatDefault
	t.Style().Options.DrawBorder = false

	var subjects []string
	for _, s := range []string{Ours, Peer, Limit} {
		if slices.ContainsFunc(results, func(r Result) bool { return r.of(s) != nil }) {
			subjects = append(subjects, s)
		}
	}
	head := table.Row{"operation", "n"}
	for _, s := range subjects {
		head = append(head, s, "10 % – 90 %")
		if s != Limit {
			head = append(head, "tx", "syncs")
		}
	}
	for _, s := range subjects[1:] {
		head = append(head, "/ "+s)
	}
	var columns []table.ColumnConfig
	for i := range head[1:] {
		columns = append(columns, table.ColumnConfig{Number: i + 2, Align: text.AlignRight, AlignHeader: text.AlignRight})
	}
	t.AppendHeader(head)
	t.SetColumnConfigs(columns)
	for _, r := range results {
		row := table.Row{r.Name, r.N}
		for _, s := range subjects {
			row = append(row, cells(s, r.of(s))...)
		}
		for _, s := range subjects[1:] {
			ratio := ""
			if first, f := r.of(subjects[0]), r.of(s); first != nil && f != nil {
				ratio = fmt.Sprintf("%.2g", float64(first.Median)/float64(max(f.Median, 1)))
			}
			row = append(row, ratio)
		}
		t.AppendRow(row)
	}
	t.Render()
	fmt.Fprintln(out)
	writeMade(out, results)
	noted := ""
	for _, r := range results {
		if r.Note != "" && r.Name != noted {
			fmt.Fprintf(out, "%s: %s\n", r.Name, r.Note)
		}
		noted = r.Name
	}
}

// writeMade says what operations left on the disk, where that was looked at.
func writeMade(out io.Writer, results []Result) {
	for _, r := range results {
		var all []string
		for _, f := range r.Figures {
			if f.Made != nil {
				all = append(all, fmt.Sprintf("%s %d inodes, %d links, %s", f.Subject, f.Made.Inodes, f.Made.Links, humanize.IBytes(uint64(max(f.Made.Bytes, 0)))))
			}
		}
		if len(all) > 0 {
			fmt.Fprintf(out, "%s, n = %d, made: %s\n", r.Name, r.N, strings.Join(all, "; "))
		}
	}
}

// cells are those of a subject in one row, empty if it was not measured.
func cells(subject string, f *Figure) table.Row {
	row := table.Row{"", ""}
	if subject != Limit {
		row = append(row, "", "")
	}
	if f == nil {
		return row
	}
	row[0], row[1] = show(f.Median), show(f.Low)+" – "+show(f.High)
	if subject != Limit {
		row[2], row[3] = fmt.Sprintf("%.3g", f.Transactions), showSyncs(f.Syncs)
	}
	return row
}

func showSyncs(n *float64) string {
	if n == nil {
		return "?"
	}
	return fmt.Sprintf("%.3g", *n)
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

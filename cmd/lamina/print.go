package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"github.com/jedib0t/go-pretty/v6/table"
	"github.com/jedib0t/go-pretty/v6/text"
	"golang.org/x/term"
)

// timeLayout is RFC 3339 with all nanoseconds, so that times sort as text.
const timeLayout = "2006-01-02T15:04:05.000000000Z"

// printJSON prints v on a line of its own.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// safe quotes what could change a terminal: control bytes, invisible runes and
// what is no UTF-8.
func safe(s string) string {
	plain := true
	for _, r := range s {
		if r == utf8.RuneError || r != ' ' && !unicode.IsGraphic(r) {
			plain = false
			break
		}
	}
	if plain {
		return s
	}
	q := strconv.QuoteToGraphic(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

// stdoutFile is standard output. It keeps the first error of a write, so that data
// which got lost on its way, a table's or a help's, is not taken for printed.
type stdoutFile struct {
	*os.File
	failed error
}

// Write writes to the file.
func (o *stdoutFile) Write(p []byte) (int, error) {
	n, err := o.File.Write(p)
	if o.failed == nil {
		o.failed = err
	}
	return n, err
}

// WriteString is Write.
func (o *stdoutFile) WriteString(s string) (int, error) { return o.Write([]byte(s)) }

// isTerminal says whether w is a terminal.
func isTerminal(w io.Writer) bool {
	f, ok := w.(interface{ Fd() uintptr })
	return ok && term.IsTerminal(int(f.Fd()))
}

// newTable is a table in the style of ls and docker: no lines, columns apart.
func newTable(w io.Writer, header ...any) table.Writer {
	t := table.NewWriter()
	t.SetOutputMirror(w)
	style := table.StyleDefault
	style.Name = "lamina"
	style.Box.PaddingLeft, style.Box.PaddingRight = "", "  "
	style.Options = table.OptionsNoBordersAndSeparators
	style.Format.Header = text.FormatUpper
	if isTerminal(w) && os.Getenv("NO_COLOR") == "" {
		style.Color.Header = text.Colors{text.Bold}
	} else {
		text.DisableColors()
	}
	t.SetStyle(style)
	t.SuppressTrailingSpaces()
	if len(header) > 0 {
		t.AppendHeader(table.Row(header))
	}
	return t
}

// rightAligned makes columns of numbers, counted from 1, line up.
func rightAligned(t table.Writer, columns ...int) {
	var cs []table.ColumnConfig
	for _, c := range columns {
		cs = append(cs, table.ColumnConfig{Number: c, Align: text.AlignRight, AlignHeader: text.AlignRight})
	}
	t.SetColumnConfigs(cs)
}

// size is a number of bytes for people; unknown ones are a dash.
func size(n int64) string {
	if n < 0 {
		return "-"
	}
	return humanize.IBytes(uint64(n))
}

// ago is a time for people.
func ago(t, now time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return humanize.RelTime(t, now, "ago", "from now")
}

// jsonTime is a time for programs; never is null.
func jsonTime(t time.Time) *string {
	if t.IsZero() {
		return nil
	}
	s := t.UTC().Format(timeLayout)
	return &s
}

// plural is "1 record" or "2 records".
func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	if strings.HasSuffix(one, "s") {
		return fmt.Sprintf("%d %ses", n, one)
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// printLine prints text that may hold anything, on a line of its own.
func printLine(w io.Writer, s string) error {
	_, err := fmt.Fprintln(w, safe(s))
	return err
}

// Command counts writes what the rigs counted into a page: hack/counts runs it.
// It reads the events of go test -json, and takes from them each line of a test
// that begins with "rig: ".
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/lamina-build/lamina/hack/internal/page"
)

// event is a line of go test -json.
type event struct {
	Action, Package, Test, Output string
}

var rigLine = regexp.MustCompile(`rig: (.*)\n`)

// count is a row of the table.
type count struct{ rig, text string }

// read collects the counts of one run. It fails if a test of the run did.
func read(r io.Reader) (rows []count, err error) {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(line) == 0 {
			return rows, nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		var e event
		if json.Unmarshal(line, &e) != nil {
			continue // the compiler's words
		}
		if e.Action == "fail" {
			return nil, fmt.Errorf("%s %s failed", e.Package, e.Test)
		}
		if m := rigLine.FindStringSubmatch(e.Output); e.Action == "output" && m != nil {
			rows = append(rows, count{path.Base(e.Package) + "." + e.Test, m[1]})
		}
	}
}

// mutants sums up a result file of hack/mutate.
func mutants(file string) (count, error) {
	var list []struct {
		CaughtBy string `json:"caught_by"`
	}
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &list)
	}
	caught := 0
	for _, r := range list {
		if r.CaughtBy != "" {
			caught++
		}
	}
	return count{"hack/mutate", fmt.Sprintf("%d mutants, %d caught", len(list), caught)}, err
}

// table is the rows as markdown, sorted.
func table(rows []count) string {
	slices.SortFunc(rows, func(a, b count) int {
		return strings.Compare(a.rig+"\x00"+a.text, b.rig+"\x00"+b.text)
	})
	var out strings.Builder
	out.WriteString("| rig | counted |\n|---|---|\n")
	for _, r := range slices.Compact(rows) {
		fmt.Fprintf(&out, "| `%s` | %s |\n", r.rig, strings.NewReplacer("|", `\|`, "<", "&lt;").Replace(r.text))
	}
	return out.String()
}

func run(file, results string, in io.Reader) error {
	rows, err := read(in)
	if err != nil {
		return err
	}
	if len(rows) == 0 {
		return errors.New("no rig has counted anything")
	}
	m, err := mutants(results)
	if err != nil {
		return err
	}
	text := table(append(rows, m))
	if file == "" {
		_, err = os.Stdout.WriteString(text)
		return err
	}
	return page.Write(file, "counts", text)
}

func main() {
	file := flag.String("page", "", "write the table into this page; to the terminal if empty")
	list := flag.Bool("rigs", false, "list the rigs that there are, and no more")
	results := flag.String("mutants", "hack/mutate.json", "the results of hack/mutate")
	flag.Parse()
	if *list {
		rigs, err := findRigs(".")
		if err != nil {
			fmt.Fprintln(os.Stderr, "counts:", err)
			os.Exit(1)
		}
		for _, r := range rigs {
			fmt.Println("./"+r.dir, r.test)
		}
		return
	}
	if err := run(*file, *results, os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "counts:", err)
		os.Exit(1)
	}
}

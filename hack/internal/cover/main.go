// Command cover says how many lines of each room the tests ran: hack/cover runs
// it, at the root of the module. It reads coverage profiles, of which several may know the same block.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/lamina-build/lamina/hack/internal/page"
)

// module is this project's name in import paths.
const module = "github.com/lamina-build/lamina/"

// lines knows of each line of a file that has code whether it was run.
type lines map[int]bool

// block adds one line of a profile: file:line.column,line.column statements
// count. A line that belongs to several blocks counts as run if any of them was.
func block(files map[string]lines, text string) error {
	name, rest, ok := strings.Cut(text, ":")
	f := strings.Fields(strings.NewReplacer(",", " ", ".", " ").Replace(rest))
	if !ok || len(f) != 6 {
		return fmt.Errorf("no block of a profile: %q", text)
	}
	var n [6]int
	for i, s := range f {
		var err error
		if n[i], err = strconv.Atoi(s); err != nil {
			return fmt.Errorf("no block of a profile: %q", text)
		}
	}
	if n[4] == 0 {
		return nil
	}
	if files[name] == nil {
		files[name] = lines{}
	}
	for line := n[0]; line <= n[2]; line++ {
		files[name][line] = files[name][line] || n[5] > 0
	}
	return nil
}

func read(files map[string]lines, r io.Reader) error {
	s := bufio.NewScanner(r)
	for s.Scan() {
		if strings.HasPrefix(s.Text(), "mode:") {
			continue
		}
		if err := block(files, s.Text()); err != nil {
			return err
		}
	}
	return s.Err()
}

// bare forgets the lines of a source that say nothing: blank ones, comments, and
// those that only close what was opened.
func (ls lines) bare(source string) {
	n := 0
	for text := range strings.Lines(source) {
		n++
		text = strings.TrimSpace(text)
		if strings.Trim(text, "(){}[],;") == "" || strings.HasPrefix(text, "//") {
			delete(ls, n)
		}
	}
}

// counted says whether a file is code that is to be tested: not the suites that
// test others, nor what a generator wrote.
func counted(name string) bool {
	return !strings.HasSuffix(path.Dir(name), "test") && !strings.HasSuffix(name, ".pb.go")
}

// sums adds up a room: the first element of a path below the module.
func sums(files map[string]lines) (run, all map[string]int) {
	run, all = map[string]int{}, map[string]int{}
	for name, ls := range files {
		if !counted(name) {
			continue
		}
		room, _, _ := strings.Cut(strings.TrimPrefix(name, module), "/")
		for _, hit := range ls {
			all[room]++
			if hit {
				run[room]++
			}
		}
	}
	return run, all
}

// missed prints the lines of a file that were not run, as ranges.
func missed(w io.Writer, name string, ls lines) {
	list := slices.Sorted(maps.Keys(ls))
	for i := 0; i < len(list); i++ {
		if ls[list[i]] {
			continue
		}
		from := list[i]
		for i+1 < len(list) && list[i+1] == list[i]+1 && !ls[list[i+1]] {
			i++
		}
		fmt.Fprintf(w, "%s:%d-%d\n", strings.TrimPrefix(name, module), from, list[i])
	}
}

func main() {
	least := flag.Float64("least", 0, "fail if a room has less than this percentage")
	file := flag.String("page", "", "write the sums into this page, too")
	list := flag.Bool("missed", false, "list the lines that were not run")
	flag.Parse()
	if err := report(flag.Args(), *least, *list, *file); err != nil {
		fmt.Fprintln(os.Stderr, "cover:", err)
		os.Exit(1)
	}
}

func report(profiles []string, least float64, list bool, file string) (err error) {
	files := map[string]lines{}
	for _, p := range profiles {
		f, err := os.Open(p)
		if err == nil {
			err = errors.Join(read(files, f), f.Close())
		}
		if err != nil {
			return err
		}
	}
	for name, ls := range files {
		source, err := os.ReadFile(strings.TrimPrefix(name, module))
		if err != nil {
			return err
		}
		ls.bare(string(source))
	}
	if list {
		for _, name := range slices.Sorted(maps.Keys(files)) {
			if counted(name) {
				missed(os.Stdout, name, files[name])
			}
		}
	}
	run, all := sums(files)
	table := "| room | lines run | of |  |\n|---|---|---|---|\n"
	for _, room := range slices.Sorted(maps.Keys(all)) {
		p := 100 * float64(run[room]) / float64(all[room])
		fmt.Printf("%-12s %6d of %6d lines  %.1f %%\n", room, run[room], all[room], p)
		table += fmt.Sprintf("| `%s` | %d | %d | %.1f %% |\n", room, run[room], all[room], p)
		if p < least {
			err = errors.Join(err, fmt.Errorf("%s: %.1f %%, less than %.0f %%", room, p, least))
		}
	}
	if file != "" {
		err = errors.Join(err, page.Write(file, "cover", table))
	}
	return err
}

// Command mutate breaks the code on purpose, one line at a time, and sees
// whether the tests notice: hack/mutate runs it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// stage is a part of the tests: the cheaper ones run first.
type stage struct {
	name string
	args []string
	env  []string
}

// stagesOf are the tests that should catch a mutant of a package.
func stagesOf(file string) (pkg string, stages []stage) {
	switch dir := filepath.Dir(file); dir {
	case "cache":
		return "./cache", []stage{
			{"histories", []string{"-test.run", "^TestHistories$/^memory$"}, []string{"LAMINA_HISTORIES=150"}},
			{"concurrent histories", []string{"-test.run", "^TestLinearizable$"}, nil},
			{"tests of states", []string{"-test.failfast", "-test.run", "^(TestSettle|TestMarks|TestHold|TestHalf|TestReopen|TestMounts|TestPrune|TestFinalize|TestLife|TestFailed|TestSecondHandle|TestDetached|TestAWriter)"}, nil},
			{"tests of the package", []string{"-test.failfast", "-test.skip", "^(TestHistories|TestLinearizable|TestCrashAtEveryStep|TestEvery.*|TestKilled.*)$"}, nil},
			{"every failure", []string{"-test.failfast", "-test.run", "^TestEvery.*$"}, nil},
			{"every crash", []string{"-test.failfast", "-test.run", "^TestCrashAtEveryStep$"}, nil},
		}
	default:
		return "./" + dir, []stage{{"tests of the package", []string{"-test.failfast"}, nil}}
	}
}

type result struct {
	File   string `json:"file"`
	Breaks string `json:"breaks"`
	// CaughtBy is the part of the tests that failed, empty for a mutant that
	// survived.
	CaughtBy string `json:"caught_by"`
	// Test is the first test that failed.
	Test string `json:"test,omitempty"`
}

func main() {
	only := flag.String("only", "", "only mutants whose file or description has this text")
	skip := flag.Int("skip", 0, "leave out the first mutants of the list")
	quick := flag.Bool("quick", false, "leave out the tests that take minutes")
	out := flag.String("o", "", "write the results into this file, as JSON")
	flag.Parse()
	if err := run(*only, *skip, *quick, *out); err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

func run(only string, skip int, quick bool, out string) error {
	scratch, err := os.MkdirTemp("", "lamina-mutate-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(scratch) }()
	var results []result
	caught := 0
	for _, m := range mutants()[skip:] {
		if !strings.Contains(m.file+" "+m.breaks, only) {
			continue
		}
		r, err := try(scratch, m, quick)
		if errors.Is(err, errNoMutant) {
			fmt.Println(m.file, m.breaks, err)
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %s: %w", m.file, m.breaks, err)
		}
		results = append(results, r)
		if r.CaughtBy != "" {
			caught++
		}
		fmt.Printf("%s: %s: caught by: %s %s\n", r.File, r.Breaks, r.CaughtBy, r.Test)
		if err := write(out, results); err != nil {
			return err
		}
	}
	fmt.Printf("%d of %d mutants caught\n", caught, len(results))
	return nil
}

func write(out string, results []result) error {
	if out == "" {
		return nil
	}
	text, err := json.MarshalIndent(results, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(out, append(text, '\n'), 0o644)
}

// errNoMutant says that the list must be mended: what does not compile is no
// mutant, and counts for nothing.
var errNoMutant = errors.New("it does not compile")

// try builds the tests with the mutant in place of the file and runs them.
func try(scratch string, m mutant, quick bool) (result, error) {
	r := result{File: m.file, Breaks: m.breaks}
	text, err := os.ReadFile(m.file)
	if err != nil {
		return r, err
	}
	if n := strings.Count(string(text), m.old); n != 1 {
		return r, fmt.Errorf("its text stands in the file %d times", n)
	}
	mutated := filepath.Join(scratch, "mutated.go")
	if err := os.WriteFile(mutated, []byte(strings.Replace(string(text), m.old, m.new, 1)), 0o600); err != nil {
		return r, err
	}
	full, err := filepath.Abs(m.file)
	if err != nil {
		return r, err
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {full: mutated}})
	if err != nil {
		return r, err
	}
	overlayFile := filepath.Join(scratch, "overlay.json")
	if err := os.WriteFile(overlayFile, overlay, 0o600); err != nil {
		return r, err
	}
	pkg, stages := stagesOf(m.file)
	binary := filepath.Join(scratch, "tests")
	build := exec.CommandContext(context.Background(), "go", "test", "-c", "-vet=off", "-tags", "invariants", "-overlay", overlayFile, "-o", binary, pkg)
	if text, err := build.CombinedOutput(); err != nil {
		return r, fmt.Errorf("%w: %w\n%s", errNoMutant, err, text)
	}
	if quick {
		stages = stages[:min(3, len(stages))]
	}
	for _, s := range stages {
		if failed, test := fails(binary, pkg, s); failed {
			r.CaughtBy, r.Test = s.name, test
			return r, nil
		}
	}
	return r, nil
}

// patience is how long one stage may take: a mutant that makes it hang is
// caught, too.
const patience = 5 * time.Minute

// fails runs a part of the tests, and names the first that failed.
func fails(binary, pkg string, s stage) (failed bool, test string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, append([]string{"-test.timeout", "4m"}, s.args...)...)
	cmd.Dir = pkg
	cmd.Env = append(os.Environ(), s.env...)
	text, err := cmd.CombinedOutput()
	if err == nil {
		return false, ""
	}
	for line := range strings.Lines(string(text)) {
		if _, name, is := strings.Cut(line, "--- FAIL: "); is {
			return true, strings.Fields(name)[0]
		}
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || ctx.Err() != nil {
		return true, "(hangs)"
	}
	return true, "(panics)"
}

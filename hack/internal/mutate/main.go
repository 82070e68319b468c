// Command mutate breaks the code on purpose, one line at a time, and sees
// whether the tests notice: hack/mutate runs it.
package main

import (
	"cmp"
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

// near are the tests of a file, or of a package, that take a second or two and
// are about what it does, by the beginnings of their names.
var near = map[string]string{
	"cache/commit.go":     "TestCommit|TestLife|TestHandles|TestMutableWithout",
	"cache/get.go":        "TestAMutable|TestLife|TestLooking",
	"cache/reopen.go":     "TestReopen|TestAReopened|TestInterrupted|TestHalf|TestOfTwo",
	"cache/remove.go":     "TestVictims|TestAParent|TestSettleR|TestParent|TestRemoval",
	"cache/prune.go":      "TestPrune$|TestPruneOf|TestCancelled|TestSpace",
	"cache/collect.go":    "TestCollect|TestAHandle|TestALimit|TestQuotas",
	"cache/usage.go":      "TestUsage|TestPrune$",
	"cache/hold.go":       "TestA(Writer|Reader)In|TestHold|TestDetached|TestFinalizeIs",
	"cache/settle.go":     "TestSettle|TestMarks",
	"cache/settledrop.go": "TestSettle",
	"cache/marks.go":      "TestMarks|TestTheMark|TestOpening",
	"cache/manager.go":    "TestMarks|TestClose|TestHalf",

	"contenthash": "TestFaults|TestChange(Behind|sBetween|WhileR)|TestIgnore|TestSaved|TestImport|TestDamage|TestPartly|TestOpaque|TestForm|TestRacy",
	"checksum":    "TestKept|TestWriter|TestTwo|TestDamaged|TestTrees|TestSave|TestReopened",

	"cache/extractlayer.go": "TestAWrongLayer|TestADamagedVariant|TestLayerHist",
	"cache/extract.go":      "TestALie|TestExtract|TestLayerHist",
	"cache/extractstack.go": "TestMerge|TestDirectoryRenamed|TestUsageCountsC|TestLayerHist",
	"cache/layers.go":       "TestMerge|TestDiff|TestALayerCounts|TestLayerHist",
	"cache/getbyblob.go":    "TestClaims|TestALayerIsFound|TestLayerOver|TestLayerHist",
	"cache/remotes.go":      "TestALie|TestOneClaim|TestABlobThat|TestLayerHist",
	"cache/blob.go":         "TestALie",
	"cache/blobintent.go":   "TestABlobGoes|TestRemotesThat",
	"cache/ingest.go":       "TestRemotesThat|TestExtract|TestLayersCrash",
	"cache/sizer.go":        "TestUsage",
	"snapshot/clean.go":     "TestClean|TestRaw|TestRenamed|TestDeleted|TestWritten|TestWhiteouts",
	"layer/behind.go":       "TestFullDisk",
}

// stagesOf are the tests that should catch a mutant of a package.
func stagesOf(file string) (pkg string, stages []stage) {
	if tests := cmp.Or(near[file], near[filepath.Dir(file)]); tests != "" {
		stages = []stage{{"tests nearby", []string{"-test.failfast", "-test.run", "^(" + tests + ")"}, nil}}
	}
	switch dir := filepath.Dir(file); dir {
	case "cache":
		return "./cache", append(stages, []stage{
			{"histories", []string{"-test.run", "^TestHistories$/^memory$"}, []string{"LAMINA_HISTORIES=150"}},
			{"concurrent histories", []string{"-test.run", "^TestLinearizable$"}, nil},
			{"tests of states", []string{"-test.failfast", "-test.run", "^(TestSettle|TestMarks|TestHold|TestHalf|TestReopen|TestMounts|TestPrune|TestFinalize|TestLife|TestFailed|TestSecondHandle|TestDetached|TestAWriter)"}, nil},
			{"tests of the package", []string{"-test.failfast", "-test.skip", "^(TestHistories|TestLinearizable|TestCrashAtEveryStep|TestEvery.*|TestKilled.*)$"}, nil},
			{"every failure", []string{"-test.failfast", "-test.run", "^TestEvery.*$"}, nil},
			{"every crash", []string{"-test.failfast", "-test.run", "^TestCrashAtEveryStep$"}, nil},
		}...)
	case "migrate", "migrate/buildkit":
		return "./migrate", []stage{
			{"cases", []string{"-test.failfast", "-test.run", "^(TestCases|TestArchivesAgree|TestBadDirectories|TestTwoAtOnce|TestRollbackRefused|TestOldDaemon|TestContentHashes|TestErrorAtEachStep|TestTwoNames|TestAnyState)"}, nil},
			// TestUnreadable is for whoever may run the binary; here that is us alone.
			{"tests of the package", []string{"-test.failfast", "-test.skip", "^(TestKilled|TestUnreadable)"}, nil},
			{"kills", []string{"-test.failfast", "-test.run", "^TestKilled"}, nil},
		}
	default:
		return "./" + dir, append(stages, stage{"tests of the package", []string{"-test.failfast"}, nil})
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
	// Reason is why one survives. People write it; another run keeps it.
	Reason string `json:"reason,omitempty"`
}

func main() {
	only := flag.String("only", "", "only mutants whose file or description has this text")
	fresh := flag.Bool("new", false, "only mutants that the file of -o has no result of")
	quick := flag.Bool("quick", false, "leave out the tests that take minutes")
	out := flag.String("o", "", "keep the results in this file, as JSON, with those that it has of other mutants")
	flag.Parse()
	if err := run(*only, *fresh, *quick, *out); err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

func run(only string, fresh, quick bool, out string) error {
	scratch, err := os.MkdirTemp("", "lamina-mutate-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(scratch) }()
	known, err := read(out)
	if err != nil {
		return err
	}
	tried, caught, void := 0, 0, 0
	for _, m := range mutants() {
		if _, has := known[m.id()]; fresh && has || !strings.Contains(m.id(), only) {
			continue
		}
		r, err := try(scratch, m, quick)
		if errors.Is(err, errNoMutant) {
			fmt.Printf("%s: %v\n", m.id(), err)
			void++
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", m.id(), err)
		}
		tried++
		if r.CaughtBy != "" {
			caught++
		}
		fmt.Printf("%s: caught by: %s %s\n", m.id(), r.CaughtBy, r.Test)
		if err := keep(out, r); err != nil {
			return err
		}
	}
	fmt.Printf("%d of %d mutants caught\n", caught, tried)
	if void > 0 {
		return fmt.Errorf("%d of the list could not be made: the code has changed under them", void)
	}
	return nil
}

// id names a mutant.
func (m mutant) id() string { return m.file + ": " + m.breaks }

// read gives the results of earlier runs.
func read(file string) (map[string]result, error) {
	known := map[string]result{}
	text, err := os.ReadFile(file)
	if file == "" || errors.Is(err, os.ErrNotExist) {
		return known, nil
	}
	if err != nil {
		return nil, err
	}
	var list []result
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for _, r := range list {
		known[mutant{file: r.File, breaks: r.Breaks}.id()] = r
	}
	return known, nil
}

// keep writes one more result, in the order of the list. Results of what is no
// longer in the list go.
func keep(file string, r result) error {
	if file == "" {
		return nil
	}
	known, err := read(file)
	if err != nil {
		return err
	}
	id := mutant{file: r.File, breaks: r.Breaks}.id()
	if r.CaughtBy == "" {
		r.Reason = known[id].Reason
	}
	known[id] = r
	var list []result
	for _, m := range mutants() {
		if r, has := known[m.id()]; has {
			list = append(list, r)
		}
	}
	text, err := json.MarshalIndent(list, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// errNoMutant says that the list must be mended: what cannot be made is no
// mutant, and counts for nothing.
var errNoMutant = errors.New("not a mutant")

// try builds the tests with the mutant in place of the file and runs them.
func try(scratch string, m mutant, quick bool) (result, error) {
	r := result{File: m.file, Breaks: m.breaks}
	text, err := os.ReadFile(m.file)
	if err != nil {
		return r, err
	}
	if n := strings.Count(string(text), m.old); n != 1 {
		return r, fmt.Errorf("%w: its text stands in the file %d times", errNoMutant, n)
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
		return r, fmt.Errorf("%w: it does not compile: %w\n%s", errNoMutant, err, text)
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

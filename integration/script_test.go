package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// laminaBinary is the command that the scripts drive: LAMINA_TEST_BINARY if
// that is set, whose name has to be lamina, else one that is built here, once.
var laminaBinary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	// A shell starts what it runs in the background with SIGINT ignored, and
	// the command heeds that. A signal that we catch is as it was by default
	// in the processes that we start.
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	if given := os.Getenv("LAMINA_TEST_BINARY"); given != "" {
		// Nothing is made here: tests start this program again, and kill it.
		var err error
		if laminaBinary, err = filepath.Abs(given); err != nil || filepath.Base(given) != "lamina" {
			fmt.Fprintf(os.Stderr, "LAMINA_TEST_BINARY is %q: scripts call it lamina (%v)\n", given, err)
			return 1
		}
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "lamina-binary-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	laminaBinary = filepath.Join(dir, "lamina")
	if err := buildBinary(laminaBinary); err != nil {
		fmt.Fprintln(os.Stderr, "build the command under test:", err)
		return 1
	}
	return m.Run()
}

func buildBinary(path string) error {
	_, here, _, _ := runtime.Caller(0)
	// No race detector: it slows the sandbox's start down tenfold, and what
	// races there are the packages' own tests find.
	build := exec.Command("go", "build", "-race=false", "-o", path, "./cmd/lamina")
	build.Dir = filepath.Dir(filepath.Dir(here))
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	return build.Run()
}

// TestScripts runs what stands in testdata/script against the real command, on
// both drivers: as root, or as an ordinary user where hack/test calls it so.
func TestScripts(t *testing.T) {
	if os.Geteuid() != 0 && os.Getenv("LAMINA_TEST_UNPRIVILEGED") == "" {
		t.Log("running as an ordinary user")
	}
	for _, driver := range []string{"overlay", "native"} {
		t.Run(driver, func(t *testing.T) {
			if reason := unusable(t, driver); reason != "" {
				t.Skipf("driver %s: %s", driver, reason)
			}
			testscript.Run(t, testscript.Params{
				Dir:                 "testdata/script",
				RequireExplicitExec: true,
				RequireUniqueNames:  true,
				Setup:               func(e *testscript.Env) error { return setup(e, driver) },
				Cmds:                commands,
				Condition:           condition,
			})
		})
	}
}

// unusable says why a driver cannot be used by whoever runs the tests.
func unusable(t *testing.T, driver string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.Command(laminaBinary, "--root", filepath.Join(t.TempDir(), "store"), "--driver", driver, "--json", "new")
	cmd.Stderr = &stderr
	if cmd.Run() == nil {
		return ""
	}
	var v struct {
		Error struct{ Class, Message string }
	}
	require.NoError(t, json.Unmarshal([]byte(lastLine(stderr.String())), &v), stderr.String())
	require.Equal(t, "not_implemented", v.Error.Class, v.Error.Message)
	return v.Error.Message
}

// TestScriptsEndWithCheck makes sure that no script forgets to look whether
// the store is whole after what it did.
func TestScriptsEndWithCheck(t *testing.T) {
	files, err := filepath.Glob("testdata/script/*.txtar")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		data, err := os.ReadFile(file)
		require.NoError(t, err)
		script, _, _ := strings.Cut(string(data), "\n-- ")
		runs := regexp.MustCompile(`(?m)^(! )?(exec|status \d+) .*`).FindAllString(script, -1)
		require.NotEmpty(t, runs, file)
		require.Regexp(t, `^(exec|status \d+) lamina .*\bcheck\b`, runs[len(runs)-1], file)
	}
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

func setup(e *testscript.Env, driver string) error {
	// Directories of whoever called the tests may be closed to an ordinary
	// user; scripts need what every system has.
	e.Setenv("PATH", filepath.Dir(laminaBinary)+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	e.Setenv("LAMINA_ROOT", filepath.Join(e.WorkDir, "store"))
	e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
	e.Setenv("DRIVER", driver)
	e.Setenv("TERM", "dumb")
	return os.Mkdir(filepath.Join(e.WorkDir, "home"), 0o700)
}

func condition(cond string) (bool, error) {
	switch cond {
	case "root":
		return os.Geteuid() == 0, nil
	case "overlay", "native":
		return false, errors.New("scripts show the same on both drivers; look at $DRIVER")
	}
	return false, fmt.Errorf("unknown condition %q", cond)
}

var commands = map[string]func(*testscript.TestScript, bool, []string){
	"status":      cmdStatus,
	"capture":     cmdCapture,
	"json":        cmdJSON,
	"waitfor":     cmdWaitFor,
	"waittext":    cmdWaitText,
	"signal":      cmdSignal,
	"fingerprint": cmdFingerprint,
	"unchanged":   cmdUnchanged,
	"seed":        cmdSeed,
	"schema":      cmdSchema,
	"legacy":      cmdLegacy,
}

// status CODE PROGRAM ARGS... runs a program that has to end with that code.
func cmdStatus(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status CODE PROGRAM ARGS...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		if got = exit.ExitCode(); got < 0 {
			ts.Fatalf("%s ended otherwise than by an exit: %v", args[1], err)
		}
	case err != nil:
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code %d, not %d", got, want)
	}
}

// capture VAR FILE sets a variable to the content of FILE without the blanks
// around it; FILE can be stdout or stderr. With a third word it is the field
// of that path in the last line of JSON.
func cmdCapture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 || len(args) > 3 {
		ts.Fatalf("usage: capture VAR FILE [PATH]")
	}
	text := strings.TrimSpace(ts.ReadFile(args[1]))
	if len(args) == 3 {
		v, err := lookUp(lastLine(text), args[2])
		ts.Check(err)
		text = v
	}
	if text == "" {
		ts.Fatalf("there is nothing in %s", args[1])
	}
	ts.Setenv(args[0], text)
}

// json FILE PATH [VALUE] looks into the last line of FILE: the field of that
// path, names and indexes with dots between, has to be VALUE, which is text or
// JSON. Without VALUE the field has to be there.
func cmdJSON(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 || len(args) > 3 {
		ts.Fatalf("usage: [!] json FILE PATH [VALUE]")
	}
	line := lastLine(ts.ReadFile(args[0]))
	got, err := lookUp(line, args[1])
	if len(args) == 2 {
		if (err == nil) == neg {
			ts.Fatalf("%s in %s: %v", args[1], line, err)
		}
		return
	}
	ts.Check(err)
	if (got == args[2]) == neg {
		ts.Fatalf("%s is %s in %s", args[1], got, line)
	}
}

// lookUp gives the value at a path: strings as they are, others as JSON.
func lookUp(line, path string) (string, error) {
	var v any
	dec := json.NewDecoder(strings.NewReader(line))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		return "", fmt.Errorf("no JSON in %q: %w", line, err)
	}
	for name := range strings.SplitSeq(path, ".") {
		switch at := v.(type) {
		case map[string]any:
			field, ok := at[name]
			if !ok {
				return "", fmt.Errorf("there is no field %q", name)
			}
			v = field
		case []any:
			i, err := strconv.Atoi(name)
			if name == "len" {
				v, err = json.Number(strconv.Itoa(len(at))), nil
			} else if err == nil && i >= 0 && i < len(at) {
				v = at[i]
			} else {
				err = fmt.Errorf("there is no element %q", name)
			}
			if err != nil {
				return "", err
			}
		default:
			return "", fmt.Errorf("there is nothing below %v", at)
		}
	}
	if s, ok := v.(string); ok {
		return s, nil
	}
	text, err := json.Marshal(v)
	return string(text), err
}

// waitfor FILE waits until a file is there.
func cmdWaitFor(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: waitfor FILE")
	}
	ts.Check(await(args[0], there(ts.MkAbs(args[0]))))
}

// waittext FILE REGEXP waits until a file that somebody writes says something.
func cmdWaitText(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: waittext FILE REGEXP")
	}
	want, err := regexp.Compile(args[1])
	ts.Check(err)
	ts.Check(await(args[1], func() bool {
		text, err := os.ReadFile(ts.MkAbs(args[0]))
		return err == nil && want.Match(text)
	}))
}

func there(file string) func() bool {
	return func() bool { _, err := os.Stat(file); return err == nil }
}

// await waits for what comes soon, or after two minutes never.
func await(what string, came func() bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !came() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s does not come", what)
		}
	}
	return nil
}

// signal SIGNAL CODE FILE PROGRAM ARGS... runs a program, sends it a signal
// when FILE is there, and compares its exit code. (A shell that is not
// interactive has its background commands ignore SIGINT.)
func cmdSignal(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 4 || args[3] != "lamina" {
		ts.Fatalf("usage: signal SIGNAL CODE FILE lamina ARGS...")
	}
	number := unix.SignalNum("SIG" + args[0])
	want, err := strconv.Atoi(args[1])
	ts.Check(err)
	cmd := exec.Command(laminaBinary, args[4:]...)
	for _, name := range []string{"PATH", "HOME", "LAMINA_ROOT", "WORK", "TMPDIR"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	cmd.Dir = ts.MkAbs(".")
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	// Whoever holds the pipes on is not waited for.
	cmd.WaitDelay = 5 * time.Second
	ts.Check(cmd.Start())
	if err = await(args[2], there(ts.MkAbs(args[2]))); err == nil {
		err = cmd.Process.Signal(number)
	} else {
		err = errors.Join(err, cmd.Process.Kill())
	}
	ended := cmd.Wait()
	ts.Check(err)
	got := cmd.ProcessState.ExitCode()
	if st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && st.Signaled() && st.Signal() == number {
		got = 128 + int(number) // it came before lamina had asked for it
	}
	if got != want {
		ts.Fatalf("exit code %d, not %d: %v", got, want, ended)
	}
}

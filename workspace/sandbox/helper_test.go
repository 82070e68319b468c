package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// envHelper makes the test binary play a program that uses the sandbox.
const envHelper = "SANDBOX_TEST_HELPER"

// envMark marks every process of one test, whatever it does to get away.
const envMark = "SANDBOX_TEST_MARK"

// someUser is an id that owns nothing on any machine.
const someUser = 64124

// patience bounds every wait for something that happens soon.
const patience = 30 * time.Second

func TestMain(m *testing.M) {
	Init()
	if name := os.Getenv(envHelper); name != "" {
		os.Exit(helpers[name](os.Args[1:]))
	}
	// What a shell runs in the background has SIGINT ignored, and hands that
	// on; what we catch is as it was by default in the processes we start.
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	// Under the race detector each process sleeps for a second at its end.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// helpers are little programs; they return their exit status.
var helpers = map[string]func(args []string) int{}

// programResult is what the helper "run" writes to the file that it is told.
type programResult struct {
	Namespace Namespace
	Exit      Exit
	Status    int
	Err       string
}

// programSpec is what the helper "run" is to do.
type programSpec struct {
	Args, Env     []string
	Dir, Source   string
	Grace         time.Duration
	Private       bool
	Enter         bool
	TerminalStdin bool
	Result        string
}

func init() {
	// A program as cmd/lamina is one: it enters, runs a command with its own
	// standard files, and turns signals into causes.
	helpers["run"] = func(args []string) int {
		var p programSpec
		if err := json.Unmarshal([]byte(args[0]), &p); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 99
		}
		var r programResult
		s := Spec{
			Args: p.Args, Env: p.Env, Dir: p.Dir, Source: p.Source, Grace: p.Grace, Private: p.Private,
			Stdout: os.Stdout, Stderr: os.Stderr,
		}
		if p.Enter {
			r.Namespace = Enter()
			s.Private = r.Namespace.Private
		}
		if p.TerminalStdin {
			s.Stdin = os.Stdin
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
		go func() { cancel(SignalError{(<-signals).(syscall.Signal)}) }()
		var err error
		r.Exit, err = Run(ctx, s)
		r.Status = r.Exit.Status()
		var start *StartError
		var cause SignalError
		switch {
		case errors.As(err, &start):
			r.Status = start.Status()
		case errors.As(err, &cause):
			r.Status = cause.Status()
		case err != nil:
			r.Status = 99
		}
		if err != nil {
			r.Err = err.Error()
		}
		text, err := json.Marshal(r)
		if err == nil {
			err = os.WriteFile(p.Result+"~", text, 0o644)
		}
		if err == nil {
			err = os.Rename(p.Result+"~", p.Result)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 99
		}
		return r.Status
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	require.NoError(t, unix.Capget(&header, &have[0]))
	if os.Geteuid() != 0 || have[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		t.Skip("needs root with CAP_SYS_ADMIN for namespaces and for changing the user")
	}
}

var markCounter atomic.Int64

// newMark returns an environment variable that no other process has.
func newMark() string {
	return fmt.Sprintf("%s=%d.%d.", envMark, os.Getpid(), markCounter.Add(1))
}

// alive lists the processes that have the mark in their environment.
func alive(t *testing.T, mark string) []int {
	t.Helper()
	names, err := readNames("/proc")
	require.NoError(t, err)
	var pids []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		// A process that ends meanwhile, and a zombie, has none.
		env, err := os.ReadFile("/proc/" + name + "/environ")
		if err == nil && bytes.Contains(env, []byte(mark)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// eventually waits for a condition that comes true soon.
func eventually(t *testing.T, condition func() bool, what string) {
	t.Helper()
	require.Eventually(t, condition, patience, 2*time.Millisecond, what)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// A place is a world-accessible directory with a tree and a fixed path, which
// belong to the user.
type place struct {
	dir, source, fixed, self string
	user                     int
}

func newPlace(t *testing.T, user int) place {
	t.Helper()
	// Neither t.TempDir nor the test binary is open to other users.
	dir, err := os.MkdirTemp("", "sandbox-test-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	p := place{dir: dir, source: dir + "/own/source", fixed: dir + "/own/fixed", self: dir + "/program", user: user}
	require.NoError(t, os.MkdirAll(p.source, 0o755))
	if user != os.Geteuid() {
		require.NoError(t, os.Chown(dir+"/own", user, user))
		require.NoError(t, os.Chown(p.source, user, user))
	}
	return p
}

// spec runs a shell script in the tree.
func (p place) spec(script string) Spec {
	return Spec{
		Args: []string{"sh", "-c", script}, Env: []string{"PATH=" + os.Getenv("PATH")},
		Dir: p.fixed, Source: p.source, Private: true,
	}
}

// program is a copy of the test binary that runs a helper as the place's user.
func (p place) program(t *testing.T, helper string, args ...string) *exec.Cmd {
	t.Helper()
	if !exists(p.self) {
		in, err := os.Open("/proc/self/exe")
		require.NoError(t, err)
		defer in.Close()
		out, err := os.OpenFile(p.self, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
		require.NoError(t, err)
		_, err = io.Copy(out, in)
		require.NoError(t, errors.Join(err, out.Close()))
	}
	cmd := exec.Command(p.self, args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "GORACE=" + os.Getenv("GORACE"), envHelper + "=" + helper}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if p.user != os.Geteuid() {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(p.user), Gid: uint32(p.user)}
	}
	return cmd
}

func (p place) resultFile() string { return p.dir + "/own/result" }

// runner is the helper "run" for a spec.
func (p place) runner(t *testing.T, s Spec, enter bool) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(programSpec{
		Args: s.Args, Env: s.Env, Dir: s.Dir, Source: s.Source, Grace: s.Grace, Private: s.Private,
		Enter: enter, TerminalStdin: s.Stdin != nil, Result: p.resultFile(),
	})
	require.NoError(t, err)
	return p.program(t, "run", string(text))
}

func (p place) result(t *testing.T) programResult {
	t.Helper()
	text, err := os.ReadFile(p.resultFile())
	require.NoError(t, err)
	var r programResult
	require.NoError(t, json.Unmarshal(text, &r))
	return r
}

// requireNothingLeft fails if a process or a mount of the test is there.
func (p place) requireNothingLeft(t *testing.T, mark string) {
	t.Helper()
	require.Empty(t, alive(t, mark), "processes left")
	p.requireNoMount(t)
}

func (p place) requireNoMount(t *testing.T) {
	t.Helper()
	require.Zero(t, mountsBelow(t, p.dir))
}

// mountsBelow counts the mounts at or below dir.
func mountsBelow(t *testing.T, dir string) int {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	require.NoError(t, err)
	return len(infos)
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(path...))
	require.NoError(t, err)
	return strings.TrimSuffix(string(text), "\n")
}

// finish waits for a program. One that does not end is made to say what it is
// doing, and is a failure.
func finish(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	kill := time.AfterFunc(patience+time.Second, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	quit := time.AfterFunc(patience, func() { _ = cmd.Process.Signal(syscall.SIGQUIT) })
	_ = cmd.Wait()
	require.True(t, quit.Stop(), "the program does not end")
}

// eachWay runs a test with namespaces and without.
func eachWay(t *testing.T, f func(t *testing.T, p place, private bool)) {
	t.Run("namespaces", func(t *testing.T) {
		needRoot(t)
		f(t, newPlace(t, os.Geteuid()), true)
	})
	t.Run("subreaper", func(t *testing.T) {
		f(t, newPlace(t, os.Geteuid()), false)
	})
}

package sandbox

import (
	"encoding/gob"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// envStage tells a program that starts what part it has to play. It is
// removed, or not passed on, before a command sees an environment.
const envStage = "_LAMINA_SANDBOX"

// stageInit is the value of envStage for init.
const stageInit = "init"

// Init makes this process the init process of a sandbox if [Run] started it
// as one, and does not return then. Otherwise it does nothing.
//
// It must be called first thing in main, before flags are parsed and files
// are opened.
func Init() {
	if os.Getenv(envStage) != stageInit {
		return
	}
	conn := os.NewFile(connection, "sandbox")
	// The thread that starts the command gives up its capabilities and, in
	// the absence of a PID namespace, is the one whose end kills the command.
	runtime.LockOSThread()
	var t task
	in := gob.NewDecoder(conn)
	if err := in.Decode(&t); err != nil {
		os.Exit(1)
	}
	o := t.run(in)
	if err := t.cleanUp(); err != nil && o.Failed == "" {
		o = failed(err)
	}
	if err := gob.NewEncoder(conn).Encode(o); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

// run does the whole work of init, and returns when no process is left.
func (t *task) run(requests *gob.Decoder) outcome {
	// The name that ps shows; without it, it would be "exe".
	_ = os.WriteFile("/proc/self/comm", []byte("lamina-init"), 0)
	// A signal that has a handler does nothing here: init ends with the
	// command or with lamina, and a command may well try to signal it. The
	// command starts with the default actions.
	ignored := make(chan os.Signal, 1)
	signal.Notify(ignored)
	// Whatever lamina's own parent left open is nothing to a command.
	if err := unix.CloseRange(connection, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		unix.CloseOnExec(connection)
	}
	if err := t.prepare(); err != nil {
		return failed(err)
	}
	path, err := lookUp(t.Args[0], t.Env)
	if err != nil {
		return notStarted(err)
	}
	pid, err := t.start(path)
	if err != nil {
		return notStarted(err)
	}
	// A command that closes its output, closes it for all.
	if err := redirectToNull(); err != nil {
		killAll(t.Private)
		return failed(err)
	}
	go t.serve(requests, pid)
	status := reapUntil(pid)
	killAll(t.Private)
	if status.Signaled() {
		return outcome{Exit: Exit{Signal: status.Signal()}}
	}
	return outcome{Exit: Exit{Code: status.ExitStatus()}}
}

func notStarted(err error) outcome {
	o := failed(err)
	o.NotStarted = true
	return o
}

// start starts the command on this thread.
func (t *task) start(path string) (pid int, err error) {
	if os.Geteuid() != 0 {
		if err := dropCapabilities(); err != nil {
			return 0, err
		}
	}
	attr := &syscall.ProcAttr{Env: t.Env, Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true}}
	if !t.Private {
		attr.Sys.Pdeathsig = syscall.SIGKILL
	}
	pid, err = syscall.ForkExec(path, t.Args, attr)
	if err != nil {
		return 0, fmt.Errorf("exec %s: %w", path, err)
	}
	return pid, nil
}

// serve sends the signals that Run asks for. When the connection ends lamina
// is gone, and nothing may be left: the end of PID 1 sees to it, and without a
// PID namespace the killing has to be done.
func (t *task) serve(requests *gob.Decoder, pid int) {
	for {
		var r request
		if err := requests.Decode(&r); err != nil {
			if !t.Private {
				killAll(false)
				_ = t.cleanUp() // nobody is there to be told
			}
			os.Exit(1)
		}
		switch {
		case !r.All:
			// ESRCH: the command has just ended.
			_ = unix.Kill(-pid, r.Signal)
		default:
			signalAll(t.Private, r.Signal)
			// A stopped process ends only when it goes on.
			signalAll(t.Private, unix.SIGCONT)
		}
	}
}

// dropCapabilities takes from this thread all that the mounts needed, so that
// what it executes is an ordinary process of its user. In a user namespace
// the bounding set does not matter: the user could make another one.
func dropCapabilities() error {
	err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}

func redirectToNull() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, unix.O_CLOEXEC); err != nil {
			return os.NewSyscallError("dup3", err)
		}
	}
	return nil
}

// errnoOf finds the errno in an error's chain. It also translates the errors
// of package fs, which some lookups give without one.
func errnoOf(err error) (syscall.Errno, bool) {
	var errno syscall.Errno
	switch {
	case errors.As(err, &errno):
		return errno, true
	case errors.Is(err, fs.ErrNotExist):
		return syscall.ENOENT, true
	case errors.Is(err, fs.ErrPermission):
		return syscall.EACCES, true
	}
	return 0, false
}

package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// confirmed is what the child says when its namespace works.
const confirmed = "ok"

// enterUser goes on in a child in a new user namespace and exits as it does.
// It returns only if there is no such child.
func enterUser() error {
	// The child is killed when this thread ends; it stays until the exit.
	runtime.LockOSThread()
	signals := make(chan os.Signal, 16)
	notify(signals)
	cmd, answer, err := startInUserNamespace()
	if err != nil {
		signal.Stop(signals)
		runtime.UnlockOSThread()
		return err
	}
	// A namespace can be made on some systems but not used: the child tries,
	// and says so before it does anything else.
	said, err := io.ReadAll(answer)
	err = errors.Join(err, answer.Close())
	if string(said) != confirmed {
		signal.Stop(signals)
		waitErr := cmd.Wait()
		runtime.UnlockOSThread()
		if len(said) > 0 {
			return errors.New(string(said))
		}
		return fmt.Errorf("process in a user namespace ended early: %w", errors.Join(err, waitErr))
	}
	go passOn(signals, cmd.Process)
	if err := cmd.Wait(); err != nil && cmd.ProcessState == nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	os.Exit(Exit{Code: status.ExitStatus(), Signal: signalOf(status)}.Status())
	return nil
}

func signalOf(status syscall.WaitStatus) syscall.Signal {
	if status.Signaled() {
		return status.Signal()
	}
	return 0
}

// startInUserNamespace starts this program again as a child. The file it
// returns gives the child's answer.
func startInUserNamespace() (*exec.Cmd, *os.File, error) {
	answer, theirs, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	uid, gid := os.Getuid(), os.Getgid()
	cmd := &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       os.Args,
		Env:        append(os.Environ(), fmt.Sprintf("%s=%s:%d", envStage, stageUser, os.Getpid())),
		Stdin:      os.Stdin,
		Stdout:     os.Stdout,
		Stderr:     os.Stderr,
		ExtraFiles: []*os.File{theirs}, // descriptor 3, connection
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			// Each id is itself; without privileges there is one of each,
			// and setgroups stays denied.
			UidMappings: []syscall.SysProcIDMap{{ContainerID: uid, HostID: uid, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: gid, HostID: gid, Size: 1}},
			// An id other than 0 keeps what is ambient, and nothing else.
			// SYS_ADMIN mounts and makes namespaces. DAC_OVERRIDE lets the
			// overlay, which works with the rights of whoever mounted it,
			// into its work directory of mode 000. All that it creates or
			// changes is the user's own, so no more is needed.
			AmbientCaps: []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_DAC_OVERRIDE},
			Setpgid:     true,
			Pdeathsig:   syscall.SIGKILL,
		},
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("user namespace: %w", err), answer.Close())
	}
	return cmd, answer, nil
}

// confirm is the child's part: it tries its rights and tells its parent, or
// ends. The parent then does without.
func confirm() {
	answer := os.NewFile(connection, "answer")
	if err := makePrivate(); err != nil {
		fmt.Fprintf(answer, "user namespace: %v", err)
		os.Exit(1)
	}
	_, err := answer.WriteString(confirmed)
	if err := errors.Join(err, answer.Close()); err != nil {
		os.Exit(1)
	}
}

// notify asks for the signals that people and shells send to a program, but
// not for those that whoever started it wants ignored.
func notify(signals chan<- os.Signal) {
	for _, s := range []syscall.Signal{
		unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2,
		unix.SIGWINCH, unix.SIGTSTP, unix.SIGCONT,
	} {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
}

// passOn passes signals on to the child for as long as the process lives.
func passOn(signals <-chan os.Signal, child *os.Process) {
	for s := range signals {
		_ = child.Signal(s) // it may have ended just now
		if s == unix.SIGTSTP {
			// Ctrl-Z: stop as well, as the shell expects.
			_ = unix.Kill(os.Getpid(), unix.SIGSTOP)
		}
	}
}

package sandbox

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Run and init talk over a pair of sockets in gob, which keeps strings of any
// bytes: first a task, then requests; back comes one outcome. The end of the
// connection means that the other side is gone.

// connection is the descriptor under which init finds its end.
const connection = 3

// A task is what init is told to do.
type task struct {
	Args, Env   []string
	Dir, Source string
	Mounts      []Mount
	ReadOnly    bool
	Private     bool
}

// A request asks init to send a signal: to the command's process group, or to
// all its descendants.
type request struct {
	Signal syscall.Signal
	All    bool
}

// An outcome is the last thing that init says.
type outcome struct {
	Exit Exit
	// Failed and Errno describe why the command did not start; NotStarted
	// tells an error of the command itself from one of the preparations.
	Failed     string
	Errno      syscall.Errno
	NotStarted bool
}

// failed is the outcome for an error.
func failed(err error) outcome {
	o := outcome{Failed: err.Error()}
	if errno, ok := errnoOf(err); ok {
		o.Errno = errno
	}
	return o
}

// err is the error that an outcome carries over.
func (o outcome) err(name string) error {
	if o.Failed == "" {
		return nil
	}
	var err error = remoteError{o.Failed, o.Errno}
	if o.NotStarted {
		return &StartError{Name: name, Err: err}
	}
	return fmt.Errorf("prepare sandbox: %w", err)
}

// remoteError is an error of init with its errno.
type remoteError struct {
	text  string
	errno syscall.Errno
}

func (e remoteError) Error() string { return e.text }

func (e remoteError) Unwrap() error {
	if e.errno == 0 {
		return nil
	}
	return e.errno
}

// socketPair returns the ends of a connection; the first is pollable.
func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fds[0]), "sandbox"), os.NewFile(uintptr(fds[1]), "sandbox init"), nil
}

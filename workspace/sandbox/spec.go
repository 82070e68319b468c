package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

// DefaultGrace is how long a command that was told to end may take for it.
// Ten seconds are what container runtimes give; compilers and test runners
// that remove their temporary files need a fraction of that.
const DefaultGrace = 10 * time.Second

// Spec says what to run, and where.
type Spec struct {
	// Args are the command and its arguments. A name without a slash is
	// looked up in the PATH of Env, any other relative to Dir.
	Args []string
	// Env is the command's whole environment; of a name that is there twice
	// the last value counts. PWD is set to Dir.
	Env []string

	// Dir is the absolute path at which the command sees the tree and where
	// it starts. If it does not exist it is made, and stays there as an empty
	// directory.
	Dir string
	// Source is the directory that is bind-mounted at Dir; mounts below it
	// come with it. Without Private, Dir is a symbolic link to it while the
	// command runs. If Source is empty or equals Dir, Dir is taken as it is.
	Source string
	// Mounts are further binds, made in this order after the one at Dir.
	Mounts []Mount
	// ReadOnly makes the tree at Dir refuse changes with EROFS. Needs Private.
	ReadOnly bool

	// Stdin is the command's standard input, /dev/null if nil. It is handed
	// over as it is, not copied: nothing is read that the command does not
	// want, and no copying goroutine can be left waiting for a reader.
	Stdin *os.File
	// Stdout and Stderr take the command's output; nil discards it. An
	// *os.File is handed over as it is, so that a terminal stays a terminal.
	// Anything else is written to by one goroutine (by a single one if both
	// are equal) while the command runs; a failing Write closes the pipe.
	Stdout, Stderr io.Writer

	// Signals are passed on to the command's process group until it ends.
	Signals <-chan os.Signal
	// Grace is the time between the signal that a cancelled context sends
	// and SIGKILL; DefaultGrace if zero.
	Grace time.Duration
	// Private says that namespaces can be had: [Namespace.Private] of Enter.
	Private bool
}

// Mount is a bind of a directory or file.
type Mount struct {
	// Source is an absolute path outside of the sandbox.
	Source string
	// Target is an absolute path as the command sees it. If it does not
	// exist, a directory or an empty file is made, which stays.
	Target string
	// ReadOnly makes it, and all mounts below it, refuse changes.
	ReadOnly bool
}

// Exit is how a command ended.
type Exit struct {
	// Code is the exit code, if Signal is 0.
	Code int
	// Signal is the signal that killed the command, or 0.
	Signal syscall.Signal
}

// Status is the exit status as a shell would report it: the exit code, or 128
// and the number of the signal.
func (e Exit) Status() int {
	if e.Signal != 0 {
		return 128 + int(e.Signal)
	}
	return e.Code
}

// StartError is the error of a command that could not be started at all.
type StartError struct {
	// Name is the command as it was given.
	Name string
	// Err says why; it holds an errno.
	Err error
}

func (e *StartError) Error() string { return fmt.Sprintf("start %q: %v", e.Name, e.Err) }

// Unwrap returns the reason.
func (e *StartError) Unwrap() error { return e.Err }

// Status is the exit status that shells give: 127 for a command that was not
// found, 126 for one that cannot be executed.
func (e *StartError) Status() int {
	if errors.Is(e.Err, syscall.ENOENT) || errors.Is(e.Err, syscall.ENOTDIR) {
		return 127
	}
	return 126
}

// SignalError as the cause of a cancelled context makes Run send that signal
// to the command instead of SIGTERM.
type SignalError struct {
	Signal syscall.Signal
}

func (e SignalError) Error() string { return "received signal: " + e.Signal.String() }

// Status is the exit status of a program that ends because of the signal.
func (e SignalError) Status() int { return 128 + int(e.Signal) }

// check refuses what cannot be run, before anything has happened.
func (s *Spec) check() error {
	invalid := func(format string, args ...any) error {
		return fmt.Errorf("run: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	switch {
	case len(s.Args) == 0 || s.Args[0] == "":
		return invalid("no command")
	case !filepath.IsAbs(s.Dir):
		return invalid("directory %q is not an absolute path", s.Dir)
	case s.Source != "" && !filepath.IsAbs(s.Source):
		return invalid("source %q is not an absolute path", s.Source)
	case s.Grace < 0:
		return invalid("grace of %v", s.Grace)
	}
	for _, list := range [][]string{s.Args, s.Env, {s.Dir, s.Source}} {
		for _, text := range list {
			if strings.ContainsRune(text, 0) {
				return invalid("%q contains a NUL byte", text)
			}
		}
	}
	for _, m := range s.Mounts {
		if !filepath.IsAbs(m.Source) || !filepath.IsAbs(m.Target) || strings.ContainsRune(m.Source+m.Target, 0) {
			return invalid("mount of %q at %q: not absolute paths", m.Source, m.Target)
		}
	}
	if !s.Private && (s.ReadOnly || len(s.Mounts) > 0) {
		return fmt.Errorf("run: a read-only tree and further mounts need a mount namespace: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// environment is env with PWD set to dir and each name once, the last value
// winning, as os/exec has it.
func environment(env []string, dir string) []string {
	seen := map[string]bool{}
	var out []string
	for _, entry := range slices.Backward(append(slices.Clone(env), "PWD="+dir)) {
		name, _, ok := strings.Cut(entry, "=")
		if ok && name != "" {
			if seen[name] {
				continue
			}
			seen[name] = true
		}
		out = append(out, entry)
	}
	slices.Reverse(out)
	return out
}

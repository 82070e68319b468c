package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache/policy"
)

// confirm asks on the terminal whether a plan is to be executed.
func (a *app) confirm(ctx context.Context, plan *policy.Plan) (yes bool, err error) {
	giveBack, err := toForeground(os.Stdin)
	if err != nil {
		fmt.Fprintln(a.err, "Nothing was removed: this process cannot ask on the terminal. Use --yes.")
		return false, nil
	}
	defer giveBack()
	fmt.Fprintf(a.err, "Remove %s (%s)? [y/N] ", plural(plan.Removed, "record"), size(plan.Freed))
	answer, err := readAnswer(ctx, os.Stdin)
	if err != nil {
		fmt.Fprintln(a.err)
		return false, err
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return true, nil
	}
	fmt.Fprintln(a.err, "Nothing was removed.")
	return false, nil
}

// toForeground makes this process's group the terminal's foreground group if
// it is not: an ordinary user's lamina is a child, in a group of its own, of
// the process that the shell knows, and would be stopped by reading. It fails
// if that one is not in the foreground either.
func toForeground(terminal *os.File) (giveBack func(), err error) {
	fd := int(terminal.Fd())
	front, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	if err != nil {
		return nil, err
	}
	own := unix.Getpgrp()
	if front == own {
		return func() {}, nil
	}
	if parents, err := unix.Getpgid(os.Getppid()); err != nil || parents != front {
		return nil, errors.New("in the background")
	}
	// Who is in the background is stopped for changing it, unless it ignores
	// the signal.
	signal.Ignore(syscall.SIGTTOU)
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPGRP, own); err != nil {
		return nil, err
	}
	return func() {
		// A shell takes the terminal back by itself if this should fail.
		_ = unix.IoctlSetPointerInt(fd, unix.TIOCSPGRP, front)
	}, nil
}

// readAnswer reads a line, unless ctx ends before there is one.
func readAnswer(ctx context.Context, terminal *os.File) (string, error) {
	const look = 100 // milliseconds between looks at ctx
	poll := []unix.PollFd{{Fd: int32(terminal.Fd()), Events: unix.POLLIN}}
	var line []byte
	for {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		n, err := unix.Poll(poll, look)
		if errors.Is(err, unix.EINTR) || err == nil && n == 0 {
			continue
		}
		if err != nil {
			return "", os.NewSyscallError("poll", err)
		}
		var one [1]byte
		if k, err := terminal.Read(one[:]); err != nil || k == 0 || one[0] == '\n' {
			return string(line), nil // the end of the input is an answer, too
		}
		line = append(line, one[0])
	}
}

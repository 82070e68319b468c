package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/workspace/sandbox"
)

// again is how long after the first signal another one is taken for a person
// who has lost patience. Tools like timeout send the same signal to a process
// and to its group, so the second comes at once.
const again = time.Second

// bySignal says which signal made ctx end, where err only says that it did: not
// every library asks for the reason.
func bySignal(ctx context.Context, err error) error {
	var s sandbox.SignalError
	if !errors.Is(err, context.Canceled) || errors.As(err, &s) || !errors.As(context.Cause(ctx), &s) {
		return err
	}
	return fmt.Errorf("%w: %w", err, s)
}

// withSignals gives a context that ends with SIGINT, SIGTERM or SIGHUP, as a
// sandbox.SignalError that says which. A further signal ends the program as if
// it had no handler: the kernel then ends whatever it had started. Signals
// that whoever started us wants ignored stay so.
func withSignals(parent context.Context) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 8)
	for _, s := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		var first time.Time
		for {
			select {
			case <-quit:
				return
			case s := <-signals:
				number, ok := s.(syscall.Signal)
				switch {
				case !ok:
				case first.IsZero():
					first = time.Now()
					cancel(sandbox.SignalError{Signal: number})
				case time.Since(first) > again:
					signal.Reset(s)
					_ = unix.Kill(os.Getpid(), number)
				}
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(quit)
		<-ended
		cancel(nil)
	}
}

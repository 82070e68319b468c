package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// drain is how long a pipe that is still open after the last process of the
// sandbox has ended is read on. Somebody outside holds it, by way of a
// descriptor that was passed on; what our processes wrote is in it already.
const drain = 100 * time.Millisecond

// outputs carry what a command writes to writers that are no files.
type outputs struct {
	theirs []*os.File // closed once init has them
	pipes  []*os.File // ours
	exited chan struct{}
	copies sync.WaitGroup
	mu     sync.Mutex
	errs   []error // guarded by mu
}

func newOutputs() *outputs { return &outputs{exited: make(chan struct{})} }

// file is what init is given to write w's output to; nil is /dev/null.
func (o *outputs) file(w io.Writer) (*os.File, error) {
	if w == nil {
		return nil, nil
	}
	if f, ok := w.(*os.File); ok {
		return f, nil
	}
	r, theirs, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe for output: %w", err)
	}
	o.theirs, o.pipes = append(o.theirs, theirs), append(o.pipes, r)
	o.copies.Go(func() {
		if err := o.copy(w, r); err != nil {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.errs = append(o.errs, fmt.Errorf("output of the command: %w", err))
		}
	})
	return theirs, nil
}

// copy ends with the pipe, or when nothing came for a while after the sandbox
// has ended. A slow writer is waited for.
func (o *outputs) copy(w io.Writer, r *os.File) error {
	// Closing the pipe at once lets a command see that nobody listens.
	defer r.Close()
	buf := make([]byte, 32<<10)
	for ended := false; ; {
		n, err := r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
		}
		timeout := errors.Is(err, os.ErrDeadlineExceeded)
		switch {
		case err == io.EOF, timeout && ended:
			return nil
		case err != nil && !timeout:
			return err
		}
		if !ended {
			select {
			case <-o.exited:
				ended = true
			default:
			}
		}
		if ended {
			if err := r.SetReadDeadline(time.Now().Add(drain)); err != nil {
				return err
			}
		}
	}
}

// started closes the ends that are init's now.
func (o *outputs) started() {
	for _, f := range o.theirs {
		_ = f.Close() // the write end of an empty pipe: nothing to lose
	}
}

// wait is called when the sandbox has ended, and returns when all that was
// written has been passed on.
func (o *outputs) wait() error {
	close(o.exited)
	for _, r := range o.pipes {
		// Wakes the reader; an error means that it has ended already.
		_ = r.SetReadDeadline(time.Now())
	}
	o.copies.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	return errors.Join(o.errs...)
}

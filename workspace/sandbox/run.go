package sandbox

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stuck is how long init gets to end after it was told to kill everything. A
// process that does not die sits in the kernel, waiting for a disk; then the
// kernel finishes the job when it comes back.
const stuck = 5 * time.Second

// Run runs the command and waits until nothing of it is left: no process, no
// mount. It can be called by many goroutines at once.
//
// The command has ended when its main process has: what it left running in
// the background is killed then, and the Exit is that of the main process.
//
// If ctx is cancelled, all processes of the command get SIGTERM, or the
// signal of a [SignalError] that is the cause, and SIGKILL after Spec.Grace.
// The error then wraps the cause, and the Exit is how the main process ended
// nevertheless.
//
// The command is in a session of its own. So Ctrl-C at a terminal reaches
// lamina alone, and the command once: by way of the context.
//
// A command that cannot be started gives a *[StartError]; other errors are
// those of the sandbox itself, or of a writer that took the output.
func Run(ctx context.Context, s Spec) (Exit, error) {
	if err := s.check(); err != nil {
		return Exit{}, err
	}
	if ctx.Err() != nil {
		return Exit{}, fmt.Errorf("run %q: %w", s.Args[0], context.Cause(ctx))
	}
	out := newOutputs()
	p, err := start(&s, out)
	if err != nil {
		return Exit{}, errors.Join(fmt.Errorf("start sandbox: %w", err), out.wait())
	}
	stopped := p.supervise(ctx, &s)
	result, err := p.outcome()
	err = errors.Join(err, out.wait())
	if err == nil {
		err = result.err(s.Args[0])
	}
	if err == nil && stopped {
		err = fmt.Errorf("run %q: stopped: %w", s.Args[0], context.Cause(ctx))
	}
	return result.Exit, err
}

// A process is the init process of a sandbox.
type process struct {
	conn    *os.File
	enc     *gob.Encoder
	pid     int
	exited  chan struct{} // closed when init has been waited for
	waitErr error         // how it ended, once exited is closed
	replies chan outcome  // closed at the end of the connection
	kill    func() error
}

// start starts init and gives it its task.
func start(s *Spec, out *outputs) (_ *process, err error) {
	defer out.started()
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd, err := initCommand(s, out, theirs)
	if err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	p := &process{
		conn: ours, enc: gob.NewEncoder(ours), exited: make(chan struct{}), replies: make(chan outcome, 1),
		kill: func() error { return cmd.Process.Kill() },
	}
	started := make(chan error)
	go func() {
		// The parent-death signal is sent when the thread that forked ends,
		// not the process, so this one stays until init is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.waitErr = cmd.Wait()
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	p.pid = cmd.Process.Pid
	go func() {
		defer close(p.replies)
		var o outcome
		if gob.NewDecoder(ours).Decode(&o) == nil {
			p.replies <- o
		}
	}()
	// An error means that init is gone; outcome says so.
	_ = p.enc.Encode(task{
		Args: s.Args, Env: environment(s.Env, s.Dir), Dir: s.Dir, Source: s.Source,
		Mounts: s.Mounts, ReadOnly: s.ReadOnly, Private: s.Private,
	})
	return p, nil
}

// initCommand is this program as init, with the command's standard files.
func initCommand(s *Spec, out *outputs, conn *os.File) (*exec.Cmd, error) {
	cmd := &exec.Cmd{
		// Not the path, which may name another program by now.
		Path:       "/proc/self/exe",
		Args:       []string{"lamina-init"},
		Env:        append(runtimeVariables(), envStage+"="+stageInit),
		ExtraFiles: []*os.File{conn},
		SysProcAttr: &syscall.SysProcAttr{
			// Whatever a terminal or a shell sends to lamina's process group
			// is lamina's to answer.
			Setsid: true,
		},
	}
	if s.Private {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID | syscall.CLONE_NEWNS
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
		if os.Geteuid() != 0 {
			// For the mounts; init drops it before the command starts.
			cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_DAC_OVERRIDE}
		}
	}
	if s.Stdin != nil {
		cmd.Stdin = s.Stdin
	}
	stdout, err := out.file(s.Stdout)
	if err != nil {
		return nil, err
	}
	stderr := stdout
	if !same(s.Stdout, s.Stderr) {
		if stderr, err = out.file(s.Stderr); err != nil {
			return nil, err
		}
	}
	// A nil *os.File in the interface would not be /dev/null.
	if stdout != nil {
		cmd.Stdout = stdout
	}
	if stderr != nil {
		cmd.Stderr = stderr
	}
	return cmd, nil
}

// runtimeVariables are what Go's own runtime looks at, in init as well.
func runtimeVariables() []string {
	var env []string
	for _, name := range []string{"GODEBUG", "GOTRACEBACK", "GORACE", "GOCOVERDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// same says whether two writers are equal; some types cannot be compared.
func same(a, b any) bool {
	return a != nil && b != nil && reflect.TypeOf(a).Comparable() && reflect.TypeOf(b).Comparable() && a == b
}

// supervise passes signals on until init has ended, and says whether it was
// the context that ended it.
func (p *process) supervise(ctx context.Context, s *Spec) (stopped bool) {
	grace := s.Grace
	if grace == 0 {
		grace = DefaultGrace
	}
	done, signals := ctx.Done(), s.Signals
	var timer <-chan time.Time
	killed := false
	for {
		select {
		case <-p.exited:
			return stopped
		case sig, ok := <-signals:
			if number, isSignal := sig.(syscall.Signal); ok && isSignal {
				p.send(request{Signal: number})
			} else if !ok {
				signals = nil
			}
		case <-done:
			done, stopped = nil, true
			signal := syscall.SIGTERM
			var cause SignalError
			if errors.As(context.Cause(ctx), &cause) {
				signal = cause.Signal
			}
			p.send(request{Signal: signal, All: true})
			timer = time.After(grace)
		case <-timer:
			if !killed {
				killed = true
				p.send(request{Signal: syscall.SIGKILL, All: true})
				timer = time.After(stuck)
				continue
			}
			timer = nil
			_ = p.kill() // it may have ended just now
		}
	}
}

// send asks init for a signal. An init that is gone needs none.
func (p *process) send(r request) { _ = p.enc.Encode(r) }

// outcome is what init said, once it has ended.
func (p *process) outcome() (outcome, error) {
	o, ok := <-p.replies
	err := p.conn.Close()
	if !ok {
		if killedBy(p.waitErr, syscall.SIGKILL) {
			o.Exit.Signal = syscall.SIGKILL
		}
		err = errors.Join(fmt.Errorf("the sandbox's init process ended early: %w", p.waitErr), err)
	}
	return o, err
}

func killedBy(err error, signal syscall.Signal) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == signal
}

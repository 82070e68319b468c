package sandbox

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A console is the other side of a terminal: what a person types into and
// reads from.
type console struct {
	t      *testing.T
	master *os.File
	slave  *os.File
	seen   strings.Builder
}

func newConsole(t *testing.T) *console {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("no pseudo-terminals on this machine")
	}
	require.NoError(t, err)
	t.Cleanup(func() { _ = master.Close() })
	// Not Fd, which would make the file a blocking one without deadlines.
	conn, err := master.SyscallConn()
	require.NoError(t, err)
	var number int
	var errs error
	require.NoError(t, conn.Control(func(fd uintptr) {
		errs = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0)
		if errs == nil {
			number, errs = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	}))
	require.NoError(t, errs)
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = slave.Close() })
	return &console{t: t, master: master, slave: slave}
}

// start starts a program for which this is the controlling terminal.
func (c *console) start(cmd *exec.Cmd) {
	c.t.Helper()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.slave, c.slave, c.slave
	cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
	require.NoError(c.t, cmd.Start())
}

// expect reads until text has been seen. One that does not come is a failure,
// with what the program was doing instead.
func (c *console) expect(cmd *exec.Cmd, text string) {
	c.t.Helper()
	require.NoError(c.t, c.master.SetReadDeadline(time.Now().Add(patience)))
	late := false
	for buf := make([]byte, 4096); !strings.Contains(c.seen.String(), text); {
		n, err := c.master.Read(buf)
		c.seen.Write(buf[:n])
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded) && !late:
			late = true
			_ = cmd.Process.Signal(unix.SIGQUIT)
			require.NoError(c.t, c.master.SetReadDeadline(time.Now().Add(time.Second)))
		default:
			_ = cmd.Process.Kill()
			require.NoError(c.t, err, "waiting for %q in %q", text, c.seen.String())
		}
	}
	require.False(c.t, late, "%q came late: %q", text, c.seen.String())
}

func (c *console) typeKeys(keys string) {
	c.t.Helper()
	_, err := io.WriteString(c.master, keys)
	require.NoError(c.t, err)
}

// Ctrl-C reaches the program and, through it, the command: once each.
func TestInterruptFromTerminal(t *testing.T) {
	// A shell starts its background jobs with interrupts ignored, and the
	// program would respect that.
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, unix.SIGINT)
	defer signal.Stop(interrupts)

	eachVariant(t, func(t *testing.T, p place, s Spec, enter bool, mark string) {
		c := newConsole(t)
		// Every interrupt counts that comes until a moment after the first.
		s.Args[2] = `n=0; trap 'n=$((n+1))' INT; [ -t 1 ] && echo a terminal
			sleep 1000 & echo ready; while [ $n = 0 ]; do sleep 0.05; done
			sleep 0.1; sleep 0.1; echo interrupted $n times; exit 3`
		cmd := p.runner(t, s, enter)
		c.start(cmd)
		c.expect(cmd, "ready")
		c.typeKeys("\x03")
		c.expect(cmd, "times")
		finish(t, cmd)
		require.Contains(t, c.seen.String(), "interrupted 1 times")
		require.Contains(t, c.seen.String(), "a terminal", "a terminal stays one")
		require.Equal(t, 130, cmd.ProcessState.ExitCode())
		require.Equal(t, Exit{Code: 3}, p.result(t).Exit)
		p.requireNothingLeft(t, mark)
	})
}

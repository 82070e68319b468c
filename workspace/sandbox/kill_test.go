package sandbox

import (
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot/overlayfs"
)

// fugitives is a script whose processes do what they can to get away. It has
// six processes that last.
const fugitives = `
	sleep 1000 &
	(setsid sh -c 'sleep 1000; true' &)
	(nohup sleep 1000 >/dev/null 2>&1 &)
	( (trap '' TERM HUP INT; setsid sleep 1000 &) & )
	touch ready
	wait`

const fugitivesCount = 6

// variants are the ways in which a program comes to its sandbox.
func eachVariant(t *testing.T, f func(t *testing.T, p place, s Spec, enter bool, mark string)) {
	for name, v := range map[string]struct {
		user    int
		enter   bool
		private bool
	}{
		"root":                     {0, true, true},
		"root, subreaper":          {0, false, false},
		"ordinary user":            {someUser, true, true},
		"ordinary user, subreaper": {someUser, false, false},
		"root without entering":    {0, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			needRoot(t)
			p := newPlace(t, v.user)
			s := p.spec(fugitives)
			mark := newMark()
			s.Private, s.Env = v.private, append(s.Env, mark)
			f(t, p, s, v.enter, mark)
		})
	}
}

func TestKilledRunnerLeavesNothing(t *testing.T) {
	eachVariant(t, func(t *testing.T, p place, s Spec, enter bool, mark string) {
		cmd := p.runner(t, s, enter)
		require.NoError(t, cmd.Start())
		eventually(t, func() bool { return exists(p.source+"/ready") && len(alive(t, mark)) >= fugitivesCount }, "the command runs")
		p.requireNoMount(t)
		family := descendants(cmd.Process.Pid)
		require.Greater(t, len(family), 1, "init and the command")
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()
		eventually(t, func() bool { return len(alive(t, mark)) == 0 }, "nothing is left")
		eventually(t, func() bool { return !anyOf(family) }, "init has ended, too")
		p.requireNoMount(t)
	})
}

// anyOf says whether one of the processes is there and more than a zombie.
func anyOf(pids []int) bool {
	for _, pid := range pids {
		if _, alive := parentOf(pid); alive {
			return true
		}
	}
	return false
}

func TestTerminatedRunnerLeavesNothing(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(signal.String(), func(t *testing.T) {
			eachVariant(t, func(t *testing.T, p place, s Spec, enter bool, mark string) {
				s.Grace = 50 * time.Millisecond // one of them does not listen
				cmd := p.runner(t, s, enter)
				require.NoError(t, cmd.Start())
				eventually(t, func() bool { return len(alive(t, mark)) >= fugitivesCount }, "the command runs")
				require.NoError(t, cmd.Process.Signal(signal))
				finish(t, cmd)
				require.Equal(t, 128+int(signal), cmd.ProcessState.ExitCode())
				p.requireNothingLeft(t, mark)
				require.Equal(t, 128+int(signal), p.result(t).Status)
			})
		})
	}
}

// The process of an ordinary user's namespace ends as its parent does, and
// the overlay that it mounted is free again.
func TestKilledRunnerFreesItsOverlay(t *testing.T) {
	for name, user := range map[string]int{"root": 0, "ordinary user": someUser} {
		t.Run(name, func(t *testing.T) {
			needRoot(t)
			p := newPlace(t, user)
			mark := newMark()
			cmd := p.program(t, "overlay", p.dir+"/own", mark, "touch ready; (trap '' TERM; setsid sleep 1000 &); sleep 1000")
			require.NoError(t, cmd.Start())
			upper := p.dir + "/own/upper"
			eventually(t, func() bool { return exists(upper + "/ready") }, "the command runs in the overlay")
			p.requireNoMount(t)
			busy, err := overlayfs.InUse(upper)
			require.NoError(t, err)
			require.True(t, busy)
			require.NoError(t, cmd.Process.Kill())
			_ = cmd.Wait()
			eventually(t, func() bool {
				busy, err := overlayfs.InUse(upper)
				return err == nil && !busy
			}, "the overlay is free")
			require.Empty(t, alive(t, mark))
			p.requireNoMount(t)
		})
	}
}

// A runner that is stopped for good does not keep its init from dying with it.
func TestKilledWhileStopped(t *testing.T) {
	needRoot(t)
	p := newPlace(t, someUser)
	s := p.spec(fugitives)
	mark := newMark()
	s.Env = append(s.Env, mark)
	cmd := p.runner(t, s, true)
	require.NoError(t, cmd.Start())
	eventually(t, func() bool { return len(alive(t, mark)) >= fugitivesCount }, "the command runs")
	require.NoError(t, cmd.Process.Signal(unix.SIGSTOP))
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	eventually(t, func() bool { return len(alive(t, mark)) == 0 }, "nothing is left")
}

// Init that is killed takes the command along, and Run says so.
func TestInitIsKilled(t *testing.T) {
	needRoot(t)
	p := newPlace(t, 0)
	mark := newMark()
	s := p.spec(fugitives)
	s.Env = append(s.Env, mark)
	type result struct {
		exit Exit
		err  error
	}
	done := make(chan result, 1)
	go func() {
		exit, err := Run(t.Context(), s)
		done <- result{exit, err}
	}()
	eventually(t, func() bool { return len(alive(t, mark)) >= fugitivesCount }, "the command runs")
	for _, pid := range descendants(os.Getpid()) {
		if comm, err := os.ReadFile("/proc/" + itoa(pid) + "/comm"); err == nil && string(comm) == "lamina-init\n" {
			require.NoError(t, unix.Kill(pid, unix.SIGKILL))
		}
	}
	r := <-done
	require.ErrorContains(t, r.err, "init")
	require.Equal(t, syscall.SIGKILL, r.exit.Signal)
	p.requireNothingLeft(t, mark)
}

func init() {
	// Mounts an overlay in its own namespace and runs a script in it.
	helpers["overlay"] = func(args []string) int {
		ns := Enter()
		if !ns.Private {
			println(ns.Reason)
			return 98
		}
		own, mark, script := args[0], args[1], args[2]
		for _, dir := range []string{"lower", "upper", "work", "merged"} {
			if err := os.MkdirAll(own+"/"+dir, 0o755); err != nil {
				println(err.Error())
				return 99
			}
		}
		m := overlayfs.Mount{
			Lower: []string{own + "/lower"}, Upper: own + "/upper", Work: own + "/work",
			UserXattr: ns.User, Volatile: true,
		}
		if err := m.Mount(own + "/merged"); err != nil {
			println(err.Error())
			return 99
		}
		got, err := Run(background(), Spec{
			Args: []string{"sh", "-c", script}, Env: append(os.Environ(), mark),
			Dir: own + "/fixed", Source: own + "/merged", Private: true, Stdout: os.Stdout, Stderr: os.Stderr,
		})
		if err != nil {
			println(err.Error())
			return 99
		}
		return got.Status()
	}
}

package sandbox

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestExit(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		for script, want := range map[string]Exit{
			"true":                      {},
			"exit 3":                    {Code: 3},
			"exit 255":                  {Code: 255},
			"kill -9 $$":                {Signal: syscall.SIGKILL},
			"kill -TERM $$":             {Signal: syscall.SIGTERM},
			"sleep 1000 & kill -SEGV 0": {Signal: syscall.SIGSEGV},
			"trap 'exit 7' USR1; kill -USR1 $$; exit 1": {Code: 7},
		} {
			s := p.spec(script)
			s.Private = private
			got, err := Run(t.Context(), s)
			require.NoError(t, err, script)
			require.Equal(t, want, got, script)
		}
	})
	require.Equal(t, 137, Exit{Signal: syscall.SIGKILL}.Status())
	require.Equal(t, 3, Exit{Code: 3}.Status())
	require.Equal(t, 130, SignalError{syscall.SIGINT}.Status())
}

func TestCannotBeStarted(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		write := func(name, content string, mode os.FileMode) {
			require.NoError(t, os.WriteFile(filepath.Join(p.source, name), []byte(content), mode))
		}
		write("plain", "#!/bin/sh\n", 0o644)
		write("garbage", "\x01\x02", 0o755)
		write("lost", "#!/no/such/interpreter\n", 0o755)
		write("fine", "#!/bin/sh\nexit 5\n", 0o755)
		require.NoError(t, os.Mkdir(p.source+"/dir", 0o755))
		for name, want := range map[string]int{
			"no-such-command": 127, "./no-such-file": 127, "/no/such/file": 127, "./plain/x": 127, "./lost": 127,
			"./plain": 126, "./dir": 126, "./garbage": 126, "plain": 126,
		} {
			s := p.spec("")
			s.Private, s.Args = private, []string{name}
			s.Env = []string{"PATH=/usr/bin:/bin:" + p.fixed}
			_, err := Run(t.Context(), s)
			var start *StartError
			require.ErrorAs(t, err, &start, name)
			require.Equal(t, want, start.Status(), "%s: %v", name, err)
			require.ErrorContains(t, err, name)
		}
		for _, name := range []string{"fine", "./fine", p.fixed + "/fine"} {
			s := p.spec("")
			s.Private, s.Args = private, []string{name}
			// The first that is found may not be executed: go on.
			s.Env = []string{"PATH=/no/such:" + p.fixed + "/dir:" + p.fixed}
			got, err := Run(t.Context(), s)
			require.NoError(t, err)
			require.Equal(t, Exit{Code: 5}, got)
		}
	})
}

func TestBadSpec(t *testing.T) {
	p := newPlace(t, os.Geteuid())
	for name, change := range map[string]func(s *Spec){
		"no command":        func(s *Spec) { s.Args = nil },
		"empty command":     func(s *Spec) { s.Args = []string{""} },
		"no directory":      func(s *Spec) { s.Dir = "" },
		"relative":          func(s *Spec) { s.Dir = "x" },
		"relative source":   func(s *Spec) { s.Source = "x" },
		"NUL in argument":   func(s *Spec) { s.Args = []string{"a\x00b"} },
		"NUL in variable":   func(s *Spec) { s.Env = []string{"A=\x00"} },
		"relative mount":    func(s *Spec) { s.Mounts = []Mount{{"/", "x", false}} },
		"negative patience": func(s *Spec) { s.Grace = -1 },
	} {
		s := p.spec("true")
		change(&s)
		_, err := Run(t.Context(), s)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
	for name, change := range map[string]func(s *Spec){
		"read-only": func(s *Spec) { s.ReadOnly = true },
		"mounts":    func(s *Spec) { s.Mounts = []Mount{{"/", "/x", false}} },
	} {
		s := p.spec("true")
		s.Private = false
		change(&s)
		_, err := Run(t.Context(), s)
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, name)
	}
	require.False(t, exists(p.fixed), "nothing has happened")
}

func TestPreparationFails(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		s := p.spec("true")
		s.Private, s.Source = private, p.dir+"/missing"
		_, err := Run(t.Context(), s)
		require.ErrorIs(t, err, syscall.ENOENT)
		require.ErrorContains(t, err, "missing")
		var start *StartError
		require.NotErrorAs(t, err, &start, "it is not the command that is missing")
		require.False(t, exists(p.fixed), "nothing has changed")

		s.Source = p.dir + "/file"
		require.NoError(t, os.WriteFile(s.Source, nil, 0o644))
		_, err = Run(t.Context(), s)
		require.ErrorIs(t, err, syscall.ENOTDIR)

		s.Source, s.Args = p.source, []string{"no-such-command"}
		_, err = Run(t.Context(), s)
		require.ErrorAs(t, err, &start)
		require.Equal(t, private, exists(p.fixed), "no link stays")
	})
	t.Run("occupied", func(t *testing.T) {
		p := newPlace(t, os.Geteuid())
		require.NoError(t, os.MkdirAll(p.fixed+"/precious", 0o755))
		s := p.spec("true")
		s.Private = false
		_, err := Run(t.Context(), s)
		require.ErrorIs(t, err, syscall.ENOTEMPTY)
		require.DirExists(t, p.fixed+"/precious")
	})
}

func TestTree(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		mark := newMark()
		for i := range 2 {
			s := p.spec("pwd > pwd; echo $PWD > PWD; echo x >> lines; readlink /proc/self/exe > /dev/null")
			s.Private, s.Env = private, append(s.Env, mark, "PWD=/somewhere/else")
			got, err := Run(t.Context(), s)
			require.NoError(t, err)
			require.Equal(t, Exit{}, got)
			require.Equal(t, p.fixed, read(t, p.source, "pwd"), "run %d", i)
			require.Equal(t, p.fixed, read(t, p.source, "PWD"))
			require.Equal(t, strings.Repeat("x\n", i)+"x", read(t, p.source, "lines"))
			p.requireNothingLeft(t, mark)
		}
		if private {
			names, err := os.ReadDir(p.fixed)
			require.NoError(t, err)
			require.Empty(t, names, "outside, the fixed path is an empty directory")
		} else {
			require.False(t, exists(p.fixed), "the link is gone")
		}
	})
	// The two ways follow each other on one path.
	t.Run("alternating", func(t *testing.T) {
		needRoot(t)
		p := newPlace(t, os.Geteuid())
		for i := range 4 {
			s := p.spec("touch done")
			s.Private = i%2 == 0
			_, err := Run(t.Context(), s)
			require.NoError(t, err)
			require.NoError(t, os.Remove(p.source+"/done"))
		}
		require.NoError(t, os.Symlink(p.dir, p.fixed), "the link of a run that was killed")
		s := p.spec("pwd -P")
		var out bytes.Buffer
		s.Stdout = &out
		_, err := Run(t.Context(), s)
		require.NoError(t, err)
		require.Equal(t, p.fixed+"\n", out.String())
	})
	t.Run("without source", func(t *testing.T) {
		p := newPlace(t, os.Geteuid())
		s := p.spec("touch here")
		s.Private, s.Source, s.Dir = false, "", p.source
		_, err := Run(t.Context(), s)
		require.NoError(t, err)
		require.FileExists(t, p.source+"/here")
	})
}

func TestReadOnlyTree(t *testing.T) {
	needRoot(t)
	p := newPlace(t, os.Geteuid())
	require.NoError(t, os.WriteFile(p.source+"/f", nil, 0o644))
	require.NoError(t, os.Mkdir(p.source+"/cache", 0o755))
	require.NoError(t, os.Mkdir(p.dir+"/extra", 0o755))
	for _, source := range []string{p.source, ""} {
		s := p.spec(`touch f 2>/dev/null && exit 1; touch new 2>/dev/null && exit 2; touch cache/written`)
		s.Source, s.ReadOnly = source, true
		if source == "" {
			s.Dir = p.source
		}
		s.Mounts = []Mount{{Source: p.dir + "/extra", Target: s.Dir + "/cache"}}
		got, err := Run(t.Context(), s)
		require.NoError(t, err)
		require.Equal(t, Exit{}, got)
		require.FileExists(t, p.dir+"/extra/written")
		require.NoError(t, os.Remove(p.dir+"/extra/written"))
	}
	require.NoError(t, os.WriteFile(p.source+"/f", []byte("x"), 0o644), "outside it can be written as ever")
	p.requireNoMount(t)
}

func TestMounts(t *testing.T) {
	needRoot(t)
	p := newPlace(t, os.Geteuid())
	require.NoError(t, os.Mkdir(p.dir+"/extra", 0o755))
	require.NoError(t, os.WriteFile(p.dir+"/secret", []byte("s3cret"), 0o600))
	s := p.spec(`touch made/dir/x 2>/dev/null && exit 1; [ "$(cat made/token)" = s3cret ] || exit 2; echo new > made/token`)
	s.Mounts = []Mount{
		{Source: p.dir + "/extra", Target: p.fixed + "/made/dir", ReadOnly: true},
		{Source: p.dir + "/secret", Target: p.fixed + "/made/token"},
	}
	got, err := Run(t.Context(), s)
	require.NoError(t, err)
	require.Equal(t, Exit{}, got)
	require.Equal(t, "new", read(t, p.dir, "secret"))
	require.Empty(t, read(t, p.source, "made/token"), "only the mount point stays in the tree")
	p.requireNoMount(t)

	s.Mounts[0].Source = p.dir + "/missing"
	_, err = Run(t.Context(), s)
	require.ErrorIs(t, err, syscall.ENOENT)
}

func TestEnvironment(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		t.Setenv("FROM_LAMINA", "must not be seen")
		var out bytes.Buffer
		s := p.spec("")
		s.Private, s.Args, s.Stdout = private, []string{"env", "-0"}, &out
		s.Env = []string{"PATH=/no", "A=1", "B=x\ny", "RAW=\xff\xfe", "A=2", "EMPTY=", "PATH=/usr/bin:/bin", "PWD=/no"}
		_, err := Run(t.Context(), s)
		require.NoError(t, err)
		got := strings.Split(strings.TrimSuffix(out.String(), "\x00"), "\x00")
		slices.Sort(got)
		require.Equal(t, []string{"A=2", "B=x\ny", "EMPTY=", "PATH=/usr/bin:/bin", "PWD=" + p.fixed, "RAW=\xff\xfe"}, got)
	})
}

// The command has its standard files and nothing else.
func TestDescriptors(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		r, w, err := os.Pipe()
		require.NoError(t, err)
		defer r.Close()
		defer w.Close()
		var out bytes.Buffer
		s := p.spec("ls /proc/self/fd")
		s.Args = []string{"ls", "/proc/self/fd"}
		s.Private, s.Stdout = private, &out
		_, err = Run(t.Context(), s)
		require.NoError(t, err)
		require.Equal(t, []string{"0", "1", "2", "3"}, strings.Fields(out.String()), "3 is the directory being read")
	})
}

func TestNamespaceSeen(t *testing.T) {
	needRoot(t)
	p := newPlace(t, os.Geteuid())
	var out bytes.Buffer
	s := p.spec("ls -d /proc/[0-9]* | wc -l; cat /proc/1/comm; ps -o sid= -p $$ 2>/dev/null | tr -d ' '")
	s.Stdout = &out
	_, err := Run(t.Context(), s)
	require.NoError(t, err)
	lines := strings.Fields(out.String())
	require.Contains(t, []string{"3", "4"}, lines[0], "/proc shows init, the shell and its children only")
	require.Equal(t, "lamina-init", lines[1])
}

func TestBackgroundIsKilled(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		mark := newMark()
		s := p.spec(`sleep 1000 &
			setsid sleep 1000 &
			(nohup sleep 1000 >/dev/null 2>&1 &)
			( (trap '' TERM HUP INT; setsid sleep 1000 &) & )
			(exec setsid sh -c 'setsid sleep 1000 & sleep 1000' &)
			exit 4`)
		s.Private, s.Env = private, append(s.Env, mark)
		got, err := Run(t.Context(), s)
		require.NoError(t, err)
		require.Equal(t, Exit{Code: 4}, got)
		p.requireNothingLeft(t, mark)
	})
}

func TestCancel(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		for name, test := range map[string]struct {
			script string
			cause  error
			want   Exit
		}{
			"terminated":       {"touch ready; sleep 1000", errors.New("enough"), Exit{Signal: syscall.SIGTERM}},
			"interrupted":      {"trap 'exit 9' INT; touch ready; while :; do sleep 1000 & wait; done", SignalError{syscall.SIGINT}, Exit{Code: 9}},
			"background, too":  {"setsid sleep 1000 & trap 'wait; exit 8' TERM; touch ready; wait", errors.New("enough"), Exit{Code: 8}},
			"does not listen":  {"trap '' TERM; touch ready; while :; do sleep 1000; done", errors.New("enough"), Exit{Signal: syscall.SIGKILL}},
			"stopped":          {"touch ready; kill -STOP $$", errors.New("enough"), Exit{Signal: syscall.SIGTERM}},
			"wrapped a signal": {"touch ready; sleep 1000", fmt.Errorf("x: %w", SignalError{syscall.SIGHUP}), Exit{Signal: syscall.SIGHUP}},
		} {
			t.Run(name, func(t *testing.T) {
				mark := newMark()
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				s := p.spec(test.script)
				s.Private, s.Env = private, append(s.Env, mark)
				if name == "does not listen" {
					s.Grace = 20 * time.Millisecond
				}
				go func() {
					for !exists(p.source+"/ready") && ctx.Err() == nil {
						runtime.Gosched()
					}
					cancel(test.cause)
				}()
				got, err := Run(ctx, s)
				require.ErrorIs(t, err, test.cause)
				require.Equal(t, test.want, got)
				p.requireNothingLeft(t, mark)
				require.NoError(t, os.Remove(p.source+"/ready"))
			})
		}
		t.Run("before", func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			cause := errors.New("never mind")
			cancel(cause)
			_, err := Run(ctx, p.spec("touch ran"))
			require.ErrorIs(t, err, cause)
			require.False(t, exists(p.source+"/ran"))
		})
	})
}

func TestSignals(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		signals := make(chan os.Signal, 1)
		r, w, err := os.Pipe()
		require.NoError(t, err)
		defer r.Close()
		s := p.spec("trap 'echo got; exit 6' USR1; echo ready; while :; do sleep 1000 & wait; done")
		s.Private, s.Signals, s.Stdout = private, signals, w
		result := make(chan Exit, 1)
		go func() {
			got, err := Run(t.Context(), s)
			if err != nil {
				t.Error(err)
			}
			_ = w.Close()
			result <- got
		}()
		buf := make([]byte, 6)
		_, err = io.ReadFull(r, buf)
		require.NoError(t, err)
		require.Equal(t, "ready\n", string(buf))
		signals <- syscall.SIGUSR1
		rest, err := io.ReadAll(r)
		require.NoError(t, err)
		require.Equal(t, "got\n", string(rest))
		require.Equal(t, Exit{Code: 6}, <-result)
	})
}

func TestStdin(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		s := p.spec("cat > copy; readlink /proc/$$/fd/0 > stdin")
		s.Private = private
		_, err := Run(t.Context(), s)
		require.NoError(t, err)
		require.Empty(t, read(t, p.source, "copy"))
		require.Equal(t, "/dev/null", read(t, p.source, "stdin"))

		require.NoError(t, os.WriteFile(p.dir+"/in", []byte("input"), 0o644))
		s.Stdin, err = os.Open(p.dir + "/in")
		require.NoError(t, err)
		defer s.Stdin.Close()
		_, err = Run(t.Context(), s)
		require.NoError(t, err)
		require.Equal(t, "input", read(t, p.source, "copy"))
	})
}

func TestOutput(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		run := func(s Spec) (Exit, error) {
			s.Private = private
			return Run(t.Context(), s)
		}
		t.Run("huge", func(t *testing.T) {
			const size = 16 << 20
			sum := sha256.New()
			n := &counter{w: sum}
			s := p.spec(fmt.Sprintf("head -c %d /dev/zero; head -c 70000 /dev/zero >&2", size))
			var other bytes.Buffer
			s.Stdout, s.Stderr = n, &other
			_, err := run(s)
			require.NoError(t, err)
			require.Equal(t, size, n.n)
			require.Equal(t, 70000, other.Len())
			require.Equal(t, sha256.Sum256(make([]byte, size)), [32]byte(sum.Sum(nil)))
		})
		t.Run("one writer for both keeps the order", func(t *testing.T) {
			s := p.spec("for i in 1 2 3 4; do echo $i; echo e$i >&2; done")
			var both bytes.Buffer
			s.Stdout, s.Stderr = &both, &both
			_, err := run(s)
			require.NoError(t, err)
			require.Equal(t, "1\ne1\n2\ne2\n3\ne3\n4\ne4\n", both.String())
		})
		t.Run("a slow writer gets all", func(t *testing.T) {
			// The pipe is full when the command ends; the writer is let go
			// only after the sandbox has been gone for longer than drain.
			s := p.spec("head -c 60000 /dev/zero; touch ended")
			slow := &gated{gate: make(chan struct{})}
			s.Stdout = slow
			go func() {
				for !exists(p.source + "/ended") {
					runtime.Gosched()
				}
				time.AfterFunc(3*drain, func() { close(slow.gate) })
			}()
			_, err := run(s)
			require.NoError(t, err)
			require.Equal(t, 60000, slow.n)
		})
		t.Run("a failing writer", func(t *testing.T) {
			s := p.spec("while :; do echo x; done")
			full := errors.New("disk full")
			s.Stdout = writerFunc(func([]byte) (int, error) { return 0, full })
			got, err := run(s)
			require.ErrorIs(t, err, full)
			require.Equal(t, Exit{Signal: syscall.SIGPIPE}, got)
		})
		t.Run("held by somebody outside", func(t *testing.T) {
			s := p.spec("echo $$ >&2; read line < hold; echo last")
			require.NoError(t, syscall.Mkfifo(p.source+"/hold", 0o600))
			mark := newMark()
			s.Env = append(s.Env, mark)
			var out bytes.Buffer
			s.Stdout = &out
			ended := make(chan error, 1)
			go func() {
				_, err := run(s)
				ended <- err
			}()
			var pids []int
			eventually(t, func() bool { pids = alive(t, mark); return len(pids) > 0 }, "the command runs")
			held, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/1", pids[0]), os.O_WRONLY, 0)
			require.NoError(t, err)
			defer held.Close()
			require.NoError(t, os.WriteFile(p.source+"/hold", []byte("go\n"), 0o600))
			require.NoError(t, <-ended, "the end of the command is the end of its output")
			require.Equal(t, "last\n", out.String())
		})
		t.Run("discarded", func(t *testing.T) {
			got, err := run(p.spec("head -c 1000000 /dev/zero && exit 2"))
			require.NoError(t, err)
			require.Equal(t, Exit{Code: 2}, got)
		})
		t.Run("closed by the command", func(t *testing.T) {
			require.NoError(t, syscall.Mkfifo(p.source+"/fifo", 0o600))
			r, w, err := os.Pipe()
			require.NoError(t, err)
			defer r.Close()
			s := p.spec("echo first; exec >&- 2>&-; read line < fifo; exit 3")
			s.Stdout, s.Stderr = w, w
			result := make(chan Exit, 1)
			go func() {
				got, err := run(s)
				if err != nil {
					t.Error(err)
				}
				result <- got
			}()
			buf := make([]byte, 6)
			_, err = io.ReadFull(r, buf)
			require.NoError(t, err)
			require.NoError(t, w.Close())
			rest, err := io.ReadAll(r)
			require.NoError(t, err, "init keeps no end of the pipe open")
			require.Empty(t, rest)
			require.NoError(t, os.WriteFile(p.source+"/fifo", []byte("go\n"), 0o600))
			require.Equal(t, Exit{Code: 3}, <-result)
		})
	})
}

type counter struct {
	w io.Writer
	n int
}

func (c *counter) Write(p []byte) (int, error) {
	c.n += len(p)
	return c.w.Write(p)
}

type gated struct {
	gate chan struct{}
	n    int
}

func (g *gated) Write(p []byte) (int, error) {
	<-g.gate
	g.n += len(p)
	return len(p), nil
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestManyRunsLeaveNothing(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		before := goleak.IgnoreCurrent()
		descriptors, err := readNames("/proc/self/fd")
		require.NoError(t, err)
		for i := range 20 {
			var out bytes.Buffer
			s := p.spec(fmt.Sprintf("sleep 1000 & echo %d; exit %d", i, i))
			s.Private, s.Stdout = private, &out
			got, err := Run(t.Context(), s)
			require.NoError(t, err)
			require.Equal(t, Exit{Code: i}, got)
			require.Equal(t, fmt.Sprintln(i), out.String())
		}
		goleak.VerifyNone(t, before)
		after, err := readNames("/proc/self/fd")
		require.NoError(t, err)
		require.Len(t, after, len(descriptors))
		_, err = syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		require.ErrorIs(t, err, syscall.ECHILD, "no child and no zombie is left")
	})
}

// The kernel sends the parent-death signal when the thread that forked ends.
func TestThreadsComeAndGo(t *testing.T) {
	eachWay(t, func(t *testing.T, p place, private bool) {
		stop := make(chan struct{})
		var churn, runs sync.WaitGroup
		churn.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				var threads sync.WaitGroup
				for range 4 {
					// A goroutine that ends while it is locked takes its
					// thread with it.
					threads.Go(func() { runtime.LockOSThread() })
				}
				threads.Wait()
			}
		})
		for i := range 4 {
			s := p.spec("sleep 0.2; exit 3")
			s.Private, s.Dir = private, fmt.Sprint(p.fixed, i)
			runs.Go(func() {
				got, err := Run(t.Context(), s)
				if err != nil || got.Code != 3 {
					t.Errorf("%+v %v", got, err)
				}
			})
		}
		runs.Wait()
		close(stop)
		churn.Wait()
	})
}

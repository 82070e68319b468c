package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot/overlayfs"
)

func itoa(n int) string { return strconv.Itoa(n) }

func background() context.Context { return context.Background() }

// A report is what the helper "report" says about itself after Enter.
type report struct {
	Namespace Namespace
	Pid, Uid  int
	Args      []string
	Mounts    string // the mount namespace
	Comm      string
	Stage     bool // the variable is still there
	Inherited string
}

func init() {
	helpers["report"] = func(args []string) int {
		ns := Enter()
		mounts, err := os.Readlink("/proc/self/ns/mnt")
		if err != nil {
			return 99
		}
		comm, err := os.ReadFile("/proc/self/comm")
		if err != nil {
			return 99
		}
		_, stage := os.LookupEnv(envStage)
		err = json.NewEncoder(os.Stdout).Encode(report{
			Namespace: ns, Pid: os.Getpid(), Uid: os.Getuid(), Args: args, Mounts: mounts,
			Comm: strings.TrimSpace(string(comm)), Stage: stage, Inherited: os.Getenv("INHERITED"),
		})
		if err != nil {
			return 99
		}
		if len(args) > 0 {
			code, err := strconv.Atoi(args[0])
			if err != nil {
				return 0
			}
			return code
		}
		return 0
	}
	// Gives up CAP_SYS_ADMIN for good and becomes the helper "report".
	helpers["weak root"] = func([]string) int {
		runtime.LockOSThread()
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_ADMIN, 0, 0, 0); err != nil {
			return 99
		}
		_ = syscall.Exec("/proc/self/exe", os.Args[:1], []string{envHelper + "=report"})
		return 99
	}
	// Forbids further user namespaces and becomes the helper "report".
	helpers["no user namespaces"] = func([]string) int {
		if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 99
		}
		_ = syscall.Exec("/proc/self/exe", os.Args[:1], []string{envHelper + "=report"})
		return 99
	}
	// Mounts something and shows that it is there.
	helpers["mount"] = func(args []string) int {
		if ns := Enter(); !ns.Private {
			return 98
		}
		if err := unix.Mount("tmpfs", args[0], "tmpfs", 0, ""); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 99
		}
		if err := os.WriteFile(args[0]+"/inside", nil, 0o644); err != nil {
			return 99
		}
		return 0
	}
	helpers["sleep"] = func([]string) int {
		Enter()
		fmt.Println(os.Getpid())
		select {}
	}
}

// reportOf runs the command and reads its report.
func reportOf(t *testing.T, cmd *exec.Cmd) (r report, pid int) {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout = &out
	require.NoError(t, cmd.Start())
	err := cmd.Wait()
	require.NotEmpty(t, out.String(), "%v", err)
	require.NoError(t, json.Unmarshal(out.Bytes(), &r))
	return r, cmd.Process.Pid
}

func ownMounts(t *testing.T) string {
	t.Helper()
	link, err := os.Readlink("/proc/self/ns/mnt")
	require.NoError(t, err)
	return link
}

func TestEnterAsRoot(t *testing.T) {
	needRoot(t)
	p := newPlace(t, 0)
	cmd := p.program(t, "report", "7", "--flag", "a b", "")
	cmd.Env = append(cmd.Env, "INHERITED=yes")
	r, pid := reportOf(t, cmd)
	require.Equal(t, 7, cmd.ProcessState.ExitCode())
	require.Equal(t, Namespace{Private: true}, r.Namespace)
	require.Equal(t, pid, r.Pid, "the process stays the same")
	require.Equal(t, []string{"7", "--flag", "a b", ""}, r.Args)
	require.NotEqual(t, ownMounts(t), r.Mounts)
	require.Equal(t, "program", r.Comm)
	require.False(t, r.Stage)
	require.Equal(t, "yes", r.Inherited)
}

func TestEnterAsOrdinaryUser(t *testing.T) {
	needRoot(t)
	p := newPlace(t, someUser)
	cmd := p.program(t, "report", "7", "--flag", "a b", "")
	cmd.Env = append(cmd.Env, "INHERITED=yes")
	r, pid := reportOf(t, cmd)
	require.Equal(t, 7, cmd.ProcessState.ExitCode(), "the first process exits as the other does")
	require.Equal(t, Namespace{Private: true, User: true}, r.Namespace)
	require.NotEqual(t, pid, r.Pid)
	require.Equal(t, someUser, r.Uid)
	require.Equal(t, []string{"7", "--flag", "a b", ""}, r.Args)
	require.NotEqual(t, ownMounts(t), r.Mounts)
	require.Equal(t, "program", r.Comm)
	require.False(t, r.Stage)
	require.Equal(t, "yes", r.Inherited)
}

// A variable that was left by whatever started the program means nothing.
func TestEnterWithForeignStage(t *testing.T) {
	needRoot(t)
	for _, user := range []int{0, someUser} {
		for _, value := range []string{"mount:1", "user:1", "user:", "nonsense", ""} {
			p := newPlace(t, user)
			cmd := p.program(t, "report")
			cmd.Env = append(cmd.Env, envStage+"="+value)
			r, _ := reportOf(t, cmd)
			require.Equal(t, Namespace{Private: true, User: user != 0}, r.Namespace, value)
			require.NotEqual(t, ownMounts(t), r.Mounts)
			require.False(t, r.Stage)
		}
	}
}

func TestEnterWithoutRights(t *testing.T) {
	needRoot(t)
	t.Run("root without CAP_SYS_ADMIN", func(t *testing.T) {
		p := newPlace(t, 0)
		r, pid := reportOf(t, p.program(t, "weak root"))
		require.False(t, r.Namespace.Private)
		require.False(t, r.Namespace.User)
		require.Contains(t, r.Namespace.Reason, "operation not permitted")
		require.Equal(t, pid, r.Pid)
		require.Equal(t, ownMounts(t), r.Mounts)
	})
	t.Run("user without user namespaces", func(t *testing.T) {
		p := newPlace(t, someUser)
		cmd := p.program(t, "no user namespaces")
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: someUser, HostID: someUser, Size: 1}}
		cmd.SysProcAttr.GidMappings = cmd.SysProcAttr.UidMappings
		cmd.SysProcAttr.Credential.NoSetGroups = true
		cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_SYS_RESOURCE}
		r, pid := reportOf(t, cmd)
		require.False(t, r.Namespace.Private)
		require.Contains(t, r.Namespace.Reason, "user namespace")
		require.NotContains(t, r.Namespace.Reason, "\n")
		require.Equal(t, pid, r.Pid, "the program goes on where it was")
		require.False(t, r.Stage)
	})
}

// Not even where mounts are shared between namespaces, as a systemd host
// shares all of them.
func TestMountsAreNotSeenOutside(t *testing.T) {
	needRoot(t)
	for _, user := range []int{0, someUser} {
		p := newPlace(t, user)
		require.NoError(t, unix.Mount(p.dir, p.dir, "", unix.MS_BIND, ""))
		t.Cleanup(func() { require.NoError(t, unix.Unmount(p.dir, unix.MNT_DETACH)) })
		require.NoError(t, unix.Mount("", p.dir, "", unix.MS_SHARED, ""))
		before := mountsBelow(t, p.dir)

		cmd := p.program(t, "mount", p.source)
		require.NoError(t, cmd.Run())
		require.False(t, exists(p.source+"/inside"))
		require.Equal(t, before, mountsBelow(t, p.dir))

		s := p.spec("touch running; read line < fifo; rm running")
		require.NoError(t, syscall.Mkfifo(p.source+"/fifo", 0o666))
		require.NoError(t, os.Chmod(p.source+"/fifo", 0o666))
		// Root may run a command without entering first, as a daemon does.
		for _, enter := range []bool{true, false}[:2-min(user, 1)] {
			cmd = p.runner(t, s, enter)
			require.NoError(t, cmd.Start())
			eventually(t, func() bool { return exists(p.source + "/running") }, "the command runs")
			require.Equal(t, before, mountsBelow(t, p.dir), "while the command runs")
			require.NoError(t, os.WriteFile(p.source+"/fifo", []byte("go\n"), 0))
			require.NoError(t, cmd.Wait())
		}
	}
}

func TestSignalsReachTheProgram(t *testing.T) {
	needRoot(t)
	for _, user := range []int{0, someUser} {
		for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGKILL} {
			t.Run(fmt.Sprint(user, signal), func(t *testing.T) {
				p := newPlace(t, user)
				cmd := p.program(t, "sleep")
				out, err := cmd.StdoutPipe()
				require.NoError(t, err)
				require.NoError(t, cmd.Start())
				var pid int
				_, err = fmt.Fscanln(out, &pid)
				require.NoError(t, err)
				require.NoError(t, cmd.Process.Signal(signal))
				require.Error(t, cmd.Wait())
				status := cmd.ProcessState.Sys().(syscall.WaitStatus)
				if user == 0 || signal == syscall.SIGKILL {
					require.Equal(t, signal, status.Signal(), "the end is a natural one")
				} else {
					require.Equal(t, 128+int(signal), status.ExitStatus())
				}
				eventually(t, func() bool { return unix.Kill(pid, 0) == unix.ESRCH }, "the program has ended")
			})
		}
	}
}

// What a command of an ordinary user sees is what it would see without all
// this, and it can do no more.
func TestOrdinaryUser(t *testing.T) {
	needRoot(t)
	for _, enter := range []bool{true, false} {
		t.Run(fmt.Sprintf("enter=%t", enter), func(t *testing.T) {
			p := newPlace(t, someUser)
			s := p.spec(`id -u > uid; id -g > gid; env > env; pwd -P > pwd; pwd > PWD
				grep ^Cap /proc/self/status > caps
				mount -t tmpfs none . 2>/dev/null && exit 1
				mkdir -m 000 closed; ls closed 2>/dev/null && exit 2
				exit 0`)
			s.Private = enter
			cmd := p.runner(t, s, enter)
			out, err := cmd.Output()
			require.NoError(t, err, string(out))
			require.NoError(t, os.Chmod(p.source+"/closed", 0o700))
			require.Equal(t, Namespace{Private: enter, User: enter}, Namespace{Private: p.result(t).Namespace.Private, User: p.result(t).Namespace.User})
			require.Equal(t, itoa(someUser), read(t, p.source, "uid"))
			require.Equal(t, itoa(someUser), read(t, p.source, "gid"))
			require.NotContains(t, read(t, p.source, "env"), envStage)
			require.NotContains(t, read(t, p.source, "env"), envHelper)
			require.Equal(t, p.fixed, read(t, p.source, "PWD"))
			if enter {
				require.Equal(t, p.fixed, read(t, p.source, "pwd"))
			}
			for line := range strings.Lines(read(t, p.source, "caps")) {
				name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
				if name != "CapBnd" {
					require.Equal(t, "0000000000000000", strings.TrimSpace(value), name)
				}
			}
			var st unix.Stat_t
			require.NoError(t, unix.Stat(p.source+"/uid", &st))
			require.Equal(t, uint32(someUser), st.Uid, "files belong to the user outside, too")
			p.requireNoMount(t)
		})
	}
}

// Root stays root, with what root may do.
func TestRootStaysRoot(t *testing.T) {
	needRoot(t)
	p := newPlace(t, 0)
	s := p.spec("id -u > uid; grep ^CapEff /proc/self/status > caps; env > env; touch f && chown 12345:54321 f")
	out, err := p.runner(t, s, true).Output()
	require.NoError(t, err, string(out))
	require.Equal(t, "0", read(t, p.source, "uid"))
	require.NotContains(t, read(t, p.source, "env"), envStage)
	own, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	require.Contains(t, string(own), read(t, p.source, "caps"))
}

func TestOverlayInNamespace(t *testing.T) {
	needRoot(t)
	for name, user := range map[string]int{"root": 0, "ordinary user": someUser} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, user)
			own := p.dir + "/own"
			require.NoError(t, os.Mkdir(own+"/lower", 0o755))
			require.NoError(t, os.WriteFile(own+"/lower/gone", []byte("1"), 0o644))
			require.NoError(t, os.WriteFile(own+"/lower/kept", []byte("2"), 0o644))
			for _, name := range []string{"", "/gone", "/kept"} {
				require.NoError(t, os.Chown(own+"/lower"+name, user, user))
			}
			out, err := p.program(t, "overlay", own, newMark(), "cat kept && rm gone && echo 3 > made && pwd").Output()
			require.NoError(t, err)
			require.Equal(t, "2"+own+"/fixed\n", string(out))
			require.Equal(t, "3", read(t, own, "upper/made"))
			var st unix.Stat_t
			require.NoError(t, unix.Lstat(own+"/upper/gone", &st))
			require.Equal(t, uint32(unix.S_IFCHR), st.Mode&unix.S_IFMT, "a whiteout")
			require.Equal(t, "1", read(t, own, "lower/gone"))
			p.requireNoMount(t)
		})
	}
}

// A sandbox that is still running does not keep what another one used.
func TestUnmountedWhileOthersRun(t *testing.T) {
	needRoot(t)
	for name, user := range map[string]int{"root": 0, "ordinary user": someUser} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t, user)
			cmd := p.program(t, "two", p.dir+"/own")
			out, err := cmd.Output()
			require.NoError(t, err, string(out))
			p.requireNoMount(t)
		})
	}
}

func init() {
	helpers["two"] = func(args []string) int {
		if err := two(Enter(), args[0]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 99
		}
		return 0
	}
}

// two runs a command in an overlay while another one runs in another, and
// wants its own upper directory back.
func two(ns Namespace, dir string) error {
	var uppers, trees []string
	for _, name := range []string{"one", "other"} {
		own := dir + "/" + name
		for _, sub := range []string{"/lower", "/upper", "/work", "/merged"} {
			if err := os.MkdirAll(own+sub, 0o755); err != nil {
				return err
			}
		}
		m := overlayfs.Mount{Lower: []string{own + "/lower"}, Upper: own + "/upper", Work: own + "/work", UserXattr: ns.User, Volatile: true}
		if err := m.Mount(own + "/merged"); err != nil {
			return err
		}
		uppers, trees = append(uppers, m.Upper), append(trees, own+"/merged")
	}
	run := func(i int, script string) error {
		exit, err := Run(background(), Spec{
			Args: []string{"sh", "-c", script}, Env: os.Environ(),
			Dir: fmt.Sprint(dir, "/fixed", i), Source: trees[i], Private: ns.Private,
		})
		if err == nil && exit != (Exit{}) {
			err = fmt.Errorf("script %q: %+v", script, exit)
		}
		return err
	}
	fifo := dir + "/fifo"
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- run(1, "echo running > "+fifo+"; read line < "+fifo) }()
	if _, err := os.ReadFile(fifo); err != nil { // it runs, with copies of both mounts
		return err
	}
	if err := run(0, "touch done"); err != nil {
		return err
	}
	if err := unix.Unmount(trees[0], 0); err != nil {
		return err
	}
	busy, err := overlayfs.InUse(uppers[0])
	if err == nil && busy {
		err = errors.New("what was unmounted is still in use")
	}
	return errors.Join(err, os.WriteFile(fifo, []byte("go\n"), 0), <-ended)
}

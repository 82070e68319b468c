package overlayfs

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// envHelper makes the test binary run one of helpers instead of the tests.
const envHelper = "OVERLAYFS_TEST_HELPER"

func TestMain(m *testing.M) {
	if name := os.Getenv(envHelper); name != "" {
		if err := helpers[name](os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Geteuid() == 0 && os.Getenv(envPrivate) == "" {
		// It returns where root may not mount, and the tests say so.
		fmt.Fprintln(os.Stderr, "no mount namespace for the tests:", intoPrivateNamespace())
	}
	os.Exit(m.Run())
}

// envPrivate says that the tests are in a mount namespace of their own.
const envPrivate = "OVERLAYFS_TEST_PRIVATE"

// intoPrivateNamespace starts the tests again in a mount namespace of their
// own. In the one of the machine, any process that makes itself a namespace
// while a test runs gets a copy of its mounts, and keeps them in use.
func intoPrivateNamespace() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), envPrivate+"=1"))
}

// helpers run in a process of their own, with its own mount namespace.
var helpers = map[string]func(args []string) error{
	// hold mounts lower on top of upper at target, says so, and ends with
	// its standard input; the mount ends with its namespace.
	"hold": func(args []string) error {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		m := Mount{Lower: args[:1], Upper: args[1], Work: args[2], Volatile: true}
		if err := m.Mount(args[3]); err != nil {
			return err
		}
		fmt.Println("mounted")
		_, err := io.Copy(io.Discard, os.Stdin)
		return err
	},
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getenv(envPrivate) == "" {
		t.Skip("needs root that may mount")
	}
}

// startHelper starts a helper in a mount namespace of its own, waits for its
// first line and returns a function that ends it.
func startHelper(t *testing.T, name string, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), envHelper+"="+name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			_ = in.Close()
			require.NoError(t, cmd.Wait())
		}
	}
	t.Cleanup(stop)
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "mounted\n", line)
	return stop
}

// A stack is a place for one mount: directories beside each other, all empty.
type stack struct {
	t   *testing.T
	dir string
}

func newStack(t *testing.T) stack { return stackAt(t, t.TempDir()) }

func stackAt(t *testing.T, dir string) stack {
	t.Helper()
	s := stack{t, dir}
	for _, name := range []string{"upper", "work", "m"} {
		require.NoError(t, os.MkdirAll(s.path(name), 0o755))
	}
	t.Cleanup(s.unmount)
	return s
}

func (s stack) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// tree makes a directory from lines "path" or "path=content"; a path that
// ends in a slash is a directory.
func (s stack) tree(name string, lines ...string) string {
	s.t.Helper()
	root := s.path(name)
	require.NoError(s.t, os.MkdirAll(root, 0o755))
	for _, line := range lines {
		path, content, _ := strings.Cut(line, "=")
		full := filepath.Join(root, path)
		if strings.HasSuffix(path, "/") {
			require.NoError(s.t, os.MkdirAll(full, 0o755))
			continue
		}
		require.NoError(s.t, os.MkdirAll(filepath.Dir(full), 0o755))
		require.NoError(s.t, os.WriteFile(full, []byte(content), 0o644))
	}
	return root
}

// writable is a mount of lower with the stack's upper directory.
func (s stack) writable(lower ...string) Mount {
	return Mount{Lower: lower, Upper: s.path("upper"), Work: s.path("work")}
}

func (s stack) mount(m Mount) {
	s.t.Helper()
	require.NoError(s.t, m.Mount(s.path("m")))
}

func (s stack) unmount() {
	s.t.Helper()
	mounted, err := mountinfo.Mounted(s.path("m"))
	require.NoError(s.t, err)
	if mounted {
		require.NoError(s.t, unix.Unmount(s.path("m"), 0))
	}
}

// show reads the mounted tree as lines "path" or "path=content".
func (s stack) show() []string {
	s.t.Helper()
	return show(s.t, s.path("m"))
}

func show(t *testing.T, root string) []string {
	t.Helper()
	lines := []string{}
	require.NoError(t, filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			lines = append(lines, rel+"/")
		case d.Type().IsRegular():
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			lines = append(lines, rel+"="+string(content))
		default:
			lines = append(lines, rel)
		}
		return nil
	}))
	return lines
}

// mounts counts the mounts below dir, itself not counted.
func mounts(t *testing.T, dir string) int {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(strings.TrimSuffix(dir, "/") + "/"))
	require.NoError(t, err)
	return len(infos)
}

func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(names)
}

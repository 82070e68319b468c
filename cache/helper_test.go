package cache_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
)

// helperEnv names the part that the test binary plays when a test starts it as
// a process of its own.
const helperEnv = "LAMINA_CACHE_TEST_HELPER"

func runHelper(name string, args []string) int {
	helpers := map[string]func(args []string) error{"hold": helpHold, "load": helpLoad, "private": helpPrivate}
	if err := helpers[name](args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// namespaceEnv says that the tests run in a mount namespace of their own.
const namespaceEnv = "LAMINA_CACHE_TEST_NAMESPACE"

// inOwnNamespace runs the tests in a mount namespace of their own. Otherwise a
// process that makes a namespace meanwhile, such as the test of another
// package, would copy our mounts into it and keep upper directories in use
// after we unmounted them.
func inOwnNamespace() int {
	// The signal at our death belongs to the thread that starts the child.
	runtime.LockOSThread()
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), namespaceEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// Go makes all mounts of the new namespace private.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, "run the tests in a mount namespace:", err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

// helper is such a process.
type helper struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
	ended bool
}

func startHelper(t testing.TB, name string, args ...string) *helper {
	return startHelperIn(t, nil, name, args...)
}

func startHelperIn(t testing.TB, namespaces *syscall.SysProcAttr, name string, args ...string) *helper {
	self, err := os.Executable()
	require.NoError(t, err)
	h := &helper{t: t, cmd: exec.CommandContext(t.Context(), self, args...)}
	h.cmd.Env = append(os.Environ(), helperEnv+"="+name, "GORACE=atexit_sleep_ms=0")
	h.cmd.Stderr = os.Stderr
	h.cmd.SysProcAttr = namespaces
	h.stdin, err = h.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := h.cmd.StdoutPipe()
	require.NoError(t, err)
	h.out = bufio.NewReader(out)
	require.NoError(t, h.cmd.Start())
	t.Cleanup(h.kill)
	return h
}

// kill ends the process with SIGKILL and waits for its end.
func (h *helper) kill() {
	if h.ended {
		return
	}
	h.ended = true
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
}

// quit lets the process end by itself.
func (h *helper) quit() {
	h.ended = true
	require.NoError(h.t, h.stdin.Close())
	require.NoError(h.t, h.cmd.Wait())
}

func (h *helper) line() string {
	h.t.Helper()
	line, err := h.out.ReadString('\n')
	require.NoError(h.t, err)
	return strings.TrimSuffix(line, "\n")
}

// startHolder starts a process that works in the record of id without having
// the store open, and returns when it has let go of the store.
func startHolder(w *world, id cache.ID, write, mount bool) (h *helper, path string) {
	w.Helper()
	if w.Manager != nil {
		w.closeStore()
	}
	h = startHelper(w, "hold", w.root, w.kind.name, w.boot, string(id), strconv.FormatBool(write), strconv.FormatBool(mount))
	word, path, _ := strings.Cut(h.line(), " ")
	require.Equal(w, "held", word)
	return h, path
}

// helpHold opens the store, detaches a record, closes the store, says so, and
// gives the record back when its standard input ends.
func helpHold(args []string) (err error) {
	root, kindName, boot, id := args[0], args[1], args[2], cache.ID(args[3])
	write, mount := args[4] == "true", args[5] == "true"
	ctx := context.Background()
	d, err := kindNamed(kindName).open(root)
	if err != nil {
		return err
	}
	m, err := cache.Open(ctx, cache.Options{Root: root, Driver: d, BootID: boot, Command: "the holder", SyncInterval: -1})
	if err != nil {
		return err
	}
	var hold *cache.Hold
	var mnt *cache.Mount
	if write {
		var mut *cache.MutableRef
		if mut, err = m.GetMutable(ctx, id); err != nil {
			return err
		}
		if mount {
			mnt, err = mut.Mount(ctx, cache.MountOptions{})
		}
		if err == nil {
			hold, err = mut.Detach(ctx)
		}
	} else {
		var imm *cache.ImmutableRef
		if imm, err = m.Get(ctx, id, cache.GetOptions{}); err != nil {
			return err
		}
		if mount {
			mnt, err = imm.Mount(ctx)
		}
		if err == nil {
			hold, err = imm.Detach(ctx)
		}
	}
	if err = errors.Join(err, m.Close(), d.Close()); err != nil {
		return err
	}
	if mnt != nil {
		fmt.Println("held", mnt.Path())
	} else {
		fmt.Println("held")
	}
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	if mnt != nil {
		err = mnt.Unmount()
	}
	return errors.Join(err, hold.Release())
}

// helpPrivate opens a store and closes it, as a process does that has a mount
// namespace of its own.
func helpPrivate(args []string) error {
	root, kindName, boot := args[0], args[1], args[2]
	d, err := kindNamed(kindName).open(root)
	if err != nil {
		return err
	}
	m, err := cache.Open(context.Background(), cache.Options{Root: root, Driver: d, BootID: boot, PrivateMounts: true})
	if err != nil {
		return err
	}
	return errors.Join(m.Close(), d.Close())
}

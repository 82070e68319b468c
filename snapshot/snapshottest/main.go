package snapshottest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// envOwn tells a test process that it runs in a mount namespace of its own.
const envOwn = "LAMINA_TEST_OWN_MOUNTS"

// Main runs tests in a mount namespace of their own and returns their exit
// code, for TestMain:
//
//	func TestMain(m *testing.M) { os.Exit(snapshottest.Main(m)) }
//
// A process that makes a mount namespace, such as a sandbox that another
// package tests at the same time, gets a copy of each mount there is. Where
// "/" is not a shared mount the copy outlives the unmounting here, so that
// upper directories stay in use for as long as that process runs. Mounts in
// a namespace of their own nobody copies. Without root, or where that is not
// allowed, the tests run as they are.
func Main(m interface{ Run() int }) int {
	if os.Getenv(envOwn) != "" {
		letGo()
		return m.Run()
	}
	if os.Geteuid() != 0 {
		return m.Run()
	}
	// The parent-death signal belongs to the thread that starts the child.
	runtime.LockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), envOwn+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, syscall.EPERM):
		return m.Run()
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "tests in a mount namespace of their own:", err)
	return 1
}

// letGo drops the copies of other processes' overlay mounts, for their sake.
func letGo() {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("overlay"))
	if err != nil {
		return
	}
	for _, m := range mounts {
		if m.Mountpoint != "/" {
			_ = unix.Unmount(m.Mountpoint, unix.MNT_DETACH) // of use to others only
		}
	}
}

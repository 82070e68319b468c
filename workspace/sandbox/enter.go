package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Stages of a program that went through Enter: "mount:<pid>" is the same
// process after it has executed itself, "user:<parent's pid>" the child in a
// user namespace. The pid tells them from a program further down that merely
// inherited the variable.
const (
	stageMount = "mount"
	stageUser  = "user"
)

// Namespace is what Enter got.
type Namespace struct {
	// Private says that this process is in a mount namespace that ends with
	// it, where it may mount, and may make namespaces for [Run].
	Private bool
	// User says that this took a user namespace, in which only the user's
	// own id exists. Overlay mounts then need user.* attributes.
	User bool
	// Reason says in one line for people why Private is false.
	Reason string
}

// Enter puts the program into a mount namespace that dies with it. It is
// called once, at the start of a verb that mounts: before files are opened
// and goroutines started, since it may start the program again from the
// beginning, with the same arguments, and return only there.
//
// Root with CAP_SYS_ADMIN executes itself anew in the same process. For an
// ordinary user the program goes on in a child in a new user namespace; the
// first process then passes signals on, exits as the child does, and takes the
// child with it when it is killed. The child is in a process group of its
// own, so that Ctrl-C at a terminal reaches it once.
//
// Where neither is allowed Enter returns in the first process, with the
// reason. Root without CAP_SYS_ADMIN, as in most containers, gets no user
// namespace: it would lose the right to give files to other users.
func Enter() Namespace {
	if stage, pid, ok := strings.Cut(os.Getenv(envStage), ":"); ok {
		switch {
		case stage == stageMount && pid == strconv.Itoa(os.Getpid()):
			forgetStage()
			return Namespace{Private: true}
		case stage == stageUser && pid == strconv.Itoa(os.Getppid()):
			forgetStage()
			confirm()
			return Namespace{Private: true, User: true}
		}
	}
	_ = os.Unsetenv(envStage) // of no meaning here
	var err error
	if os.Geteuid() == 0 {
		err = enterMount()
	} else {
		err = enterUser()
	}
	return Namespace{Reason: "no mount namespace: " + err.Error()}
}

// forgetStage removes the traces of the way here: commands must not see the
// variable, and ps should show the program's name instead of "exe".
func forgetStage() {
	_ = os.Unsetenv(envStage)
	_ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
}

// enterMount executes this program again in a new mount namespace, and
// returns only if that fails.
func enterMount() error {
	failed := make(chan error)
	go func() {
		// A namespace is a thread's until it executes something. If that
		// fails, the thread ends with this goroutine instead of serving
		// others in its namespace.
		runtime.LockOSThread()
		failed <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if err := makePrivate(); err != nil {
				return err
			}
			env := append(os.Environ(), fmt.Sprintf("%s=%s:%d", envStage, stageMount, os.Getpid()))
			// Not the path, which may name another program by now.
			return fmt.Errorf("execute itself: %w", syscall.Exec("/proc/self/exe", os.Args, env))
		}()
	}()
	return <-failed
}

// makePrivate cuts the mounts of this namespace off from those outside: what
// the host mounts is still seen here, what is mounted here is not seen there.
//
// Among themselves they are shared, with the namespaces that [Run] makes: each
// of those starts as a copy of all that is mounted here. Without it, what is
// unmounted here would stay mounted in every sandbox that is still running,
// and its upper directory in use.
func makePrivate() error {
	for _, propagation := range []uintptr{unix.MS_SLAVE, unix.MS_SHARED} {
		if err := unix.Mount("", "/", "", unix.MS_REC|propagation, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
	}
	return nil
}

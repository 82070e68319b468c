package sandbox

import (
	"errors"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// reapUntil waits for children, and for orphans that became ours, until the
// one with pid has ended, and returns how.
func reapUntil(pid int) unix.WaitStatus {
	for {
		var status unix.WaitStatus
		got, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			// No child at all: it cannot have ended unseen, but waiting on
			// would be for ever.
			return unix.WaitStatus(unix.SIGKILL)
		case got == pid && (status.Exited() || status.Signaled()):
			return status
		}
	}
}

// killAll kills all descendants and reaps them until none is left. Without a
// PID namespace, a descendant that has become another user cannot be killed;
// then it returns all the same.
func killAll(namespace bool) {
	// One that forks while the others are listed leaves a new orphan, so this
	// is repeated until no child is left.
	for signalAll(namespace, unix.SIGKILL) {
		if !reap(0) {
			return
		}
		for reap(unix.WNOHANG) {
		}
	}
	for reap(unix.WNOHANG) {
	}
}

// reap waits for one child, and says whether it got one.
func reap(options int) bool {
	for {
		pid, err := unix.Wait4(-1, nil, options, nil)
		if !errors.Is(err, unix.EINTR) {
			return pid > 0
		}
	}
}

// signalAll sends a signal to all descendants, and says whether there was one
// that could be signalled. In a PID namespace that is a single call, which no
// fork can escape.
func signalAll(namespace bool, signal unix.Signal) bool {
	if namespace {
		return unix.Kill(-1, signal) == nil
	}
	found := false
	for _, pid := range descendants(os.Getpid()) {
		if unix.Kill(pid, signal) == nil {
			found = true
		}
	}
	return found
}

// descendants lists the processes below pid, parents first, zombies left out.
func descendants(pid int) []int {
	names, err := readNames("/proc")
	if err != nil {
		return nil
	}
	children := map[int][]int{}
	for _, name := range names {
		child, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if parent, alive := parentOf(child); alive {
			children[parent] = append(children[parent], child)
		}
	}
	var all []int
	for queue := children[pid]; len(queue) > 0; queue = queue[1:] {
		all = append(all, queue[0])
		queue = append(queue, children[queue[0]]...)
	}
	return all
}

// parentOf reads the parent of a process, and whether it is more than a zombie.
func parentOf(pid int) (parent int, alive bool) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, false
	}
	// "pid (comm) state ppid ...", where comm may hold anything.
	text := string(stat)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 2 {
		return 0, false
	}
	parent, err = strconv.Atoi(fields[1])
	return parent, err == nil && fields[0] != "Z" && fields[0] != "X"
}

func readNames(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

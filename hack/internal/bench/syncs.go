package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// syncCalls are the system calls that wait for the disk, as the kernel's
// tracepoints name them.
var syncCalls = [...]string{"sys_enter_fsync", "sys_enter_fdatasync", "sys_enter_syncfs"}

// syncsEnv carries the descriptors of the counters over to the same program,
// executed again.
const syncsEnv = "LAMINA_BENCH_SYNC_COUNTERS"

// Syncs counts the fsync, fdatasync and syncfs calls of this process exactly,
// whoever makes them: the kernel counts at the entry of the system call.
type Syncs struct{ fds []int }

// CountSyncs must be the first thing that a program does. A counter of the
// kernel follows the threads that the counted one starts from then on, and a
// Go program has several before main; so CountSyncs opens the counters and
// executes the program once more, in which it returns them. It needs root, or
// CAP_PERFMON and a readable tracefs; the error says what is missing.
func CountSyncs() (*Syncs, error) {
	if handed, ok := os.LookupEnv(syncsEnv); ok {
		if err := os.Unsetenv(syncsEnv); err != nil {
			return nil, err
		}
		return adoptSyncs(handed)
	}
	// What counts is the thread that executes the program: it lives on.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	s, err := openSyncs()
	if err != nil {
		return nil, err
	}
	fds := make([]string, len(s.fds))
	for i, fd := range s.fds {
		fds[i] = strconv.Itoa(fd)
	}
	env := append(os.Environ(), syncsEnv+"="+strings.Join(fds, ","))
	err = syscall.Exec("/proc/self/exe", os.Args, env)
	return nil, errors.Join(fmt.Errorf("execute the program again: %w", err), s.Close())
}

// adoptSyncs takes the counters over that this program opened before it was
// executed again.
func adoptSyncs(handed string) (*Syncs, error) {
	s := &Syncs{}
	for _, field := range strings.Split(handed, ",") {
		fd, err := strconv.Atoi(field)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", syncsEnv, err)
		}
		if to, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil || !strings.Contains(to, "perf_event") {
			return nil, fmt.Errorf("%s: descriptor %d is no counter", syncsEnv, fd)
		}
		unix.CloseOnExec(fd)
		s.fds = append(s.fds, fd)
	}
	return s, nil
}

// openSyncs opens counters for the calling thread and all that it starts.
func openSyncs() (_ *Syncs, err error) {
	s := &Syncs{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("count syncs: %w", err), s.Close())
		}
	}()
	for _, call := range syncCalls {
		id, err := tracepoint(call)
		if err != nil {
			return nil, err
		}
		attr := unix.PerfEventAttr{
			Type:   unix.PERF_TYPE_TRACEPOINT,
			Size:   uint32(unsafe.Sizeof(unix.PerfEventAttr{})),
			Config: id,
			Bits:   unix.PerfBitInherit,
		}
		fd, err := unix.PerfEventOpen(&attr, 0, -1, -1, 0)
		if err != nil {
			return nil, fmt.Errorf("perf_event_open of %s: %w", call, err)
		}
		s.fds = append(s.fds, fd)
	}
	return s, nil
}

// Count is the number of calls since the counters were opened.
func (s *Syncs) Count() (uint64, error) {
	var sum uint64
	for _, fd := range s.fds {
		var b [8]byte
		if n, err := unix.Read(fd, b[:]); err != nil || n != len(b) {
			return 0, fmt.Errorf("read a sync counter: %d bytes: %w", n, err)
		}
		sum += binary.NativeEndian.Uint64(b[:])
	}
	return sum, nil
}

// Close closes the counters.
func (s *Syncs) Close() error {
	var err error
	for _, fd := range s.fds {
		err = errors.Join(err, unix.Close(fd))
	}
	s.fds = nil
	return err
}

// tracepoint is the number of a tracepoint of system calls on this kernel.
func tracepoint(name string) (uint64, error) {
	file := path.Join("events/syscalls", name, "id")
	text, err := os.ReadFile(path.Join("/sys/kernel/tracing", file))
	if errors.Is(err, os.ErrNotExist) {
		text, err = readUnmounted("tracefs", file)
	}
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
}

// readUnmounted reads a file of a file system that is mounted nowhere, and
// leaves it so.
func readUnmounted(fsType, file string) ([]byte, error) {
	fs, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", fsType, err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("make %s: %w", fsType, err)
	}
	root, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", fsType, err)
	}
	defer unix.Close(root)
	fd, err := unix.Openat(root, file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s of %s: %w", file, fsType, err)
	}
	defer unix.Close(fd)
	b := make([]byte, 64)
	n, err := unix.Read(fd, b)
	if err != nil {
		return nil, fmt.Errorf("%s of %s: %w", file, fsType, err)
	}
	return b[:n], nil
}

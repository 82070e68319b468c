package overlayfs

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// descriptors is the directory in which an open descriptor has its number as
// its name. Options made of these names need no escaping and are short enough
// that a full stack fits in the one page that mount(2) takes.
const descriptors = "/proc/self/fd"

// classic mounts with mount(2), for kernels before 6.13 and for sandboxes
// that forbid the newer calls.
func classic(l *layers, m Mount, target int) error {
	options := m.options(l)
	if page := os.Getpagesize(); len(options) >= page {
		return fmt.Errorf("options of %d bytes do not fit in a page of %d: too many open files", len(options), page)
	}
	var flags uintptr
	if m.ReadOnly {
		flags = unix.MS_RDONLY
	}
	return inDirectory(descriptors, func() error {
		err := unix.Mount("overlay", strconv.Itoa(target), "overlay", flags, options)
		if errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("mount with options %q: %w (the kernel log says more)", options, err)
		}
		if err != nil {
			return fmt.Errorf("mount with options %q: %w", options, err)
		}
		return nil
	})
}

// options are those of mount(2), with descriptors in place of paths.
func (m Mount) options(l *layers) string {
	lower := make([]string, len(l.lower))
	for i, fd := range l.lower {
		lower[i] = strconv.Itoa(fd)
	}
	list := []string{"lowerdir=" + strings.Join(lower, ":")}
	if l.upper >= 0 {
		list = append(list, "upperdir="+strconv.Itoa(l.upper), "workdir="+strconv.Itoa(l.work))
	}
	for _, s := range m.settings() {
		list = append(list, s.key+"="+s.value)
	}
	if m.UserXattr {
		list = append(list, "userxattr")
	}
	if m.Volatile {
		list = append(list, "volatile")
	}
	return strings.Join(list, ",")
}

// inDirectory runs f on a thread of its own whose working directory is dir,
// and waits for it. The thread ends afterwards, since it can never share the
// working directory of the others again.
func inDirectory(dir string, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end, and /proc shows its working
			// directory as that of the process: hold it until another
			// thread is done.
			defer runtime.UnlockOSThread()
			result <- inDirectory(dir, f)
			return
		}
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			result <- fmt.Errorf("unshare working directory: %w", err)
			return
		}
		if err := unix.Chdir(dir); err != nil {
			result <- &os.PathError{Op: "chdir", Path: dir, Err: err}
			return
		}
		result <- f()
	}()
	return <-result
}

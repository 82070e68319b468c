package overlayfs

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// A setting is one string option of a mount.
type setting struct{ key, value string }

// settings are those that every mount has, see the package documentation.
func (m Mount) settings() []setting {
	metacopy, redirect := "off", "nofollow"
	if m.Follow && !m.UserXattr {
		metacopy, redirect = "on", "on"
	}
	return []setting{
		{"index", "off"},
		{"metacopy", metacopy},
		{"redirect_dir", redirect},
		{"xino", "off"},
	}
}

// Settings are the options that the kernel gets in any case, as words for
// mount(8).
func (m Mount) Settings() []string {
	var words []string
	for _, s := range m.settings() {
		words = append(words, s.key+"="+s.value)
	}
	return words
}

// byDescriptor mounts through fsopen, fsconfig and move_mount with
// descriptors for all directories.
func byDescriptor(l *layers, m Mount, target int) error {
	c, err := newContext("overlay")
	if err != nil {
		return err
	}
	defer c.close()
	if err := c.directories(l); err != nil {
		return err
	}
	for _, s := range m.settings() {
		if err := c.set(s.key, s.value); err != nil {
			return err
		}
	}
	if m.UserXattr {
		if err := c.flag("userxattr"); err != nil {
			return err
		}
	}
	if m.Volatile {
		if err := c.flag("volatile"); err != nil {
			return err
		}
	}
	attr := 0
	if m.ReadOnly {
		attr = unix.MOUNT_ATTR_RDONLY
	}
	fd, err := c.mount(attr)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.MoveMount(fd, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	return nil
}

// An fsContext is a configuration context of the new mount interface, fsopen(2).
type fsContext struct{ fd int }

func newContext(filesystem string) (fsContext, error) {
	fd, err := unix.Fsopen(filesystem, unix.FSOPEN_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENOSYS):
		return fsContext{}, fmt.Errorf("fsopen: %w: %w", err, errNoMethod)
	case err != nil:
		return fsContext{}, fmt.Errorf("fsopen %s: %w", filesystem, err)
	}
	return fsContext{fd}, nil
}

// close drops the context; closing a descriptor of this kind loses nothing.
func (c fsContext) close() { _ = unix.Close(c.fd) }

// directories names the layers, bottom of the stack last.
func (c fsContext) directories(l *layers) error {
	for i, fd := range l.lower {
		err := unix.FsconfigSetFd(c.fd, "lowerdir+", fd)
		if i == 0 && errors.Is(err, unix.EINVAL) {
			// The first descriptor tells whether the kernel takes any:
			// lowerdir+ came with 6.8, descriptors for it with 6.13.
			return c.wrap("lower layer by descriptor", errors.Join(err, errNoMethod))
		}
		if err != nil {
			return c.wrap(fmt.Sprintf("lower layer %d", i+1), err)
		}
	}
	if l.upper < 0 {
		return nil
	}
	if err := unix.FsconfigSetFd(c.fd, "upperdir", l.upper); err != nil {
		return c.wrap("upperdir", err)
	}
	if err := unix.FsconfigSetFd(c.fd, "workdir", l.work); err != nil {
		return c.wrap("workdir", err)
	}
	return nil
}

func (c fsContext) set(key, value string) error {
	return c.wrap(key+"="+value, unix.FsconfigSetString(c.fd, key, value))
}

func (c fsContext) flag(key string) error {
	return c.wrap(key, unix.FsconfigSetFlag(c.fd, key))
}

// create makes the superblock, which is where layers are judged.
func (c fsContext) create() error {
	return c.wrap("create", unix.FsconfigCreate(c.fd))
}

// mount makes the superblock and returns a descriptor of its detached mount.
func (c fsContext) mount(attr int) (int, error) {
	if err := c.create(); err != nil {
		return -1, err
	}
	fd, err := unix.Fsmount(c.fd, unix.FSMOUNT_CLOEXEC, attr)
	return fd, c.wrap("fsmount", err)
}

// wrap adds to err what was being done and what the kernel logged about it.
func (c fsContext) wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	if log := c.log(); log != "" {
		return fmt.Errorf("%s: %s: %w", what, log, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// log reads the messages that the kernel queued in the context. Each read
// gives one, as a letter for its level, a space and the text.
func (c fsContext) log() string {
	var lines []string
	// The kernel keeps eight messages; the bound is for one that repeats.
	for buf := make([]byte, 4096); len(lines) < 16; {
		n, err := unix.Read(c.fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n <= 0 {
			break
		}
		line := strings.TrimSpace(string(buf[:n]))
		if _, text, ok := strings.Cut(line, " "); ok {
			line = text
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "; ")
}

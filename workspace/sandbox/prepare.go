package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// prepare makes what the command sees, and goes to its directory.
func (t *task) prepare() error {
	if t.Source != "" {
		if info, err := os.Stat(t.Source); err != nil {
			return fmt.Errorf("tree: %w", err)
		} else if !info.IsDir() {
			return fmt.Errorf("tree: %w", &os.PathError{Op: "open", Path: t.Source, Err: unix.ENOTDIR})
		}
	}
	var err error
	if t.Private {
		err = t.mount()
	} else {
		err = t.link()
	}
	if err != nil {
		return err
	}
	return os.Chdir(t.Dir)
}

// mount makes the mounts in init's mount namespace, where they end with it.
func (t *task) mount() error {
	// What the host mounts from now on is seen, what is mounted here is not.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// An ordinary user may mount /proc only if nothing covers parts of the
	// present one, as container runtimes do. The old one then stays: it shows
	// the processes of the outer namespace under their outer ids.
	err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	if err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if t.Source != "" && t.Source != t.Dir {
		if err := t.bindTree(); err != nil {
			return err
		}
	} else if t.ReadOnly {
		if err := bind(t.Dir, t.Dir, true); err != nil {
			return err
		}
	}
	for _, m := range t.Mounts {
		if err := mountPoint(m); err != nil {
			return err
		}
		if err := bind(m.Source, m.Target, m.ReadOnly); err != nil {
			return err
		}
	}
	return nil
}

func (t *task) bindTree() error {
	// The link of an earlier run that had no namespace.
	if err := removeLink(t.Dir); err != nil {
		return err
	}
	if err := os.MkdirAll(t.Dir, 0o755); err != nil {
		return fmt.Errorf("make the command's directory: %w", err)
	}
	return bind(t.Source, t.Dir, t.ReadOnly)
}

// mountPoint makes the target of a bind if it does not exist.
func mountPoint(m Mount) error {
	source, err := os.Stat(m.Source)
	if err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	if _, err := os.Stat(m.Target); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if source.IsDir() {
		return os.MkdirAll(m.Target, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(m.Target), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(m.Target, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

func bind(source, target string, readOnly bool) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %q at %q: %w", source, target, err)
	}
	if !readOnly {
		return nil
	}
	// Only this flag is touched: in a user namespace the others may be locked.
	err := unix.MountSetattr(unix.AT_FDCWD, target, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if errors.Is(err, unix.ENOSYS) {
		err = remountReadOnly(target)
	}
	if err != nil {
		return fmt.Errorf("make %q read-only: %w", target, err)
	}
	return nil
}

// remountReadOnly is for kernels before 5.12. It does not reach mounts below.
func remountReadOnly(target string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(target, &st); err != nil {
		return err
	}
	// The flags of statfs are those of mount(2) as far as they go.
	const keep = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_RELATIME
	flags := uintptr(st.Flags)&keep | unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY
	return unix.Mount("", target, "", flags, "")
}

// link makes Dir a symbolic link to Source, in one step.
func (t *task) link() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	if t.Source == "" || t.Source == t.Dir {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(t.Dir), 0o755); err != nil {
		return fmt.Errorf("make the command's directory: %w", err)
	}
	// The empty directory of an earlier run that had a namespace; one that
	// holds anything is not ours to remove.
	if info, err := os.Lstat(t.Dir); err == nil && info.IsDir() {
		if err := os.Remove(t.Dir); err != nil {
			return fmt.Errorf("make the command's directory a link: %w", err)
		}
	}
	fresh := fmt.Sprintf("%s.%d", t.Dir, os.Getpid())
	if err := os.Symlink(t.Source, fresh); err != nil {
		return err
	}
	if err := os.Rename(fresh, t.Dir); err != nil {
		return errors.Join(err, os.Remove(fresh))
	}
	return nil
}

// cleanUp removes the link, if it is still ours. Mounts need nothing.
func (t *task) cleanUp() error {
	if t.Private || t.Source == "" || t.Source == t.Dir {
		return nil
	}
	if to, err := os.Readlink(t.Dir); err != nil || to != t.Source {
		return nil
	}
	return removeLink(t.Dir)
}

// removeLink removes path if it is a symbolic link.
func removeLink(path string) error {
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Type() != fs.ModeSymlink {
		return nil
	}
	return os.Remove(path)
}

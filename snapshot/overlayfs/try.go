package overlayfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

// TryOptions say what a trial is to show.
type TryOptions struct {
	// UserXattr tries with user.* attributes, as an ordinary user must.
	UserXattr bool
}

// Support is the outcome of a trial.
type Support struct {
	// OK says that a driver may use overlayfs here.
	OK bool
	// Reason says in one line for people why not; empty if OK.
	Reason string
	// Features are the single facts that were tried, by a short name for
	// people, as far as the trial got. Only "lower layers by descriptor" and
	// "volatile" may be false while OK is true.
	Features map[string]bool
	// MaxLayers is how many lower layers a mount takes.
	MaxLayers int
}

// Names of the facts in Support.Features.
const (
	featureDescriptor = "lower layers by descriptor"
	featureVolatile   = "volatile"
	featureStack      = "stacked mount"
	featureReadOnly   = "read-only mount"
	featureProbe      = "probe of upper directories"
	featureWhiteout   = "whiteouts"
	featureOpaque     = "opaque directories"
	featureOrigin     = "hidden foreign whiteouts"
)

// Try finds out whether overlayfs can be used for layers below dir, by
// mounting it there: what a kernel, a file system and the privileges at hand
// do together cannot be told from their names. It works in a temporary
// directory of its own below dir and removes it; a trial that is killed leaves
// it behind with the name "overlayfs-trial-*", perhaps with something mounted.
//
// A fact that does not hold is not an error but a Support that says so. The
// error is for a trial that could not be made or cleaned up, such as a full
// disk or a cancelled ctx.
func Try(ctx context.Context, dir string, o TryOptions) (_ Support, err error) {
	root, err := os.MkdirTemp(dir, "overlayfs-trial-")
	if err != nil {
		return Support{}, fmt.Errorf("try overlayfs: %w", err)
	}
	t := &trial{root: root, user: o.UserXattr, features: map[string]bool{}}
	defer func() {
		if cleanErr := t.clean(); cleanErr != nil {
			err = errors.Join(err, fmt.Errorf("clean up after trying overlayfs: %w", cleanErr))
		}
	}()
	for _, step := range []func() error{t.prepare, t.writable, t.stacked, t.again} {
		if err := ctx.Err(); err != nil {
			return Support{}, fmt.Errorf("try overlayfs: %w", context.Cause(ctx))
		}
		if err := step(); err != nil {
			if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
				return Support{}, fmt.Errorf("try overlayfs: %w", err)
			}
			// The directory's random name is of no use to people.
			reason := strings.ReplaceAll(err.Error(), root+"/", "")
			return Support{Reason: reason, Features: t.features}, nil
		}
	}
	return Support{OK: true, Features: t.features, MaxLayers: MaxLayers}, nil
}

// A trial holds directories a and b as lower layers, upper and work, all
// below root, and mounts on root/m.
type trial struct {
	root     string
	user     bool
	features map[string]bool
	mounted  bool
}

func (t *trial) path(elem ...string) string {
	return filepath.Join(append([]string{t.root}, elem...)...)
}

func (t *trial) xattr(name string) string { return xattr(t.user, name) }

// xattr is the full name of an overlay attribute.
func xattr(user bool, name string) string {
	if user {
		return "user.overlay." + name
	}
	return "trusted.overlay." + name
}

// fact notes whether a feature holds and turns a "no" into an error.
func (t *trial) fact(feature string, holds bool, otherwise string) error {
	t.features[feature] = holds
	if !holds {
		return errors.New(otherwise)
	}
	return nil
}

func (t *trial) prepare() error {
	for _, dir := range []string{"a/dir", "a/covered", "b", "upper", "work", "m", "c/foreign"} {
		if err := os.MkdirAll(t.path(dir), 0o755); err != nil {
			return err
		}
	}
	for _, file := range []string{"a/dir/file", "a/covered/file", "b/kept", "b/deleted"} {
		if err := os.WriteFile(t.path(file), []byte(file), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// mount mounts in the best way that the kernel knows, and notes it.
func (t *trial) mount(m Mount) error {
	m.UserXattr = t.user
	err := m.mountWith(t.path("m"), byDescriptor)
	if errors.Is(err, errNoMethod) {
		t.features[featureDescriptor] = false
		err = m.Mount(t.path("m"))
	} else if err == nil {
		t.features[featureDescriptor] = true
	}
	t.mounted = t.mounted || err == nil
	return err
}

func (t *trial) unmount() error {
	if err := unix.Unmount(t.path("m"), 0); err != nil {
		return &os.PathError{Op: "unmount", Path: t.path("m"), Err: err}
	}
	t.mounted = false
	return nil
}

// writable tries a writable mount: what deleting and replacing leave in the
// upper directory, and both answers of the probe.
func (t *trial) writable() error {
	m := Mount{Lower: []string{t.path("a"), t.path("b")}, Upper: t.path("upper"), Work: t.path("work"), Volatile: true}
	err := t.mount(m)
	t.features[featureVolatile] = err == nil
	if err != nil {
		m.Volatile = false
		if withoutErr := t.mount(m); withoutErr != nil {
			t.features[featureStack] = false
			return err
		}
	}
	if err := t.fact(featureStack, readable(t.path("m/dir/file")) && readable(t.path("m/kept")),
		"an overlay mount does not show its layers"); err != nil {
		return err
	}
	if err := t.probe(true); err != nil {
		return err
	}
	if err := t.change(); err != nil {
		return err
	}
	if err := t.unmount(); err != nil {
		return err
	}
	return t.probe(false)
}

func (t *trial) probe(want bool) error {
	busy, err := InUse(t.path("upper"))
	if err != nil {
		t.features[featureProbe] = false
		return err
	}
	return t.fact(featureProbe, busy == want,
		fmt.Sprintf("the kernel does not tell whether an upper directory is mounted (says %t for %t)", busy, want))
}

// change deletes a file and replaces a directory in the mount.
func (t *trial) change() error {
	err := errors.Join(
		os.Remove(t.path("m/deleted")),
		os.RemoveAll(t.path("m/covered")),
		os.Mkdir(t.path("m/new"), 0o755),
		os.Rename(t.path("m/new"), t.path("m/covered")),
	)
	if err != nil {
		t.features[featureWhiteout] = false
		return err
	}
	if err := t.fact(featureWhiteout, isWhiteout(t.path("upper/deleted")),
		"a deleted file leaves no whiteout in the upper directory"); err != nil {
		return err
	}
	value, err := sysx.LGetxattr(t.path("upper/covered"), t.xattr("opaque"))
	return t.fact(featureOpaque, err == nil && string(value) == "y",
		"a replaced directory is not marked opaque in the upper directory")
}

// stacked mounts the former upper directory as a lower one: its marks must
// have their effect, and nothing can be written. Layer c has a whiteout and
// an opaque directory that were made by hand.
func (t *trial) stacked() error {
	err := errors.Join(
		unix.Mknod(t.path("c/foreign/gone"), unix.S_IFCHR, 0),
		sysx.LSetxattr(t.path("c/foreign"), t.xattr("origin"), nil, 0),
		os.Mkdir(t.path("c/dir"), 0o755),
		sysx.LSetxattr(t.path("c/dir"), t.xattr("opaque"), []byte("y"), 0),
	)
	if err != nil {
		t.features[featureWhiteout] = false
		return fmt.Errorf("make overlay marks by hand: %w", err)
	}
	if err := t.mount(Mount{Lower: []string{t.path("c"), t.path("upper"), t.path("a"), t.path("b")}}); err != nil {
		t.features[featureReadOnly] = false
		return err
	}
	err = os.WriteFile(t.path("m/written"), nil, 0o644)
	if err := t.fact(featureReadOnly, errors.Is(err, syscall.EROFS),
		"a mount without an upper directory can be written"); err != nil {
		return err
	}
	if err := t.fact(featureWhiteout, !exists(t.path("m/deleted")) && readable(t.path("m/kept")),
		"a whiteout in a lower layer hides nothing"); err != nil {
		return err
	}
	if err := t.fact(featureOpaque, !exists(t.path("m/covered/file")) && !exists(t.path("m/dir/file")),
		"an opaque directory in a lower layer hides nothing"); err != nil {
		return err
	}
	names, err := os.ReadDir(t.path("m/foreign"))
	if err := t.fact(featureOrigin, err == nil && len(names) == 0,
		"a whiteout over nothing shows up as a name"); err != nil {
		return err
	}
	return t.unmount()
}

// again mounts the upper directory a second time, as a workspace is.
func (t *trial) again() error {
	volatile := t.features[featureVolatile]
	if volatile {
		if err := RemoveVolatileMark(t.path("work")); err != nil {
			t.features[featureVolatile] = false
			return err
		}
	}
	err := t.mount(Mount{
		Lower: []string{t.path("a"), t.path("b")}, Upper: t.path("upper"), Work: t.path("work"), Volatile: volatile,
	})
	if err != nil {
		return fmt.Errorf("mount an upper directory again: %w", err)
	}
	if err := t.fact(featureStack, !exists(t.path("m/deleted")) && exists(t.path("m/covered")),
		"an upper directory that is mounted again lost its changes"); err != nil {
		return err
	}
	return t.unmount()
}

// clean unmounts and removes all that the trial made.
func (t *trial) clean() error {
	var errs []error
	if t.mounted {
		// Lazily: whoever looks into the mount meanwhile keeps it busy.
		errs = append(errs, os.NewSyscallError("unmount", unix.Unmount(t.path("m"), unix.MNT_DETACH)))
	}
	if err := os.Chmod(t.path("work/work"), 0o700); err != nil && !os.IsNotExist(err) {
		errs = append(errs, err)
	}
	errs = append(errs, os.RemoveAll(t.root))
	return errors.Join(slices.DeleteFunc(errs, func(err error) bool { return err == nil })...)
}

func readable(path string) bool {
	_, err := os.ReadFile(path)
	return err == nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// isWhiteout says whether path is how overlayfs marks a deleted name: a
// character device with number 0/0.
func isWhiteout(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

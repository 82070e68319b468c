package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/snapshot/overlayfs"
)

// Mount implements Driver.
func (a *adapted) Mount(ctx context.Context, key, target string, readOnly bool) error {
	if err := a.mount(ctx, key, target, readOnly); err != nil {
		return fmt.Errorf("mount %q: %w", key, err)
	}
	return nil
}

func (a *adapted) mount(ctx context.Context, key, target string, readOnly bool) error {
	defer a.lock(key)()
	info, err := a.visible(ctx, key)
	if err != nil {
		return err
	}
	var mounts []mount.Mount
	if info.Kind == snapshots.KindCommitted {
		mounts, err = a.viewOf(ctx, key)
	} else {
		mounts, err = a.s.Mounts(ctx, key)
	}
	if err != nil {
		return err
	}
	if readOnly || info.Kind != snapshots.KindActive {
		mounts = readOnlyMounts(mounts)
	} else if busy, err := upperInUse(mounts); err != nil {
		return err
	} else if busy {
		return fmt.Errorf("it is still the writable layer of a mount: %w", errdefs.ErrFailedPrecondition)
	}
	return mountAll(mounts, target)
}

// viewOf describes the view through which a committed name is mounted. It is
// made once and stays until the name goes: some snapshotters need it for as
// long as it is mounted.
func (a *adapted) viewOf(ctx context.Context, key string) ([]mount.Mount, error) {
	view := viewKey(key)
	mounts, err := a.s.Mounts(ctx, view)
	if !errdefs.IsNotFound(err) {
		return mounts, err
	}
	return a.s.View(ctx, view, key, snapshots.WithLabels(map[string]string{labelView: key}))
}

// InUse implements Driver. It knows about mounts of overlayfs only.
func (a *adapted) InUse(ctx context.Context, key string) (bool, error) {
	defer a.lock(key)()
	info, err := a.visible(ctx, key)
	if err != nil || info.Kind != snapshots.KindActive {
		return false, err
	}
	mounts, err := a.s.Mounts(ctx, key)
	if err != nil {
		return false, err
	}
	return upperInUse(mounts)
}

// upperInUse probes the upper directory of an overlay mount. A work directory
// in which there is nothing was never mounted.
func upperInUse(mounts []mount.Mount) (bool, error) {
	for _, m := range mounts {
		upper, work := option(m, "upperdir="), option(m, "workdir=")
		if m.Type != "overlay" || upper == "" {
			continue
		}
		if ok, err := exists(below(work, "work")); err != nil || !ok {
			return false, err
		}
		return overlayfs.InUse(upper)
	}
	return false, nil
}

func option(m mount.Mount, prefix string) string {
	for _, o := range m.Options {
		if v, ok := strings.CutPrefix(o, prefix); ok {
			return v
		}
	}
	return ""
}

// readOnlyMounts are the same mounts without a way to write: an overlay's
// upper directory becomes its topmost lower one, which leaves out whatever
// belongs to writing.
func readOnlyMounts(mounts []mount.Mount) []mount.Mount {
	out := slices.Clone(mounts)
	for i, m := range out {
		var options []string
		upper := ""
		if m.Type == "overlay" {
			upper = option(m, "upperdir=")
		}
		for _, o := range m.Options {
			lower, isLower := strings.CutPrefix(o, "lowerdir=")
			switch {
			case o == "rw", o == "ro":
			case upper != "" && (strings.HasPrefix(o, "upperdir=") || strings.HasPrefix(o, "workdir=") || o == "volatile"):
			case upper != "" && isLower:
				options = append(options, "lowerdir="+upper+":"+lower)
			default:
				options = append(options, o)
			}
		}
		out[i].Options = append(options, "ro")
	}
	return out
}

// mountAll mounts in order; after an error nothing of it is mounted.
func mountAll(mounts []mount.Mount, target string) error {
	for i := range mounts {
		err := mounts[i].Mount(target)
		if err == nil {
			continue
		}
		if errors.Is(err, fs.ErrPermission) {
			err = fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
		}
		if i > 0 {
			err = errors.Join(err, mount.UnmountMounts(mounts[:i], target, 0))
		}
		return err
	}
	return nil
}

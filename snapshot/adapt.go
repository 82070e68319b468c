package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/locker"
	"golang.org/x/sys/unix"
)

// Labels by which the adaptor marks names in the snapshotter below. Names
// with one of them are not in the adaptor's key space.
const (
	// labelRemoval marks a removal that was detached.
	labelRemoval = "lamina/removal"
	// labelView marks the view through which a committed name is mounted.
	labelView = "lamina/view"
)

// AdaptOptions say what an adaptor cannot find out about a snapshotter.
type AdaptOptions struct {
	// Root is a directory on the file system that holds the snapshots. It is
	// what Sync syncs; without it Sync is errdefs.ErrNotImplemented.
	Root string
	// MaxDepth is how many layers one mount can stack; 0 means no limit.
	MaxDepth int
	// Attributes is the class of extended attributes with overlay marks,
	// Trusted or User, or empty where there are none.
	Attributes string
}

// Adapt makes a Driver of any other snapshotter. name is what Info calls it.
//
// What the Driver interface has beside containerd's is built on labels: a
// detached name carries one and is hidden, so its key can be used again only
// after Discard. A snapshotter that stores labels in a database spends a
// transaction on each Detach and Restore, and a Walk over all names looks for
// children. A committed name is mounted through a view that is made for it
// once, hidden too, and removed with it. Discard lets the snapshotter remove
// the name; if that one removes asynchronously the bytes go at Cleanup.
//
// The Driver owns s: Close closes it.
func Adapt(name string, s snapshots.Snapshotter, o AdaptOptions) Driver {
	a := &adapted{
		s: s, locks: locker.New(), held: map[string]bool{}, doomed: map[string]bool{},
		info: Info{
			Name: name, Attributes: o.Attributes, Reason: "handed in", MaxDepth: o.MaxDepth,
			Features: map[string]bool{}, Lingers: true,
		},
	}
	if o.Root == "" {
		a.rootErr = fmt.Errorf("the adaptor was not told a directory to sync: %w", errdefs.ErrNotImplemented)
		return a
	}
	// Before the first write: see tree.openSynced.
	a.root, a.rootErr = os.Open(o.Root)
	return a
}

type adapted struct {
	// Fixed after Adapt.
	s       snapshots.Snapshotter
	info    Info
	locks   *locker.Locker
	root    *os.File
	rootErr error

	syncMu sync.Mutex
	closed bool

	mu     sync.Mutex
	held   map[string]bool // removals that Cleanup leaves alone
	doomed map[string]bool // discarded, but a detached child is still there
}

var _ Driver = (*adapted)(nil)

func (a *adapted) lock(keys ...string) (unlock func()) { return lockKeys(a.locks, keys) }

func viewKey(key string) string { return key + " lamina-view" }

func hidden(info snapshots.Info) bool {
	return info.Labels[labelRemoval] != "" || info.Labels[labelView] != ""
}

// visible is Stat for keys of the adaptor's key space.
func (a *adapted) visible(ctx context.Context, key string) (snapshots.Info, error) {
	if err := requireKey(key); err != nil {
		return snapshots.Info{}, err
	}
	info, err := a.s.Stat(ctx, key)
	if err != nil {
		return snapshots.Info{}, err
	}
	if hidden(info) {
		return snapshots.Info{}, fmt.Errorf("snapshot %q: %w", key, errdefs.ErrNotFound)
	}
	return info, nil
}

// Info implements Driver.
func (a *adapted) Info() Info { return a.info }

// Stacker implements Driver: how a foreign snapshotter keeps its layers is
// unknown.
func (a *adapted) Stacker() (Stacker, bool) { return nil, false }

// Stat implements snapshots.Snapshotter.
func (a *adapted) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	return a.visible(ctx, key)
}

// Update implements snapshots.Snapshotter.
func (a *adapted) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	if _, err := a.visible(ctx, info.Name); err != nil {
		return snapshots.Info{}, err
	}
	return a.s.Update(ctx, info, fieldpaths...)
}

// Usage implements snapshots.Snapshotter.
func (a *adapted) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	if _, err := a.visible(ctx, key); err != nil {
		return snapshots.Usage{}, err
	}
	return a.s.Usage(ctx, key)
}

// Mounts implements snapshots.Snapshotter.
func (a *adapted) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	if _, err := a.visible(ctx, key); err != nil {
		return nil, err
	}
	return a.s.Mounts(ctx, key)
}

// Prepare implements snapshots.Snapshotter.
func (a *adapted) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return a.create(ctx, key, parent, opts, a.s.Prepare)
}

// View implements snapshots.Snapshotter.
func (a *adapted) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return a.create(ctx, key, parent, opts, a.s.View)
}

func (a *adapted) create(ctx context.Context, key, parent string, opts []snapshots.Opt,
	create func(context.Context, string, string, ...snapshots.Opt) ([]mount.Mount, error),
) ([]mount.Mount, error) {
	if err := requireKey(key); err != nil {
		return nil, err
	}
	if parent != "" {
		defer a.lock(parent)()
		if _, err := a.visible(ctx, parent); err != nil {
			return nil, fmt.Errorf("parent: %w", err)
		}
	}
	return create(ctx, key, parent, opts...)
}

// Commit implements snapshots.Snapshotter.
func (a *adapted) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	base, err := applyOpts(opts)
	if err := errors.Join(err, requireKey(name)); err != nil {
		return err
	}
	defer a.lock(key, base.Parent)()
	if _, err := a.visible(ctx, key); err != nil {
		return err
	}
	if base.Parent != "" {
		if _, err := a.visible(ctx, base.Parent); err != nil {
			return fmt.Errorf("parent: %w", err)
		}
	}
	return a.s.Commit(ctx, name, key, append(slices.Clip(opts), func(info *snapshots.Info) error {
		takeExact(info)
		return nil
	})...)
}

// Walk implements snapshots.Snapshotter.
func (a *adapted) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return a.walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		if hidden(info) {
			return nil
		}
		return fn(ctx, info)
	}, filters...)
}

// walk is the Walk of the snapshotter below. Those of containerd call it
// NotFound when there has never been a snapshot.
func (a *adapted) walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	met := false
	err := a.s.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		met = true
		return fn(ctx, info)
	}, filters...)
	if !met && errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Settle implements Driver. The snapshotter below settles its own names when
// it cleans up: containerd's would else meet the directories of a Prepare that
// was killed.
func (a *adapted) Settle(ctx context.Context) error {
	if err := a.cleanBelow(ctx); err != nil {
		return fmt.Errorf("settle: %w", err)
	}
	return nil
}

// Pending implements Driver.
func (a *adapted) Pending(ctx context.Context) ([]Pending, error) {
	var out []Pending
	err := a.walk(ctx, func(_ context.Context, info snapshots.Info) error {
		switch {
		case info.Labels[labelRemoval] != "":
			out = append(out, Pending{Key: info.Name, Kind: PendingRemoval, entry: info.Name})
		case info.Labels[labelView] == "" && info.Kind != snapshots.KindCommitted:
			out = append(out, Pending{Key: info.Name, Kind: PendingActive, entry: info.Name})
		}
		return nil
	})
	return out, err
}

// Committed implements Driver.
func (a *adapted) Committed(ctx context.Context) (keys []string, err error) {
	err = a.walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if info.Kind == snapshots.KindCommitted && info.Labels[labelRemoval] == "" {
			keys = append(keys, info.Name)
		}
		return nil
	})
	return keys, err
}

// Dir implements Driver: how a foreign snapshotter keeps its trees is unknown.
func (a *adapted) Dir(ctx context.Context, key string) (string, bool, error) {
	_, err := a.visible(ctx, key)
	return "", false, err
}

// Sync implements Driver.
func (a *adapted) Sync(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	a.syncMu.Lock()
	defer a.syncMu.Unlock()
	if a.rootErr != nil {
		return fmt.Errorf("sync: %w", a.rootErr)
	}
	if a.closed {
		return fmt.Errorf("sync: driver is closed: %w", errdefs.ErrFailedPrecondition)
	}
	if err := unix.Syncfs(int(a.root.Fd())); err != nil {
		return &os.PathError{Op: "syncfs", Path: a.root.Name(), Err: err}
	}
	return nil
}

// Close implements snapshots.Snapshotter.
func (a *adapted) Close() error {
	a.syncMu.Lock()
	defer a.syncMu.Unlock()
	if a.closed {
		return nil
	}
	a.closed = true
	err := a.s.Close()
	if a.root != nil {
		err = errors.Join(err, a.root.Close())
	}
	return err
}

package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/locker"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot/overlayfs"
)

// Names of the drivers.
const (
	Overlay = "overlay"
	Native  = "native"
)

// Classes of extended attributes for overlay marks.
const (
	Trusted = "trusted"
	User    = "user"
)

// Options of Open.
type Options struct {
	// Driver is Overlay or Native; empty means the driver that made the
	// tree, and for a new tree the one that a trial mount finds possible.
	Driver string
	// Attributes is Trusted or User: where overlay marks are kept. Empty
	// means as in the existing tree, and for a new tree Trusted for root in
	// the initial user namespace, User for everybody else. Layers made with
	// one class must never be mounted with the other: deleted files would
	// come back. The native driver has no marks and takes no notice.
	Attributes string
	// Step, if set, is called with a short name before each durable step: a
	// directory, link, line or rename that is about to be made, a name that
	// is about to be unlinked. An error of it fails the step as an I/O error
	// would. It serves tests that stop or fail at each step.
	Step func(name string) error
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	// Trial tries whether overlayfs can be used below a directory; nil is
	// overlayfs.Try. A process that may not mount, but whose helpers may in
	// a user namespace, asks them.
	Trial func(ctx context.Context, dir string, o overlayfs.TryOptions) (overlayfs.Support, error)
}

// trialPrefix begins the names that a trial uses in new.
const trialPrefix = "overlayfs-trial-"

// origin is the file snapshots/driver: which driver made the tree, and what
// the trial found.
type origin struct {
	Driver     string          `json:"driver"`
	Attributes string          `json:"attributes,omitempty"`
	Reason     string          `json:"reason"`
	Kernel     string          `json:"kernel"`
	Features   map[string]bool `json:"features,omitempty"`
	MaxDepth   int             `json:"max_depth,omitempty"`
}

// Open opens the tree of snapshots below root, the directory snapshots in
// it, and makes it if needed. An existing tree costs the same however many
// snapshots it has, and nothing is written unless the kernel is another one
// than last time.
//
// The driver and the class of attributes are those that made the tree; asking
// for others is errdefs.ErrFailedPrecondition. If the overlay driver is asked
// for where overlayfs cannot be used the error is errdefs.ErrNotImplemented
// and says why.
func Open(ctx context.Context, root string, o Options) (Driver, error) {
	d, err := open(ctx, root, o)
	if err != nil {
		return nil, fmt.Errorf("open snapshots below %q: %w", root, err)
	}
	return d, nil
}

func open(ctx context.Context, root string, o Options) (_ Driver, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	root, err = filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	t := &tree{
		dir: filepath.Join(root, "snapshots"), steps: o.Step, clock: o.Now, locks: locker.New(),
		held: map[string]bool{}, making: map[string]bool{}, layers: map[string]layer{},
		cleaned: map[string]snapshots.Usage{}, adoptions: adoptions{path: filepath.Join(root, "snapshots", adoptedList)},
	}
	if t.clock == nil {
		t.clock = time.Now
	}
	if o.Trial == nil {
		o.Trial = overlayfs.Try
	}
	if err := t.layout(); err != nil {
		return nil, err
	}
	from, err := t.origin(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := t.openSynced(); err != nil {
		return nil, err
	}
	t.info = Info{
		Name: from.Driver, Attributes: from.Attributes, Reason: from.Reason,
		Features: from.Features, MaxDepth: from.MaxDepth,
	}
	if from.Driver == Native {
		d := &native{t}
		t.backend = d
		return d, nil
	}
	d := &overlay{
		tree: t, userXattr: from.Attributes == User,
		volatile: from.Features["volatile"], maxDepth: from.MaxDepth,
	}
	t.backend = d
	return d, nil
}

func (o Options) check() error {
	switch o.Driver {
	case "", Overlay, Native:
	default:
		return fmt.Errorf("no driver is called %q: %w", o.Driver, errdefs.ErrInvalidArgument)
	}
	switch o.Attributes {
	case "", Trusted, User:
	default:
		return fmt.Errorf("no class of attributes is called %q: %w", o.Attributes, errdefs.ErrInvalidArgument)
	}
	return nil
}

// layout makes the directories and looks that renames between them work.
func (t *tree) layout() error {
	if err := os.MkdirAll(filepath.Dir(t.dir), 0o700); err != nil {
		return err
	}
	var dev uint64
	for i, dir := range []string{"", dirNew, dirActive, dirCommitted, dirTrash, dirEmpty, dirLinks} {
		var st unix.Stat_t
		err := unix.Stat(t.path(dir), &st)
		if errors.Is(err, unix.ENOENT) {
			if err := t.step("open.mkdir"); err != nil {
				return err
			}
			if err := os.Mkdir(t.path(dir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
			err = unix.Stat(t.path(dir), &st)
		}
		switch {
		case err != nil:
			return &os.PathError{Op: "stat", Path: t.path(dir), Err: err}
		case st.Mode&unix.S_IFMT != unix.S_IFDIR:
			return &os.PathError{Op: "open", Path: t.path(dir), Err: unix.ENOTDIR}
		case i == 0:
			dev = st.Dev
		case st.Dev != dev:
			return fmt.Errorf("%q lies on another device than what is around it: %w", t.path(dir), errdefs.ErrFailedPrecondition)
		}
	}
	t.dev = dev
	return nil
}

// openSynced opens a descriptor per file system before anything is written:
// the kernel reports a write error once to each descriptor that was open.
func (t *tree) openSynced() error {
	dir, err := os.Open(t.dir)
	if err != nil {
		return err
	}
	t.synced = []*os.File{dir}
	var st unix.Stat_t
	if err := unix.Stat(t.path(dirAdopted), &st); err != nil || st.Dev == t.dev {
		return nil // none adopted, or adopted on the same device
	}
	adopted, err := os.Open(t.path(dirAdopted))
	if err != nil {
		return errors.Join(err, dir.Close())
	}
	t.synced = append(t.synced, adopted)
	return nil
}

// origin reads which driver made the tree, or decides it.
func (t *tree) origin(ctx context.Context, o Options) (origin, error) {
	data, err := os.ReadFile(t.path("driver"))
	var was origin
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return t.decide(ctx, o)
	case err != nil:
		return origin{}, err
	case json.Unmarshal(data, &was) != nil || was.Driver != Overlay && was.Driver != Native:
		return origin{}, fmt.Errorf("%q is damaged: %w", t.path("driver"), errdefs.ErrDataLoss)
	case o.Driver != "" && o.Driver != was.Driver:
		return origin{}, fmt.Errorf("the tree was made by driver %q, not %q: %w", was.Driver, o.Driver, errdefs.ErrFailedPrecondition)
	case o.Attributes != "" && was.Attributes != "" && o.Attributes != was.Attributes:
		return origin{}, fmt.Errorf("the tree was made with %q attributes, not %q: %w", was.Attributes, o.Attributes, errdefs.ErrFailedPrecondition)
	}
	if was.Driver == Native || was.Kernel == kernel() {
		return was, nil
	}
	return t.another(ctx, o, was)
}

// another tries an existing tree of layers on another kernel. Where that
// cannot be, as for a user who may only look, the former findings stand: the
// names can be worked with, and a mount says for itself what it lacks.
func (t *tree) another(ctx context.Context, o Options, was origin) (origin, error) {
	found, err := t.try(ctx, o, was.Attributes)
	if ctx.Err() != nil {
		return origin{}, context.Cause(ctx)
	}
	if err != nil || !found.OK {
		was.Reason = fmt.Sprintf("made by it on kernel %s; on kernel %s: %s", was.Kernel, kernel(), found.Reason)
		if err != nil {
			was.Reason += err.Error()
		}
		return was, nil
	}
	now := t.stacking(was.Attributes, was.Reason, found)
	if err := t.record(now); err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.EROFS) {
		return origin{}, err
	}
	return now, nil
}

// try makes a trial, and another if it fails: a process that makes a mount
// namespace just then keeps a copy of the trial's mount, and its upper
// directory stays in use.
func (t *tree) try(ctx context.Context, o Options, class string) (found overlayfs.Support, err error) {
	for range 3 {
		found, err = o.Trial(ctx, t.path(dirNew), overlayfs.TryOptions{UserXattr: class == User})
		if err != nil || found.OK {
			break
		}
	}
	return found, err
}

// decide chooses the driver of a new tree.
func (t *tree) decide(ctx context.Context, o Options) (origin, error) {
	made := origin{Driver: Native, Reason: "asked for", Kernel: kernel()}
	if o.Driver != Native {
		class := o.Attributes
		if class == "" {
			class = DefaultAttributes()
		}
		found, err := t.try(ctx, o, class)
		switch {
		case err != nil:
			return origin{}, err
		case found.OK:
			reason := "overlayfs can be mounted here"
			if o.Driver != "" {
				reason = "asked for"
			}
			made = t.stacking(class, reason, found)
		case o.Driver == Overlay:
			return origin{}, fmt.Errorf("overlayfs cannot be used here: %s: %w", found.Reason, errdefs.ErrNotImplemented)
		default:
			made.Reason = "copies, as overlayfs cannot be used here: " + found.Reason
			made.Features = features(found)
		}
	}
	return made, t.record(made)
}

func (t *tree) stacking(class, reason string, found overlayfs.Support) origin {
	return origin{
		Driver: Overlay, Attributes: class, Reason: reason, Kernel: kernel(),
		Features: features(found), MaxDepth: found.MaxLayers,
	}
}

// features are the findings of a trial, and who made it.
func features(found overlayfs.Support) map[string]bool {
	m := map[string]bool{"overlayfs": found.OK, "user namespace": !initialUserNamespace()}
	for name, ok := range found.Features {
		m[name] = ok
	}
	return m
}

// record writes the file driver, once for all: it alone is synced.
func (t *tree) record(o origin) error {
	data, err := json.MarshalIndent(o, "", "  ")
	if err != nil {
		return err
	}
	if err := t.step("open.driver"); err != nil {
		return err
	}
	path := t.path("driver")
	f, err := os.CreateTemp(t.dir, ".driver-")
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// kernel is the running kernel's release, with whose findings a tree can be
// opened without another trial.
func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// DefaultAttributes is the class of attributes of a new tree for whoever runs: trusted attributes need
// root in the initial user namespace.
func DefaultAttributes() string {
	if os.Geteuid() == 0 && initialUserNamespace() {
		return Trusted
	}
	return User
}

// initialUserNamespace says whether all user ids are mapped to themselves.
func initialUserNamespace() bool {
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return true // no user namespaces in this kernel
	}
	return strings.Join(strings.Fields(string(ids)), " ") == "0 0 4294967295"
}

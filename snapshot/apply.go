package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Change is the difference between the trees of two committed snapshots: what
// one layer says, or a Diff.
type Change struct {
	// Lower is the snapshot to which the difference applies; empty for the
	// empty tree. For the layer of a snapshot it is its parent.
	Lower string
	// Upper is the snapshot that results.
	Upper string
}

// Apply makes the active snapshot key, which was prepared without a parent,
// show what results from applying changes to an empty tree, in their order, as
// if each were a layer's tar: whiteouts remove, directories merge, everything
// else replaces what is there. It is how merges and differences get a tree
// where the driver cannot stack.
//
// Where the driver has layers and Upper's begin with those of Lower, the
// remaining layers are applied one by one, if they are clean; else the two
// trees are compared.
//
// Nobody may have key mounted, and afterwards it has to be committed: with the
// native driver its files can be hard links to those of committed snapshots,
// and whoever wrote to it would write to them. Children get copies. After an
// error the snapshot is to be removed.
func Apply(ctx context.Context, d Driver, key string, changes []Change) error {
	if err := apply(ctx, d, key, changes); err != nil {
		return fmt.Errorf("apply to %q: %w", key, err)
	}
	return nil
}

func apply(ctx context.Context, d Driver, key string, changes []Change) (err error) {
	info, err := d.Stat(ctx, key)
	if err != nil {
		return err
	}
	if info.Kind != snapshots.KindActive || info.Parent != "" {
		return fmt.Errorf("it is not active or has a parent: %w", errdefs.ErrFailedPrecondition)
	}
	if busy, err := d.InUse(ctx, key); err != nil && !errdefs.IsPermissionDenied(err) {
		return err
	} else if busy {
		return fmt.Errorf("it is mounted: %w", errdefs.ErrFailedPrecondition)
	}
	to, err := openTarget(ctx, d, key)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.close()) }()
	for _, c := range changes {
		if err := to.apply(ctx, d, c); err != nil {
			return fmt.Errorf("the difference of %q to %q: %w", c.Upper, c.Lower, err)
		}
	}
	return nil
}

// target is where differences are applied to.
type target struct {
	dir   string
	marks marks
	// links says that files may become hard links.
	links bool
	close func() error
}

func openTarget(ctx context.Context, d Driver, key string) (*target, error) {
	to := &target{close: func() error { return nil }}
	if s, ok := d.Stacker(); ok {
		layers, err := s.Layers(ctx, key)
		if err != nil {
			return nil, err
		}
		own := layers[len(layers)-1]
		to.dir, to.marks = own.Dir, marksOf(own.Attributes)
		return to, nil
	}
	dir, ok, err := d.Dir(ctx, key)
	if err != nil {
		return nil, err
	}
	if ok {
		to.dir, to.links = dir, true
		return to, nil
	}
	to.dir, to.close, err = mountTree(ctx, d, key, false)
	return to, err
}

func (to *target) apply(ctx context.Context, d Driver, c Change) error {
	layers, err := remaining(ctx, d, c)
	if err != nil {
		return err
	}
	if layers == nil {
		return to.applyTrees(ctx, d, c)
	}
	for _, l := range layers {
		if err := to.applyLayer(ctx, l); err != nil {
			return fmt.Errorf("layer %q: %w", l.Name, err)
		}
	}
	return nil
}

// remaining are the layers that a change consists of, nil if that cannot be
// known.
func remaining(ctx context.Context, d Driver, c Change) ([]Layer, error) {
	s, ok := d.Stacker()
	if !ok {
		return nil, nil
	}
	upper, err := s.Layers(ctx, c.Upper)
	if err != nil {
		return nil, err
	}
	var lower []Layer
	if c.Lower != "" {
		if lower, err = s.Layers(ctx, c.Lower); err != nil {
			return nil, err
		}
	}
	rest, ok := Remainder(lower, upper)
	if !ok || slices.ContainsFunc(rest, func(l Layer) bool { return !l.Clean }) {
		return nil, nil
	}
	return rest, nil
}

func (to *target) applyLayer(ctx context.Context, l Layer) (err error) {
	if l.Opaque {
		if err := emptyDir(to.dir); err != nil {
			return err
		}
	}
	u, err := openUnion(marksOf(l.Attributes), []string{l.Dir})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, u.close()) }()
	list, err := changesOf(ctx, u)
	if err != nil {
		return err
	}
	return write(ctx, to.dir, u, list, to.marks, false, to.links)
}

func emptyDir(dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := removeTree(dir + "/" + n.Name()); err != nil {
			return err
		}
	}
	return nil
}

func (to *target) applyTrees(ctx context.Context, d Driver, c Change) (err error) {
	return compared(ctx, d, c, func(upper *union, list []change) error {
		return write(ctx, to.dir, upper, list, to.marks, false, to.links)
	})
}

// compared compares the trees of a change and hands the difference to use.
func compared(ctx context.Context, d Driver, c Change, use func(upper *union, list []change) error) (err error) {
	lower, closeLower, err := openTree(ctx, d, c.Lower)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeLower()) }()
	upper, closeUpper, err := openTree(ctx, d, c.Upper)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeUpper()) }()
	list, err := difference(ctx, lower, upper)
	if err != nil {
		return err
	}
	return use(upper, list)
}

// openTree opens the tree of a committed name for reading: by its layers, as
// the directory that holds it, or else through a mount. An empty name is the
// empty tree.
func openTree(ctx context.Context, d Driver, name string) (u *union, closed func() error, err error) {
	var roots []string
	var m marks
	done := func() error { return nil }
	if name != "" {
		if roots, m, done, err = treeRoots(ctx, d, name); err != nil {
			return nil, nil, err
		}
	}
	if u, err = openUnion(m, roots); err != nil {
		return nil, nil, errors.Join(err, done())
	}
	return u, func() error { return errors.Join(u.close(), done()) }, nil
}

// treeRoots are the directories of which a tree consists, topmost first.
func treeRoots(ctx context.Context, d Driver, name string) (roots []string, m marks, done func() error, err error) {
	done = func() error { return nil }
	if s, ok := d.Stacker(); ok {
		layers, err := s.Layers(ctx, name)
		if err != nil {
			return nil, "", nil, err
		}
		if !slices.ContainsFunc(layers, func(l Layer) bool { return l.Bound != "" }) {
			for _, l := range slices.Backward(layers) {
				roots, m = append(roots, l.Dir), marksOf(l.Attributes)
				if l.Opaque {
					break
				}
			}
			return roots, m, done, nil
		}
	}
	dir, ok, err := d.Dir(ctx, name)
	if err != nil {
		return nil, "", nil, err
	}
	if !ok {
		dir, done, err = mountTree(ctx, d, name, true)
	}
	return []string{dir}, "", done, err
}

// mountTree mounts a snapshot for the time of one call.
func mountTree(ctx context.Context, d Driver, key string, readOnly bool) (dir string, done func() error, err error) {
	dir, err = os.MkdirTemp("", "lamina-tree-")
	if err != nil {
		return "", nil, err
	}
	if err := d.Mount(ctx, key, dir, readOnly); err != nil {
		return "", nil, errors.Join(err, os.Remove(dir))
	}
	return dir, func() error {
		err := unix.Unmount(dir, 0)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(dir, unix.MNT_DETACH)
		}
		if err != nil {
			return &os.PathError{Op: "unmount", Path: dir, Err: err}
		}
		return os.Remove(dir)
	}, nil
}

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot/overlayfs"
)

// Clean implements Stacker.
func (o *overlay) Clean(ctx context.Context, key string) (snapshots.Usage, error) {
	used, err := o.clean(ctx, key)
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("clean %q: %w", key, asNotFound(err))
	}
	return used, nil
}

func (o *overlay) clean(ctx context.Context, key string) (snapshots.Usage, error) {
	if err := requireKey(key); err != nil {
		return snapshots.Usage{}, err
	}
	// The lock keeps mounts and the commit away meanwhile.
	defer o.lock(key)()
	e, s, err := o.load(key)
	if err != nil {
		return snapshots.Usage{}, err
	}
	if e.dir != dirActive || s.View {
		return snapshots.Usage{}, fmt.Errorf("it is not active: %w", errdefs.ErrFailedPrecondition)
	}
	if s.Bound != "" {
		return snapshots.Usage{}, &LayerError{Name: key, Reason: string(s.Bound), Bound: true}
	}
	upper := below(o.at(e), "fs")
	if busy, err := o.mounted(upper, below(o.at(e), "work")); err != nil {
		return snapshots.Usage{}, err
	} else if busy {
		return snapshots.Usage{}, fmt.Errorf("it is the writable layer of a mount: %w", errdefs.ErrFailedPrecondition)
	}
	used, err := o.cleanLayer(ctx, upper, string(s.Parent), nil)
	if err != nil {
		return snapshots.Usage{}, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.cleaned[e.name] = used
	return used, nil
}

// mounted asks whether a mount has upper as its writable layer. One whose work
// directory is empty was never mounted.
func (o *overlay) mounted(upper, work string) (bool, error) {
	if ok, err := exists(below(work, "work")); err != nil || !ok {
		return false, err
	}
	return overlayfs.InUse(upper)
}

// dirty forgets that an active snapshot was cleaned, as it may be written.
func (t *tree) dirty(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.cleaned, name)
}

// wasCleaned is what Clean found, if nothing can have changed since.
func (t *tree) wasCleaned(name string) (used snapshots.Usage, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	used, ok = t.cleaned[name]
	return used, ok
}

// CleanCopy implements Stacker.
func (o *overlay) CleanCopy(ctx context.Context, name, layer string, opts ...snapshots.Opt) error {
	if err := o.cleanCopy(ctx, name, layer, opts); err != nil {
		return fmt.Errorf("clean copy %q of %q: %w", name, layer, asNotFound(err))
	}
	return nil
}

func (o *overlay) cleanCopy(ctx context.Context, name, layer string, opts []snapshots.Opt) error {
	if err := o.requireCommitted(layer, errdefs.ErrFailedPrecondition); err != nil {
		return err
	}
	l, err := o.layerOf(layer)
	switch {
	case err != nil:
		return err
	case l.isStack:
		return fmt.Errorf("%q is a stack and has no layer of its own: %w", layer, errdefs.ErrInvalidArgument)
	case l.bound != "":
		return &LayerError{Name: layer, Reason: l.bound, Bound: true}
	}
	s := state{Clean: true, Opaque: l.opaque}
	err = o.found(ctx, name, s, opts, func(path string) (snapshots.Usage, error) {
		upper := below(path, "fs")
		names, err := linkTree(ctx, upper, o.path(dirCommitted, encodeKey(layer), "fs"))
		if err != nil {
			return snapshots.Usage{}, err
		}
		return o.cleanLayer(ctx, upper, l.parent, names)
	})
	var bound *LayerError
	if errors.As(err, &bound) && bound.Name == "" {
		bound.Name = layer
	}
	return err
}

// cleanLayer cleans the layer in the directory upper, which nobody has
// mounted, over the committed name parent. Of a copy with hard links, names
// says how many names each file has in it; files are not measured then.
func (o *overlay) cleanLayer(ctx context.Context, upper, parent string, names map[inodeID]int) (_ snapshots.Usage, err error) {
	m := marksOf(o.info.Attributes)
	// A layer that is empty, or hides things only, is clean whatever lies below.
	lower := &union{marks: m, roots: func() ([]string, error) {
		chain, err := o.chain(parent, 1<<30)
		return o.layers(chain), err
	}}
	defer func() { err = errors.Join(err, lower.close()) }()
	root, err := openPlace(unix.AT_FDCWD, upper, unix.O_DIRECTORY)
	if err != nil {
		return snapshots.Usage{}, err
	}
	defer root.Close()
	c := &cleaner{comparer: comparer{ctx: ctx, names: names}, marks: m, step: o.step, seen: map[inodeID]bool{}}
	st, err := stat(root)
	if err != nil {
		return snapshots.Usage{}, err
	}
	if _, err := c.dir(root, &st, lower); err != nil {
		return snapshots.Usage{}, err
	}
	c.count(&st)
	return c.used, nil
}

// A cleaner goes through a layer. Whatever it does, mounts of the layer over
// its parent show the same, so it may be cut anywhere.
type cleaner struct {
	comparer
	marks marks
	step  func(string) error
	used  snapshots.Usage
	seen  map[inodeID]bool
}

// count measures what is kept, each inode once. The files of a copy are
// another layer's.
func (c *cleaner) count(st *unix.Stat_t) {
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		id := inodeID{st.Dev, st.Ino}
		if c.names[id] > 0 || st.Nlink > 1 && c.seen[id] {
			return
		}
		c.seen[id] = true
	}
	c.used.Inodes++
	c.used.Size += st.Blocks * 512
}

// dir cleans a directory of the layer; lower is what the parent shows of it,
// nil for nothing. It says whether anything is left in it, and brings st up to
// date.
func (c *cleaner) dir(place *os.File, st *unix.Stat_t, lower *union) (empty bool, err error) {
	f, shut, err := openReadable(place, unix.O_DIRECTORY)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close(), shut()) }()
	names, err := readNames(f)
	if err != nil {
		return false, err
	}
	kept, white := 0, false
	for _, name := range names {
		if err := context.Cause(c.ctx); err != nil {
			return false, err
		}
		var st unix.Stat_t
		if err := unix.Fstatat(int(f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return false, &os.PathError{Op: "stat", Path: name, Err: err}
		}
		white = white || c.marks.whiteout(&st)
		drop, err := c.entry(f, name, &st, lower)
		if err != nil {
			return false, within(name, err)
		}
		if !drop {
			kept++
			c.count(&st)
		}
	}
	if white {
		if err := c.marks.markWhite(place); err != nil {
			return false, err
		}
	}
	if kept < len(names) {
		if err := setTimes(place, *st); err != nil {
			return false, err
		}
		*st, err = stat(place)
	}
	return kept == 0, err
}

// entry cleans one name, and says whether it is gone.
func (c *cleaner) entry(dir *os.File, name string, st *unix.Stat_t, lower *union) (drop bool, err error) {
	if c.marks.whiteout(st) {
		return false, nil
	}
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	var below found
	if lower != nil {
		if below, _, err = lower.lookup(name); err != nil {
			return false, err
		}
	}
	// Only a copy may be of a layer that others have made.
	if !isDir && c.names == nil && (below.name == "" || !sameStat(st, &below.st)) {
		return false, nil
	}
	place, err := openPlace(int(dir.Fd()), name, unix.O_NOFOLLOW)
	if err != nil {
		return false, err
	}
	defer place.Close()
	if reason, err := c.marks.boundMark(place, st); err != nil {
		return false, err
	} else if reason != "" {
		return false, &LayerError{Reason: reason, Bound: true} // its path is added on the way up
	}
	if isDir {
		drop, err = c.directory(place, st, lower, &below)
	} else {
		drop, err = c.file(place, st, lower, &below)
	}
	if err != nil || !drop {
		return false, err
	}
	flags := 0
	if isDir {
		flags = unix.AT_REMOVEDIR
	}
	if err := c.step("clean.drop"); err != nil {
		return false, err
	}
	if err := unix.Unlinkat(int(dir.Fd()), name, flags); err != nil {
		return false, &os.PathError{Op: "unlink", Path: name, Err: err}
	}
	return true, nil
}

// file says whether a file is nothing but a copy of the parent's. One with
// other names in the layer is what they are.
func (c *cleaner) file(place *os.File, st *unix.Stat_t, lower *union, below *found) (drop bool, err error) {
	if below.name == "" || !sameStat(st, &below.st) || c.links(st) > 1 {
		return false, nil
	}
	theirs, err := lower.place(below)
	if err != nil {
		return false, err
	}
	defer theirs.Close()
	return c.sameFile(c.marks, lower.marks, place, theirs, st)
}

// directory cleans what is below a directory, and says whether nothing is left
// of a difference to the parent's.
func (c *cleaner) directory(place *os.File, st *unix.Stat_t, lower *union, below *found) (drop bool, err error) {
	var sub *union
	if below.name != "" && below.isDir() {
		if sub, err = lower.sub(below); err != nil {
			return false, err
		}
		defer func() { err = errors.Join(err, sub.close()) }()
	}
	under := sub
	opaque, _, err := c.marks.get(place, "opaque")
	if err != nil {
		return false, err
	}
	if opaque == "y" {
		same := sub == nil
		if !same {
			if same, err = c.sameAsBelow(place, sub); err != nil {
				return false, err
			}
		}
		if same {
			if err = c.step("clean.opaque"); err == nil {
				err = c.marks.drop(place, "opaque")
			}
			if err != nil {
				return false, err
			}
		} else {
			under = nil // it is needed, and nothing below shows
		}
	}
	empty, err := c.dir(place, st, under)
	if err != nil || !empty || under == nil || !sameStat(st, &below.st) {
		return false, err
	}
	return sameXattrs(c.marks, under.marks, place, under.top())
}

// sameAsBelow says whether an opaque directory holds just what it hides, as
// after renaming a directory and back, which copies it.
func (c *cleaner) sameAsBelow(place *os.File, below *union) (same bool, err error) {
	again, err := openPlace(int(place.Fd()), ".", unix.O_DIRECTORY)
	if err != nil {
		return false, err
	}
	own := &union{marks: c.marks}
	defer func() { err = errors.Join(err, own.close()) }()
	if _, err := own.add(again); err != nil {
		return false, err
	}
	return c.sameTree(own, below)
}

// within puts a name before the path of an error.
func within(name string, err error) error {
	var bound *LayerError
	if errors.As(err, &bound) {
		bound.Path = filepath.Join(name, bound.Path)
		return err
	}
	var path *os.PathError
	if errors.As(err, &path) && path == err { //nolint:errorlint // only one that nothing wraps
		path.Path = filepath.Join(name, path.Path)
		return err
	}
	return fmt.Errorf("%s: %w", name, err)
}

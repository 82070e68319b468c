package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// Stacker is the part of a driver whose committed snapshots are layers, each
// a difference that can lie over others: see Driver.Stacker.
//
// The layers of a snapshot are those of its parent and its own. A layer is
// named by the committed snapshot that it belongs to, and in the list of a
// stack such a name stands for that layer alone, without the parents.
//
// Not every layer can lie over any other. What a build leaves behind holds
// marks and copies that say nothing over its own parent and would hide or
// undo something over others. A layer is clean when it is the difference and
// nothing else: because Clean went through it before Commit, because Commit
// was told so (WithExactLayer), or because CleanCopy or Diff made it. All
// others are raw. They are mounted under their own children as they are.
type Stacker interface {
	// Stack makes the committed name that shows layers, bottom first, as if
	// each were applied to the tree of those below it. It takes no inode,
	// link or byte per file: a directory, a description, and one hard link
	// per layer, by which the stack counts as a child of each. A layer that
	// is in the list several times counts at its topmost place; a stack in
	// the list stands for its own list. No layers at all make an empty
	// tree.
	//
	// Errors: NotFound for a layer that there is not; a *LayerError for one
	// that cannot be stacked and a *DepthError for too many, both of class
	// FailedPrecondition; AlreadyExists for a name that is taken.
	Stack(ctx context.Context, name string, layers []string, opts ...snapshots.Opt) error

	// Layers lists the layers of key, bottom first; of an active key its
	// own, which may still change, is the last. It takes time for each
	// layer but not for their files.
	Layers(ctx context.Context, key string) ([]Layer, error)

	// Clean goes once through what an active snapshot holds, and makes it
	// the mere difference to its parent: it drops the opaque marks of
	// directories of which the parent shows none, and what is identical to
	// the parent's, as after renaming a file and back. Mounts show the same
	// as before, but that a directory in which nothing differs any more has
	// the parent's times. The Commit that follows knows the layer as clean
	// and its usage, which Clean returns, unless there is a writable mount
	// between the two.
	//
	// No process may have the snapshot mounted in any way: the kernel does
	// not define what happens to mounts whose layers change. Clean looks for
	// a writer (FailedPrecondition); that there is no reader the caller
	// knows. It may be cut at any time and be called again.
	Clean(ctx context.Context, key string) (snapshots.Usage, error)

	// CleanCopy commits name, without a parent, as the cleaned layer of the
	// committed snapshot layer. Files become hard links; only directories
	// are new, and only what is new counts for the usage of name. A
	// *LayerError says that it can lie over its own parent only.
	CleanCopy(ctx context.Context, name, layer string, opts ...snapshots.Opt) error

	// Diff commits name, without a parent, as the layer that turns the tree
	// of lower into that of upper. Directories which both have from the same
	// layers are not looked into. An empty lower is the empty tree.
	//
	// It knows two trees and no history: where upper's layers are those of
	// lower and more, a Stack of the remaining ones (see Remainder) says
	// more exactly what was done, and costs nothing.
	Diff(ctx context.Context, name, lower, upper string, opts ...snapshots.Opt) error
}

// Layer is what one committed snapshot adds to those below it.
type Layer struct {
	// Name is the snapshot that the layer belongs to.
	Name string
	// Dir is the upper directory of overlayfs, as an absolute path. It stays
	// where it is until the snapshot is removed, for an active one until it
	// is committed. It may be a symbolic link to the directory.
	Dir string
	// Attributes is the class of the attributes with overlayfs's marks in
	// it, Trusted or User.
	Attributes string
	// Clean says that the layer may be in the list of a stack. See Stacker.
	Clean bool
	// Bound says, if it is not empty, why it makes sense over its own parent
	// only; not even a clean copy can be made then.
	Bound string
	// Opaque says that nothing below the layer shows: its root is marked so,
	// which a layer's tar can do.
	Opaque bool
}

// DepthError says that a snapshot has more layers than one mount can stack.
// Its class is FailedPrecondition.
type DepthError struct {
	// Layers is how many there are, or at least how many were counted.
	Layers int
	// Max is how many the driver can stack.
	Max int
}

func (e *DepthError) Error() string {
	return fmt.Sprintf("%d layers or more, and one mount stacks at most %d layers", e.Layers, e.Max)
}

// Unwrap gives the error's class.
func (e *DepthError) Unwrap() error { return errdefs.ErrFailedPrecondition }

// LayerError says that a layer cannot lie over others than its own parent.
// Its class is FailedPrecondition.
type LayerError struct {
	// Name is the layer.
	Name string
	// Path is the file or directory in it that is the reason, if it is one.
	Path string
	// Reason is text for people.
	Reason string
	// Bound says that no copy helps: what depends on it has to be made from
	// a mount of it (see Apply). Otherwise CleanCopy makes one that can be
	// stacked.
	Bound bool
}

func (e *LayerError) Error() string {
	reason := e.Reason
	if e.Path != "" {
		reason = fmt.Sprintf("%q %s", e.Path, reason)
	}
	return fmt.Sprintf("layer %q cannot be stacked: %s", e.Name, reason)
}

// Unwrap gives the error's class.
func (e *LayerError) Unwrap() error { return errdefs.ErrFailedPrecondition }

// Remainder is what upper has on top of lower, both lists of layers, bottom
// first; ok is false where upper does not begin with all of lower.
func Remainder[L comparable](lower, upper []L) (rest []L, ok bool) {
	if len(upper) < len(lower) || !slices.Equal(lower, upper[:len(lower)]) {
		return nil, false
	}
	return upper[len(lower):], true
}

// Flatten is a list of layers, bottom first, in which each is only at its
// topmost place: A, B, A is B, A.
func Flatten[L comparable](layers []L) []L {
	seen := make(map[L]bool, len(layers))
	var out []L
	for _, l := range slices.Backward(layers) {
		if !seen[l] {
			seen[l] = true
			out = append(out, l)
		}
	}
	slices.Reverse(out)
	return out
}

var _ Stacker = (*overlay)(nil)

// Stacker implements Driver.
func (o *overlay) Stacker() (Stacker, bool) { return o, true }

// Stack implements Stacker.
func (o *overlay) Stack(ctx context.Context, name string, layers []string, opts ...snapshots.Opt) error {
	err := context.Cause(ctx)
	if err == nil {
		err = o.stack(ctx, name, layers, opts)
	}
	if err != nil {
		return fmt.Errorf("stack %q: %w", name, err)
	}
	return nil
}

func (o *overlay) stack(ctx context.Context, name string, layers []string, opts []snapshots.Opt) error {
	list, err := o.flatten(layers)
	if err != nil {
		return err
	}
	s, err := o.stackable(list)
	if err != nil {
		return err
	}
	if shown := len(s.Layers) - s.Hidden; shown > o.maxDepth {
		return &DepthError{Layers: shown, Max: o.maxDepth}
	}
	return o.found(ctx, name, s, opts, func(path string) (snapshots.Usage, error) {
		for k, layer := range list {
			if err := errors.Join(context.Cause(ctx), o.joinLocked(layer, path, k)); err != nil {
				return snapshots.Usage{}, err
			}
		}
		if len(list) > 0 {
			return snapshots.Usage{}, nil
		}
		upper := below(path, "fs")
		if err := os.Mkdir(upper, 0o700); err != nil {
			return snapshots.Usage{}, err
		}
		return snapshots.Usage{Inodes: 1}, likeRoot(upper, "")
	})
}

// flatten replaces stacks by their layers, and leaves each at its topmost
// place.
func (o *overlay) flatten(layers []string) ([]string, error) {
	var list []string
	for _, name := range layers {
		if err := o.requireCommitted(name, errdefs.ErrFailedPrecondition); err != nil {
			return nil, err
		}
		l, err := o.layerOf(name)
		if err != nil {
			return nil, err
		}
		if !l.isStack {
			list = append(list, name)
			continue
		}
		s, err := o.stateOf(entry{dirCommitted, encodeKey(name)})
		if err != nil {
			return nil, asNotFound(err)
		}
		list = append(list, s.needs()...)
	}
	return Flatten(list), nil
}

// stackable is the state of a stack of these layers, none of which is a stack.
func (o *overlay) stackable(layers []string) (s state, err error) {
	s.Clean = true
	for k, name := range layers {
		l, err := o.layerOf(name)
		switch {
		case err != nil:
			return state{}, err
		case l.bound != "":
			return state{}, &LayerError{Name: name, Reason: l.bound, Bound: true}
		case !l.clean:
			return state{}, &LayerError{Name: name, Reason: "it is raw: it may hold what makes sense over its own parent only"}
		case l.opaque:
			s.Hidden = k
		}
		s.Layers = append(s.Layers, text(name))
	}
	return s, nil
}

// found makes a committed entry that was not active before: complete in new,
// then by one rename. fill makes what it holds beside info.
func (o *overlay) found(ctx context.Context, name string, s state, opts []snapshots.Opt,
	fill func(path string) (snapshots.Usage, error),
) (err error) {
	if err := requireKey(name); err != nil {
		return err
	}
	base, err := applyOpts(opts)
	if err != nil {
		return err
	}
	if err := o.free(name); err != nil {
		return err
	}
	e := entry{dirCommitted, encodeKey(name)}
	if hashed(e.name) {
		s.Key = text(name)
	}
	takeExact(&base)
	s.setLabels(base.Labels)

	making := entry{dirNew, randomName(e.name)}
	o.mark(&o.making, making.name, true)
	defer o.mark(&o.making, making.name, false)
	defer func() {
		if err != nil {
			err = errors.Join(err, o.unmake(making))
		}
	}()
	if err := o.step("found.mkdir"); err != nil {
		return err
	}
	if err := os.Mkdir(o.at(making), 0o700); err != nil {
		return err
	}
	if err := o.step("found.fill"); err != nil {
		return err
	}
	used, err := fill(o.at(making))
	if err != nil {
		return err
	}
	s.Sealed, s.Usage = true, &usage{Inodes: used.Inodes, Size: used.Size}
	s.Created = o.clock().UnixNano()
	s.Updated = s.Created
	if err := o.step("found.info"); err != nil {
		return err
	}
	if err := createState(below(o.at(making), "info"), s); err != nil {
		return err
	}
	if err := errors.Join(context.Cause(ctx), o.publish(name, making, e)); err != nil {
		return err
	}
	o.remember(name, s)
	return nil
}

// Layers implements Stacker.
func (o *overlay) Layers(_ context.Context, key string) ([]Layer, error) {
	e, s, err := o.load(key)
	var list []Layer
	if err == nil {
		list, err = o.listLayers(key, e, s)
	}
	if err != nil {
		return nil, fmt.Errorf("layers of %q: %w", key, err)
	}
	return list, nil
}

func (o *overlay) listLayers(key string, e entry, s state) (list []Layer, err error) {
	var names []string
	if s.stack() {
		names = s.needs()
	} else if names, err = o.ancestors(string(s.Parent)); err != nil {
		return nil, err
	}
	for _, name := range names {
		l, err := o.layerOf(name)
		if err != nil {
			return nil, err
		}
		list = append(list, o.layer(name, entry{dirCommitted, encodeKey(name)}, l))
	}
	if _, own, err := o.shown(s); err != nil {
		return nil, err
	} else if own {
		list = append(list, o.layer(key, e, s.layer()))
	}
	return list, nil
}

func (o *overlay) layer(name string, e entry, l layer) Layer {
	return Layer{
		Name: name, Dir: below(o.at(e), "fs"), Attributes: o.info.Attributes,
		Clean: l.clean && l.bound == "", Bound: l.bound, Opaque: l.opaque,
	}
}

// ancestors are all layers of a committed name, bottom first, whether or not
// they show.
func (o *overlay) ancestors(name string) ([]string, error) {
	var names []string
	for name != "" {
		l, err := o.layerOf(name)
		if err != nil {
			return nil, err
		}
		if l.isStack {
			s, err := o.stateOf(entry{dirCommitted, encodeKey(name)})
			if err != nil {
				return nil, asNotFound(err)
			}
			slices.Reverse(names)
			return append(s.needs(), names...), nil
		}
		names = append(names, name)
		name = l.parent
	}
	slices.Reverse(names)
	return names, nil
}

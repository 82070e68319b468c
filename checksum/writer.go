package checksum

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
)

// Writer is the tree of a mutable record whose holder reports what it changes.
// It does not keep the record: the handle stays its owner's, who ends it with
// the Writer's Commit, its own Commit (then nothing is vouched for) or Release.
type Writer struct {
	k    *Keeper
	ref  *cache.MutableRef
	tree *Tree

	mu sync.Mutex
	// unreported says that not every change was reported. Guarded by mu.
	unreported bool
}

// New is Manager.New for a holder that reports all its changes: the tree starts
// from the parent's.
func (k *Keeper) New(ctx context.Context, parent *cache.ImmutableRef, o cache.NewOptions) (*cache.MutableRef, *Writer, error) {
	tree := contenthash.New()
	if parent != nil {
		s := k.take(parent.ID())
		defer k.give(s)
		t, err := k.tree(ctx, s, parent)
		if err != nil {
			return nil, nil, fmt.Errorf("content hashes of record %s: %w", parent.ID(), err)
		}
		tree = t.Clone()
	}
	ref, err := k.m.New(ctx, parent, o)
	if err != nil {
		return nil, nil, err
	}
	return ref, k.writer(ref, newTree(ref.ID(), tree, nil)), nil
}

// Reopen is GetMutableWith for a holder that reports all its changes: what is
// known of a committed record goes on to hold where nothing is reported. Of a
// record that was mutable already nobody knows what the holder before changed,
// so what is known of it is validated.
func (k *Keeper) Reopen(ctx context.Context, id cache.ID, o cache.ReopenOptions) (*cache.MutableRef, *Writer, error) {
	s := k.take(id)
	defer k.give(s)
	// Nobody loads a tree of the old id beside the reopen.
	select {
	case s.loading <- struct{}{}:
		defer func() { <-s.loading }()
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
	tree := k.loaded(s)
	if tree == nil {
		// The reopen leaves an index that confirms nothing.
		var err error
		if tree, err = loadStored(ctx, k.m, id); err != nil {
			return nil, nil, err
		}
	}
	ref, err := k.m.GetMutableWith(ctx, id, o)
	if err != nil {
		return nil, nil, err
	}
	k.forget(s)
	w, err := k.carryOver(ctx, ref, tree)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("content hashes of record %s: %w", ref.ID(), err), ref.Release(ctx))
	}
	return ref, w, nil
}

// forget takes the tree of s out of memory.
func (k *Keeper) forget(s *slot) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s.tree, s.unsafe = nil, false
	k.dropLocked(s)
}

// carryOver gives the tree from before a reopen to the reopened record. tree is
// nil where there was none.
func (k *Keeper) carryOver(ctx context.Context, ref *cache.MutableRef, tree *Tree) (*Writer, error) {
	if tree == nil {
		return k.writer(ref, newTree(ref.ID(), contenthash.New(), nil)), nil
	}
	// A save of the old id that is under way ends first.
	release, err := tree.lockSaves(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	index, err := ref.Attachment(ctx, cache.TreeIndex)
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) && !errors.Is(err, errdefs.ErrDataLoss) {
		return nil, err
	}
	if want, err := unconfirmed(tree.stored); err != nil || !bytes.Equal(want, index) {
		tree.Tree.Save().Failed() // what is stored is another tree, or none: the next save has all
	}
	tree.id, tree.stored = ref.ID(), index
	return k.writer(ref, tree), nil
}

func (k *Keeper) writer(ref *cache.MutableRef, t *Tree) *Writer {
	t.Unconfirm()
	return &Writer{k: k, ref: ref, tree: t}
}

// unconfirmed is what a reopen makes of a stored index page.
func unconfirmed(index []byte) ([]byte, error) {
	if index == nil {
		return nil, nil
	}
	return contenthash.UnconfirmStored(index)
}

// HandleChange reports one change that has been made: see
// contenthash.Tree.HandleChange.
func (w *Writer) HandleChange(c contenthash.Change) error { return w.tree.HandleChange(c) }

// Unreported says that something was, or may have been, changed that was not
// reported: a command ran, or the holder lost count. Commit then vouches for
// nothing, and what is known is validated before it is believed.
func (w *Writer) Unreported() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.unreported = true
}

// Checksum is the digest of a path as the files are now. All that it uses is
// looked at again, for others may be writing.
func (w *Writer) Checksum(ctx context.Context, path string, o contenthash.Options) (digest.Digest, error) {
	d, err := w.tree.Checksum(ctx, func(ctx context.Context) (*contenthash.Root, error) {
		return mounted(w.ref.Mount(ctx, cache.MountOptions{ReadOnly: true}))
	}, path, o)
	if err != nil {
		return "", fmt.Errorf("checksum of record %s: %w", w.ref.ID(), err)
	}
	return d, nil
}

// Stats are those of the tree.
func (w *Writer) Stats() contenthash.Stats { return w.tree.Stats() }

// Commit is CommitWith of the handle, with the tree in the same transaction.
// Unless Unreported was called the holder vouches that every change was
// reported. When it fails the Writer stays as it was.
func (w *Writer) Commit(ctx context.Context, o cache.CommitOptions) (*cache.ImmutableRef, error) {
	release, err := w.tree.lockSaves(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	w.mu.Lock()
	unreported := w.unreported
	w.mu.Unlock()
	if unreported {
		w.tree.Seal()
	} else {
		w.tree.Confirm()
	}
	saved := w.tree.Tree.Save()
	edit := o.Edit
	o.Edit = func(e *cache.Edit) error {
		if saved.Replace {
			e.DetachAll(cache.TreePrefix)
		}
		err := write(saved, e.Attach, func(name string) error { return e.Attach(name, nil) })
		if err == nil && edit != nil {
			err = edit(e)
		}
		return err
	}
	imm, err := w.ref.CommitWith(ctx, o)
	if err != nil {
		saved.Failed()
		w.tree.Unconfirm()
		return nil, err
	}
	w.tree.stored = indexOf(saved, w.tree.stored)
	w.k.keep(imm.ID(), w.tree)
	return imm, nil
}

// keep puts a tree in memory.
func (k *Keeper) keep(id cache.ID, t *Tree) {
	s := k.take(id)
	defer k.give(s)
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.tree == nil {
		s.tree = t
	}
}

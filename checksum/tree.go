package checksum

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
)

// Tree is what is known of one record's files, and what of it is stored. Most
// callers want a Keeper, which looks after loading and saving; a command that
// has the store open for moments only does these itself.
type Tree struct {
	*contenthash.Tree
	// Damage says why what was stored could not be used, nil if it could.
	Damage error

	// saving is held by the one who saves; it guards the fields below.
	saving chan struct{}
	id     cache.ID
	// stored is the index page as it is stored; nil for none.
	stored []byte
}

func newTree(id cache.ID, t *contenthash.Tree, stored []byte) *Tree {
	return &Tree{Tree: t, saving: make(chan struct{}, 1), id: id, stored: stored}
}

// Load gives the tree of a record from what is stored of it or, if that is
// nothing, of its ancestors. It reads names in the record's layer, but no file.
func Load(ctx context.Context, m *cache.Manager, ref *cache.ImmutableRef) (*Tree, error) {
	return load(ctx, m, ref, func(cache.ID) *contenthash.Tree { return nil })
}

// load is Load with a look at the trees that are in memory.
func load(ctx context.Context, m *cache.Manager, ref *cache.ImmutableRef, loaded func(cache.ID) *contenthash.Tree) (*Tree, error) {
	t, err := loadStored(ctx, m, ref.ID())
	if err != nil || t != nil {
		return t, err
	}
	if ref.Record().State == cache.Lazy {
		// Then it has layers that tell what it inherits.
		if err := ref.Extract(ctx); err != nil {
			return nil, err
		}
	}
	inherited, err := inherit(ctx, m, ref, loaded)
	if err != nil {
		return nil, err
	}
	if inherited == nil {
		inherited = contenthash.New()
	}
	return newTree(ref.ID(), inherited, nil), nil
}

// pages are those of a record within one transaction.
type pages struct{ a *cache.Attachments }

func (p pages) Page(name string) ([]byte, error) { return p.a.Get(cache.TreePrefix + name) }

// loadStored gives the tree that is stored for a record, nil if there is none.
// One that is damaged is a new one, with its Damage.
func loadStored(ctx context.Context, m *cache.Manager, id cache.ID) (t *Tree, err error) {
	err = m.ViewAttachments(ctx, id, func(a *cache.Attachments) error {
		t, err = loadTree(id, a)
		return err
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

func loadTree(id cache.ID, a *cache.Attachments) (*Tree, error) {
	index, err := a.Get(cache.TreeIndex)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, nil
	}
	var tree *contenthash.Tree
	if err == nil {
		tree, err = contenthash.Load(pages{a})
	}
	if errors.Is(err, errdefs.ErrDataLoss) {
		t := newTree(id, contenthash.New(), nil)
		t.Damage = fmt.Errorf("record %s: %w", id, err)
		return t, nil
	}
	if err != nil {
		return nil, err
	}
	return newTree(id, tree, index), nil
}

// errMoved says that somebody else has stored another tree meanwhile.
var errMoved = errors.New("another tree is stored")

// Save stores what the tree learned since it was loaded, in one transaction,
// or nothing if that is nothing. A record that was reopened or removed
// meanwhile is NotFound, a mutable one FailedPrecondition; the tree can be
// used as before, and saved again.
func (t *Tree) Save(ctx context.Context, m *cache.Manager) error {
	release, err := t.lockSaves(ctx)
	if err != nil {
		return err
	}
	defer release()
	for {
		err := t.save(ctx, m)
		if !errors.Is(err, errMoved) {
			return err
		}
		// Once more, and then all of it.
	}
}

// lockSaves waits until nobody else saves the tree.
func (t *Tree) lockSaves(ctx context.Context) (release func(), err error) {
	select {
	case t.saving <- struct{}{}:
		return func() { <-t.saving }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (t *Tree) save(ctx context.Context, m *cache.Manager) error {
	saved := t.Tree.Save()
	if saved.Empty() {
		return nil
	}
	err := m.EditAttachments(ctx, t.id, func(a *cache.Attachments) error {
		if saved.Replace {
			// Whatever there is: the new pages are a whole.
			if err := a.DeleteAll(cache.TreePrefix); err != nil {
				return err
			}
		} else if now, err := a.Get(cache.TreeIndex); err != nil || !bytes.Equal(now, t.stored) {
			return errors.Join(errMoved, err)
		}
		return write(saved, a.Set, a.Delete)
	})
	if err != nil {
		saved.Failed()
		return err
	}
	t.stored = indexOf(saved, t.stored)
	return nil
}

// write hands pages over under the names of attachments.
func write(s *contenthash.Saved, set func(string, []byte) error, remove func(string) error) error {
	for _, name := range s.Delete {
		if err := remove(cache.TreePrefix + name); err != nil {
			return err
		}
	}
	for name, data := range s.Put {
		if err := set(cache.TreePrefix+name, data); err != nil {
			return err
		}
	}
	return nil
}

// indexOf is the index page that is stored once s is.
func indexOf(s *contenthash.Saved, before []byte) []byte {
	if index, ok := s.Put[contenthash.IndexPage]; ok {
		return index
	}
	return before
}

// Files gives access to the files of a record through a mount that is there
// as long as they are read.
func Files(ref *cache.ImmutableRef) contenthash.Opener {
	return func(ctx context.Context) (*contenthash.Root, error) {
		return mounted(ref.Mount(ctx))
	}
}

func mounted(mnt *cache.Mount, err error) (*contenthash.Root, error) {
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(mnt.Path())
	if err != nil {
		return nil, errors.Join(err, mnt.Unmount())
	}
	return contenthash.NewRoot(dir, mnt.Unmount), nil
}

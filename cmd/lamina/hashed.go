package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
)

// hashed is a record with what is known of its content hashes.
type hashed struct {
	id   cache.ID
	tree *contenthash.Tree
	open contenthash.Opener
	// kept stores tree; nil for a record that is mutable.
	kept *checksum.Tree
	// ref is its handle while the store is open, held what it becomes then.
	ref  heldRef
	held *held
}

func (h *hashed) side() contenthash.Side { return contenthash.Side{Tree: h.tree, Open: h.open} }

// errNeedsFiles says that a question cannot be answered from what is stored.
var errNeedsFiles = errors.New("files have to be read")

// withTrees asks something about the trees of records. It is asked first while
// the store is open and no file can be read. If that does not do the records
// are mounted, the store is closed, it is asked again, and what was learned is
// stored.
func (a *app) withTrees(ctx context.Context, args []string, ask func([]*hashed) error) error {
	recs, err := a.loadTrees(ctx, args, ask)
	if err != nil || recs == nil {
		return err
	}
	stop := a.progress("hashing", nil)
	err = ask(recs)
	stop()
	if err != nil {
		err = about(recs[0].id, err)
	}
	// What was read until an error is worth keeping, too.
	return errors.Join(err, a.keepTrees(context.WithoutCancel(ctx), recs))
}

// loadTrees returns the records, mounted, unless the question was answered.
func (a *app) loadTrees(ctx context.Context, args []string, ask func([]*hashed) error) (recs []*hashed, err error) {
	m, err := a.open(ctx, changing)
	if err != nil {
		return nil, err
	}
	defer shut(m, &err)
	defer func() {
		if err != nil {
			err = errors.Join(err, endAll(ctx, recs))
			recs = nil
		}
	}()
	stored := true
	for _, arg := range args {
		h, err := a.loadTree(ctx, m, arg)
		if err != nil {
			return recs, err
		}
		recs = append(recs, h)
		stored = stored && h.kept != nil
	}
	if stored {
		err = ask(recs)
		if !errors.Is(err, errNeedsFiles) {
			if err != nil {
				return recs, about(recs[0].id, err)
			}
			return nil, endAll(ctx, recs)
		}
	}
	for _, h := range recs {
		if err := a.mountHashed(ctx, h); err != nil {
			return recs, about(h.id, err)
		}
	}
	return recs, nil
}

func (a *app) loadTree(ctx context.Context, m *cache.Manager, arg string) (_ *hashed, err error) {
	id, err := resolve(ctx, m, arg)
	if err != nil {
		return nil, err
	}
	defer func() { err = about(id, err) }()
	rec, err := m.Lookup(ctx, id)
	if err != nil {
		return nil, err
	}
	h := &hashed{id: rec.ID, open: func(context.Context) (*contenthash.Root, error) { return nil, errNeedsFiles }}
	if rec.State == cache.Mutable {
		mut, err := m.GetMutable(ctx, rec.ID)
		if err != nil {
			return nil, err
		}
		h.ref, h.tree = mut, contenthash.New()
		return h, nil
	}
	imm, err := m.Get(ctx, rec.ID, cache.GetOptions{NoUpdate: true})
	if err != nil {
		return nil, err
	}
	h.ref = imm
	if h.kept, err = checksum.Load(ctx, m, imm); err != nil {
		return nil, errors.Join(err, imm.Release(ctx))
	}
	h.tree = h.kept.Tree
	if h.kept.Damage != nil {
		fmt.Fprintf(a.err, "lamina: stored content hashes are damaged, and computed anew: %s\n", safe(h.kept.Damage.Error()))
	}
	return h, nil
}

// mountHashed turns the handle into a mount that outlives the open store.
func (a *app) mountHashed(ctx context.Context, h *hashed) error {
	ref := h.ref
	h.ref = nil
	kept, err := a.keep(ctx, ref, func() (*cache.Mount, error) {
		if mut, ok := ref.(*cache.MutableRef); ok {
			return mut.Mount(ctx, cache.MountOptions{ReadOnly: true})
		}
		return ref.(*cache.ImmutableRef).Mount(ctx)
	})
	if h.held, err = a.mounted(kept, h.id, err); err != nil {
		return err
	}
	h.open = contenthash.Dir(h.held.path)
	return nil
}

// keepTrees stores what was learned and lets the records go. That it cannot be
// stored makes no answer wrong.
func (a *app) keepTrees(ctx context.Context, recs []*hashed) (err error) {
	m, err := a.open(ctx, changing)
	if err == nil {
		defer shut(m, &err) // after the records: so it can be closed clean
		for _, h := range recs {
			if h.kept != nil {
				err = errors.Join(err, h.kept.Save(ctx, m))
			}
		}
	}
	if err != nil {
		fmt.Fprintf(a.err, "lamina: the content hashes are not kept: %s\n", safe(err.Error()))
	}
	return endAll(ctx, recs)
}

func endAll(ctx context.Context, recs []*hashed) error {
	var errs []error
	for _, h := range recs {
		if h.held != nil {
			errs = append(errs, h.held.end())
		}
		if h.ref != nil {
			errs = append(errs, h.ref.Release(ctx))
		}
	}
	return errors.Join(errs...)
}

package cachemount

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace/sandbox"
)

// Options say where cache directories come from.
type Options struct {
	// Root is the directory of the store, and Open opens it for a moment.
	Root string
	Open func(context.Context) (*cache.Manager, error)
	// NoWait fails with cache.ErrLocked instead of waiting.
	NoWait bool
	// OnWait hears for whom the build waits, if it does; it may be nil.
	OnWait func(Spec, cache.Holder)
}

// Set is the cache directories of one build, held until Release.
type Set struct {
	held []held
}

// held is one directory, at one or more targets.
type held struct {
	specs []Spec
	hold  *cache.Hold
	dir   string
}

// Acquire holds the directories of specs, which Check has completed, making
// those that do not exist. It waits for those that somebody uses in a way that
// excludes this use, each in the order of arrival, until ctx ends. They are
// taken in the order of their ids, so that builds never wait for each other.
// The store must not be open in this process.
func Acquire(ctx context.Context, o Options, specs []Spec) (_ *Set, err error) {
	set := &Set{}
	defer func() {
		if err != nil {
			err = errors.Join(err, set.Release())
		}
	}()
	specs = slices.Clone(specs)
	slices.SortStableFunc(specs, func(a, b Spec) int { return cmp.Compare(a.ID, b.ID) })
	for _, s := range specs {
		if n := len(set.held); s.Sharing != Private && n > 0 && set.held[n-1].specs[0].ID == s.ID {
			// The same directory at another place.
			set.held[n-1].specs = append(set.held[n-1].specs, s)
			continue
		}
		h, err := acquire(ctx, o, s)
		if err != nil {
			return nil, fmt.Errorf("cache directory %q: %w", s.ID, err)
		}
		set.held = append(set.held, h)
	}
	return set, nil
}

// acquire holds one directory.
func acquire(ctx context.Context, o Options, s Spec) (h held, err error) {
	h.specs = []Spec{s}
	if s.Sharing == Private {
		err = h.take(ctx, o, s)
		return h, err
	}
	q, err := join(ctx, o.Root, s.ID)
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, q.leave()) }()
	for said := false; ; said = true {
		first, err := q.first()
		if err != nil {
			return h, err
		}
		locked := &cache.LockedError{Holders: []cache.Holder{{Kind: cache.HolderProcess, Command: "who wait for it"}}}
		if first {
			if err = h.take(ctx, o, s); !errors.As(err, &locked) {
				return h, err
			}
		}
		if o.NoWait {
			return h, locked
		}
		if !said && o.OnWait != nil && len(locked.Holders) > 0 {
			o.OnWait(s, locked.Holders[0])
		}
		if first {
			err = cache.AwaitHold(ctx, o.Root, locked.ID, s.Sharing == Locked)
		} else {
			err = q.turn(ctx)
		}
		if err != nil {
			return h, err
		}
	}
}

// take holds a directory that is free now. Which one is the same for all, but
// for private ones: the oldest. With none there it makes one.
func (h *held) take(ctx context.Context, o Options, s Spec) (err error) {
	m, err := o.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if _, err := m.RemoveReleased(ctx); err != nil {
		return err
	}
	ids, err := candidates(ctx, m, s.ID)
	if err != nil {
		return err
	}
	if s.Sharing == Private && len(ids) > 0 {
		// Those who wait for the oldest were here before.
		if busy, err := waiting(o.Root, s.ID); err != nil {
			return err
		} else if busy {
			ids = ids[1:]
		}
	}
	for _, id := range ids {
		err := h.hold1(ctx, m, id, s.Sharing != Shared)
		if s.Sharing != Private || !errors.Is(err, cache.ErrLocked) {
			return err
		}
	}
	mut, err := m.New(ctx, nil, cache.DirectoryOptions(s.ID))
	if err != nil {
		return err
	}
	if err := mut.Release(ctx); err != nil {
		return err
	}
	return h.hold1(ctx, m, mut.ID(), s.Sharing != Shared)
}

// candidates are the directories of an id, the oldest first.
func candidates(ctx context.Context, m *cache.Manager, id string) (out []cache.ID, err error) {
	found, err := m.Search(ctx, cache.DirectoryIndex(id))
	if err != nil {
		return nil, err
	}
	var recs []*cache.Record
	for _, id := range found {
		rec, err := m.Lookup(ctx, id)
		switch {
		case errors.Is(err, errdefs.ErrNotFound):
			continue
		case err != nil:
			return nil, err
		case rec.State != cache.Mutable && rec.State != cache.Committed || len(rec.Parents) > 0:
			continue // a directory over a base is another thing
		}
		recs = append(recs, rec)
	}
	slices.SortFunc(recs, func(a, b *cache.Record) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	})
	for _, rec := range recs {
		out = append(out, rec.ID)
	}
	return out, nil
}

// hold1 holds one record. One that was committed, as migrated ones
// are, becomes mutable again.
func (h *held) hold1(ctx context.Context, m *cache.Manager, id cache.ID, exclusive bool) error {
	rec, err := m.Lookup(ctx, id)
	if err != nil {
		return err
	}
	if rec.State == cache.Committed {
		mut, err := m.GetMutable(ctx, id)
		if err != nil {
			return err
		}
		id = mut.ID()
		if err := mut.Release(ctx); err != nil {
			return err
		}
	}
	h.hold, h.dir, err = m.HoldDirectory(ctx, id, exclusive)
	return err
}

// Mounts are the binds of the directories below dir, where the build sees its
// workspace.
func (s *Set) Mounts(dir string) (out []sandbox.Mount) {
	for _, h := range s.held {
		for _, spec := range h.specs {
			out = append(out, sandbox.Mount{Source: h.dir, Target: filepath.Join(dir, filepath.FromSlash(spec.Target))})
		}
	}
	return out
}

// Release lets others have the directories. Releasing again
// does nothing. Whoever opens the store next calls its RemoveReleased.
func (s *Set) Release() error {
	var errs []error
	for _, h := range slices.Backward(s.held) {
		errs = append(errs, h.hold.Release())
	}
	s.held = nil
	return errors.Join(errs...)
}

// MakeTargets makes the directories in the workspace tree that the targets are
// mounted on. What it made, undo removes again, as far as nothing is in it by
// then; so does it an empty target that was there and that keep, which is
// given its path, does not claim: a killed build left it. Targets behind a
// symbolic link are refused: they would not be in the workspace.
func MakeTargets(tree string, specs []Spec, keep func(path string) bool) (undo func() error, err error) {
	root, err := os.OpenRoot(tree)
	if err != nil {
		return nil, err
	}
	var made []string
	undo = func() error {
		var errs []error
		for _, p := range slices.Backward(made) {
			err := root.Remove(p)
			if err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
				errs = append(errs, err)
			}
		}
		return errors.Join(append(errs, root.Close())...)
	}
	for _, s := range specs {
		for i := range len(s.Target) + 1 {
			if i < len(s.Target) && s.Target[i] != '/' {
				continue
			}
			p := s.Target[:i]
			err := root.Mkdir(p, 0o755)
			if err == nil {
				made = append(made, p)
				continue
			}
			st, serr := root.Lstat(p)
			if !errors.Is(err, os.ErrExist) || serr != nil {
				return nil, errors.Join(fmt.Errorf("make %q for cache directory %q: %w", p, s.ID, errors.Join(err, serr)), undo())
			}
			if !st.IsDir() {
				return nil, errors.Join(fmt.Errorf("target %q of cache directory %q: %q is there and no directory: %w", s.Target, s.ID, p, errdefs.ErrFailedPrecondition), undo())
			}
			if p == s.Target && !keep(p) {
				made = append(made, p)
			}
		}
	}
	return undo, nil
}

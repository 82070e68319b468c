package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// closeTidies is how many work directories Close looks at: each may cost a
// probe of some 2 ms, and what is left over is only an empty directory.
const closeTidies = 32

// Commit implements snapshots.Snapshotter. With WithParent a snapshot that
// has no parent gets one; drivers that cannot do so return NotImplemented.
func (t *tree) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	if err := t.commit(ctx, name, key, opts); err != nil {
		return fmt.Errorf("commit %q as %q: %w", key, name, err)
	}
	return nil
}

func (t *tree) commit(ctx context.Context, name, key string, opts []snapshots.Opt) error {
	if err := errors.Join(requireKey(name), requireKey(key)); err != nil {
		return err
	}
	base, err := applyOpts(opts)
	if err != nil {
		return err
	}
	exact := takeExact(&base)
	e, s, err := t.load(key)
	if err != nil {
		return err
	}
	if e.dir != dirActive || s.View {
		return fmt.Errorf("%q is not active: %w", key, errdefs.ErrFailedPrecondition)
	}
	if err := t.free(name); err != nil {
		return err
	}
	rebase, err := t.rebase(string(s.Parent), base.Parent)
	if err != nil {
		return err
	}
	// Measured outside the locks: it takes as long as the tree is large.
	before, err := os.Lstat(t.at(e))
	if err != nil {
		return asNotFound(err)
	}
	used, cleaned := t.wasCleaned(e.name)
	// Later it would be another size where files become links of others'.
	later := exact && t.info.Name != Native
	if !cleaned && !later {
		if used, err = measure(ctx, below(t.at(e), "fs")); err != nil {
			return asNotFound(err)
		}
	}
	if s.Usage = nil; cleaned || !later {
		s.Usage = &usage{Inodes: used.Inodes, Size: used.Size}
	}
	s.Clean = s.Bound == "" && (cleaned && rebase == "" || exact)

	defer t.lock(name, key, rebase)()
	if now, err := os.Lstat(t.at(e)); err != nil || !os.SameFile(before, now) {
		return errors.Join(fmt.Errorf("%q is no longer there: %w", key, errdefs.ErrNotFound), err)
	}
	if err := t.free(name); err != nil {
		return err
	}
	return t.seal(name, e, s, base, rebase)
}

// rebase is the parent that the snapshot gets only now, if any.
func (t *tree) rebase(has, asked string) (string, error) {
	if asked == "" || asked == has {
		return "", nil
	}
	if has != "" {
		return "", fmt.Errorf("the parent is %q and cannot become %q: %w", has, asked, errdefs.ErrInvalidArgument)
	}
	if err := t.requireCommitted(asked, errdefs.ErrFailedPrecondition); err != nil {
		return "", err
	}
	if err := t.backend.rebase(); err != nil {
		return "", err
	}
	return asked, t.backend.check(asked)
}

// seal writes the line that counts from the rename on, and renames.
func (t *tree) seal(name string, e entry, s state, base snapshots.Info, rebase string) (err error) {
	path := t.at(e)
	if rebase != "" {
		if err := t.join(rebase, path, 0); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, t.leave("commit.undo", path))
			}
		}()
		s.Parent = text(rebase)
		if err := t.bind(&s); err != nil {
			return err
		}
		s.Clean = s.Clean && s.Bound == ""
	}
	if err := t.backend.describe(path, &s); err != nil {
		return asNotFound(err)
	}
	to := entry{dirCommitted, encodeKey(name)}
	s.Sealed, s.Key = true, ""
	if hashed(to.name) {
		s.Key = text(name)
	}
	s.Created = t.clock().UnixNano()
	s.Updated = s.Created
	s.setLabels(base.Labels)
	if err := t.step("commit.info"); err != nil {
		return err
	}
	if err := appendState(below(path, "info"), s); err != nil {
		return err
	}
	if err := t.rename("commit.rename", e, to); err != nil {
		return err
	}
	t.remember(name, s)
	t.dirty(e.name)
	// The commit is done; what is left over from being active is no reason
	// to call it failed.
	if again, err := t.backend.tidy(t.at(to), false); again || err != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.sealing = append(t.sealing, to.name)
	}
	return nil
}

// tidy gives committed entries another chance to lose what they no longer
// need, at most limit of them.
func (t *tree) tidy(limit int) error {
	t.mu.Lock()
	n := min(limit, len(t.sealing))
	names := t.sealing[:n:n]
	t.sealing = t.sealing[n:]
	t.mu.Unlock()
	var errs []error
	for _, name := range names {
		again, err := t.backend.tidy(t.path(dirCommitted, name), true)
		if err != nil {
			errs = append(errs, fmt.Errorf("tidy committed/%s: %w", name, err))
		}
		if again {
			t.mu.Lock()
			t.sealing = append(t.sealing, name)
			t.mu.Unlock()
		}
	}
	return errors.Join(errs...)
}

// asNotFound gives the errors of a name that vanished meanwhile their class.
func asNotFound(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

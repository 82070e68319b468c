package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// Remove implements snapshots.Snapshotter: Detach, without the right to have
// the snapshot back.
func (t *tree) Remove(ctx context.Context, key string) error {
	p, err := t.Detach(ctx, key)
	if err != nil {
		return err
	}
	t.mark(&t.held, path.Base(p.entry), false)
	return nil
}

// Detach implements Driver.
func (t *tree) Detach(ctx context.Context, key string) (Pending, error) {
	err := context.Cause(ctx)
	var trash entry
	if err == nil {
		trash, err = t.detach(key)
	}
	if err != nil {
		return Pending{}, fmt.Errorf("remove %q: %w", key, err)
	}
	return Pending{Key: key, Kind: PendingRemoval, entry: path.Join(trash.dir, trash.name)}, nil
}

// detach counts the children, moves the entry to trash, counts again, for a
// child that came meanwhile, and goes back if there is one. Only then does
// the parent lose this child.
func (t *tree) detach(key string) (trash entry, err error) {
	if err := requireKey(key); err != nil {
		return entry{}, err
	}
	defer t.lock(key)()
	if trash, ok, err := t.detachAwaited(key); ok || err != nil {
		return trash, err
	}
	e, err := t.find(key)
	if err != nil {
		return entry{}, err
	}
	if err := t.requireChildless(key, t.at(e)); err != nil {
		return entry{}, err
	}
	trash = entry{dirTrash, trashName(e)}
	// Before the name is there, so that a Cleanup that runs does not see it.
	t.mark(&t.held, trash.name, true)
	defer func() {
		if err != nil {
			t.mark(&t.held, trash.name, false)
		}
	}()
	if err := t.rename("remove.rename", e, trash); err != nil {
		return entry{}, err
	}
	t.forget(key)
	t.dirty(e.name)
	err = requireChildless(key, t.at(trash))
	if err == nil {
		err = t.leave("remove.leave", t.at(trash))
	}
	if err != nil {
		return entry{}, errors.Join(err, t.rename("remove.undo", trash, e))
	}
	return trash, nil
}

// trashed is the entry in trash that p stands for.
func trashed(p Pending) (e, from entry, err error) {
	dir, name := path.Split(p.entry)
	from, ok := splitTrash(name)
	if p.Kind != PendingRemoval || dir != dirTrash+"/" || !ok {
		return entry{}, entry{}, fmt.Errorf("%q is not a removal: %w", p.Key, errdefs.ErrInvalidArgument)
	}
	return entry{dirTrash, name}, from, nil
}

// Discard implements Driver.
func (t *tree) Discard(_ context.Context, p Pending) error {
	e, _, err := trashed(p)
	if err == nil {
		defer t.mark(&t.held, e.name, false)
		err = t.discard(e)
	}
	if err != nil {
		return fmt.Errorf("discard %q: %w", p.Key, err)
	}
	return nil
}

// beingDeleted marks an entry in trash whose bytes are being deleted, a bit of
// its directory's mode that means nothing where only we write.
const beingDeleted = fs.ModeSticky

// discard deletes the bytes of an entry in trash. It starts with what other
// entries and directories know of it, and info goes last, as it may be the
// only place that holds the key.
func (t *tree) discard(e entry) error {
	at := t.at(e)
	if _, going, ok := splitMoved(e.name); ok {
		return t.discardMoved(e, going)
	}
	if ok, err := exists(at); err != nil || !ok {
		return err
	}
	if err := requireChildless(e.name, at); err != nil {
		return err
	}
	if err := t.leave("discard.leave", at); err != nil {
		return err
	}
	if err := t.step("discard.bytes"); err != nil {
		return err
	}
	if err := t.dropLinks(at); err != nil {
		return err
	}
	// From here on Restore refuses: what is left is no snapshot any more.
	if err := os.Chmod(at, 0o700|beingDeleted); errors.Is(err, fs.ErrNotExist) {
		return nil // somebody else was faster
	} else if err != nil {
		return err
	}
	adopted, err := t.adopted(below(at, "fs"))
	if err != nil {
		return err
	}
	r, ok := t.removers.Get().(*remover)
	if !ok {
		r = new(remover)
	}
	defer t.removers.Put(r)
	for _, dir := range []string{adopted, below(at, "fs"), below(at, "work")} {
		if dir == "" {
			continue
		}
		if err := r.tree(dir); err != nil {
			return err
		}
	}
	if err := t.step("discard.entry"); err != nil {
		return err
	}
	return r.tree(at)
}

// adopted is the directory that an adopted entry's fs leads to, empty for
// entries that have their own. Only links of the one form that an adoption
// makes are taken, so that no other link leads a removal elsewhere.
func (t *tree) adopted(fsPath string) (string, error) {
	link, err := os.Readlink(fsPath)
	if err != nil {
		return "", ignoreNoLink(err)
	}
	n, ok := strings.CutPrefix(link, "../../"+dirAdopted+"/")
	n = strings.TrimSuffix(n, "/fs")
	if !ok || n == "" || n == "." || n == ".." || strings.ContainsRune(n, '/') {
		return "", fmt.Errorf("%q is a link to %q, which no adoption makes: %w", fsPath, link, errdefs.ErrDataLoss)
	}
	return t.path(dirAdopted, n), nil
}

// Restore implements Driver. It fails with FailedPrecondition if the parent
// was removed after the snapshot, and with AlreadyExists if the name was
// taken again.
func (t *tree) Restore(_ context.Context, p Pending) error {
	e, from, err := trashed(p)
	if err == nil {
		defer t.mark(&t.held, e.name, false)
		err = t.restore(e, from)
	}
	if err != nil {
		return fmt.Errorf("restore %q: %w", p.Key, err)
	}
	return nil
}

func (t *tree) restore(e, from entry) error {
	at := t.at(e)
	if dir, going, ok := splitMoved(e.name); ok && going != e.name {
		return t.restoreMoved(e, from, dir)
	}
	s, err := readState(below(at, "info"), from.dir == dirCommitted)
	if err != nil {
		return asNotFound(err)
	}
	if fi, err := os.Lstat(at); err != nil {
		return asNotFound(err)
	} else if fi.Mode()&beingDeleted != 0 {
		return fmt.Errorf("its bytes are being deleted: %w", errdefs.ErrNotFound)
	}
	key, ok := decodeKey(from.name)
	if !ok {
		key = string(s.Key)
	}
	parents := s.needs()
	defer t.lock(append([]string{key}, parents...)...)()
	if err := t.free(key); err != nil {
		return err
	}
	for k, parent := range parents {
		if has, err := exists(below(at, linkName(k))); err != nil {
			return err
		} else if has {
			continue
		}
		if err := t.join(parent, at, k); errdefs.IsNotFound(err) {
			// Its class is about the parent and would mislead here.
			return fmt.Errorf("its parent is gone: %w: %s", errdefs.ErrFailedPrecondition, err.Error())
		} else if err != nil {
			return err
		}
	}
	if err := t.rename("restore.rename", e, from); err != nil {
		return errors.Join(err, t.leave("restore.undo", at))
	}
	t.forget(key)
	return nil
}

// Cleanup implements snapshots.Cleaner: it deletes the bytes of removals that
// nobody holds. An entry that still has children, which only a crash leaves
// behind, is left to Settle.
func (t *tree) Cleanup(ctx context.Context) error {
	names, err := t.list(dirTrash)
	errs := []error{err}
	for _, name := range names {
		if ctx.Err() != nil {
			errs = append(errs, context.Cause(ctx))
			break
		}
		if _, ok := splitTrash(name); !ok || t.marked(&t.held, name) {
			continue
		}
		e := entry{dirTrash, name}
		if !moved(name) {
			if n, err := children(t.at(e)); err != nil || n > 0 {
				errs = append(errs, err)
				continue
			}
		}
		errs = append(errs, t.discard(e))
	}
	errs = append(errs, t.tidy(1<<20))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	return nil
}

// list is the names in one of the directories, sorted.
func (t *tree) list(dir string) ([]string, error) {
	files, err := os.ReadDir(t.path(dir))
	names := make([]string, 0, len(files))
	for _, f := range files {
		if f.IsDir() {
			names = append(names, f.Name())
		}
	}
	return names, err
}

// ignoreNoLink drops the errors of reading a link that say there is none.
func ignoreNoLink(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoLink) {
		return nil
	}
	return err
}

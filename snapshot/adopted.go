package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// awaited is the adopted snapshot of a name that has no entry yet.
func (t *tree) awaited(name string) (adoption, bool, error) {
	t.adoptions.mu.Lock()
	defer t.adoptions.mu.Unlock()
	return t.adoptions.find(name)
}

// allAwaited are the adopted snapshots of a directory without an entry there.
// names are the entries, in order.
func (t *tree) allAwaited(dir string, names []string) (list []adoption, err error) {
	t.adoptions.mu.Lock()
	defer t.adoptions.mu.Unlock()
	for a, err := range t.adoptions.waiting() {
		if err != nil {
			return nil, err
		}
		if _, there := slices.BinarySearch(names, a.name); !there && a.entry().dir == dir {
			list = append(list, a)
		}
	}
	return list, nil
}

// awaitedChildren counts the children of a key that have no entry yet.
func (t *tree) awaitedChildren(key string) (int, error) {
	t.adoptions.mu.Lock()
	defer t.adoptions.mu.Unlock()
	return t.adoptions.childrenOf(key)
}

// claim makes the entry of an adopted snapshot that has none, and first those
// of its ancestors; it does nothing for other names. Callers look again
// afterwards: someone else may have made it meanwhile.
func (t *tree) claim(name string) error {
	l := &t.adoptions
	l.mu.Lock()
	defer l.mu.Unlock()
	var chain []adoption
	for name != "" {
		a, ok, err := l.find(name)
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if chain = append(chain, a); a.parent == "" || len(chain) > len(l.lines) {
			break
		}
		name = encodeKey(a.parent)
	}
	for _, a := range slices.Backward(chain) {
		if err := t.take(a); err != nil {
			return fmt.Errorf("adopted snapshot %s: %w", a.dir, err)
		}
	}
	return nil
}

// take makes the entry of an adopted snapshot whose parent has one, unless a
// kill came between the entry and its mark.
func (t *tree) take(a adoption) error {
	there, err := exists(t.at(a.entry()))
	if err == nil && !there {
		err = t.makeAdopted(a)
	}
	if err != nil {
		return err
	}
	if err := t.step("adopt.mark"); err != nil {
		return err
	}
	return t.adoptions.mark(a)
}

func (t *tree) makeAdopted(a adoption) (err error) {
	making := entry{dirNew, randomName(a.name)}
	t.mark(&t.making, making.name, true)
	defer t.mark(&t.making, making.name, false)
	defer func() {
		if err != nil {
			err = errors.Join(err, t.unmake(making))
		}
	}()
	if err := t.step("adopt.mkdir"); err != nil {
		return err
	}
	path := t.at(making)
	if err := t.linkData(path, a.dir, a.active); err != nil {
		return err
	}
	s := a.state()
	if a.parent != "" {
		if err := t.join(a.parent, path, 0); err != nil {
			return err
		}
	}
	if err := t.backend.examine(below(path, "fs"), &s); err != nil {
		return err
	}
	if err := t.bind(&s); err != nil {
		return err
	}
	if err := t.step("adopt.info"); err != nil {
		return err
	}
	if err := createState(below(path, "info"), s); err != nil {
		return err
	}
	return t.rename("adopt.rename", making, a.entry())
}

// detachAwaited removes an adopted snapshot that has no entry: its data itself
// moves to trash, which needs no room on the disk. ok is false if there is no
// such snapshot, or if it has to get its entry first.
func (t *tree) detachAwaited(key string) (trash entry, ok bool, err error) {
	name := encodeKey(key)
	l := &t.adoptions
	l.mu.Lock()
	defer l.mu.Unlock()
	a, ok, err := l.find(name)
	if err != nil || !ok || a.key != "" {
		return entry{}, false, err
	}
	if there, err := exists(t.at(a.entry())); err != nil || there {
		return entry{}, false, err
	}
	if n, err := l.childrenOf(key); err != nil {
		return entry{}, false, err
	} else if n > 0 {
		return entry{}, false, fmt.Errorf("cannot remove %q, which is the parent of %d: %w", key, n, errdefs.ErrFailedPrecondition)
	}
	trash = entry{dirTrash, movedName(a)}
	if err := t.step("remove.move"); err != nil {
		return entry{}, false, err
	}
	// Before the name is there, so that a Cleanup that runs does not see it.
	t.mark(&t.held, trash.name, true)
	err = unix.Renameat2(unix.AT_FDCWD, t.path(dirAdopted, a.dir), unix.AT_FDCWD, t.at(trash), unix.RENAME_NOREPLACE)
	if err != nil {
		t.mark(&t.held, trash.name, false)
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.ENAMETOOLONG) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EBUSY) {
			return entry{}, false, nil
		}
		return entry{}, false, fmt.Errorf("move %s/%s to trash: %w", dirAdopted, a.dir, err)
	}
	if err := l.mark(a); err != nil {
		t.mark(&t.held, trash.name, false)
		return entry{}, false, errors.Join(err, os.Rename(t.at(trash), t.path(dirAdopted, a.dir)))
	}
	return trash, true, nil
}

// restoreMoved takes such a removal back: the line waits again before the data
// is there, which a kill between the two leaves to Settle.
func (t *tree) restoreMoved(e, from entry, dir string) error {
	l := &t.adoptions
	l.mu.Lock()
	defer l.mu.Unlock()
	a, ok, err := l.taken(from.name)
	if err != nil {
		return err
	}
	if !ok || a.dir != dir || a.entry() != from {
		return fmt.Errorf("nothing says what %s/%s was: %w", e.dir, e.name, errdefs.ErrNotFound)
	}
	for _, d := range []string{dirActive, dirCommitted} {
		if there, err := exists(t.path(d, from.name)); err != nil {
			return err
		} else if there {
			return fmt.Errorf("snapshot %s: %w", from.name, errdefs.ErrAlreadyExists)
		}
	}
	if a.parent != "" {
		_, waits, err := l.find(encodeKey(a.parent))
		there := waits
		if err == nil && !waits {
			there, err = exists(t.path(dirCommitted, encodeKey(a.parent)))
		}
		if err != nil {
			return err
		}
		if !there {
			return fmt.Errorf("its parent %q is gone: %w", a.parent, errdefs.ErrFailedPrecondition)
		}
	}
	if err := l.wait(a); err != nil {
		return err
	}
	err = t.step("restore.move")
	if err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, t.at(e), unix.AT_FDCWD, t.path(dirAdopted, dir), unix.RENAME_NOREPLACE)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("move %s back from trash: %w", dir, asNotFound(err)), l.mark(a))
	}
	return nil
}

// discardMoved deletes the data of a removal that had no entry. The first
// rename is the moment from which it cannot be had back.
func (t *tree) discardMoved(e entry, going string) error {
	if err := t.step("discard.going"); err != nil {
		return err
	}
	if going != e.name {
		err := os.Rename(t.at(e), t.path(dirTrash, going))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := t.step("discard.bytes"); err != nil {
		return err
	}
	return removeTree(t.path(dirTrash, going))
}

// left notes that a name is about to be no longer where an adopted snapshot
// would be looked for, should a kill have come before its mark.
func (t *tree) left(e entry) error {
	if e.dir != dirActive && e.dir != dirCommitted {
		return nil
	}
	l := &t.adoptions
	l.mu.Lock()
	defer l.mu.Unlock()
	a, ok, err := l.find(e.name)
	if err != nil || !ok {
		return err
	}
	return l.mark(a)
}

// settleAdopted takes back the marks that a power cut lost: what has an entry,
// even in trash, or no data any more, does not wait. It reads the links of all
// entries, as long as some snapshot waits.
func (t *tree) settleAdopted(context.Context) error {
	l := &t.adoptions
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.load(); err != nil || len(l.lines) == 0 {
		return err
	}
	owned, err := t.ownedData()
	if err != nil {
		return err
	}
	dirs, err := t.list(dirAdopted)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	here := make(map[string]bool, len(dirs))
	for _, dir := range dirs {
		here[dir] = true
	}
	var taken []adoption
	waits := false
	for a, err := range l.waiting() {
		if err != nil {
			return err
		}
		if owned[a.dir] || !here[a.dir] {
			taken = append(taken, a)
		} else {
			waits = true
		}
	}
	if waits {
		return l.mark(taken...)
	}
	if err := t.step("adopt.done"); err != nil {
		return err
	}
	l.set(nil)
	return os.Remove(l.path)
}

// ownedData are the data directories that entries lead to.
func (t *tree) ownedData() (map[string]bool, error) {
	owned := map[string]bool{}
	for _, dir := range []string{dirActive, dirCommitted, dirTrash} {
		names, err := t.list(dir)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if dir == dirTrash && moved(name) {
				continue
			}
			for _, elem := range []string{"fs", "gone"} {
				data, err := t.adopted(t.path(dir, name, elem))
				if err != nil && !errdefs.IsDataLoss(err) {
					return nil, err
				}
				if err == nil && data != "" {
					owned[filepath.Base(data)] = true
				}
			}
		}
	}
	return owned, nil
}

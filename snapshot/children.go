package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// idName is the k-th file that children link to. One file takes 65,000 links
// on ext4; the next one is made when the file system says so.
func idName(k int) string {
	if k == 0 {
		return "id"
	}
	return "id." + strconv.Itoa(k)
}

// linkName is the link to the k-th of the names that an entry needs: the
// parent, or the layers of a stack. Without the first there are no others.
func linkName(k int) string {
	if k == 0 {
		return "parent"
	}
	return "parent." + strconv.Itoa(k)
}

// joinLocked is join under the parent's lock, so that a removal of the parent
// which is about to be refused does not show it as missing.
func (t *tree) joinLocked(parent, path string, k int) error {
	defer t.lock(parent)()
	return t.join(parent, path, k)
}

// join makes the entry at path a child of the committed name parent, which is
// the k-th that it needs.
func (t *tree) join(parent, path string, k int) error {
	if err := t.step("join.link"); err != nil {
		return err
	}
	child := below(path, linkName(k))
	dir := t.path(dirCommitted, encodeKey(parent))
	for n, made := 0, false; ; {
		id := below(dir, idName(n))
		err := unix.Link(id, child)
		switch {
		case err == nil:
			return t.joined(parent, id, child)
		case errors.Is(err, unix.EMLINK):
			n, made = n+1, false
		case errors.Is(err, unix.ENOENT) && !made:
			if err := t.makeID(id); errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("parent %q: %w: %w", parent, err, errdefs.ErrNotFound)
			} else if err != nil {
				return err
			}
			made = true
		default:
			return &os.LinkError{Op: "link", Old: id, New: child, Err: err}
		}
	}
}

func (t *tree) makeID(id string) error {
	if err := t.step("join.id"); err != nil {
		return err
	}
	f, err := os.OpenFile(id, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// joined looks whether the link went to the parent that still has the name.
// If the parent went to trash before the link, its id is not found there; if
// after it, the removal counts once more and sees the link.
func (t *tree) joined(parent, id, child string) error {
	now, err := os.Lstat(id)
	if err == nil {
		var ours fs.FileInfo
		if ours, err = os.Lstat(child); err == nil && os.SameFile(now, ours) {
			return nil
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err = fmt.Errorf("parent %q was removed meanwhile: %w", parent, errdefs.ErrNotFound)
	return errors.Join(err, os.Remove(child))
}

// leave ends the entry at path being a child, of a stack's layers the last one
// first, so that none is overlooked when it is cut.
func (t *tree) leave(step, path string) error {
	n := 0
	for {
		if ok, err := exists(below(path, linkName(n))); err != nil {
			return err
		} else if !ok {
			break
		}
		n++
	}
	for n--; n >= 0; n-- {
		if err := t.step(step); err != nil {
			return err
		}
		if err := os.Remove(below(path, linkName(n))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// children counts the entries that are children of the one at path.
func children(path string) (n uint64, err error) {
	for k := 0; ; k++ {
		id := below(path, idName(k))
		var st unix.Stat_t
		switch err := unix.Lstat(id, &st); {
		case errors.Is(err, unix.ENOENT):
			return n, nil
		case err != nil:
			return 0, &os.PathError{Op: "lstat", Path: id, Err: err}
		}
		n += uint64(st.Nlink) - 1
	}
}

// requireChildless refuses the removal of a key with children.
func (t *tree) requireChildless(key, path string) error {
	// Adopted ones first: one that gets its entry has its link before it is no
	// longer counted here.
	n, err := t.awaitedChildren(key)
	if err != nil {
		return err
	}
	if n > 0 {
		return fmt.Errorf("cannot remove %q, which is the parent of %d adopted: %w", key, n, errdefs.ErrFailedPrecondition)
	}
	return requireChildless(key, path)
}

// requireChildless refuses the removal of an entry with children.
func requireChildless(key, path string) error {
	n, err := children(path)
	if err != nil {
		return err
	}
	if n > 0 {
		return fmt.Errorf("cannot remove %q, which is the parent of %d: %w", key, n, errdefs.ErrFailedPrecondition)
	}
	return nil
}

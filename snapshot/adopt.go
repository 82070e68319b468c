package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// Adopted is a snapshot whose data stands in snapshots/snapshots/<Dir>, where
// another snapshotter made it. The data is not moved.
type Adopted struct {
	// Key is its key here, Parent that of a committed one that is adopted, too,
	// empty for none.
	Key, Parent string
	// Kind is KindActive or KindCommitted.
	Kind snapshots.Kind
	// Dir is the name of the data directory. Under it lie, for Overlay, fs and
	// (active only) work; for Native it is the tree itself.
	Dir              string
	Created, Updated time.Time
	Usage            snapshots.Usage
	// Bound, if it is not empty, says why the layer makes sense over its own
	// parent only. It is mounted so that overlayfs's marks redirect and metacopy
	// are followed, and never stacked. If it is empty, the layer is looked
	// through for such marks before it is first used.
	Bound string
}

// Adopt makes a tree of snapshots below root out of those of another
// snapshotter, with o as for Open. Whatever an earlier Adopt made there is
// replaced. The data directories in discard become removals, whose bytes go
// with the first Cleanup or settling.
//
// All snapshots are named in one file; each gets its entry when it is first
// used. So this costs no inode a snapshot, and nobody looks at their data.
//
// Nothing in the data directories is changed, and nothing is synced. It must
// not be called while a driver has the tree open.
func Adopt(ctx context.Context, root string, o Options, entries iter.Seq[Adopted], discard []string) error {
	err := Disown(ctx, root, o.Step)
	var d Driver
	if err == nil {
		d, err = open(ctx, root, o)
	}
	if err != nil {
		return fmt.Errorf("adopt snapshots below %q: %w", root, err)
	}
	t := treeOf(d)
	err = t.settleNew(ctx)
	if err == nil {
		err = t.adoptAll(ctx, entries)
	}
	for _, dir := range discard {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err == nil {
			err = t.adoptTrash(dir)
		}
	}
	return errors.Join(err, d.Close())
}

func treeOf(d Driver) *tree {
	switch d := d.(type) {
	case *native:
		return d.tree
	case *overlay:
		return d.tree
	}
	return nil // open gives no other
}

// adoptAll writes the list, in the order of the names, under another name
// first.
func (t *tree) adoptAll(ctx context.Context, entries iter.Seq[Adopted]) (err error) {
	var all []adoption
	for a := range entries {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		line, err := adoptionOf(a)
		if err != nil {
			return fmt.Errorf("adopt snapshot %q: %w", a.Key, err)
		}
		all = append(all, line)
	}
	if len(all) == 0 {
		return nil
	}
	slices.SortFunc(all, func(a, b adoption) int { return strings.Compare(a.name, b.name) })
	const usual = 160 // bytes of a line
	list := make([]byte, 0, usual*len(all))
	for i, a := range all {
		if i > 0 && all[i-1].name == a.name {
			return fmt.Errorf("two adopted snapshots are called %s: %w", a.name, errdefs.ErrAlreadyExists)
		}
		list = a.append(list)
	}
	if err := t.step("adopt.list"); err != nil {
		return err
	}
	next := t.adoptions.path + ".new"
	if err := writeFile(next, os.O_TRUNC, list); err != nil {
		return errors.Join(err, ignoreNotExist(os.Remove(next)))
	}
	if err := t.step("adopt.named"); err != nil {
		return err
	}
	return os.Rename(next, t.adoptions.path)
}

func adoptionOf(a Adopted) (adoption, error) {
	if err := requireKey(a.Key); err != nil {
		return adoption{}, err
	}
	if err := requireDataDir(a.Dir); err != nil {
		return adoption{}, err
	}
	line := adoption{
		name: encodeKey(a.Key), dir: a.Dir, active: a.Kind == snapshots.KindActive, parent: a.Parent,
		created: nanos(a.Created), updated: nanos(a.Updated), bound: a.Bound,
		inodes: a.Usage.Inodes, size: a.Usage.Size,
	}
	if hashed(line.name) {
		line.key = a.Key
	}
	return line, nil
}

// nanos are those since 1970, 0 for a time that is not known.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func requireDataDir(dir string) error {
	if dir == "" || dir == "." || dir == ".." || strings.ContainsRune(dir, '/') {
		return fmt.Errorf("data directory %q: %w", dir, errdefs.ErrInvalidArgument)
	}
	return nil
}

// linkData makes an entry's directory with the links to its data.
func (t *tree) linkData(path, dir string, writable bool) error {
	if err := requireDataDir(dir); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	data := "../../" + dirAdopted + "/" + dir
	if t.info.Name == Native {
		return os.Symlink(data, below(path, "fs"))
	}
	err := os.Symlink(data+"/fs", below(path, "fs"))
	if err == nil && writable {
		err = os.Symlink(data+"/work", below(path, "work"))
	}
	return err
}

// adoptTrash makes a removal whose bytes are a data directory.
func (t *tree) adoptTrash(dir string) error {
	if err := t.step("adopt.discard"); err != nil {
		return err
	}
	e := entry{dirTrash, encodeKey("adopted-"+dir) + "~aADOPTED"}
	path := t.at(e)
	if err := t.linkData(path, dir, false); err != nil {
		return fmt.Errorf("discard snapshots/%s: %w", dir, err)
	}
	now := t.clock().UnixNano()
	return createState(below(path, "info"), state{Created: now, Updated: now})
}

// Disown removes what was made for adopted snapshots below root, and nothing
// of their data. Entries with data of their own stay. step, which may be nil,
// is as Options.Step.
func Disown(ctx context.Context, root string, step func(string) error) error {
	t := &tree{dir: filepath.Join(root, "snapshots"), steps: step}
	for _, dir := range []string{dirNew, dirActive, dirCommitted, dirTrash} {
		names, err := t.list(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("disown snapshots below %q: %w", root, err)
		}
		for _, name := range names {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			if dir == dirNew && strings.HasPrefix(name, trialPrefix) {
				continue // perhaps still mounted: Settle knows how to end it
			}
			if err := t.disown(t.path(dir, name)); err != nil {
				return fmt.Errorf("disown snapshots below %q: %w", root, err)
			}
		}
	}
	for _, name := range []string{adoptedList, adoptedList + ".new"} {
		if err := t.step("disown.list"); err != nil {
			return err
		}
		if err := ignoreNotExist(os.Remove(t.path(name))); err != nil {
			return fmt.Errorf("disown snapshots below %q: %w", root, err)
		}
	}
	return nil
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// disown removes an entry that is, or was about to become, adopted: its fs is
// a link, or it has none yet.
func (t *tree) disown(path string) error {
	info, err := os.Lstat(below(path, "fs"))
	if err == nil && info.Mode()&fs.ModeSymlink == 0 {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := t.step("disown.entry"); err != nil {
		return err
	}
	return os.RemoveAll(path) // links are not followed
}

// AdoptedDirs says where the data of adopted snapshots is, in a tree that need
// not be open. The function that it returns gives the name of the directory
// below snapshots/snapshots; it is not found for a key that is not there, is of
// the other kind, or has data of its own.
func AdoptedDirs(root string) (func(key string, kind snapshots.Kind) (string, error), error) {
	t := &tree{dir: filepath.Join(root, "snapshots")}
	t.adoptions.path = t.path(adoptedList)
	here := map[string]bool{}
	dirs, err := t.list(dirAdopted)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("adopted snapshots below %q: %w", root, err)
	}
	for _, dir := range dirs {
		here[dir] = true
	}
	return func(key string, kind snapshots.Kind) (string, error) {
		e := entry{dirCommitted, encodeKey(key)}
		if kind == snapshots.KindActive {
			e.dir = dirActive
		}
		data, err := t.adopted(below(t.at(e), "fs"))
		if err == nil && data == "" {
			var a adoption
			var ok bool
			if a, ok, err = t.awaited(e.name); ok && a.entry() == e {
				data = a.dir
			}
		}
		if err != nil {
			return "", fmt.Errorf("snapshot %q: %w", key, err)
		}
		if data = filepath.Base(data); !here[data] {
			return "", fmt.Errorf("snapshot %q is not adopted: %w", key, errdefs.ErrNotFound)
		}
		return data, nil
	}, nil
}

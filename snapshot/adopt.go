package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// Adopted is a snapshot whose data stands in snapshots/snapshots/<Dir>, where
// another snapshotter made it. Its entry is one as any other, but for links
// that lead there: the data is not moved.
type Adopted struct {
	// Key is its key here, Parent that of a committed one that was adopted
	// before, empty for none.
	Key, Parent string
	// Kind is KindActive or KindCommitted.
	Kind snapshots.Kind
	// Dir is the name of the data directory. Under it lie, for Overlay, fs and
	// (active only) work; for Native it is the tree itself.
	Dir              string
	Created, Updated time.Time
	Labels           map[string]string
	Usage            snapshots.Usage
	// Bound, if it is not empty, says why the layer makes sense over its own
	// parent only: it has overlayfs's marks redirect or metacopy. It is
	// mounted so that they are followed, and never stacked.
	Bound string
}

// Adopt makes a tree of snapshots below root out of those of another
// snapshotter, with o as for Open. Whatever an earlier Adopt made there is
// replaced. The data directories in discard become removals, whose bytes go
// with the first Cleanup or settling.
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
	for a := range entries {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			break
		}
		if err = t.adopt(a); err != nil {
			err = fmt.Errorf("adopt snapshot %q: %w", a.Key, err)
		}
	}
	for _, dir := range discard {
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

// adopt makes one entry, in its place: nobody looks before all are made.
func (t *tree) adopt(a Adopted) error {
	if err := requireKey(a.Key); err != nil {
		return err
	}
	if err := t.step("adopt.entry"); err != nil {
		return err
	}
	e := entry{dirCommitted, encodeKey(a.Key)}
	if a.Kind == snapshots.KindActive {
		e.dir = dirActive
	}
	s := state{
		Parent: text(a.Parent), Created: nanos(a.Created), Updated: nanos(a.Updated),
		Sealed: e.dir == dirCommitted, Bound: text(a.Bound),
	}
	if err := t.bind(&s); err != nil {
		return err
	}
	if s.Sealed {
		s.Usage = &usage{Inodes: a.Usage.Inodes, Size: a.Usage.Size}
	}
	if hashed(e.name) {
		s.Key = text(a.Key)
	}
	s.setLabels(a.Labels)
	path := t.at(e)
	if err := t.adoptData(path, a.Dir, e.dir == dirActive); err != nil {
		return err
	}
	if a.Parent != "" {
		if err := t.join(a.Parent, path, 0); err != nil {
			return err
		}
	}
	return createState(filepath.Join(path, "info"), s)
}

// nanos are those since 1970, 0 for a time that is not known.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// adoptData makes an entry's directory with the links to its data.
func (t *tree) adoptData(path, dir string, writable bool) error {
	if dir == "" || dir == "." || dir == ".." || strings.ContainsRune(dir, '/') {
		return fmt.Errorf("data directory %q: %w", dir, errdefs.ErrInvalidArgument)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	data := "../../" + dirAdopted + "/" + dir
	if t.info.Name == Native {
		return os.Symlink(data, filepath.Join(path, "fs"))
	}
	err := os.Symlink(data+"/fs", filepath.Join(path, "fs"))
	if err == nil && writable {
		err = os.Symlink(data+"/work", filepath.Join(path, "work"))
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
	if err := t.adoptData(path, dir, false); err != nil {
		return fmt.Errorf("discard snapshots/%s: %w", dir, err)
	}
	now := t.clock().UnixNano()
	return createState(filepath.Join(path, "info"), state{Created: now, Updated: now})
}

// Disown removes the entries of adopted snapshots below root, and nothing of
// their data. Entries with data of their own stay. step, which may be nil, is
// as Options.Step.
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
	return nil
}

// disown removes an entry that is, or was about to become, adopted: its fs is
// a link, or it has none yet.
func (t *tree) disown(path string) error {
	for _, name := range []string{"fs", "gone"} {
		info, err := os.Lstat(filepath.Join(path, name))
		if err == nil && info.Mode()&fs.ModeSymlink == 0 {
			return nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := t.step("disown.entry"); err != nil {
		return err
	}
	return os.RemoveAll(path) // links are not followed
}

// AdoptedDir is the data directory, below snapshots/snapshots, of an adopted
// snapshot in a tree that need not be open. It is not found for a key that is
// not there, is of the other kind, or has data of its own.
func AdoptedDir(root, key string, kind snapshots.Kind) (string, error) {
	t := &tree{dir: filepath.Join(root, "snapshots")}
	e := entry{dirCommitted, encodeKey(key)}
	if kind == snapshots.KindActive {
		e.dir = dirActive
	}
	data, err := t.adopted(filepath.Join(t.at(e), "fs"))
	if err != nil {
		return "", fmt.Errorf("snapshot %q: %w", key, err)
	}
	if ok, err := exists(data); data == "" || err != nil || !ok {
		return "", errors.Join(err, fmt.Errorf("snapshot %q is not adopted: %w", key, errdefs.ErrNotFound))
	}
	return filepath.Base(data), nil
}

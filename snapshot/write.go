package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

// A writer writes a difference to a directory: as a layer, or by applying it
// to the tree that is there.
type writer struct {
	copier
	// from and to are the marks of the trees that are read and written.
	from, to marks
	// layer writes what goes as whiteouts, instead of removing it.
	layer bool
}

// write writes changes, which src shows, to the directory to. With hard links
// files are not copied but shared with src.
func write(ctx context.Context, to string, src *union, list []change, m marks, layer, hardLinks bool) (err error) {
	root, err := openPlace(unix.AT_FDCWD, to, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer root.Close()
	w := &writer{
		copier: copier{ctx: ctx, root: root, links: map[inodeID]string{}, clones: true},
		from:   src.marks, to: m, layer: layer,
	}
	if hardLinks {
		w.names = map[inodeID]int{}
	}
	if err := w.directory(src, root, "", list); err != nil {
		return err
	}
	if top := src.top(); top != nil {
		return w.attributes(top, root)
	}
	return nil
}

func (w *writer) directory(src *union, dst *os.File, rel string, list []change) error {
	for i := range list {
		if err := context.Cause(w.ctx); err != nil {
			return err
		}
		if err := w.change(src, dst, rel, &list[i]); err != nil {
			return within(list[i].name, err)
		}
	}
	return nil
}

func (w *writer) change(src *union, dst *os.File, rel string, c *change) (err error) {
	rel = filepath.Join(rel, c.name)
	if c.gone {
		return w.remove(dst, c.name)
	}
	if !c.isDir() {
		return w.file(src, dst, rel, c)
	}
	place, err := w.makeDir(dst, c)
	if err != nil {
		return err
	}
	defer place.Close()
	sub, err := src.sub(&c.found)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sub.close()) }()
	if err := w.directory(sub, place, rel, c.below); err != nil {
		return err
	}
	return w.attributes(sub.top(), place)
}

// remove hides a name, or takes it away.
func (w *writer) remove(dst *os.File, name string) error {
	if !w.layer {
		return removeAt(dst, name)
	}
	if err := unix.Mknodat(int(dst.Fd()), name, unix.S_IFCHR, 0); err != nil {
		return &os.PathError{Op: "mknod", Path: name, Err: err}
	}
	return w.to.markWhite(dst)
}

// removeAt removes a name with all that is below it.
func removeAt(dir *os.File, name string) error {
	err := unix.Unlinkat(int(dir.Fd()), name, 0)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM):
		return &os.PathError{Op: "unlink", Path: name, Err: err}
	}
	return removeTree(filepath.Join(procPath(dir), name))
}

// makeDir makes the directory, where there is none yet.
func (w *writer) makeDir(dst *os.File, c *change) (*os.File, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(dst.Fd()), c.name, &st, unix.AT_SYMLINK_NOFOLLOW)
	there := err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR
	if err == nil && (!there || c.opaque) {
		err, there = removeAt(dst, c.name), false
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	if !there {
		if err := unix.Mkdirat(int(dst.Fd()), c.name, 0o700); err != nil {
			return nil, &os.PathError{Op: "mkdir", Path: c.name, Err: err}
		}
	}
	place, err := openPlace(int(dst.Fd()), c.name, unix.O_NOFOLLOW|unix.O_DIRECTORY)
	if err == nil && w.layer && c.opaque {
		err = w.to.set(place, "opaque", "y")
	}
	return place, err
}

// file puts a file in place of whatever is there: a link to what was written
// of it already, a hard link of the source's, or a copy.
func (w *writer) file(src *union, dst *os.File, rel string, c *change) error {
	if !w.layer {
		if err := removeAt(dst, c.name); err != nil {
			return err
		}
	}
	if first, ok := w.links[c.id()]; ok && c.st.Nlink > 1 {
		return unix.Linkat(int(w.root.Fd()), first, int(dst.Fd()), c.name, 0)
	}
	if linked, err := w.link(src.parts[c.at].File, dst, c.name, &c.st); err != nil || linked {
		return err
	}
	if c.st.Nlink > 1 {
		w.links[c.id()] = rel
	}
	from, err := src.place(&c.found)
	if err != nil {
		return err
	}
	defer from.Close()
	if reason, err := w.from.boundMark(from, &c.st); err != nil {
		return err
	} else if reason != "" {
		return &LayerError{Reason: reason, Bound: true}
	}
	if err := w.create(from, int(dst.Fd()), c.name, c.st); err != nil {
		return err
	}
	to, err := openPlace(int(dst.Fd()), c.name, unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer to.Close()
	return w.attributes(from, to)
}

// attributes gives dst all that from shows, and nothing else.
func (w *writer) attributes(from, dst *os.File) error {
	st, err := stat(from)
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR && !w.layer {
		if err := w.dropXattrs(from, dst); err != nil {
			return err
		}
	}
	return copyAttributes(from, dst, st, func(name string) (string, bool) {
		shown, ok := w.from.shown(name)
		return w.to.stored(shown), ok
	})
}

// dropXattrs removes the attributes of a directory that was there before, but
// those that it is to have.
func (w *writer) dropXattrs(from, dst *os.File) error {
	wanted, err := xattrs(w.from, from)
	if err != nil {
		return err
	}
	path := procPath(dst)
	names, err := sysx.Listxattr(path)
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return &os.PathError{Op: "listxattr", Path: dst.Name(), Err: err}
	}
	for _, name := range names {
		shown, ok := w.to.shown(name)
		if _, keep := wanted[shown]; keep || !ok {
			continue
		}
		err := unix.Removexattr(path, name)
		if err != nil && !errors.Is(err, unix.ENODATA) && !strings.HasPrefix(name, "security.") {
			return &os.PathError{Op: "removexattr", Path: dst.Name(), Err: err}
		}
	}
	return nil
}

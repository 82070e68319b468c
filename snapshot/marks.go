package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

// labelExact is how WithExactLayer reaches Commit; no snapshot keeps it.
const labelExact = "lamina/exact-layer"

// WithExactLayer is an option of Commit that says: the layer is to lie over
// others exactly as it is, whatever its marks say, because it was written
// from a description of a difference, such as a layer's tar, and not by using
// a mount. Drivers without layers take no notice. It comes after an option
// that sets labels.
//
// Such a layer is measured by Usage, each time, and not by Commit: who waits
// for that wants the layer and not its size.
func WithExactLayer(info *snapshots.Info) error {
	info.Labels = maps.Clone(info.Labels)
	if info.Labels == nil {
		info.Labels = map[string]string{}
	}
	info.Labels[labelExact] = "yes"
	return nil
}

// takeExact says whether WithExactLayer was among the options.
func takeExact(info *snapshots.Info) bool {
	if info.Labels[labelExact] == "" {
		return false
	}
	info.Labels = maps.Clone(info.Labels)
	delete(info.Labels, labelExact)
	return true
}

// marks is how the names of overlayfs's own attributes begin in the layers of
// a tree. It is empty for a tree in which nothing is a mark: a directory with
// everything in it, or a mount.
type marks string

// marksOf are those of a class of attributes.
func marksOf(class string) marks {
	if class == "" {
		return ""
	}
	return marks(class + ".overlay.")
}

// shown is the name under which a mount shows an attribute of a layer; ok is
// false for marks. Names that look like marks within the mount, as another
// overlay in it would use them, are escaped by one more "overlay.".
func (m marks) shown(name string) (string, bool) {
	rest, mark := strings.CutPrefix(name, string(m))
	if m == "" || !mark {
		return name, true
	}
	if rest, ok := strings.CutPrefix(rest, "overlay."); ok {
		return string(m) + rest, true
	}
	return "", false
}

// stored is the name that keeps, in a layer, an attribute of a mount.
func (m marks) stored(name string) string {
	rest, mark := strings.CutPrefix(name, string(m))
	if m == "" || !mark {
		return name
	}
	return string(m) + "overlay." + rest
}

// get reads a mark; ok is false where there is none.
func (m marks) get(f *os.File, mark string) (value string, ok bool, err error) {
	if m == "" {
		return "", false, nil
	}
	v, err := sysx.Getxattr(procPath(f), string(m)+mark)
	switch {
	case err == nil:
		return string(v), true, nil
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
		return "", false, nil
	}
	return "", false, fmt.Errorf("attribute %s%s: %w", m, mark, &os.PathError{Op: "getxattr", Path: f.Name(), Err: err})
}

// set writes a mark.
func (m marks) set(f *os.File, mark, value string) error {
	if err := unix.Setxattr(procPath(f), string(m)+mark, []byte(value), 0); err != nil {
		return fmt.Errorf("attribute %s%s: %w", m, mark, &os.PathError{Op: "setxattr", Path: f.Name(), Err: err})
	}
	return nil
}

// drop removes a mark.
func (m marks) drop(f *os.File, mark string) error {
	err := unix.Removexattr(procPath(f), string(m)+mark)
	if err != nil && !errors.Is(err, unix.ENODATA) {
		return fmt.Errorf("attribute %s%s: %w", m, mark, &os.PathError{Op: "removexattr", Path: f.Name(), Err: err})
	}
	return nil
}

// whiteout says whether a file of a layer hides the name below it.
func (m marks) whiteout(st *unix.Stat_t) bool {
	return m != "" && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// boundMark looks for a mark by which a file or directory of a layer depends
// on what lies below: a directory that shows another one of the parent
// (redirect), or a file whose content is the parent's (metacopy).
func (m marks) boundMark(f *os.File, st *unix.Stat_t) (reason string, err error) {
	mark := ""
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		mark = "redirect"
	case unix.S_IFREG:
		mark = "metacopy"
	default:
		return "", nil
	}
	_, ok, err := m.get(f, mark)
	if err != nil || !ok {
		return "", err
	}
	return fmt.Sprintf("depends on what is below it (%s%s)", m, mark), nil
}

// markWhite makes mounts take notice of whiteouts in a directory of a layer:
// where no other layer has it, they would show up in it as names without
// files. An origin, even one that names none, says that the directory may hold
// some.
func (m marks) markWhite(dir *os.File) error {
	if _, ok, err := m.get(dir, "origin"); err != nil || ok {
		return err
	}
	return m.set(dir, "origin", "")
}

// findBound looks for a boundMark in a layer, and says where it is. It looks
// at directories, and at files that have a size and no data: no other has such
// a mark.
func findBound(root string, m marks) (reason text, err error) {
	root, err = filepath.EvalSymlinks(root)
	if err != nil {
		return "", asNotFound(err)
	}
	redirect, metacopy := string(m)+"redirect", string(m)+"metacopy"
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		mark := redirect
		if !d.IsDir() {
			if !d.Type().IsRegular() {
				return nil
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Blocks > 0 || st.Size == 0 {
				return nil
			}
			mark = metacopy
		}
		_, err = unix.Lgetxattr(path, mark, nil)
		switch {
		case err == nil:
			rel, _ := filepath.Rel(root, path)
			reason = text(fmt.Sprintf("%s depends on what is below it (%s)", rel, mark))
			return fs.SkipAll
		case errors.Is(err, unix.ENODATA), errors.Is(err, unix.EOPNOTSUPP):
			return nil
		}
		return &os.PathError{Op: "getxattr", Path: path, Err: err}
	})
	return reason, err
}

package output

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// place checks all destinations and changes nothing.
func (c *collector) place(tree string) error {
	work, err := fsat.RealPath(tree)
	if err != nil {
		return err
	}
	cwd, err := os.Getwd()
	if err != nil {
		return fsat.Error("find", "working directory", err)
	}
	if cwd, err = fsat.RealPath(cwd); err != nil {
		return err
	}
	for i, j := range c.jobs {
		abs, err := filepath.Abs(j.spec.Dest)
		if err != nil {
			return j.fail("resolve destination", err)
		}
		parent, err := fsat.RealPath(filepath.Dir(abs))
		if err != nil {
			return j.fail("resolve destination", err)
		}
		j.base = filepath.Base(abs)
		j.dest = filepath.Join(parent, j.base)
		switch {
		case fsat.Inside(cwd, j.dest):
			return j.refuse(errdefs.ErrInvalidArgument, "the destination is or holds the working directory")
		case fsat.Inside(work, j.dest):
			return j.refuse(errdefs.ErrInvalidArgument, "the destination is or holds the workspace")
		case fsat.Inside(j.dest, work):
			return j.refuse(errdefs.ErrInvalidArgument, "the destination is in the workspace")
		}
		for _, o := range c.jobs[:i] {
			if fsat.Inside(j.dest, o.dest) || fsat.Inside(o.dest, j.dest) {
				return j.refuse(errdefs.ErrInvalidArgument, "the destination is, holds or is in that of output %q", o.spec.Path)
			}
		}
		if err := j.checkDest(parent); err != nil {
			return err
		}
	}
	return nil
}

// checkDest looks whether the destination can be made or replaced.
func (j *job) checkDest(parent string) error {
	var st unix.Stat_t
	err := unix.Lstat(j.dest, &st)
	switch {
	case err == nil:
		if err := j.checkType(&st); err != nil {
			return err
		}
	case !errors.Is(err, unix.ENOENT):
		return j.fail("stat destination", err)
	}
	// The nearest directory that is there has to take a new name.
	for dir := parent; ; dir = filepath.Dir(dir) {
		err := unix.Stat(dir, &st)
		if errors.Is(err, unix.ENOENT) && dir != "/" {
			continue
		}
		if err != nil {
			return j.fail("stat destination", err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return j.refuse(errdefs.ErrInvalidArgument, "%q is not a directory", dir)
		}
		if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
			return fsat.Error("write the destination of output \""+j.spec.Path+"\" in directory", dir, err)
		}
		return nil
	}
}

// checkType refuses to replace a directory by a file and a file by a
// directory. A symbolic link may be replaced by either.
func (j *job) checkType(st *unix.Stat_t) error {
	switch kind := st.Mode & unix.S_IFMT; {
	case kind == unix.S_IFLNK:
	case j.isDir() && kind != unix.S_IFDIR:
		return j.refuse(errdefs.ErrFailedPrecondition, "the output is a directory, the destination is not; remove it first")
	case !j.isDir() && kind == unix.S_IFDIR:
		return j.refuse(errdefs.ErrFailedPrecondition, "the output is a file, the destination a directory; name the file in it")
	case !j.isDir() && kind != unix.S_IFREG:
		return j.refuse(errdefs.ErrFailedPrecondition, "the destination is neither a file nor a directory")
	}
	return nil
}

// openParent opens the directory of the destination, making it and those above
// it where they are missing.
func (c *collector) openParent(j *job) error {
	dir := filepath.Dir(j.dest)
	var lacking []string
	for d := dir; ; d = filepath.Dir(d) {
		err := unix.Mkdir(d, 0o777)
		if err == nil {
			c.made = append(c.made, d)
			break
		}
		if errors.Is(err, unix.EEXIST) {
			break
		}
		if !errors.Is(err, unix.ENOENT) || d == "/" {
			return j.fail("make directory for destination", err)
		}
		lacking = append(lacking, d)
	}
	for i := len(lacking) - 1; i >= 0; i-- {
		if err := unix.Mkdir(lacking[i], 0o777); err == nil {
			c.made = append(c.made, lacking[i])
		} else if !errors.Is(err, unix.EEXIST) {
			return j.fail("make directory for destination", err)
		}
	}
	var err error
	j.parent, err = fsat.OpenRoot(dir)
	return j.fail("open directory for destination", err)
}

package fsat

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Xattr is one extended attribute.
type Xattr struct {
	Name  string
	Value []byte
}

// Kept says whether an extended attribute belongs to what a tree holds and is
// copied with it.
//
//   - user.* and POSIX ACLs always: the owner of a file may set them, and
//     without its ACL the group bits of a file's mode mean something else;
//   - trusted.* and security.capability for root, who alone may set them;
//   - never the marks of overlayfs (trusted.overlay.*, user.overlay.*), which
//     would change what an overlay shows, and never labels of the machine's
//     own policy (security.selinux, security.ima, security.evm, ...).
func Kept(name string, root bool) bool {
	switch {
	case strings.HasPrefix(name, "user.overlay."), strings.HasPrefix(name, "trusted.overlay."):
		return false
	case strings.HasPrefix(name, "user."):
		return true
	case name == aclAccess, name == aclDefault:
		return true
	case strings.HasPrefix(name, "trusted."), name == "security.capability":
		return root
	}
	return false
}

const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
)

// Xattrs reads the kept attributes of an open file, sorted by name; nil where
// there are none or the file system has none. path is set for descriptors
// opened with O_PATH, on which the kernel refuses the direct calls.
func Xattrs(fd int, path, root bool) ([]Xattr, error) {
	return xattrs(openFile(fd, path), nil, func(name string) bool { return Kept(name, root) })
}

// XattrsAt reads the attributes that keep wants of an entry of the directory
// at, of a link itself if it is one, or with an empty name of the open file at;
// sorted by name, nil where there are none or the file system has none. It needs
// /proc for entries. scratch, if it is not empty, saves memory.
func XattrsAt(at int, name string, scratch []byte, keep func(name string) bool) ([]Xattr, error) {
	return xattrs(entryOf(at, name), scratch, keep)
}

func xattrs(f attrFile, scratch []byte, keep func(name string) bool) ([]Xattr, error) {
	names, err := f.names(scratch)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	var out []Xattr
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if !keep(name) {
			continue
		}
		value, err := f.value(name)
		if errors.Is(err, unix.ENODATA) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, Xattr{Name: name, Value: value})
	}
	slices.SortFunc(out, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// XattrNames lists the extended attributes of an open file, or with path set of
// one opened with O_PATH; none where the file system has none.
func XattrNames(fd int, path bool) ([]string, error) {
	names, err := openFile(fd, path).names(nil)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(names), "\x00"), "\x00"), nil
}

// GetXattr reads one extended attribute; ENODATA if there is none of that name.
func GetXattr(fd int, path bool, name string) ([]byte, error) {
	return openFile(fd, path).value(name)
}

// GetXattrAt is GetXattr for a file that is named as in XattrsAt.
func GetXattrAt(at int, entry, name string) ([]byte, error) {
	return entryOf(at, entry).value(name)
}

// attrFile names a file for the calls on its attributes: by a descriptor or, if
// that will not do, by a path in /proc.
type attrFile struct {
	fd   int
	path string
	// link says that path names the file itself, should it be a link.
	link bool
}

func openFile(fd int, path bool) attrFile {
	if path {
		return attrFile{path: ProcPath(fd)}
	}
	return attrFile{fd: fd}
}

func entryOf(at int, name string) attrFile {
	if name == "" {
		return attrFile{fd: at}
	}
	return attrFile{path: ProcPath(at) + "/" + name, link: true}
}

func (f attrFile) list(buf []byte) (int, error) {
	switch {
	case f.path == "":
		return unix.Flistxattr(f.fd, buf)
	case f.link:
		return unix.Llistxattr(f.path, buf)
	default:
		return unix.Listxattr(f.path, buf)
	}
}

func (f attrFile) get(name string, buf []byte) (int, error) {
	switch {
	case f.path == "":
		return unix.Fgetxattr(f.fd, name, buf)
	case f.link:
		return unix.Lgetxattr(f.path, name, buf)
	default:
		return unix.Getxattr(f.path, name, buf)
	}
}

// names reads the list of names, in buf if that is large enough.
func (f attrFile) names(buf []byte) ([]byte, error) {
	names, err := grow(buf, f.list)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		return nil, nil // this file system has none
	}
	return names, err
}

func (f attrFile) value(name string) ([]byte, error) {
	return grow(nil, func(buf []byte) (int, error) { return f.get(name, buf) })
}

// grow calls read with larger buffers until the answer fits. The kernel's
// limit for a list and for a value is 64 KiB.
func grow(buf []byte, read func([]byte) (int, error)) ([]byte, error) {
	if len(buf) == 0 {
		buf = make([]byte, 256)
	}
	for {
		n, err := read(buf)
		switch {
		case err == nil:
			return buf[:n], nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ERANGE) && len(buf) < 1<<20:
			buf = make([]byte, 4*len(buf))
		default:
			return nil, err
		}
	}
}

// EqualXattrs compares two sorted lists.
func EqualXattrs(a, b []Xattr) bool {
	return slices.EqualFunc(a, b, func(x, y Xattr) bool {
		return x.Name == y.Name && bytes.Equal(x.Value, y.Value)
	})
}

// SetXattrs makes the kept attributes of an open file equal to want, removing
// those that it has beside (a new file inherits an ACL from its directory).
// refused lists attributes that this file system or this user cannot set, with
// the reason; everything else that goes wrong is an error.
func SetXattrs(fd int, path bool, want []Xattr, root bool) (refused []string, err error) {
	have, err := Xattrs(fd, path, root)
	if err != nil {
		return nil, err
	}
	if EqualXattrs(have, want) {
		return nil, nil
	}
	for _, h := range have {
		if slices.ContainsFunc(want, func(w Xattr) bool { return w.Name == h.Name }) {
			continue
		}
		if err := removeXattr(fd, path, h.Name); err != nil && !errors.Is(err, unix.ENODATA) {
			if !isRefusal(err) {
				return refused, err
			}
			refused = append(refused, "extended attribute "+h.Name+" not removed: "+err.Error())
		}
	}
	// An access ACL changes the mode and with it the right to set user.*, so
	// ACLs come last.
	for _, acls := range []bool{false, true} {
		for _, w := range want {
			if (w.Name == aclAccess || w.Name == aclDefault) != acls {
				continue
			}
			if slices.ContainsFunc(have, func(h Xattr) bool { return h.Name == w.Name && bytes.Equal(h.Value, w.Value) }) {
				continue
			}
			if err := setXattr(fd, path, w); err != nil {
				if !isRefusal(err) {
					return refused, err
				}
				refused = append(refused, "extended attribute "+w.Name+" not kept: "+err.Error())
			}
		}
	}
	return refused, nil
}

// isRefusal tells the errors that mean "not here" or "not you" from those that
// mean that something broke.
func isRefusal(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) ||
		errors.Is(err, unix.EINVAL) || errors.Is(err, unix.E2BIG)
}

func setXattr(fd int, path bool, x Xattr) error {
	if path {
		return unix.Setxattr(ProcPath(fd), x.Name, x.Value, 0)
	}
	return unix.Fsetxattr(fd, x.Name, x.Value, 0)
}

func removeXattr(fd int, path bool, name string) error {
	if path {
		return unix.Removexattr(ProcPath(fd), name)
	}
	return unix.Fremovexattr(fd, name)
}

package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

const (
	xattrRecord = "SCHILY.xattr."
	aclAccess   = "system.posix_acl_access"
	aclDefault  = "system.posix_acl_default"
)

// carried says whether a layer may carry an extended attribute.
func carried(name string) bool {
	return fsat.Kept(name, true) && !strings.HasPrefix(name, "trusted.")
}

// attributes are what a file has beside its content.
type attributes struct {
	mode         uint32 // the twelve bits
	uid, gid     uint32
	atime, mtime unix.Timespec
	xattrs       []fsat.Xattr // sorted by name, carried ones only
}

func (w *attributes) hasACL() bool {
	return slices.ContainsFunc(w.xattrs, func(x fsat.Xattr) bool { return x.Name == aclAccess || x.Name == aclDefault })
}

func refused(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrPermissionDenied)...)
}

// attributes takes from a header what it says.
func (a *applier) attributes(h *tar.Header) (*attributes, error) {
	w := &attributes{mode: uint32(h.Mode & 0o7777), uid: a.euid, gid: a.egid, mtime: timespec(h.ModTime)}
	w.atime = w.mtime
	if h.AccessTime.After(h.ModTime) {
		w.atime = timespec(h.AccessTime)
	}
	if a.o.Owners == OwnersKept {
		// The last number means "no change" to the kernel.
		const last = 1<<32 - 1
		if h.Uid < 0 || h.Uid >= last || h.Gid < 0 || h.Gid >= last {
			return nil, invalid("there is no owner %d:%d", h.Uid, h.Gid)
		}
		w.uid, w.gid = uint32(h.Uid), uint32(h.Gid)
	}
	for key, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if !ok {
			continue
		}
		if !carried(name) {
			a.out.Skipped.Xattrs++
			continue
		}
		w.xattrs = append(w.xattrs, fsat.Xattr{Name: name, Value: []byte(value)})
	}
	slices.SortFunc(w.xattrs, func(x, y fsat.Xattr) int { return strings.Compare(x.Name, y.Name) })
	return w, nil
}

func timespec(t time.Time) unix.Timespec {
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

// setTimes sets access and modification time of an open file.
func setTimes(fd int, ts *[2]unix.Timespec) error {
	// Without a path the call means the descriptor itself: one lookup less
	// than with an empty path, and on every kernel.
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(ts)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// dropACLs removes what a new file has got from its directory's default ACL.
func dropACLs(fd int) error {
	for _, name := range []string{aclAccess, aclDefault} {
		err := unix.Fremovexattr(fd, name)
		if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	return nil
}

// setDirAttributes gives an open directory the attributes, and remembers the
// times for when it is closed.
func (a *applier) setDirAttributes(d *dir, w *attributes) error {
	if d.uid != w.uid || d.gid != w.gid {
		if a.o.Owners == OwnersKept {
			if err := unix.Fchown(d.fd, int(w.uid), int(w.gid)); err != nil {
				return ownerError(d.path, w, err)
			}
		}
		d.uid, d.gid = w.uid, w.gid
	}
	acls := w.hasACL()
	if d.isNew {
		if err := a.setXattrs(d.fd, false, d.path, unix.S_IFDIR, w); err != nil {
			return err
		}
	} else {
		skipped, err := fsat.SetXattrs(d.fd, false, w.xattrs, true)
		if err != nil {
			return failed("set extended attributes of", d.path, err)
		}
		a.out.Skipped.Xattrs += int64(len(skipped))
		acls = true
	}
	d.isNew = false
	d.want = w.mode
	if now := w.mode | a.atLeast; now != d.mode || acls {
		if err := unix.Fchmod(d.fd, now); err != nil {
			return failed("set mode of", d.path, err)
		}
		d.mode = now
	}
	d.inherits = w.mode&unix.S_ISGID != 0 || slices.ContainsFunc(w.xattrs, func(x fsat.Xattr) bool { return x.Name == aclDefault })
	d.atime, d.mtime, d.changed = w.atime, w.mtime, true
	return nil
}

// newOwner says whether what is made in at has to be given away.
func (a *applier) newOwner(at *dir, w *attributes) bool {
	if a.o.Owners != OwnersKept {
		return false
	}
	return w.uid != a.euid || w.gid != a.egid || at.inherits || at.gid != a.egid
}

// setFileAttributes finishes a new regular file that was made with the mode
// made and has its content.
func (a *applier) setFileAttributes(at *dir, base string, fd int, made uint32, w *attributes) error {
	return a.finish(&unfinished{
		dir: at.path, base: base, fd: fd, made: made, want: w, owned: a.newOwner(at, w), inherits: at.inherits,
	})
}

// finish gives a new regular file its attributes. The order counts: a new owner
// takes set-id bits and capabilities away, and an ACL changes the mode.
func (a *applier) finish(u *unfinished) error {
	w := u.want
	chmod := u.made != w.mode || !a.exactModes
	if u.owned {
		if err := unix.Fchown(u.fd, int(w.uid), int(w.gid)); err != nil {
			return ownerError(join(u.dir, u.base), w, err)
		}
	}
	if u.inherits {
		if err := dropACLs(u.fd); err != nil {
			return failed("remove inherited attributes of", join(u.dir, u.base), err)
		}
		chmod = true
	}
	if len(w.xattrs) > 0 {
		if err := a.setXattrs(u.fd, false, join(u.dir, u.base), unix.S_IFREG, w); err != nil {
			return err
		}
		chmod = chmod || w.hasACL()
	}
	if chmod {
		if err := unix.Fchmod(u.fd, w.mode); err != nil {
			return failed("set mode of", join(u.dir, u.base), err)
		}
	}
	if err := setTimes(u.fd, &[2]unix.Timespec{w.atime, w.mtime}); err != nil {
		return failed("set times of", join(u.dir, u.base), err)
	}
	return nil
}

// setNodeAttributes is setFileAttributes for what is not opened: links, FIFOs
// and devices.
func (a *applier) setNodeAttributes(at *dir, base string, w *attributes, isLink bool) error {
	if a.newOwner(at, w) {
		if err := unix.Fchownat(at.fd, base, int(w.uid), int(w.gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return ownerError(join(at.path, base), w, err)
		}
	}
	if len(w.xattrs) > 0 || at.inherits && !isLink {
		if err := a.setNodeXattrs(at, base, w); err != nil {
			return err
		}
	}
	if !isLink && (!a.exactModes || w.mode&^0o777 != 0 || at.inherits || w.hasACL()) {
		if err := fsat.Chmod(at.fd, base, w.mode); err != nil {
			return failed("set mode of", join(at.path, base), err)
		}
	}
	ts := []unix.Timespec{w.atime, w.mtime}
	if err := unix.UtimesNanoAt(at.fd, base, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return failed("set times of", join(at.path, base), err)
	}
	return nil
}

func (a *applier) setNodeXattrs(at *dir, base string, w *attributes) error {
	fd, err := fsat.OpenAt(at.fd, base, unix.O_PATH, 0)
	if err != nil {
		return failed("open", join(at.path, base), err)
	}
	defer fsat.Close(fd)
	if at.inherits {
		err := unix.Removexattr(fsat.ProcPath(fd), aclAccess)
		if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
			return failed("remove inherited attributes of", join(at.path, base), err)
		}
	}
	return a.setXattrs(fd, true, join(at.path, base), 0, w)
}

// setXattrs sets the attributes of a new file, ACLs last.
func (a *applier) setXattrs(fd int, isPath bool, p string, kind uint32, w *attributes) error {
	for _, acls := range []bool{false, true} {
		for _, x := range w.xattrs {
			if (x.Name == aclAccess || x.Name == aclDefault) != acls {
				continue
			}
			var err error
			if isPath {
				err = unix.Setxattr(fsat.ProcPath(fd), x.Name, x.Value, 0)
			} else {
				err = unix.Fsetxattr(fd, x.Name, x.Value, 0)
			}
			switch {
			case err == nil:
			case errors.Is(err, unix.EOPNOTSUPP),
				errors.Is(err, unix.EPERM) && (!a.root || kind == 0 && strings.HasPrefix(x.Name, "user.")):
				// Only files and directories may have user.* (xattr(7)).
				a.out.Skipped.Xattrs++
			case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), errors.Is(err, unix.E2BIG):
				return invalid("extended attribute %q: %w", x.Name, err)
			default:
				return failed("set extended attribute "+x.Name+" of", p, err)
			}
		}
	}
	return nil
}

func ownerError(p string, w *attributes, err error) error {
	if errors.Is(err, unix.EINVAL) {
		// The kernel's word for an id that a user namespace does not map.
		return fmt.Errorf("owner %d:%d is not mapped in this user namespace: %w: %w", w.uid, w.gid, err, errdefs.ErrPermissionDenied)
	}
	return failed(fmt.Sprintf("give owner %d:%d to", w.uid, w.gid), p, err)
}

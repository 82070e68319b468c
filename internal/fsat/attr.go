package fsat

import (
	"errors"
	"strconv"

	"golang.org/x/sys/unix"
)

// ProcPath names the file behind a descriptor, also one opened with O_PATH,
// for calls that take nothing but paths. It needs /proc.
func ProcPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// Chmod sets the mode of name in the directory at; a symbolic link is refused
// with EOPNOTSUPP or ELOOP, never followed.
func Chmod(at int, name string, mode uint32) error {
	err := unix.Fchmodat(at, name, mode, unix.AT_SYMLINK_NOFOLLOW)
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	// fchmodat2 came with Linux 6.6. Before it: through the descriptor, which
	// for a link would change the link's own inode, so look first.
	fd, err := OpenAt(at, name, unix.O_PATH, 0)
	if err != nil {
		return err
	}
	defer Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return unix.EOPNOTSUPP
	}
	return unix.Chmod(ProcPath(fd), mode)
}

// SetMtime sets the modification time of name in the directory at, of a link
// itself if it is one, and leaves the access time alone. The empty name means
// the file that the descriptor at is.
func SetMtime(at int, name string, sec, nsec int64) error {
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: sec, Nsec: nsec}}
	flags := unix.AT_SYMLINK_NOFOLLOW
	if name == "" {
		// AT_EMPTY_PATH for utimensat came with Linux 5.8.
		if err := unix.UtimesNanoAt(at, "", ts, unix.AT_EMPTY_PATH); err == nil {
			return nil
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, ProcPath(at), ts, 0)
	}
	return unix.UtimesNanoAt(at, name, ts, flags)
}

package fsat

import (
	"errors"

	"golang.org/x/sys/unix"
)

// RemoveAll removes name in the directory at with everything below it and
// follows no link. Directories without the right to be read or changed are
// opened up first, which their owner may. What is not there is no error.
func RemoveAll(at int, name string) error {
	err := unix.Unlinkat(at, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	// Linux says EISDIR for a directory, some file systems EPERM.
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return err
	}
	if rerr := unix.Unlinkat(at, name, unix.AT_REMOVEDIR); rerr == nil || errors.Is(rerr, unix.ENOENT) {
		return nil
	} else if errors.Is(rerr, unix.ENOTDIR) {
		return err
	} else if !errors.Is(rerr, unix.ENOTEMPTY) && !errors.Is(rerr, unix.EEXIST) {
		return rerr
	}
	if err := removeChildren(at, name); err != nil {
		return err
	}
	err = unix.Unlinkat(at, name, unix.AT_REMOVEDIR)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func removeChildren(at int, name string) error {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY
	fd, err := OpenAt(at, name, flags, 0)
	if errors.Is(err, unix.EACCES) {
		if err := Chmod(at, name, 0o700); err != nil {
			return err
		}
		fd, err = OpenAt(at, name, flags, 0)
	}
	if err != nil {
		return err
	}
	defer Close(fd)
	names, err := Names(fd, make([]byte, 32<<10), nil)
	if err != nil {
		return err
	}
	opened := false
	for _, n := range names {
		err := RemoveAll(fd, n)
		if errors.Is(err, unix.EACCES) && !opened {
			opened = true
			if err := unix.Fchmod(fd, 0o700); err != nil {
				return err
			}
			err = RemoveAll(fd, n)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

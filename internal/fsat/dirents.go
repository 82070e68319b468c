package fsat

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Dirent is a name in a directory.
type Dirent struct {
	Name string
	// Type is what the directory says of it (unix.DT_REG, ...); DT_UNKNOWN on
	// file systems that say nothing. It may be out of date.
	Type byte
}

// Names appends the names in the directory fd, without "." and "..", to names
// in no order. It reads on from where the descriptor stands. buf is scratch
// space of some 32 KiB.
func Names(fd int, buf []byte, names []string) ([]string, error) {
	err := getdents(fd, buf, func(name []byte, _ byte) { names = append(names, string(name)) })
	return names, err
}

// Dirents is Names with types.
func Dirents(fd int, buf []byte, list []Dirent) ([]Dirent, error) {
	err := getdents(fd, buf, func(name []byte, typ byte) { list = append(list, Dirent{string(name), typ}) })
	return list, err
}

// getdents hands out the entries of a directory, but "." and "..".
func getdents(fd int, buf []byte, entry func(name []byte, typ byte)) error {
	for {
		n, err := unix.Getdents(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return err
		}
		if err := eachDirent(buf[:n], entry); err != nil {
			return err
		}
	}
}

// eachDirent takes apart what getdents64 gives: inode and offset of eight
// bytes each, the record's length in two, the type in one, the name up to a
// NUL. What cannot be is EIO.
func eachDirent(buf []byte, entry func(name []byte, typ byte)) error {
	const head = 19
	for len(buf) > 0 {
		if len(buf) < head {
			return unix.EIO
		}
		size := int(binary.NativeEndian.Uint16(buf[16:]))
		if size < head || size > len(buf) {
			return unix.EIO
		}
		name := buf[head:size]
		if i := bytes.IndexByte(name, 0); i >= 0 {
			name = name[:i]
		}
		if len(name) > 0 && string(name) != "." && string(name) != ".." {
			entry(name, buf[18])
		}
		buf = buf[size:]
	}
	return nil
}

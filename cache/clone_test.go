package cache_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/continuity/sysx"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot/overlayfs"
)

// fastDir is a fresh directory in memory, if overlayfs can have its upper
// directories there, and any other one if not.
func fastDir(t testing.TB) string {
	const memory = "/dev/shm"
	dir, err := os.MkdirTemp(memory, "lamina-cache-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	found, err := overlayfs.Try(t.Context(), dir, overlayfs.TryOptions{})
	if err != nil || !found.OK {
		t.Logf("not in memory: %v %s", err, found.Reason)
		return t.TempDir()
	}
	return dir
}

// cloneTree copies a store as it lies on the disk: with hard links, extended
// attributes and whiteouts, without what is mounted. It is what is left of the
// store when all its processes die at this moment.
func cloneTree(from, to string) error {
	links := map[uint64]string{}
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if strings.HasPrefix(rel, "mounts/") {
			return fs.SkipDir
		}
		return cloneOne(path, filepath.Join(to, rel), links)
	})
}

func cloneOne(from, to string, links map[uint64]string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return err
	}
	if first, ok := links[st.Ino]; ok {
		return os.Link(first, to)
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		err = os.Mkdir(to, 0o700)
	case unix.S_IFLNK:
		var target string
		if target, err = os.Readlink(from); err == nil {
			err = os.Symlink(target, to)
		}
	case unix.S_IFREG:
		links[st.Ino] = to
		err = cloneFile(from, to)
	default:
		err = unix.Mknod(to, st.Mode, int(st.Rdev))
	}
	if err != nil {
		return err
	}
	return errors.Join(cloneXattrs(from, to), os.Lchown(to, int(st.Uid), int(st.Gid)), cloneMode(to, st.Mode))
}

// cloneFile leaves out pages of zeros, of which a store's file has many.
func cloneFile(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	errs := []error{f.Truncate(int64(len(data)))}
	const page = 4096
	zeros := make([]byte, page)
	for at := 0; at < len(data); at += page {
		if p := data[at:min(at+page, len(data))]; !bytes.Equal(p, zeros[:len(p)]) {
			_, err := f.WriteAt(p, int64(at))
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, f.Close())...)
}

func cloneMode(to string, mode uint32) error {
	if mode&unix.S_IFMT == unix.S_IFLNK {
		return nil
	}
	return syscall.Chmod(to, mode&0o7777)
}

func cloneXattrs(from, to string) error {
	names, err := sysx.LListxattr(from)
	if err != nil {
		return err
	}
	for _, name := range names {
		value, err := sysx.LGetxattr(from, name)
		if err != nil {
			return err
		}
		if err := sysx.LSetxattr(to, name, value, 0); err != nil {
			return err
		}
	}
	return nil
}

package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/continuity/sysx"
	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// file is all that a copy must keep of one.
type file struct {
	Mode     uint32
	UID, GID uint32
	Rdev     uint64
	Nlink    uint64
	Mtime    int64
	Size     int64
	Blocks   int64
	Link     string
	Data     string
	Xattrs   map[string]string
	First    string // of those that are the same file
}

func list(t *testing.T, root string) map[string]file {
	t.Helper()
	out := map[string]file{}
	first := map[uint64]string{}
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		require.NoError(t, err)
		rel, err := filepath.Rel(root, path)
		require.NoError(t, err)
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(path, &st))
		f := file{
			Mode: st.Mode, UID: st.Uid, GID: st.Gid, Rdev: st.Rdev, Mtime: st.Mtim.Nano(), Xattrs: map[string]string{},
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			f.Link, err = os.Readlink(path)
			require.NoError(t, err)
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			require.NoError(t, err)
			f.Data, f.Size, f.Blocks = string(data), st.Size, st.Blocks
			f.Nlink = st.Nlink
		}
		if d.IsDir() {
			f.Nlink = 0
		} else if st.Nlink > 1 {
			if first[st.Ino] == "" {
				first[st.Ino] = rel
			}
			f.First = first[st.Ino]
		}
		names, err := sysx.LListxattr(path)
		require.NoError(t, err)
		for _, name := range names {
			value, err := sysx.LGetxattr(path, name)
			require.NoError(t, err)
			f.Xattrs[name] = string(value)
		}
		out[rel] = f
		return nil
	}))
	return out
}

func TestCopyTree(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	at := func(name string) string { return filepath.Join(src, name) }
	write := func(name string, data []byte, mode os.FileMode) {
		require.NoError(t, os.MkdirAll(filepath.Dir(at(name)), 0o755))
		require.NoError(t, os.WriteFile(at(name), data, 0o644))
		require.NoError(t, os.Chmod(at(name), mode))
	}
	write("file", []byte("content"), 0o640)
	write("empty", nil, 0o600)
	write("setuid", []byte("x"), 0o755|os.ModeSetuid)
	write("big", bytes.Repeat([]byte("0123456789abcdef"), 1<<16), 0o644)
	write("d/e/f", []byte("f"), 0o644)
	write("readonly/file", []byte("r"), 0o600)
	require.NoError(t, unix.Setxattr(at("readonly/file"), "user.c", []byte("c"), 0))
	require.NoError(t, os.Chmod(at("readonly/file"), 0o400))
	write("odd\n\xff name", []byte("o"), 0o644)
	require.NoError(t, os.Link(at("d/e/f"), at("hard")))
	require.NoError(t, os.Link(at("d/e/f"), at("d/hard")))
	require.NoError(t, os.Symlink("/etc/passwd", at("absolute")))
	require.NoError(t, os.Symlink("nowhere", at("dangling")))
	require.NoError(t, os.Symlink(strings.Repeat("x/", 1000), at("long")))
	require.NoError(t, os.Symlink("d", at("to-directory")))
	require.NoError(t, unix.Mkfifo(at("fifo"), 0o622))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: at("socket"), Net: "unix"})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	hole, err := os.Create(at("sparse"))
	require.NoError(t, err)
	_, err = hole.WriteAt([]byte("middle"), 5<<20)
	require.NoError(t, err)
	require.NoError(t, hole.Truncate(10<<20))
	require.NoError(t, hole.Sync(), "so that blocks are counted")
	require.NoError(t, hole.Close())
	require.NoError(t, unix.Setxattr(at("file"), "user.a", []byte("\x00bytes"), 0))
	require.NoError(t, unix.Setxattr(at("d"), "user.b", nil, 0))
	if os.Geteuid() == 0 {
		require.NoError(t, os.Lchown(at("absolute"), 1, 2))
		require.NoError(t, os.Chown(at("big"), 3, 4))
		require.NoError(t, os.Chown(at("setuid"), 5, 6))
		require.NoError(t, os.Chmod(at("setuid"), 0o755|os.ModeSetuid|os.ModeSetgid))
		require.NoError(t, unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
		require.NoError(t, unix.Setxattr(at("d"), "trusted.overlay.opaque", []byte("y"), 0))
		require.NoError(t, unix.Lsetxattr(at("dangling"), "trusted.link", []byte("l"), 0))
		capability := []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
		require.NoError(t, unix.Setxattr(at("empty"), "security.capability", capability, 0))
	}
	require.NoError(t, os.Chmod(at("readonly"), 0o500))
	t.Cleanup(func() { _ = removeTree(dir) })
	for i, name := range []string{"absolute", "file", "d/e", "d", "readonly", "fifo"} {
		times := []unix.Timespec{{Sec: int64(i), Nsec: 1}, {Sec: int64(i), Nsec: 123456789}}
		require.NoError(t, unix.UtimesNanoAt(unix.AT_FDCWD, at(name), times, unix.AT_SYMLINK_NOFOLLOW))
	}
	require.NoError(t, os.Chmod(src, 0o711))

	require.NoError(t, copyTree(t.Context(), dst, src))
	syncFS(t, dst)
	want := list(t, src)
	got := list(t, dst)
	require.Empty(t, cmp.Diff(want, got))
	require.Less(t, got["sparse"].Blocks, int64(1<<20/512))
	require.Equal(t, "d/e/f d/hard hard", same(got))

	err = copyTree(t.Context(), dst, src)
	require.ErrorIs(t, err, fs.ErrExist)
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	cancel(stop)
	require.ErrorIs(t, copyTree(ctx, dst+"2", src), stop)
}

// syncFS has delayed blocks allocated, so that they are counted alike.
func syncFS(t *testing.T, path string) {
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, unix.Syncfs(int(f.Fd())))
}

func same(files map[string]file) string {
	var names []string
	for _, name := range []string{"d/e/f", "d/hard", "hard"} {
		if files[name].First == files["hard"].First && files[name].Nlink == 3 {
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
}

// A file that its mode keeps from being read is copied by its owner.
func TestCopyUnreadable(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	require.NoError(t, os.MkdirAll(filepath.Join(src, "d"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(src, "d", "f"), []byte("secret"), 0o000))
	require.NoError(t, os.Chmod(filepath.Join(src, "d"), 0o000))
	t.Cleanup(func() { _ = removeTree(dir) })
	require.NoError(t, copyTree(t.Context(), dst, src))
	for _, root := range []string{src, dst} {
		fi, err := os.Lstat(filepath.Join(root, "d"))
		require.NoError(t, err)
		require.Equal(t, os.ModeDir, fi.Mode())
		require.NoError(t, os.Chmod(filepath.Join(root, "d"), 0o700))
		fi, err = os.Lstat(filepath.Join(root, "d", "f"))
		require.NoError(t, err)
		require.Zero(t, fi.Mode())
		require.EqualValues(t, len("secret"), fi.Size())
	}
}

// Deeper than any path that the kernel takes.
func TestDeepTree(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	require.NoError(t, os.Mkdir(src, 0o755))
	name := strings.Repeat("n", 250)
	fd, err := unix.Open(src, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	require.NoError(t, err)
	for range 30 {
		require.NoError(t, unix.Mkdirat(fd, name, 0o700))
		next, err := unix.Openat(fd, name, unix.O_DIRECTORY|unix.O_RDONLY, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Close(fd))
		fd = next
	}
	require.NoError(t, unix.Mkdirat(fd, "closed", 0o000))
	require.NoError(t, unix.Close(fd))
	require.NoError(t, copyTree(t.Context(), dst, src))
	require.NoError(t, removeTree(src))
	require.NoError(t, removeTree(dst))
	require.NoDirExists(t, dst)
}

// The removal opens closed directories, and follows no link out.
func TestRemoveTree(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	require.NoError(t, os.Mkdir(outside, 0o500))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "tree", "a", "b"), 0o755))
	for _, name := range []string{"tree/f", "tree/a/f", "tree/a/b/f"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o644))
	}
	require.NoError(t, os.Symlink(outside, filepath.Join(dir, "tree", "a", "link")))
	require.NoError(t, os.Chmod(filepath.Join(dir, "tree", "a", "b"), 0o000))
	require.NoError(t, os.Chmod(filepath.Join(dir, "tree", "a"), 0o000))
	require.NoError(t, os.Chmod(filepath.Join(dir, "tree"), 0o500))
	require.NoError(t, openUp(unix.AT_FDCWD, filepath.Join(dir, "tree")))
	fi, err := os.Stat(filepath.Join(dir, "tree", "a", "b"))
	require.NoError(t, err)
	require.Equal(t, os.ModeDir|0o700, fi.Mode())
	require.NoError(t, os.Chmod(filepath.Join(dir, "tree", "a"), 0o000))

	require.NoError(t, removeTree(filepath.Join(dir, "tree")))
	require.NoDirExists(t, filepath.Join(dir, "tree"))
	require.NoError(t, removeTree(filepath.Join(dir, "tree")), "what is not there")
	fi, err = os.Stat(outside)
	require.NoError(t, err)
	require.Equal(t, os.ModeDir|0o500, fi.Mode())
	require.NoError(t, os.Symlink(outside, filepath.Join(dir, "link")))
	require.NoError(t, removeTree(filepath.Join(dir, "link")))
	require.DirExists(t, outside)
}

func TestRemoveLargeTree(t *testing.T) {
	dir := t.TempDir()
	// More names than one listing holds, at two levels; and names as long as
	// they get.
	for _, d := range []string{"tree", "tree/sub", "tree/" + strings.Repeat("d", 255), "tree/empty"} {
		require.NoError(t, os.Mkdir(filepath.Join(dir, d), 0o700))
	}
	for i := range 2000 {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "tree", fmt.Sprint("file-", i)), nil, 0o600))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "tree", "sub", fmt.Sprint("file-", i)), nil, 0o600))
	}
	deep := filepath.Join(dir, "tree")
	for range 300 {
		deep = filepath.Join(deep, "deep")
		require.NoError(t, os.Mkdir(deep, 0o700))
		require.NoError(t, os.Symlink(dir, filepath.Join(deep, "link")))
	}
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "tree", "fifo"), 0o600))

	// Several at once, as a Cleanup beside a Discard.
	errs := make(chan error, 4)
	for range cap(errs) {
		go func() { errs <- removeTree(filepath.Join(dir, "tree")) }()
	}
	for range cap(errs) {
		require.NoError(t, <-errs)
	}
	require.NoDirExists(t, filepath.Join(dir, "tree"))
	require.DirExists(t, dir)
}

func TestMeasure(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "tree"), 0o755))
	for i := range 5 {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "tree", fmt.Sprint(i)), make([]byte, 4096), 0o644))
	}
	require.NoError(t, os.Link(filepath.Join(dir, "tree", "0"), filepath.Join(dir, "tree", "again")))
	require.NoError(t, os.Symlink("/", filepath.Join(dir, "tree", "root")))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "tree", "closed"), 0o000))
	require.NoError(t, os.Symlink("tree", filepath.Join(dir, "adopted")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "tree", "elsewhere"), []byte("too"), 0o644))
	require.NoError(t, os.Link(filepath.Join(dir, "tree", "elsewhere"), filepath.Join(dir, "else")))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "tree", "deep", "deeper"), 0o755))
	syncFS(t, dir)
	used, err := measure(t.Context(), filepath.Join(dir, "tree"))
	require.NoError(t, err)
	require.EqualValues(t, 1+5+1+1+2, used.Inodes)
	var blocks int64
	for _, name := range []string{"", "0", "1", "2", "3", "4", "root", "closed", "deep", "deep/deeper"} {
		fi, err := os.Lstat(filepath.Join(dir, "tree", name))
		require.NoError(t, err)
		blocks += fi.Sys().(*syscall.Stat_t).Blocks
	}
	require.Equal(t, blocks*512, used.Size)
	again, err := measure(t.Context(), filepath.Join(dir, "adopted"))
	require.NoError(t, err)
	require.Equal(t, used, again)
	one, err := measure(t.Context(), filepath.Join(dir, "tree", "1"))
	require.NoError(t, err)
	require.EqualValues(t, 1, one.Inodes)
	_, err = measure(t.Context(), filepath.Join(dir, "none"))
	require.ErrorIs(t, err, fs.ErrNotExist)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = measure(ctx, filepath.Join(dir, "tree"))
	require.ErrorIs(t, err, context.Canceled)
}

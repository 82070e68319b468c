package treetar

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// archive is Write into memory.
func archive(t *testing.T, root, name string) ([]byte, Stats) {
	t.Helper()
	var buf bytes.Buffer
	stats, err := Write(t.Context(), &buf, root, name, Options{})
	require.NoError(t, err)
	return buf.Bytes(), stats
}

type entry struct {
	tar.Header
	content string
}

func read(t *testing.T, data []byte) []entry {
	t.Helper()
	var out []entry
	r := tar.NewReader(bytes.NewReader(data))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		require.NoError(t, err)
		content, err := io.ReadAll(r)
		require.NoError(t, err)
		out = append(out, entry{*h, string(content)})
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
}

func names(entries []entry) []string {
	var out []string
	for _, e := range entries {
		out = append(out, e.Name)
	}
	return out
}

// fill makes a tree with one of each kind and settles all its times.
func fill(t *testing.T, dir string, order []string) {
	t.Helper()
	for _, name := range order {
		write(t, filepath.Join(dir, name), "content of "+name)
	}
	require.NoError(t, os.Symlink("../outside/x", filepath.Join(dir, "b/link")))
	require.NoError(t, os.Link(filepath.Join(dir, "a/one"), filepath.Join(dir, "b/same")))
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	require.NoError(t, unix.Setxattr(filepath.Join(dir, "a/one"), "user.note", []byte("hi\x00\xff"), 0))
	require.NoError(t, unix.Chmod(filepath.Join(dir, "a"), 0o1750))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "empty"), 0o700))
	at := []unix.Timespec{{Sec: 1}, {Sec: 1_700_000_000, Nsec: 123456789}}
	require.NoError(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, path, at, unix.AT_SYMLINK_NOFOLLOW))
	}))
}

func TestEachKindOfEntry(t *testing.T) {
	dir := t.TempDir()
	fill(t, dir, []string{"a/one", "b/two", "a.b", "weird\n\x1b\xff", "a/" + strings.Repeat("x", 200)})
	data, stats := archive(t, dir, "/")
	entries := read(t, data)
	require.Equal(t, []string{
		"a/", "a/one", "a/" + strings.Repeat("x", 200), "a.b", "b/", "b/link", "b/same", "b/two", "empty/", "fifo", "weird\n\x1b\xff",
	}, names(entries))
	require.EqualValues(t, len(entries), stats.Entries)
	by := map[string]entry{}
	for _, e := range entries {
		by[e.Name] = e
		require.Equal(t, time.Unix(1_700_000_000, 123456789), e.ModTime, e.Name)
		require.Equal(t, os.Getuid(), e.Uid)
		require.Empty(t, e.Uname)
	}
	require.Equal(t, "content of a/one", by["a/one"].content)
	require.EqualValues(t, 0o644, by["a/one"].Mode)
	require.Equal(t, "hi\x00\xff", by["a/one"].PAXRecords["SCHILY.xattr.user.note"])
	require.EqualValues(t, 0o1750, by["a/"].Mode)
	require.Equal(t, byte(tar.TypeSymlink), by["b/link"].Typeflag)
	require.Equal(t, "../outside/x", by["b/link"].Linkname)
	require.Equal(t, byte(tar.TypeLink), by["b/same"].Typeflag)
	require.Equal(t, "a/one", by["b/same"].Linkname)
	require.Equal(t, byte(tar.TypeFifo), by["fifo"].Typeflag)
}

// TestSameTreeSameBytes makes one tree twice, in another order.
func TestSameTreeSameBytes(t *testing.T) {
	one, two := t.TempDir(), t.TempDir()
	fill(t, one, []string{"a/one", "b/two", "c/d/e", "z"})
	fill(t, two, []string{"z", "c/d/e", "b/two", "a/one"})
	first, _ := archive(t, one, ".")
	second, _ := archive(t, two, "")
	require.Equal(t, sha256.Sum256(first), sha256.Sum256(second))
	require.NoError(t, os.Chmod(filepath.Join(two, "z"), 0o600))
	third, _ := archive(t, two, "")
	require.NotEqual(t, sha256.Sum256(first), sha256.Sum256(third))
}

func TestPathInTheTree(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "etc/conf/x"), "x")
	write(t, filepath.Join(dir, "etc/passwd"), "of the tree")
	require.NoError(t, os.Symlink("/etc", filepath.Join(dir, "absolute")))
	require.NoError(t, os.Symlink("../../../../etc", filepath.Join(dir, "etc/conf/up")))

	data, _ := archive(t, dir, "etc/conf")
	require.Equal(t, []string{"up", "x"}, names(read(t, data)))

	for _, name := range []string{"etc/passwd", "/absolute/passwd", "etc/conf/up/passwd", "../../etc/passwd"} {
		data, _ := archive(t, dir, name)
		entries := read(t, data)
		require.Equal(t, []string{"passwd"}, names(entries), name)
		require.Equal(t, "of the tree", entries[0].content)
	}
	for _, name := range []string{"nothing", "etc/passwd/x"} {
		_, err := Write(t.Context(), io.Discard, dir, name, Options{})
		require.ErrorIs(t, err, errdefs.ErrNotFound, name)
	}
}

func TestSparseFileIsPlainAndSocketsAreLeftOut(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("end"), 3<<20)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	// A socket's path is limited to 108 bytes.
	t.Chdir(dir)
	l, err := net.Listen("unix", "s")
	require.NoError(t, err)
	defer l.Close()

	var last int64
	var buf bytes.Buffer
	stats, err := Write(t.Context(), &buf, dir, "", Options{Progress: func(n int64) {
		require.Greater(t, n, last)
		last = n
	}})
	require.NoError(t, err)
	require.EqualValues(t, 1, stats.Sockets)
	require.EqualValues(t, 3<<20+3, stats.Bytes)
	require.Equal(t, stats.Bytes, last)
	entries := read(t, buf.Bytes())
	require.Equal(t, []string{"sparse"}, names(entries))
	require.Equal(t, strings.Repeat("\x00", 3<<20)+"end", entries[0].content)
}

func TestDeepTree(t *testing.T) {
	dir := t.TempDir()
	name := strings.Repeat("d", 200)
	at := dir
	// Deeper than a path that one system call takes.
	fd, err := unix.Open(at, unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	for range 30 {
		require.NoError(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_DIRECTORY, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Close(fd))
		fd = next
	}
	require.NoError(t, unix.Close(fd))
	data, _ := archive(t, dir, "")
	entries := read(t, data)
	require.Len(t, entries, 30)
	require.Equal(t, strings.Repeat(name+"/", 30), entries[29].Name)
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, unix.ENOSPC }

func TestErrorsComeThrough(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "x"), "x")
	_, err := Write(t.Context(), full{}, dir, "", Options{})
	require.ErrorIs(t, err, unix.ENOSPC)

	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	_, err = Write(ctx, io.Discard, dir, "", Options{})
	require.ErrorIs(t, err, why)
}

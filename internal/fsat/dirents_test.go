package fsat

import (
	"encoding/binary"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestDirents(t *testing.T) {
	dir := t.TempDir()
	want := map[string]byte{"dir": unix.DT_DIR, "file\n\xff": unix.DT_REG, "link": unix.DT_LNK, "...": unix.DT_FIFO}
	require.NoError(t, os.Mkdir(dir+"/dir", 0o755))
	require.NoError(t, os.WriteFile(dir+"/file\n\xff", nil, 0o644))
	require.NoError(t, os.Symlink("nothing", dir+"/link"))
	require.NoError(t, unix.Mkfifo(dir+"/...", 0o644))
	r, err := OpenRoot(dir)
	require.NoError(t, err)
	defer func() { require.NoError(t, r.Close()) }()
	// Far less room than all of them take.
	list, err := Dirents(r.Fd(), make([]byte, 64), nil)
	require.NoError(t, err)
	got := map[string]byte{}
	for _, d := range list {
		got[d.Name] = d.Type
	}
	require.Equal(t, want, got)
	require.Len(t, list, len(want))

	fd, err := r.Open("", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	defer Close(fd)
	names, err := Names(fd, make([]byte, 32<<10), []string{"before"})
	require.NoError(t, err)
	slices.Sort(names)
	require.Equal(t, []string{"...", "before", "dir", "file\n\xff", "link"}, names)
}

// The kernel never gives any of this.
func TestDirentsThatCannotBe(t *testing.T) {
	record := func(size int, name string) []byte {
		b := make([]byte, max(19+len(name), 1))
		binary.NativeEndian.PutUint16(b[16:], uint16(size))
		b[18] = unix.DT_REG
		copy(b[19:], name)
		return b
	}
	for what, buf := range map[string][]byte{
		"short head": record(24, "abcde")[:18],
		"too small":  record(18, "abcde"),
		"nothing":    record(0, "abcde"),
		"too large":  record(25, "abcde"),
		"second":     append(record(24, "abcde"), record(99, "x")...),
	} {
		names := []string{}
		err := eachDirent(buf, func(name []byte, _ byte) { names = append(names, string(name)) })
		require.ErrorIs(t, err, unix.EIO, what)
		require.LessOrEqual(t, len(names), 1, what)
	}
	names := []string{}
	add := func(name []byte, _ byte) { names = append(names, string(name)) }
	require.NoError(t, eachDirent(record(24, "ab\x00cd"), add))
	require.NoError(t, eachDirent(record(24, "abcde"), add), "without a NUL")
	require.NoError(t, eachDirent(record(24, "\x00bcde"), add))
	require.Equal(t, []string{"ab", "abcde"}, names)
}

func TestXattrsAt(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(dir+"/f", nil, 0o644))
	require.NoError(t, os.Symlink("f", dir+"/link"))
	long := strings.Repeat("v", 3000)
	for name, value := range map[string]string{"user.b": "1", "user.a": long, "user.no": "x"} {
		require.NoError(t, unix.Setxattr(dir+"/f", name, []byte(value), 0))
	}
	keep := func(name string) bool { return name == "user.a" || name == "user.b" }
	want := []Xattr{{"user.a", []byte(long)}, {"user.b", []byte("1")}}
	r, err := OpenRoot(dir)
	require.NoError(t, err)
	defer func() { require.NoError(t, r.Close()) }()
	fd, err := r.Open("f", ForReading, 0)
	require.NoError(t, err)
	defer Close(fd)
	for _, scratch := range [][]byte{nil, make([]byte, 1), make([]byte, 1<<10)} {
		got, err := XattrsAt(r.Fd(), "f", scratch, keep)
		require.NoError(t, err)
		require.Equal(t, want, got)
		got, err = XattrsAt(fd, "", scratch, keep)
		require.NoError(t, err)
		require.Equal(t, want, got)
		got, err = XattrsAt(r.Fd(), "link", scratch, keep)
		require.NoError(t, err)
		require.Empty(t, got, "the link's own, not the file's")
	}
	value, err := GetXattrAt(r.Fd(), "f", "user.a")
	require.NoError(t, err)
	require.Equal(t, long, string(value))
	_, err = GetXattrAt(r.Fd(), "f", "user.none")
	require.ErrorIs(t, err, unix.ENODATA)
	_, err = XattrsAt(r.Fd(), "none", nil, keep)
	require.ErrorIs(t, err, unix.ENOENT)
}

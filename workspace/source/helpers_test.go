package source

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// tb is what both testing.T and rapid.T are.
type tb interface {
	require.TestingT
	Helper()
}

// look describes everything below dir: path → what is there. Links that share
// a file name the first of its paths.
func look(t tb, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	first := map[uint64]string{}
	require.NoError(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		require.NoError(t, err)
		if p == dir {
			return nil
		}
		rel, err := filepath.Rel(dir, p)
		require.NoError(t, err)
		all[rel] = describe(t, p, rel, first)
		return nil
	}))
	return all
}

func describe(t tb, p, rel string, first map[uint64]string) string {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(p, &st))
	d := fmt.Sprintf("%07o %d:%d mtime=%d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		content, err := os.ReadFile(p)
		require.NoError(t, err)
		sum := sha256.Sum256(content)
		d += fmt.Sprintf(" size=%d sum=%s", st.Size, hex.EncodeToString(sum[:4]))
	case unix.S_IFLNK:
		target, err := os.Readlink(p)
		require.NoError(t, err)
		d += " -> " + target
	case unix.S_IFBLK, unix.S_IFCHR:
		d += fmt.Sprintf(" dev=%x", st.Rdev)
	}
	fd, err := unix.Open(p, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	defer fsat.Close(fd)
	xattrs, err := fsat.Xattrs(fd, true, os.Geteuid() == 0)
	require.NoError(t, err)
	for _, x := range xattrs {
		d += fmt.Sprintf(" %s=%q", x.Name, x.Value)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
		if l, ok := first[st.Ino]; ok {
			d += " = " + l
		} else {
			first[st.Ino] = rel
		}
	}
	return d
}

// requireSynced checks that all that is in src is in dst exactly so, and that
// what dst has beside is what foreign names.
func requireSynced(t tb, src, dst string, foreign ...string) {
	t.Helper()
	want, have := look(t, src), look(t, dst)
	for _, f := range foreign {
		require.Contains(t, have, f, "foreign file is gone")
		delete(have, f)
	}
	require.Equal(t, want, have)
}

func scan(t tb, dir string, prev *Tree) *Tree {
	t.Helper()
	tree, err := Scan(context.Background(), dir, Options{}, prev)
	require.NoError(t, err)
	return tree
}

// sync brings src into dst as a caller does: scan with what is stored, sync,
// store.
func syncDirs(t tb, src, dst string, prev *Tree) Result {
	t.Helper()
	tree := scan(t, src, prev)
	r, err := tree.SyncTo(context.Background(), src, dst, prev, nil)
	require.NoError(t, err)
	require.Equal(t, tree.Digest(), r.Tree.Digest())
	enc, err := r.Tree.Encode()
	require.NoError(t, err)
	stored, err := Decode(enc)
	require.NoError(t, err)
	require.Equal(t, tree.Digest(), stored.Digest())
	r.Tree = stored
	return r
}

func write(t tb, path, content string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
}

func read(t tb, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(b)
}

// age sets the times of everything below dir back, so that nothing there is
// too young to be certain but for its ctime.
func age(t tb, dir string) {
	t.Helper()
	old := time.Now().Add(-24 * time.Hour).UnixNano()
	require.NoError(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		require.NoError(t, err)
		old += 1_000_001
		ts := []unix.Timespec{unix.NsecToTimespec(old), unix.NsecToTimespec(old)}
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, ts, unix.AT_SYMLINK_NOFOLLOW)
	}))
}

// tree makes files from lines: "dir/", "file=content", "link->target",
// "name=>other" for a hard link, "name|" for a FIFO.
func makeTree(t tb, dir string, lines ...string) {
	t.Helper()
	for _, l := range lines {
		switch {
		case strings.HasSuffix(l, "/"):
			require.NoError(t, os.MkdirAll(filepath.Join(dir, l), 0o755))
		case strings.HasSuffix(l, "|"):
			require.NoError(t, unix.Mkfifo(filepath.Join(dir, strings.TrimSuffix(l, "|")), 0o640))
		case strings.Contains(l, "=>"):
			name, other, _ := strings.Cut(l, "=>")
			require.NoError(t, os.Link(filepath.Join(dir, other), filepath.Join(dir, name)))
		case strings.Contains(l, "->"):
			name, target, _ := strings.Cut(l, "->")
			require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
			require.NoError(t, os.Symlink(target, filepath.Join(dir, name)))
		default:
			name, content, _ := strings.Cut(l, "=")
			write(t, filepath.Join(dir, name), content)
		}
	}
}

func paths(t *Tree) []string {
	var list []string
	for e := range t.Entries() {
		list = append(list, e.Path)
	}
	return list
}

func inode(t testing.TB, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(path, &st))
	return st.Ino
}

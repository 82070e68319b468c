package source

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// TestAnyEditsOnBothSides edits a source and a workspace at random, syncs, and
// compares with a model: the part of the workspace that the source names
// equals the source, the files that only the workspace has are untouched, and
// the digest is that of a scan from nothing.
func TestAnyEditsOnBothSides(t *testing.T) {
	base := t.TempDir()
	run := 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		dir := filepath.Join(base, fmt.Sprint(run))
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		require.NoError(t, os.MkdirAll(src, 0o755))
		require.NoError(t, os.MkdirAll(dst, 0o755))
		defer os.RemoveAll(dir)
		var prev *Tree
		for range rapid.IntRange(1, 4).Draw(t, "rounds") {
			for range rapid.IntRange(0, 8).Draw(t, "edits of the source") {
				edit(t, src, names)
			}
			for range rapid.IntRange(0, 5).Draw(t, "edits of the workspace") {
				// Where the source may be, too, and where it never is.
				edit(t, dst, append(names[:len(names):len(names)], "o1", "o2", "o3"))
			}
			before, source, had := look(t, dst), look(t, src), before(prev)
			r := syncDirs(t, src, dst, prev)
			after := look(t, dst)
			for path, what := range source {
				require.Equal(t, withoutLinks(what), withoutLinks(after[path]), path)
			}
			requireSameLinks(t, src, dst, source)
			for path, what := range after {
				if _, ok := source[path]; ok {
					continue
				}
				require.Contains(t, before, path, "made from nothing")
				if had[path] {
					require.True(t, what[2:4] == "40", "%q was dropped by the source: %s", path, what)
				} else if what[2:4] != "40" {
					require.Equal(t, withoutLinks(before[path]), withoutLinks(what), path)
				}
			}
			for path := range before {
				if _, ok := after[path]; !ok && !had[path] {
					require.True(t, inTheWay(source, had, before, path), "%q is gone", path)
				}
			}
			require.Equal(t, scan(t, src, nil).Digest(), r.Tree.Digest())
			prev = r.Tree
			if rapid.Bool().Draw(t, "time passes") {
				settle(prev)
			}
		}
		// With nothing edited, nothing is done.
		r := syncDirs(t, src, dst, prev)
		require.Zero(t, r.Changed)
		require.Zero(t, r.Removed)
	})
}

var names = []string{"a", "b", "a/a", "a/b", "a-a", "b/a", "b/a/c", "a/b/c"}

func before(prev *Tree) map[string]bool {
	had := map[string]bool{}
	if prev != nil {
		for e := range prev.Entries() {
			had[e.Path] = true
		}
	}
	return had
}

// inTheWay says that a file of the workspace had to go because the source has
// something else than a directory at or above its place, or has a directory in
// its place.
func inTheWay(source map[string]string, _ map[string]bool, _ map[string]string, path string) bool {
	for p := path; p != "."; p = filepath.Dir(p) {
		if what, ok := source[p]; ok && (p == path || what[2:4] != "40") {
			return true
		}
	}
	return false
}

// withoutLinks leaves out which names are one file; the numbers of names
// differ when a product shares it.
func withoutLinks(what string) string {
	before, _, _ := strings.Cut(what, " = ")
	return before
}

// requireSameLinks checks that the same names of the source share a file on
// both sides.
func requireSameLinks(t tb, src, dst string, source map[string]string) {
	t.Helper()
	id := func(path string) (uint64, bool) {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(path, &st))
		return st.Ino, st.Mode&unix.S_IFMT != unix.S_IFDIR
	}
	there := map[uint64]uint64{}
	back := map[uint64]uint64{}
	for path := range source {
		a, file := id(filepath.Join(src, path))
		b, _ := id(filepath.Join(dst, path))
		if !file {
			continue
		}
		if have, ok := there[a]; ok {
			require.Equal(t, have, b, path)
		}
		if have, ok := back[b]; ok {
			require.Equal(t, have, a, path)
		}
		there[a], back[b] = b, a
	}
}

// edit does one random thing to the tree below dir. What cannot be done in the
// tree as it is, is not.
func edit(t *rapid.T, dir string, names []string) {
	path := filepath.Join(dir, rapid.SampledFrom(names).Draw(t, "path"))
	content := rapid.SampledFrom([]string{"", "1", "2", "12"}).Draw(t, "content")
	var st unix.Stat_t
	there := unix.Lstat(path, &st) == nil
	isDir := there && st.Mode&unix.S_IFMT == unix.S_IFDIR
	isFile := there && st.Mode&unix.S_IFMT == unix.S_IFREG
	// Never through a link, which may lead anywhere.
	if real, err := filepath.EvalSymlinks(filepath.Dir(path)); err != nil || real != filepath.Dir(path) {
		return
	}
	switch rapid.IntRange(0, 10).Draw(t, "edit") {
	case 0, 1:
		if isFile || !there {
			_ = os.WriteFile(path, []byte(content), 0o644)
		}
	case 2: // same times
		if isFile {
			_ = os.WriteFile(path, []byte(content), 0o644)
			_ = os.Chtimes(path, time.Time{}, time.Unix(st.Mtim.Unix()))
		}
	case 3:
		_ = os.RemoveAll(path)
	case 4:
		_ = os.Mkdir(path, 0o755)
	case 5:
		_ = os.RemoveAll(path)
		_ = os.Mkdir(path, 0o700)
	case 6:
		if !isDir {
			_ = os.Remove(path)
		}
		_ = os.Symlink(rapid.SampledFrom([]string{"a", "../..", "/etc", "."}).Draw(t, "target"), path)
	case 7:
		if isDir || isFile {
			mode := rapid.SampledFrom([]os.FileMode{0o600, 0o755, 0o755 | os.ModeSetuid, 0o777 | os.ModeSticky}).Draw(t, "mode")
			_ = os.Chmod(path, mode)
		}
	case 8:
		if there && !isDir {
			other := filepath.Join(dir, rapid.SampledFrom(names).Draw(t, "second name"))
			if real, err := filepath.EvalSymlinks(filepath.Dir(other)); err == nil && real == filepath.Dir(other) {
				_ = os.Link(path, other)
			}
		}
	case 9:
		_ = os.Rename(path, path+"x")
		_ = os.Rename(path+"x", filepath.Join(dir, "a"))
		_ = os.RemoveAll(path + "x")
	case 10:
		if isFile || isDir {
			_ = unix.Lsetxattr(path, "user.x", []byte(content), 0)
		}
	}
}

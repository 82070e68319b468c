package contenthash_test

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/contenthash"
)

// TestHistories changes a tree at random, with and without telling, and asks
// for digests in between: they are always those of a fresh scan. The number of
// histories is that of the flag rapid.checks, if it is given.
func TestHistories(t *testing.T) {
	checks := 10_000
	if raceEnabled {
		checks = 600
	}
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		require.NoError(t, f.Value.Set(strconv.Itoa(checks)))
		defer func() { require.NoError(t, f.Value.Set(f.DefValue)) }()
	}
	dir := scratch(t)
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		h := &history{T: rt, dir: filepath.Join(dir, strconv.Itoa(n)), tree: contenthash.New()}
		h.tree.SetPageTarget(smallPages)
		must(rt, os.Mkdir(h.dir, 0o755))
		defer os.RemoveAll(h.dir)
		h.run()
	})
}

func must(t *rapid.T, err error) {
	if err != nil {
		t.Helper()
		t.Fatalf("%v", err)
	}
}

// smallPages holds two or three entries.
const smallPages = 200

// history is one run of changes.
type history struct {
	*rapid.T
	dir  string
	tree *contenthash.Tree
	// session is how the holder behaves.
	session session
	stored  memory
}

type session int

const (
	quiet     session = iota // no session: every change is reported
	reporting                // every change is reported
	secret                   // none is
)

func (h *history) run() {
	for range rapid.IntRange(1, 16).Draw(h.T, "steps") {
		switch what := rapid.IntRange(0, 19).Draw(h.T, "what"); what {
		case 0, 1:
			h.turn()
		case 2, 6:
			h.reload()
		case 3, 4, 5:
			h.check(h.path())
		default:
			h.change()
		}
	}
	h.finish()
	h.check("")
	h.check(h.path())
}

// turn begins or ends a session.
func (h *history) turn() {
	if h.session != quiet {
		h.finish()
		return
	}
	h.tree.Unconfirm()
	h.session = rapid.SampledFrom([]session{reporting, secret}).Draw(h.T, "session")
	h.Logf("unconfirm, session %d", h.session)
}

func (h *history) finish() {
	switch h.session {
	case reporting:
		if rapid.Bool().Draw(h.T, "cut off") {
			// Changes that nobody reports, then a second attempt, that reports
			// what it changes itself.
			h.Logf("cut off")
			h.session = secret
			h.change()
			h.tree.Unconfirm()
			h.session = reporting
			h.change()
		}
		h.Logf("confirm")
		h.tree.Confirm()
	case secret:
		h.Logf("seal")
		h.tree.Seal()
	}
	h.session = quiet
}

// reload stores the tree and goes on with what is loaded.
func (h *history) reload() {
	if h.stored == nil {
		h.stored = memory{}
	}
	h.Logf("save, load")
	h.stored.save(h.tree)
	tree, err := contenthash.Load(h.stored)
	must(h.T, err)
	h.tree = tree
	h.tree.SetPageTarget(smallPages)
	if h.session != quiet {
		h.tree.Unconfirm()
	}
	if h.session == reporting {
		h.session = secret // what was reported before may be validated only
	}
}

func (h *history) check(path string) {
	h.Logf("check %q", path)
	o := contenthash.Options{FollowLinks: rapid.Bool().Draw(h.T, "follow")}
	if rapid.IntRange(0, 4).Draw(h.T, "filter") == 0 {
		o.ExcludePatterns = []string{"**/b"}
	}
	got, err := h.tree.Checksum(h.Context(), contenthash.Dir(h.dir), path, o)
	want, wantErr := contenthash.New().Checksum(h.Context(), contenthash.Dir(h.dir), path, o)
	if got != want || (err == nil) != (wantErr == nil) {
		h.Fatalf("%q: got %s (%v), a fresh scan gives %s (%v)", path, got, err, want, wantErr)
	}
}

// path is a path that may be there.
func (h *history) path() string {
	return rapid.SampledFrom([]string{"a", "b", "c", "a/a", "a/b", "b/a", "b/c", "a/a/a", "a/b/c", "c/a"}).Draw(h.T, "path")
}

func (h *history) abs(path string) string { return filepath.Join(h.dir, path) }

// change does one thing to the files.
func (h *history) change() {
	p := h.path()
	old, err := os.Lstat(h.abs(p))
	exists := err == nil
	var changes []contenthash.Change
	remove := func(path string) {
		must(h.T, os.RemoveAll(h.abs(path)))
		changes = append(changes, contenthash.Change{Kind: contenthash.Delete, Path: path})
	}
	what := rapid.SampledFrom([]string{"file", "dir", "link", "fifo", "delete", "write", "chmod", "rename", "hardlink", "xattr"}).Draw(h.T, "change")
	if !h.inDirectories(p) {
		return
	}
	h.Logf("%s %s", what, p)
	switch what {
	case "file":
		if exists {
			remove(p)
		}
		must(h.T, os.WriteFile(h.abs(p), h.data(), 0o644))
	case "dir":
		if exists && !old.IsDir() {
			remove(p)
		}
		must(h.T, os.MkdirAll(h.abs(p), 0o755))
	case "link":
		if exists {
			remove(p)
		}
		must(h.T, os.Symlink(rapid.SampledFrom([]string{"a", "../b", "/a/b", "..", "/"}).Draw(h.T, "target"), h.abs(p)))
	case "fifo":
		if exists {
			remove(p)
		}
		must(h.T, unix.Mkfifo(h.abs(p), 0o600))
	case "delete":
		if exists {
			remove(p)
		}
		h.report(changes)
		return
	case "write":
		if exists && old.Mode().IsRegular() {
			must(h.T, os.WriteFile(h.abs(p), h.data(), 0o644))
		}
	case "chmod":
		if exists && old.Mode()&fs.ModeSymlink == 0 {
			must(h.T, os.Chmod(h.abs(p), rapid.SampledFrom([]fs.FileMode{0o700, 0o755, 0o711}).Draw(h.T, "mode")))
		}
	case "xattr":
		if exists && (old.Mode().IsRegular() || old.IsDir()) {
			must(h.T, unix.Setxattr(h.abs(p), "user.x", h.data(), 0))
		}
	case "rename", "hardlink":
		to := h.path()
		if !exists || to == p || isBelow(to, p) || isBelow(p, to) {
			return
		}
		if !h.inDirectories(to) {
			return
		}
		h.Logf("to %s", to)
		if what == "hardlink" && old.IsDir() {
			return
		}
		remove(to)
		if what == "hardlink" {
			must(h.T, os.Link(h.abs(p), h.abs(to)))
		} else {
			must(h.T, os.Rename(h.abs(p), h.abs(to)))
			changes = append(changes, contenthash.Change{Kind: contenthash.Delete, Path: p})
		}
		p = to
	}
	h.report(append(changes, h.now(p)...))
}

// inDirectories says whether all that lies above a path is a directory: a link
// could lead out of the tree, where nothing is to be changed.
func (h *history) inDirectories(path string) bool {
	for at := filepath.Dir(path); at != "."; at = filepath.Dir(at) {
		if fi, err := os.Lstat(h.abs(at)); err != nil || !fi.IsDir() {
			return false
		}
	}
	return true
}

func isBelow(p, dir string) bool { return len(p) > len(dir) && p[:len(dir)+1] == dir+"/" }

func (h *history) data() []byte {
	return []byte(rapid.SampledFrom([]string{"x", "y", "", "longer"}).Draw(h.T, "data"))
}

// now lists as changes what is at p and below, and under other names of the
// same file.
func (h *history) now(p string) (changes []contenthash.Change) {
	at, err := os.Lstat(h.abs(p))
	if err != nil {
		return nil
	}
	must(h.T, filepath.WalkDir(h.dir, func(file string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(h.dir, file)
		if err != nil || rel == "." {
			return err
		}
		fi, err := os.Lstat(file)
		if err != nil {
			return err
		}
		if rel == p || isBelow(rel, p) || (os.SameFile(at, fi) && !fi.IsDir()) {
			changes = append(changes, h.describe(rel, fi))
		}
		return nil
	}))
	if rapid.Bool().Draw(h.T, "backwards") {
		slices.Reverse(changes)
	}
	return changes
}

// describe makes the change of a file that is there, sometimes with all that
// can be told.
func (h *history) describe(rel string, fi fs.FileInfo) contenthash.Change {
	c := contenthash.Change{Kind: contenthash.Modify, Path: rel, Mode: fi.Mode()}
	if fi.Mode()&fs.ModeSymlink != 0 {
		link, err := os.Readlink(h.abs(rel))
		must(h.T, err)
		c.Linkname = link
	}
	if rapid.Bool().Draw(h.T, "digest") {
		c.Digest = digestOfFile(h.T, h.abs(rel), fi, c.Linkname)
		c.Stat, c.Racy = contenthash.StatOf(fi), true
	}
	return c
}

func digestOfFile(t *rapid.T, file string, fi fs.FileInfo, link string) digest.Digest {
	st := fi.Sys().(*syscall.Stat_t)
	head := contenthash.Header{Mode: fi.Mode(), UID: st.Uid, GID: st.Gid, Size: fi.Size(), Linkname: link}
	buf := make([]byte, 100)
	if n, err := unix.Lgetxattr(file, "user.x", buf); err == nil {
		head.Xattrs = []contenthash.Xattr{{Name: "user.x", Value: buf[:n]}}
	}
	hash := contenthash.NewHash(head)
	if fi.Mode().IsRegular() {
		data, err := os.ReadFile(file)
		must(t, err)
		fmt.Fprintf(hash, "%s", data)
	}
	return hash.Digest()
}

func (h *history) report(changes []contenthash.Change) {
	if h.session == secret {
		return
	}
	for _, c := range changes {
		must(h.T, h.tree.HandleChange(c))
	}
}

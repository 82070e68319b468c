package contenthash_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/contenthash"
)

func write(t testing.TB, dir, path, data string) {
	t.Helper()
	p := filepath.Join(dir, path)
	require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
	require.NoError(t, os.WriteFile(p, []byte(data), 0o644))
}

// The form of the digest of a file: a header of names and values, the content.
func TestForm(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "d/f", "data")
	require.NoError(t, os.Chown(filepath.Join(dir, "d/f"), os.Getuid(), os.Getgid()))
	require.NoError(t, os.Chmod(filepath.Join(dir, "d/f"), 0o640))
	h := contenthash.NewHash(contenthash.Header{Mode: 0o640, UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Size: 4})
	_, err := h.Write([]byte("data"))
	require.NoError(t, err)
	require.Equal(t, string(h.Digest()), sum(t, contenthash.New(), dir, "d/f", contenthash.Options{}))
	if os.Getuid() == 0 && os.Getgid() == 0 {
		plain := "namemode416uid0gid0size4typeflag0linknameunamegnamedevmajor0devminor0" + "data"
		require.Equal(t, digest.FromString(plain), h.Digest())
	}
}

func TestHeaderDistinguishes(t *testing.T) {
	seen := map[digest.Digest]int{}
	for i, h := range []contenthash.Header{
		{Mode: 0o644},
		{Mode: 0o600},
		{Mode: 0o644 | fs.ModeSetuid},
		{Mode: 0o644 | fs.ModeSetgid},
		{Mode: 0o644 | fs.ModeSticky},
		{Mode: 0o644 | fs.ModeDir},
		{Mode: 0o644 | fs.ModeNamedPipe},
		{Mode: 0o644 | fs.ModeDevice, Devmajor: 1, Devminor: 3},
		{Mode: 0o644 | fs.ModeDevice, Devmajor: 1, Devminor: 5},
		{Mode: 0o644 | fs.ModeDevice | fs.ModeCharDevice, Devmajor: 1, Devminor: 3},
		{Mode: 0o777 | fs.ModeSymlink, Linkname: "a"},
		{Mode: 0o777 | fs.ModeSymlink, Linkname: "b"},
		{Mode: 0o644, UID: 1},
		{Mode: 0o644, GID: 1},
		{Mode: 0o644, Size: 1},
		{Mode: 0o644, Xattrs: []contenthash.Xattr{{Name: "user.a"}}},
		{Mode: 0o644, Xattrs: []contenthash.Xattr{{Name: "security.capability", Value: []byte("x")}}},
	} {
		d := contenthash.NewHash(h).Digest()
		if j, ok := seen[d]; ok {
			t.Errorf("%d and %d have one digest", j, i)
		}
		seen[d] = i
	}
	for _, h := range []contenthash.Header{
		{Mode: 0o644, Linkname: "ignored", Devmajor: 7},
		{Mode: 0o644 | fs.ModeSocket},
		{Mode: 0o644, Xattrs: []contenthash.Xattr{{Name: "security.selinux", Value: []byte("label")}, {Name: "system.posix_acl_access"}}},
	} {
		require.Contains(t, seen, contenthash.NewHash(h).Digest(), "%+v counts as a plain file", h)
	}
}

func TestErrors(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a/f", "x")
	require.NoError(t, os.Symlink("loop", filepath.Join(dir, "loop")))
	ask := func(path string, o contenthash.Options) error {
		t.Helper()
		d, err := contenthash.New().Checksum(t.Context(), contenthash.Dir(dir), path, o)
		require.Error(t, err)
		require.Empty(t, d)
		return err
	}
	require.ErrorIs(t, ask("b", contenthash.Options{}), errdefs.ErrNotFound)
	require.ErrorIs(t, ask("a/f/x", contenthash.Options{}), errdefs.ErrNotFound)
	require.ErrorIs(t, ask("a\x00b", contenthash.Options{}), errdefs.ErrInvalidArgument)
	err := ask("loop", contenthash.Options{FollowLinks: true})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorIs(t, err, unix.ELOOP)
	require.ErrorIs(t, ask("[", contenthash.Options{Wildcard: true}), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, ask("/", contenthash.Options{IncludePatterns: []string{"["}}), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, ask("/", contenthash.Options{ExcludePatterns: []string{"!"}}), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, ask("*", contenthash.Options{Wildcard: true, RequiredPaths: []string{"/b"}}), errdefs.ErrNotFound)

	_, err = contenthash.New().Checksum(t.Context(), contenthash.Dir("/nowhere"), "/", contenthash.Options{})
	require.ErrorIs(t, err, fs.ErrNotExist)
	released := 0
	bad := errors.New("unmount")
	_, err = contenthash.New().Checksum(t.Context(), func(context.Context) (*contenthash.Root, error) {
		f, err := os.Open(dir)
		return contenthash.NewRoot(f, func() error { released++; return bad }), err
	}, "/", contenthash.Options{})
	require.ErrorIs(t, err, bad)
	require.Equal(t, 1, released)
}

// A path that is not there is found missing by one look, and where all is
// known by none.
func TestMissingPathWalksNothing(t *testing.T) {
	dir := t.TempDir()
	manyFiles(t, dir, 10, 10)
	tree := contenthash.New()
	_, err := tree.Checksum(t.Context(), contenthash.Dir(dir), "missing/path", contenthash.Options{})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.Equal(t, contenthash.Stats{Stats: 1}, tree.Stats())
	sum(t, tree, dir, "dir00", contenthash.Options{})
	require.Equal(t, uint64(10), tree.Stats().FilesRead, "only what was asked for is read")
	sum(t, tree, dir, "/", contenthash.Options{})
	before := tree.Stats()
	for _, p := range []string{"missing", "missing/path", "dir00/missing", "dir00/sub0000/file00/x"} {
		_, err := tree.Checksum(t.Context(), contenthash.Dir("/nowhere"), p, contenthash.Options{FollowLinks: true})
		require.ErrorIs(t, err, errdefs.ErrNotFound, p)
	}
	require.Equal(t, before, tree.Stats())
}

// Excluded files are not read, nor are excluded directories listed.
func TestExcludedIsNotRead(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "src/a", "a")
	write(t, dir, "node_modules/x/y", "y")
	tree := contenthash.New()
	sum(t, tree, dir, "/", contenthash.Options{ExcludePatterns: []string{"node_modules"}})
	require.Equal(t, uint64(1), tree.Stats().FilesRead)
	require.Equal(t, uint64(2), tree.Stats().DirsListed)
	sum(t, tree, dir, "/src/*", contenthash.Options{Wildcard: true})
	require.Equal(t, uint64(1), tree.Stats().FilesRead)
	require.Equal(t, uint64(2), tree.Stats().DirsListed)
}

// A change behind our back is noticed by its ctime, whatever was done to look
// the same.
func TestChangeBehindOurBack(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "d/f", "one")
	write(t, dir, "d/g", "x")
	tree := contenthash.New()
	tree.SetClock(func() time.Time { return time.Now().Add(time.Hour) }) // all stamps are old
	sum(t, tree, dir, "/", contenthash.Options{})
	for _, seal := range []bool{true, false} {
		tree.Unconfirm()
		before := tree.Stats()
		sum(t, tree, dir, "/", contenthash.Options{})
		after := tree.Stats()
		require.Equal(t, before.FilesRead, after.FilesRead, "all looks the same")
		require.Equal(t, before.DirsListed, after.DirsListed)

		p := filepath.Join(dir, "d/f")
		fi, err := os.Stat(p)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(p, []byte(map[bool]string{true: "two", false: "six"}[seal]), 0o644))
		for changed := false; !changed; { // in the same tick of a kernel's coarse clock it would not show
			require.NoError(t, os.Chtimes(p, fi.ModTime(), fi.ModTime()))
			now, err := os.Stat(p)
			require.NoError(t, err)
			changed = now.Sys().(*syscall.Stat_t).Ctim != fi.Sys().(*syscall.Stat_t).Ctim
		}
		if seal {
			tree.Seal()
		}
		require.Equal(t, fresh(t, dir, "/"), sum(t, tree, dir, "/", contenthash.Options{}))
		require.Equal(t, after.FilesRead+1, tree.Stats().FilesRead)
	}
}

// Stat data that are as young as the look at them prove nothing.
func TestRacyFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "f", "one")
	fi, err := os.Stat(filepath.Join(dir, "f"))
	require.NoError(t, err)
	for _, test := range []struct {
		age  time.Duration
		read uint64
	}{{0, 2}, {20 * time.Millisecond, 2}, {-time.Hour, 2}, {3 * time.Second, 1}} {
		tree := contenthash.New()
		tree.SetClock(func() time.Time { return fi.ModTime().Add(test.age) })
		want := sum(t, tree, dir, "f", contenthash.Options{})
		tree.SetClock(func() time.Time { return fi.ModTime().Add(time.Hour) })
		for range 3 {
			tree.Unconfirm()
			tree.Seal()
			require.Equal(t, want, sum(t, tree, dir, "f", contenthash.Options{}))
		}
		require.Equal(t, test.read, tree.Stats().FilesRead, "age %s", test.age)
	}
}

// What is asked by many at once is computed once.
func TestOneComputation(t *testing.T) {
	dir := scratch(t)
	manyFiles(t, dir, 30, 30)
	tree := contenthash.New()
	want := fresh(t, dir, "/")
	var wg sync.WaitGroup
	got := make([]digest.Digest, 64)
	for i := range got {
		wg.Go(func() {
			got[i], _ = tree.Checksum(context.Background(), contenthash.Dir(dir), "/", contenthash.Options{})
		})
	}
	wg.Wait()
	for _, d := range got {
		require.Equal(t, want, string(d))
	}
	require.Equal(t, uint64(900), tree.Stats().FilesRead)
}

// One who leaves takes nobody along, and who waits can leave.
func TestCancelledAsker(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "f", "x")
	tree := contenthash.New()
	ctx, cancel := context.WithCancel(t.Context())
	opened := make(chan struct{})
	first := make(chan error)
	go func() {
		_, err := tree.Checksum(ctx, func(ctx context.Context) (*contenthash.Root, error) {
			close(opened)
			<-ctx.Done()
			return nil, ctx.Err()
		}, "/", contenthash.Options{})
		first <- err
	}()
	<-opened
	impatient, leave := context.WithCancel(t.Context())
	leave()
	_, err := tree.Checksum(impatient, contenthash.Dir(dir), "/", contenthash.Options{})
	require.ErrorIs(t, err, context.Canceled)
	second := make(chan error)
	go func() {
		d, err := tree.Checksum(t.Context(), contenthash.Dir(dir), "/", contenthash.Options{})
		if err == nil && d == "" {
			err = errors.New("empty digest")
		}
		second <- err
	}()
	cancel()
	require.ErrorIs(t, <-first, context.Canceled)
	require.NoError(t, <-second)
	d, err := contenthash.New().Checksum(ctx, contenthash.Dir(dir), "/", contenthash.Options{})
	require.ErrorIs(t, err, context.Canceled)
	require.Empty(t, d)
}

// What was read before a cancellation is not read again.
func TestCancelledWorkIsKept(t *testing.T) {
	dir := scratch(t)
	manyFiles(t, dir, 20, 70)
	tree := contenthash.New()
	ctx, cancel := context.WithCancel(t.Context())
	reads := 0
	var mu sync.Mutex
	tree.SetClock(func() time.Time { // asked once a file or directory
		mu.Lock()
		defer mu.Unlock()
		if reads++; reads == 700 {
			cancel()
		}
		return time.Now()
	})
	_, err := tree.Checksum(ctx, contenthash.Dir(dir), "/", contenthash.Options{})
	require.ErrorIs(t, err, context.Canceled)
	read := tree.Stats().FilesRead
	require.Less(t, read, uint64(1400))
	require.Equal(t, fresh(t, dir, "/"), sum(t, tree, dir, "/", contenthash.Options{}))
	require.Less(t, tree.Stats().FilesRead, uint64(1400+200), "of what was read, most is kept")
}

func TestBadChanges(t *testing.T) {
	tree := contenthash.New()
	for _, c := range []contenthash.Change{
		{Path: "a/../b"}, {Path: "a//b"}, {Path: "./a"}, {Path: "a\x00b"}, {Path: "a", Digest: "md5:00"}, {Path: "a", Digest: "sha256:ABC"},
	} {
		require.ErrorIs(t, tree.HandleChange(c), errdefs.ErrInvalidArgument, "%+v", c)
	}
	require.NoError(t, tree.HandleChange(contenthash.Change{Path: "/a/"}))
}

// Paths longer than what one system call takes are read in steps.
func TestLongPaths(t *testing.T) {
	dir := t.TempDir()
	name := strings.Repeat("n", 200)
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	for range 30 {
		require.NoError(t, unix.Mkdirat(at, name, 0o755))
		next, err := unix.Openat(at, name, unix.O_PATH|unix.O_DIRECTORY, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Close(at))
		at = next
	}
	fd, err := unix.Openat(at, "f", unix.O_CREAT|unix.O_WRONLY, 0o644)
	require.NoError(t, err)
	require.NoError(t, unix.Close(fd))
	require.NoError(t, unix.Close(at))
	tree := contenthash.New()
	want := sum(t, tree, dir, "/", contenthash.Options{})
	require.Equal(t, sum(t, tree, dir, strings.Repeat(name+"/", 30)+"f", contenthash.Options{}),
		sum(t, contenthash.New(), dir, strings.Repeat(name+"/", 30)+"f", contenthash.Options{}))
	m := memory{}
	m.save(tree)
	loaded, err := contenthash.Load(m)
	require.NoError(t, err)
	require.Equal(t, want, sum(t, loaded, "/nowhere", "/", contenthash.Options{}))
}

func TestUnreadable(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("needs an ordinary user: root reads everything")
	}
	dir := t.TempDir()
	write(t, dir, "d/f", "x")
	require.NoError(t, os.Chmod(filepath.Join(dir, "d/f"), 0))
	_, err := contenthash.New().Checksum(t.Context(), contenthash.Dir(dir), "/", contenthash.Options{})
	require.ErrorIs(t, err, errdefs.ErrPermissionDenied)
	require.ErrorContains(t, err, "/d/f")
	sum(t, contenthash.New(), dir, "/", contenthash.Options{ExcludePatterns: []string{"d/f"}})
}

// Changes are reported while others ask. Whenever all of them were, the digest
// is right: what was read before a change is not taken for what is there after
// it.
func TestChangesWhileAsking(t *testing.T) {
	dir := scratch(t)
	manyFiles(t, dir, 4, 10)
	tree := contenthash.New()
	var changes atomic.Int64
	change := changer(dir, tree)
	asked := []string{"/", "dir00", "dir01", "dir02"}
	for round := range 30 {
		stop := background(t, func() error {
			defer changes.Add(1)
			return change()
		})
		enough := changes.Load() + 10
		for j := 0; (j < 10 || changes.Load() < enough) && !t.Failed(); j++ {
			_, err := tree.Checksum(t.Context(), contenthash.Dir(dir), asked[j%len(asked)], contenthash.Options{})
			if err != nil && !errors.Is(err, contenthash.ErrChanged) && !errors.Is(err, errdefs.ErrNotFound) {
				t.Errorf("ask for %s: %v", asked[j%len(asked)], err)
			}
			if j == 5 {
				tree.Save()
			}
		}
		stop()
		require.False(t, t.Failed())
		for _, p := range asked {
			require.Equal(t, fresh(t, dir, p), sum(t, tree, dir, p, contenthash.Options{}), "%s in round %d", p, round)
		}
	}
}

// changer returns a function that makes one change after the other to what
// manyFiles made in dir, and has reported all of it when it returns.
func changer(dir string, tree *contenthash.Tree) func() error {
	i := 0
	rewrite := func(p string) error {
		return os.WriteFile(filepath.Join(dir, p), []byte(strings.Repeat("x", i%1000)), 0o644)
	}
	rename := func(from, to string) error {
		return os.Rename(filepath.Join(dir, from), filepath.Join(dir, to))
	}
	made := "dir02/sub0002/made"
	return func() error {
		i++
		var err error
		var reports []contenthash.Change
		switch {
		case i%40 == 0: // all of it is doubted
			reports = []contenthash.Change{{Kind: contenthash.Delete, Path: "/"}}
		case i%10 == 0:
			err = rewrite(made)
			reports = []contenthash.Change{{Kind: contenthash.Add, Path: made}}
		case i%10 == 5:
			if err = os.Remove(filepath.Join(dir, made)); errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
			reports = []contenthash.Change{{Kind: contenthash.Delete, Path: made}}
		case i%5 == 1: // away, changed there, and back
			if err = rename("dir01", "moved"); err == nil {
				err = errors.Join(rewrite("moved/sub0001/file05"), rename("moved", "dir01"))
			}
			reports = []contenthash.Change{
				{Kind: contenthash.Delete, Path: "moved"},
				{Kind: contenthash.Add, Path: "dir01", Mode: fs.ModeDir},
				{Kind: contenthash.Add, Path: "dir01/sub0001", Mode: fs.ModeDir},
			}
			for f := range 10 {
				reports = append(reports, contenthash.Change{Kind: contenthash.Add, Path: fmt.Sprintf("dir01/sub0001/file%02d", f)})
			}
		default:
			p := "dir00/sub0000/file" + []string{"00", "03", "07"}[i%3]
			err = rewrite(p)
			reports = []contenthash.Change{{Kind: contenthash.Modify, Path: p}}
		}
		for _, c := range reports {
			err = errors.Join(err, tree.HandleChange(c))
		}
		return err
	}
}

// A change that is reported while a file is being read counts: what was read,
// of that file, of one before it or of their directory, is that of before.
func TestChangeWhileReading(t *testing.T) {
	modify := func(path string, mode fs.FileMode) contenthash.Change {
		return contenthash.Change{Kind: contenthash.Modify, Path: path, Mode: mode}
	}
	for name, c := range map[string]struct {
		change  func(t *testing.T, dir string)
		reports []contenthash.Change
	}{
		"the file": {
			func(t *testing.T, dir string) {
				write(t, dir, "new", "new")
				require.NoError(t, os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "d/b")))
			},
			[]contenthash.Change{modify("d/b", 0)},
		},
		"a file read before": {
			func(t *testing.T, dir string) { write(t, dir, "d/a", "new") },
			[]contenthash.Change{modify("d/a", 0)},
		},
		"a file read before, removed": {
			func(t *testing.T, dir string) { require.NoError(t, os.Remove(filepath.Join(dir, "d/a"))) },
			[]contenthash.Change{{Kind: contenthash.Delete, Path: "d/a"}},
		},
		"a file beside, new": {
			func(t *testing.T, dir string) { write(t, dir, "d/aa", "new") },
			[]contenthash.Change{{Kind: contenthash.Add, Path: "d/aa"}},
		},
		"a directory in its place": {
			func(t *testing.T, dir string) {
				require.NoError(t, os.Remove(filepath.Join(dir, "d/b")))
				write(t, dir, "d/b/f", "new")
			},
			[]contenthash.Change{modify("d/b", fs.ModeDir), modify("d/b/f", 0)},
		},
		"another directory above": {
			func(t *testing.T, dir string) {
				require.NoError(t, os.Rename(filepath.Join(dir, "d"), filepath.Join(t.TempDir(), "d")))
				for _, f := range []string{"a", "b", "c"} {
					write(t, dir, "d/"+f, "new "+f)
				}
			},
			[]contenthash.Change{modify("d", fs.ModeDir), modify("d/a", 0), modify("d/b", 0), modify("d/c", 0)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, f := range []string{"a", "b", "c"} {
				write(t, dir, "d/"+f, "old")
			}
			tree := contenthash.New()
			tree.SetWorkers(1) // one after the other
			done := false
			tree.SetClock(func() time.Time {
				// The clock is asked when the file is open.
				if open, _ := filepath.Glob("/proc/self/fd/*"); !done && isOpen(open, filepath.Join(dir, "d/b")) {
					done = true
					c.change(t, dir)
					for _, r := range c.reports {
						require.NoError(t, tree.HandleChange(r))
					}
				}
				return time.Now()
			})
			got := sum(t, tree, dir, "/", contenthash.Options{})
			require.True(t, done)
			require.Equal(t, fresh(t, dir, "/"), got)
			require.Equal(t, got, sum(t, tree, dir, "/", contenthash.Options{}))
		})
	}
}

func isOpen(fds []string, file string) bool {
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); target == file {
			return true
		}
	}
	return false
}

// A pattern sees names: a file that was renamed counts, though its content is
// the same.
func TestPatternsSeeNames(t *testing.T) {
	digests := map[string]bool{}
	for _, name := range []string{"one", "two"} {
		dir := t.TempDir()
		write(t, dir, "src/"+name, "same")
		digests[string(sum(t, contenthash.New(), dir, "/src/*", contenthash.Options{Wildcard: true}))] = true
	}
	require.Len(t, digests, 2)
}

// Owners can be left out of one question, which neither uses nor changes what
// is kept.
func TestIgnoreOwners(t *testing.T) {
	needRoot(t, "it changes owners")
	dir := t.TempDir()
	manyFiles(t, dir, 2, 3)
	ask := func(tree *contenthash.Tree, path string, o contenthash.Options) string {
		o.IgnoreOwners = true
		return sum(t, tree, dir, path, o)
	}
	patterns := contenthash.Options{IncludePatterns: []string{"**"}, ExcludePatterns: []string{"dir01"}}
	want, listed := fresh(t, dir, "/"), sum(t, contenthash.New(), dir, "/", patterns)
	require.NoError(t, os.Lchown(dir+"/dir00", 5, 6))
	require.NoError(t, os.Lchown(dir+"/dir00/sub0000/file01", 7, 8))
	owned := fresh(t, dir, "/")
	require.NotEqual(t, want, owned)
	tree := contenthash.New()
	for range 2 {
		require.Equal(t, want, ask(tree, "/", contenthash.Options{}))
		require.Equal(t, listed, ask(tree, "/", patterns))
		require.Equal(t, owned, sum(t, tree, dir, "/", contenthash.Options{}))
	}
	_, err := tree.Checksum(t.Context(), contenthash.Dir(dir), "none", contenthash.Options{IgnoreOwners: true})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

package source

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

func TestScanRefusesWhatIsNoDirectory(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/file", "x")
	require.NoError(t, unix.Mkfifo(dir+"/pipe", 0o600))
	for path, class := range map[string]error{
		dir + "/none":      errdefs.ErrNotFound,
		dir + "/none/none": errdefs.ErrNotFound,
		dir + "/file":      errdefs.ErrInvalidArgument,
		dir + "/file/x":    errdefs.ErrInvalidArgument,
		dir + "/pipe":      errdefs.ErrInvalidArgument,
		"":                 errdefs.ErrNotFound,
	} {
		_, err := Scan(context.Background(), path, Options{}, nil)
		require.ErrorIs(t, err, class, path)
		require.ErrorContains(t, err, "source directory", path)
	}
}

func TestScanReachesTheSourceThroughLinks(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir, "real/f=x", "link->real")
	require.Equal(t, []string{"f"}, paths(scan(t, dir+"/link", nil)))
}

func TestScanOfAnEmptyDirectory(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	r := syncDirs(t, src, dst, nil)
	require.Zero(t, r.Changed)
	require.Zero(t, r.Tree.Len())
}

func TestExclude(t *testing.T) {
	all := []string{".git/config=x", "a.o=x", "a.c=x", "sub/a.o=x", "sub/deep/b.o=x", "sub/deep/b.c=x", "vendor/x/keep.go=x", "vendor/x/drop.go=x", "vendor/y/z=x", "weird[1]=x"}
	everything := []string{".git", ".git/config", "a.c", "a.o", "sub", "sub/a.o", "sub/deep", "sub/deep/b.c", "sub/deep/b.o", "vendor", "vendor/x", "vendor/x/drop.go", "vendor/x/keep.go", "vendor/y", "vendor/y/z", "weird[1]"}
	without := func(prefixes ...string) (list []string) {
	next:
		for _, p := range everything {
			for _, x := range prefixes {
				if p == x || strings.HasPrefix(p, x+"/") {
					continue next
				}
			}
			list = append(list, p)
		}
		return list
	}
	tests := map[string]struct {
		patterns []string
		want     []string
	}{
		"none":         {nil, everything},
		"blank":        {[]string{"", "  "}, everything},
		"a directory":  {[]string{"vendor"}, without("vendor")},
		"with slashes": {[]string{"/vendor/", "./.git"}, without("vendor", ".git")},
		"one level":    {[]string{"*.o"}, without("a.o")},
		"all levels":   {[]string{"**/*.o"}, without("a.o", "sub/a.o", "sub/deep/b.o")},
		"taken back":   {[]string{"**/*.o", "!sub/deep/**"}, without("a.o", "sub/a.o")},
		// As BuildKit does: what no pattern had excluded cannot be taken back,
		// and what is below it asks for its own match.
		"not taken back":         {[]string{"**/*.o", "!sub/deep"}, without("a.o", "sub/a.o", "sub/deep/b.o")},
		"taken back below":       {[]string{"vendor", "!vendor/x/keep.go"}, without("vendor/x/drop.go", "vendor/y")},
		"taken back by wildcard": {[]string{"vendor", "! vendor/**/keep.*"}, without("vendor/x/drop.go", "vendor/y")},
		"taken back anywhere":    {[]string{"*", "!**/*.c"}, []string{"a.c", "sub", "sub/deep", "sub/deep/b.c"}},
		"the last one counts":    {[]string{"!a.c", "a.c"}, without("a.c")},
		"escaped":                {[]string{`weird\[1\]`}, without("weird[1]")},
		"everything":             {[]string{"**"}, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			makeTree(t, dir, all...)
			tree, err := Scan(context.Background(), dir, Options{Exclude: tt.patterns}, nil)
			require.NoError(t, err)
			require.Equal(t, tt.want, paths(tree))
		})
	}
	for _, bad := range []string{"[", "!", "a[]b"} {
		_, err := Scan(context.Background(), t.TempDir(), Options{Exclude: []string{bad}}, nil)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, bad)
	}
}

func TestExcludedFilesLeaveTheWorkspace(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "a=1", "b/c=2")
	r := syncDirs(t, src, dst, nil)
	tree, err := Scan(context.Background(), src, Options{Exclude: []string{"b"}}, r.Tree)
	require.NoError(t, err)
	r, err = tree.SyncTo(context.Background(), src, dst, r.Tree, nil)
	require.NoError(t, err)
	require.Equal(t, 2, r.Removed)
	require.NoDirExists(t, dst+"/b")
}

func TestSkip(t *testing.T) {
	base := t.TempDir()
	src := base + "/src"
	makeTree(t, base, "src/main.go=x", "src/bin/tool=built", "src/dist/deep/app=built", "src/dist2/app=built",
		"src/dist2/mine=x", "src/store/lamina.db=x", "alias->src", "src/storelink->store", "elsewhere/")
	for _, src := range []string{src, base + "/alias", base + "/elsewhere/../src/"} {
		tree, err := Scan(context.Background(), src, Options{Skip: []string{
			base + "/alias/bin/tool",      // its directory held nothing else
			base + "/src/dist/deep/app",   // nor those above this one
			base + "/src/dist2/app",       // but this one does
			base + "/src/storelink",       // the link and where it leads
			base + "/elsewhere/out",       // outside
			base + "/src/not/there/yet.o", // not there
			base + "/srcdir",              // begins alike
		}}, nil)
		require.NoError(t, err)
		require.Equal(t, []string{"dist2", "dist2/mine", "main.go"}, paths(tree))
	}
	for _, in := range []string{src, base, "/"} {
		_, err := Scan(context.Background(), src, Options{Skip: []string{in}}, nil)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, in)
	}
}

// A run that writes its output into the source must find the same source the
// next time.
func TestOutputsInTheSourceDoNotChangeIt(t *testing.T) {
	src := t.TempDir()
	makeTree(t, src, "main.go=x")
	o := Options{Skip: []string{src + "/out/bin/app"}}
	before, err := Scan(context.Background(), src, o, nil)
	require.NoError(t, err)
	makeTree(t, src, "out/bin/app=built", "out/bin/"+fsat.TempName()+"=half")
	after, err := Scan(context.Background(), src, o, before)
	require.NoError(t, err)
	require.Equal(t, before.Digest(), after.Digest())
	require.Len(t, after.Notes(), 1)
	require.Contains(t, after.Notes()[0].Reason, "unfinished output")
}

func TestPathOrderAndNames(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir, "a-b=1", "a/b=2", "a.c=3", "a/b-c=4", "\xff\xfe=5", "new\nline=6", "日本=7", " =8", "a/\x01=9")
	require.Equal(t, []string{" ", "a", "a/\x01", "a/b", "a/b-c", "a-b", "a.c", "new\nline", "日本", "\xff\xfe"}, paths(scan(t, dir, nil)))
	dst := t.TempDir()
	syncDirs(t, dir, dst, nil)
	requireSynced(t, dir, dst)
}

// Paths longer than one system call takes.
func TestDeepTree(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	name := strings.Repeat("d", 200)
	make := func(dir string) {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		require.NoError(t, err)
		for range 30 {
			require.NoError(t, unix.Mkdirat(fd, name, 0o755))
			next, err := unix.Openat(fd, name, unix.O_PATH|unix.O_DIRECTORY, 0)
			require.NoError(t, err)
			fsat.Close(fd)
			fd = next
		}
		out, err := unix.Openat(fd, "leaf", unix.O_CREAT|unix.O_WRONLY, 0o644)
		require.NoError(t, err)
		_, err = unix.Write(out, []byte("x"))
		require.NoError(t, err)
		fsat.Close(out)
		fsat.Close(fd)
	}
	make(src)
	r := syncDirs(t, src, dst, nil)
	require.Equal(t, 31, r.Changed)
	require.Equal(t, r.Tree.Digest(), scan(t, dst, nil).Digest())
	r = syncDirs(t, src, dst, r.Tree)
	require.Zero(t, r.Changed)
	require.NoError(t, os.RemoveAll(src+"/"+name))
	r = syncDirs(t, src, dst, r.Tree)
	require.Equal(t, 31, r.Removed)
}

func TestDigestIsAFunctionOfTheTree(t *testing.T) {
	make := func() string {
		dir := t.TempDir()
		makeTree(t, dir, sample...)
		return dir
	}
	want := scan(t, make(), nil).Digest()
	other := make()
	age(t, other)
	require.NoError(t, os.Chmod(other, 0o700))
	if os.Geteuid() == 0 {
		require.NoError(t, os.Lchown(other+"/README", 7, 8))
	}
	require.Equal(t, want, scan(t, other, nil).Digest(), "times, owners and the directory itself do not count")

	for name, edit := range map[string]func(dir string) error{
		"content":   func(d string) error { return os.WriteFile(d+"/README", []byte("READ me"), 0o644) },
		"mode":      func(d string) error { return os.Chmod(d+"/README", 0o640) },
		"setuid":    func(d string) error { return os.Chmod(d+"/README", 0o644|os.ModeSetuid) },
		"directory": func(d string) error { return os.Chmod(d+"/empty", 0o700) },
		"name":      func(d string) error { return os.Rename(d+"/a-b", d+"/a_b") },
		"removed":   func(d string) error { return os.Remove(d + "/empty") },
		"moved":     func(d string) error { return os.Rename(d+"/a-b", d+"/empty/a-b") },
		"link":      func(d string) error { os.Remove(d + "/lib.so"); return os.Symlink("lib.so.2", d+"/lib.so") },
		"type":      func(d string) error { os.Remove(d + "/zero"); return unix.Mkfifo(d+"/zero", 0o644) },
		"attribute": func(d string) error { return unix.Setxattr(d+"/README", "user.x", []byte("1"), 0) },
		"of a dir":  func(d string) error { return unix.Setxattr(d+"/empty", "user.x", []byte("1"), 0) },
	} {
		dir := make()
		require.NoError(t, edit(dir), name)
		require.NotEqual(t, want, scan(t, dir, nil).Digest(), name)
	}
}

// reads counts the bytes that a scan reads.
func reads(t *testing.T, dir string, prev *Tree, now func() time.Time) (*Tree, int64) {
	t.Helper()
	var total int64
	tree, err := Scan(context.Background(), dir, Options{now: now, Progress: func(done, all int64) { total = all }}, prev)
	require.NoError(t, err)
	return tree, total
}

func TestOnlyChangedFilesAreRead(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir, "a=12345", "d/b=123", "c=1")
	later := func() time.Time { return time.Now().Add(time.Minute) }
	first, n := reads(t, dir, nil, later)
	require.EqualValues(t, 9, n)
	again, n := reads(t, dir, first, later)
	require.Zero(t, n)
	require.Equal(t, first.Digest(), again.Digest())
	write(t, dir+"/d/b", "1234")
	_, n = reads(t, dir, again, later)
	require.EqualValues(t, 4, n)
	require.NoError(t, os.Chmod(dir+"/a", 0o600)) // its ctime changes
	_, n = reads(t, dir, again, later)
	require.EqualValues(t, 4+5, n)
}

// A file that is written again within a tick of the clock shows the same
// times. The clock of the scan decides what is read again.
func TestRacyFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "before")
	var st unix.Stat_t
	require.NoError(t, unix.Stat(dir+"/f", &st))
	changed := time.Unix(st.Ctim.Unix())
	if st.Ctim.Nsec < 1_000_000 {
		changed = changed.Add(time.Millisecond) // a whole second would count as coarse
	}
	for _, tt := range []struct {
		after time.Duration
		again bool
	}{
		{-time.Hour, true},
		{0, true},
		{time.Millisecond, true},
		{10 * time.Millisecond, true},
		{24 * time.Millisecond, true},
		{27 * time.Millisecond, false},
		{time.Second, false},
		{time.Hour, false},
	} {
		clock := func() time.Time { return changed.Add(tt.after) }
		first, _ := reads(t, dir, nil, clock)
		enc, err := first.Encode()
		require.NoError(t, err)
		first, err = Decode(enc)
		require.NoError(t, err)
		// What the kernel's clock would hide: another content, the same stat data.
		first.nodes[0].sum[0] ^= 1
		second, n := reads(t, dir, first, func() time.Time { return changed.Add(2 * time.Hour) })
		require.Equal(t, tt.again, n > 0, tt.after)
		_, n = reads(t, dir, second, clock)
		require.Zero(t, n, "read again once, not for ever")
	}
}

func TestCoarseTimesHaveAWiderWindow(t *testing.T) {
	at := stamp{sec: 1000}
	require.False(t, at.settled(stamp{sec: 1001, nsec: 999_999_999}))
	require.False(t, at.settled(stamp{sec: 1002}))
	require.True(t, at.settled(stamp{sec: 1002, nsec: 26_000_000}))
	fine := stamp{sec: 1000, nsec: 1}
	require.False(t, fine.settled(stamp{sec: 1000, nsec: 25_000_001}))
	require.True(t, fine.settled(stamp{sec: 1000, nsec: 25_000_002}))
	require.False(t, stamp{sec: 2000, nsec: 1}.settled(stamp{sec: 1000}), "a time to come is never certain")
}

// The same on the workspace's side: a command's write within a tick of the
// sync's end shows the times that the copy had, and is found all the same.
func TestRacyCopiesAreVerified(t *testing.T) {
	for _, tt := range []struct {
		end   time.Duration // of the sync, after the copy's ctime
		found bool
	}{{0, true}, {10 * time.Millisecond, true}, {24 * time.Millisecond, true}, {27 * time.Millisecond, false}} {
		src, dst := t.TempDir(), t.TempDir()
		makeTree(t, src, "f=before")
		age(t, src)
		tree := scan(t, src, nil)
		r, err := tree.SyncTo(context.Background(), src, dst, nil, nil)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(dst+"/f", []byte("BEFORE"), 0o644))
		require.NoError(t, os.Chtimes(dst+"/f", time.Time{}, tree.nodes[0].mtime.time()))
		var st unix.Stat_t
		require.NoError(t, unix.Stat(dst+"/f", &st))
		if st.Ctim.Nsec == 0 {
			continue // one in 1e9: it would count as coarse
		}
		ctime := stampOfSpec(st.Ctim)
		r.Tree.nodes[0].copy.ctime = ctime
		r.Tree.synced = stampOf(ctime.time().Add(tt.end))
		r, err = tree.SyncTo(context.Background(), src, dst, r.Tree, nil)
		require.NoError(t, err)
		require.Equal(t, tt.found, r.Changed == 1, tt.end)
		require.Equal(t, tt.found, read(t, dst+"/f") == "before", tt.end)
	}
}

func TestChangeBetweenScanAndSyncIsFound(t *testing.T) {
	for name, edit := range map[string]func(f string) error{
		"written":             func(f string) error { return os.WriteFile(f, []byte("AFTER!"), 0o644) },
		"removed":             os.Remove,
		"replaced by a link":  func(f string) error { os.Remove(f); return os.Symlink("/etc/passwd", f) },
		"replaced by a pipe":  func(f string) error { os.Remove(f); return unix.Mkfifo(f, 0o644) },
		"replaced by a dir":   func(f string) error { os.Remove(f); return os.Mkdir(f, 0o755) },
		"its directory moved": func(f string) error { return os.Rename(filepath.Dir(f), filepath.Dir(f)+"x") },
		"its directory is a link": func(f string) error {
			d := filepath.Dir(f)
			if err := os.Rename(d, d+"x"); err != nil {
				return err
			}
			return os.Symlink(d+"x", d)
		},
	} {
		t.Run(name, func(t *testing.T) {
			src, dst := t.TempDir(), t.TempDir()
			makeTree(t, src, "a=1", "d/f=before", "z=2")
			tree := scan(t, src, nil)
			settle(tree) // so that the stat data alone must tell
			require.NoError(t, edit(src+"/d/f"))
			r, err := tree.SyncTo(context.Background(), src, dst, nil, nil)
			var changed *ChangedError
			require.ErrorAs(t, err, &changed)
			require.Equal(t, "d/f", changed.Path)
			require.ErrorIs(t, err, ErrChanged)
			require.True(t, errdefs.IsAborted(err))
			r = syncDirs(t, src, dst, r.Tree)
			requireSynced(t, src, dst)
		})
	}
}

// Within a tick of the scan the stat data cannot show the change; the content
// does.
func TestRacyChangeBetweenScanAndSyncIsFound(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "f=before")
	tree := scan(t, src, nil)
	tree.nodes[0].sum[0] ^= 1
	_, err := tree.SyncTo(context.Background(), src, dst, nil, nil)
	require.ErrorIs(t, err, ErrChanged)
	settle(tree)
	_, err = tree.SyncTo(context.Background(), src, dst, nil, nil)
	require.NoError(t, err, "an old file is not read twice")
}

func TestFileThatGoesOnChangingIsAnError(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/log", strings.Repeat("x", 1<<20))
	f, err := os.OpenFile(dir+"/log", os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(t, err)
	defer f.Close()
	// Every piece that is read is answered by another line.
	grow := func(int64, int64) {
		_, err := f.WriteString("more\n")
		require.NoError(t, err)
	}
	_, err = Scan(context.Background(), dir, Options{Progress: grow}, nil)
	var changed *ChangedError
	require.ErrorAs(t, err, &changed)
	require.Equal(t, "log", changed.Path)

	// One change is only read again.
	once := false
	tree, err := Scan(context.Background(), dir, Options{Progress: func(_, _ int64) {
		if !once {
			once = true
			grow(0, 0)
		}
	}}, nil)
	require.NoError(t, err)
	require.Equal(t, scan(t, dir, nil).Digest(), tree.Digest())
}

func TestFilesThatVanishAreNotInTheTree(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir, "a=1", "b/c=2", "d=3")
	tree, err := Scan(context.Background(), dir, Options{Progress: func(_, _ int64) { os.Remove(dir + "/b/c"); os.Remove(dir + "/a"); os.Remove(dir + "/d") }}, nil)
	require.NoError(t, err)
	require.Less(t, tree.Len(), 4)
	require.Contains(t, paths(tree), "b")
	enc, err := tree.Encode()
	require.NoError(t, err)
	_, err = Decode(enc)
	require.NoError(t, err)
}

package output

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/internal/fsat"
	"github.com/lamina-build/lamina/workspace/source"
)

func TestParseSpec(t *testing.T) {
	for in, want := range map[string]Spec{
		"lamina":          {"lamina", "lamina"},
		"./a//b/":         {"a/b", "a/b"},
		"a:b":             {"a", "b"},
		"a:/abs/b":        {"a", "/abs/b"},
		"a:../b":          {"a", "../b"},
		"a:b/":            {"a", "b/"},
		`a\:b`:            {"a:b", "a:b"},
		`a\:b:c\:d`:       {"a:b", "c:d"},
		`a\\:b`:           {`a\`, "b"},
		`a\b:c\d`:         {`a\b`, `c\d`},
		`a\`:              {`a\`, `a\`},
		"..a:b":           {"..a", "b"},
		"a..b/...":        {"a..b/...", "a..b/..."},
		" a : b ":         {" a ", " b "},
		"\xff:日本":         {"\xff", "日本"},
		"a/./b:./c/../d/": {"a/b", "./c/../d/"},
	} {
		got, err := ParseSpec(in)
		require.NoError(t, err, in)
		require.Equal(t, want, got, in)
	}
	for _, in := range []string{"", ":", ":b", "a:", ".", "./", "..", "../a", "a/../b", "a/..", "/a", "/", "//", "a:b:c", "a\x00b", "a:b\x00", ".:x"} {
		_, err := ParseSpec(in)
		require.True(t, errdefs.IsInvalidArgument(err), "%q: %v", in, err)
	}
}

func TestSpecStringParsesBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringMatching(`[a\\:é ]{1,8}`)
		want := Spec{Path: name.Draw(t, "path"), Dest: name.Draw(t, "dest")}
		got, err := ParseSpec(want.String())
		require.NoError(t, err)
		require.Equal(t, want, got)
	})
}

// place is a workspace and a directory for outputs, the working directory.
func place(t *testing.T) (tree, out string) {
	t.Helper()
	tree, out = t.TempDir(), t.TempDir()
	cwd := filepath.Join(out, "cwd")
	require.NoError(t, os.Mkdir(cwd, 0o755))
	t.Chdir(cwd)
	return tree, out
}

func write(t testing.TB, path, content string, mode os.FileMode) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(content), mode))
	require.NoError(t, os.Chmod(path, mode))
}

func read(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(b)
}

// all lists what is below dir, with type, mode, time, link and content.
func all(t testing.TB, dir string) map[string]string {
	t.Helper()
	list := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		require.NoError(t, err)
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(p, &st))
		d := fmt.Sprintf("%o %d.%d", st.Mode, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			d += " " + read(t, p)
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			require.NoError(t, err)
			d += " " + target
		}
		rel, err := filepath.Rel(dir, p)
		require.NoError(t, err)
		list[rel] = d
		return nil
	}))
	return list
}

func collect(t testing.TB, tree string, specs ...string) (Result, error) {
	t.Helper()
	var outs []Spec
	for _, s := range specs {
		o, err := ParseSpec(s)
		require.NoError(t, err)
		outs = append(outs, o)
	}
	return Collect(context.Background(), tree, outs)
}

func noTemps(t testing.TB, dir string) {
	t.Helper()
	for p := range all(t, dir) {
		require.False(t, fsat.IsTemp(filepath.Base(p)), p)
	}
}

func TestCollect(t *testing.T) {
	tree, out := place(t)
	old := time.Unix(1234567890, 123456789)
	write(t, tree+"/bin/app", "binary", 0o751|os.ModeSetuid)
	write(t, tree+"/dist/a/x", "x", 0o600)
	write(t, tree+"/dist/y", "y", 0o444)
	require.NoError(t, os.Link(tree+"/dist/y", tree+"/dist/a/y2"))
	require.NoError(t, os.Symlink("../y", tree+"/dist/a/link"))
	require.NoError(t, os.Symlink("/etc/passwd", tree+"/dist/abs"))
	require.NoError(t, os.Mkdir(tree+"/dist/empty", 0o700))
	require.NoError(t, unix.Setxattr(tree+"/bin/app", "user.x", []byte("1"), 0))
	for _, p := range []string{"bin/app", "dist/a/x", "dist/empty", "dist/a", "dist"} {
		require.NoError(t, os.Chtimes(tree+"/"+p, old, old))
	}
	require.NoError(t, os.Chmod(tree+"/dist", 0o705))

	r, err := collect(t, tree, "bin/app:../new/sub/app", "dist:"+out+"/dist", "bin/app")
	require.NoError(t, err)
	require.Equal(t, 3, r.Written)
	require.EqualValues(t, 6+6+2, r.Bytes)
	require.Equal(t, all(t, tree+"/dist"), all(t, out+"/dist"))
	require.Equal(t, all(t, tree+"/bin")["app"], all(t, out+"/new/sub")["app"])
	require.Equal(t, "binary", read(t, "bin/app"))
	value := make([]byte, 8)
	n, err := unix.Getxattr("bin/app", "user.x", value)
	require.NoError(t, err)
	require.Equal(t, "1", string(value[:n]))
	var a, b unix.Stat_t
	require.NoError(t, unix.Stat(out+"/dist/y", &a))
	require.NoError(t, unix.Stat(out+"/dist/a/y2", &b))
	require.Equal(t, a.Ino, b.Ino, "hard links are kept")
	noTemps(t, out)
}

func TestUnchangedOutputsAreLeftAlone(t *testing.T) {
	tree, out := place(t)
	write(t, tree+"/f", "same", 0o644)
	write(t, tree+"/d/g", "same", 0o644)
	specs := []string{"f:" + out + "/f", "d:" + out + "/d"}
	_, err := collect(t, tree, specs...)
	require.NoError(t, err)
	before := all(t, out)
	var was, is unix.Stat_t
	require.NoError(t, unix.Stat(out+"/d", &was))
	later := time.Now().Add(time.Hour)
	require.NoError(t, os.Chtimes(tree+"/f", later, later))
	require.NoError(t, os.Chtimes(tree+"/d/g", later, later))

	r, err := collect(t, tree, specs...)
	require.NoError(t, err)
	require.Equal(t, Result{Unchanged: 2}, r)
	require.Equal(t, before, all(t, out), "times too")
	require.NoError(t, unix.Stat(out+"/d", &is))
	require.Equal(t, was.Ino, is.Ino)

	for name, edit := range map[string]func(){
		"content":     func() { write(t, out+"/f", "SAME", 0o644); write(t, out+"/d/g", "SAME", 0o644) },
		"length":      func() { write(t, out+"/f", "same+", 0o644); write(t, out+"/d/g", "sam", 0o644) },
		"mode":        func() { require.NoError(t, os.Chmod(out+"/f", 0o600)); require.NoError(t, os.Chmod(out+"/d", 0o700)) },
		"attributes":  func() { setX(t, out+"/f"); setX(t, out+"/d/g") },
		"more, other": func() { write(t, out+"/d/more", "", 0o644); write(t, out+"/f", "", 0o644) },
		"gone":        func() { require.NoError(t, os.Remove(out+"/f")); require.NoError(t, os.Remove(out+"/d/g")) },
		"link": func() {
			require.NoError(t, os.Rename(out+"/f", out+"/elsewhere"))
			require.NoError(t, os.Symlink("elsewhere", out+"/f"))
			require.NoError(t, os.RemoveAll(out+"/d"))
			require.NoError(t, os.Symlink(tree+"/d", out+"/d"))
		},
	} {
		edit()
		r, err := collect(t, tree, specs...)
		require.NoError(t, err, name)
		require.Equal(t, 2, r.Written, name)
		require.Equal(t, all(t, tree+"/d"), all(t, out+"/d"), name)
		require.Equal(t, all(t, tree)["f"], all(t, out)["f"], name)
		noTemps(t, out)
	}
}

func setX(t *testing.T, path string) {
	t.Helper()
	require.NoError(t, unix.Setxattr(path, "user.other", []byte("1"), 0))
}

// Each case must fail and leave the directory of outputs exactly as it was.
func TestNothingIsWrittenOnErrors(t *testing.T) {
	tests := map[string]struct {
		prepare func(tree, out string)
		specs   []string
		class   error
		says    []string
	}{
		"missing": {
			specs: []string{"f:OUT/f", "none:OUT/n", "d/none", "d:OUT/d"}, class: errdefs.ErrNotFound,
			says: []string{`"none"`, `"d/none"`},
		},
		"below a file":    {specs: []string{"f/x:OUT/n"}, class: errdefs.ErrNotFound, says: []string{`"f/x"`}},
		"dangling link":   {prepare: link("gone", "l"), specs: []string{"f:OUT/f", "l:OUT/l"}, class: errdefs.ErrNotFound},
		"link that loops": {prepare: link("l", "l"), specs: []string{"l:OUT/l"}, class: errdefs.ErrNotFound},
		"link out":        {prepare: link("/etc/passwd", "l"), specs: []string{"l:OUT/l"}, class: errdefs.ErrNotFound},
		"link up and out": {prepare: link("../../../../../../../etc", "l"), specs: []string{"l/passwd:OUT/l"}, class: errdefs.ErrNotFound},
		"pipe": {
			prepare: func(tree, _ string) { must(unix.Mkfifo(tree+"/p", 0o600)) },
			specs:   []string{"f:OUT/f", "p:OUT/p"}, class: errdefs.ErrInvalidArgument,
		},
		"same destination":       {specs: []string{"f:OUT/x", "g:OUT/./x"}, class: errdefs.ErrInvalidArgument},
		"one in the other":       {specs: []string{"d:OUT/x", "f:OUT/x/f"}, class: errdefs.ErrInvalidArgument},
		"the other way":          {specs: []string{"f:OUT/x/f", "d:OUT/x"}, class: errdefs.ErrInvalidArgument},
		"same through a link":    {prepare: outLink("real", "alias"), specs: []string{"f:OUT/real/x", "g:OUT/alias/x"}, class: errdefs.ErrInvalidArgument},
		"into the workspace":     {specs: []string{"f:TREE/copy"}, class: errdefs.ErrInvalidArgument},
		"onto the workspace":     {specs: []string{"d:TREE"}, class: errdefs.ErrInvalidArgument},
		"onto the working dir":   {specs: []string{"d:OUT/cwd"}, class: errdefs.ErrInvalidArgument},
		"onto what holds it":     {specs: []string{"d:OUT"}, class: errdefs.ErrInvalidArgument},
		"onto the root":          {specs: []string{"d:/"}, class: errdefs.ErrInvalidArgument},
		"dot":                    {specs: []string{"d:."}, class: errdefs.ErrInvalidArgument},
		"file onto directory":    {prepare: existing, specs: []string{"g:OUT/n", "f:OUT/dir"}, class: errdefs.ErrFailedPrecondition},
		"directory onto file":    {prepare: existing, specs: []string{"g:OUT/n", "d:OUT/file"}, class: errdefs.ErrFailedPrecondition},
		"file with a slash":      {specs: []string{"g:OUT/n", "f:OUT/new/"}, class: errdefs.ErrInvalidArgument},
		"file as directory":      {prepare: existing, specs: []string{"g:OUT/n", "f:OUT/file/x"}, class: errdefs.ErrInvalidArgument},
		"name that is too long":  {specs: []string{"g:OUT/n", "f:OUT/" + strings.Repeat("n", 256)}, class: errdefs.ErrInvalidArgument},
		"late: name of parent":   {specs: []string{"g:OUT/n/a", "f:OUT/m/" + strings.Repeat("n", 256) + "/x"}, class: errdefs.ErrInvalidArgument},
		"spec made by hand":      {specs: []string{"g:OUT/n"}, class: errdefs.ErrInvalidArgument},
		"destination is a pipe ": {prepare: func(_, out string) { must(unix.Mkfifo(out+"/pipe", 0o600)) }, specs: []string{"f:OUT/pipe"}, class: errdefs.ErrFailedPrecondition},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tree, out := place(t)
			write(t, tree+"/f", "f", 0o644)
			write(t, tree+"/g", "g", 0o644)
			write(t, tree+"/d/x", "x", 0o644)
			if tt.prepare != nil {
				tt.prepare(tree, out)
			}
			before, inside := all(t, out), all(t, tree)
			var outs []Spec
			for _, s := range tt.specs {
				o, err := ParseSpec(strings.NewReplacer("OUT", out, "TREE", tree).Replace(s))
				require.NoError(t, err)
				outs = append(outs, o)
			}
			if name == "spec made by hand" {
				outs = append(outs, Spec{Path: "../x", Dest: out + "/y"})
			}
			r, err := Collect(context.Background(), tree, outs)
			require.ErrorIs(t, err, tt.class)
			for _, s := range tt.says {
				require.ErrorContains(t, err, s)
			}
			require.Equal(t, Result{}, r)
			after := all(t, out)
			for p := range after { // times of directories may move, names may not
				require.Contains(t, before, p)
				if !strings.HasPrefix(before[p], "4") {
					require.Equal(t, before[p], after[p])
				}
			}
			require.Len(t, after, len(before))
			require.Equal(t, inside, all(t, tree))
		})
	}
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func link(target, name string) func(string, string) {
	return func(tree, _ string) { must(os.Symlink(target, tree+"/"+name)) }
}

func outLink(target, name string) func(string, string) {
	return func(_, out string) {
		must(os.Mkdir(out+"/"+target, 0o755))
		must(os.Symlink(target, out+"/"+name))
	}
}

func existing(_, out string) {
	must(os.MkdirAll(out+"/dir/mine", 0o755))
	must(os.WriteFile(out+"/file", []byte("mine"), 0o644))
}

func TestMissingErrorNamesAll(t *testing.T) {
	tree, _ := place(t)
	_, err := collect(t, tree, "a", "b/c")
	var missing *MissingError
	require.ErrorAs(t, err, &missing)
	require.Equal(t, []string{"a", "b/c"}, missing.Paths)
	require.EqualError(t, err, `outputs "a", "b/c" do not exist in the workspace`)
}

func TestNoOutputs(t *testing.T) {
	r, err := Collect(context.Background(), "/nowhere", nil)
	require.NoError(t, err)
	require.Equal(t, Result{}, r)
}

// Links are followed inside the workspace only, where absolute ones start.
func TestLinksInTheWorkspace(t *testing.T) {
	tree, out := place(t)
	write(t, tree+"/real/f", "f", 0o644)
	must(os.Symlink("real", tree+"/rel"))
	must(os.Symlink("/real/f", tree+"/abs"))
	must(os.Symlink("../../../real", tree+"/over"))
	_, err := collect(t, tree, "rel/f:"+out+"/a", "abs:"+out+"/b", "over/f:"+out+"/c", "rel:"+out+"/d")
	require.NoError(t, err)
	for _, p := range []string{"a", "b", "c", "d/f"} {
		require.Equal(t, "f", read(t, out+"/"+p))
	}
}

// A link at the destination is replaced and not followed.
func TestLinkAtTheDestinationIsReplaced(t *testing.T) {
	tree, out := place(t)
	write(t, tree+"/f", "new", 0o644)
	write(t, tree+"/d/x", "new", 0o644)
	write(t, out+"/victim", "old", 0o644)
	write(t, out+"/victims/x", "old", 0o644)
	must(os.Symlink("victim", out+"/f"))
	must(os.Symlink("victims", out+"/d"))
	_, err := collect(t, tree, "f:"+out+"/f", "d:"+out+"/d")
	require.NoError(t, err)
	require.Equal(t, "new", read(t, out+"/f"))
	require.Equal(t, "new", read(t, out+"/d/x"))
	require.Equal(t, "old", read(t, out+"/victim"))
	require.Equal(t, "old", read(t, out+"/victims/x"))
	noTemps(t, out)
}

// A reader that looks all the time sees the old or the new, whole.
func TestReadersNeverSeeHalf(t *testing.T) {
	tree, out := place(t)
	for i := range 20 {
		write(t, fmt.Sprintf("%s/d/%d", tree, i), "0", 0o644)
	}
	_, err := collect(t, tree, "d:"+out+"/d")
	require.NoError(t, err)
	stop := make(chan struct{})
	var reader sync.WaitGroup
	var bad error
	reader.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			dir, err := os.Open(out + "/d")
			if err != nil {
				bad = err
				return
			}
			var first unix.Stat_t
			entries, err := dir.Readdirnames(-1)
			// Removing the old one may have begun; the name leads to another by then.
			if err == nil && len(entries) != 20 && unix.Fstat(int(dir.Fd()), &first) == nil {
				var now unix.Stat_t
				if unix.Stat(out+"/d", &now) == nil && now.Ino == first.Ino {
					bad = fmt.Errorf("%d entries", len(entries))
				}
			}
			dir.Close()
		}
	})
	for round := range 40 {
		for i := range 20 {
			write(t, fmt.Sprintf("%s/d/%d", tree, i), fmt.Sprint(round+1), 0o644)
		}
		r, err := collect(t, tree, "d:"+out+"/d")
		require.NoError(t, err)
		require.Equal(t, 1, r.Written)
	}
	close(stop)
	reader.Wait()
	require.NoError(t, bad)
	noTemps(t, out)
}

// When the last of several renames fails, the first go back.
func TestLateFailureTakesAllBack(t *testing.T) {
	tree, out := place(t)
	write(t, tree+"/f", "new", 0o644)
	write(t, tree+"/d/x", "new", 0o644)
	write(t, tree+"/n", "new", 0o644)
	write(t, tree+"/z", "new", 0o644)
	write(t, out+"/f", "old", 0o644)
	write(t, out+"/d/x", "old", 0o644)
	write(t, out+"/z/mine", "old", 0o644)
	before := all(t, out)
	outs := []Spec{{"f", out + "/f"}, {"d", out + "/d"}, {"n", out + "/n"}, {"z", out + "/made/z"}}
	c := &collector{}
	defer c.close()
	must(c.find(tree, outs))
	must(c.place(tree))
	must(c.stage(context.Background()))
	must(os.Mkdir(out+"/made/z", 0o755)) // somebody makes a directory there meanwhile
	err := c.publish()
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.NoError(t, c.clean(true))
	must(os.RemoveAll(out + "/made"))
	after := all(t, out)
	delete(after, ".")
	delete(before, ".")
	require.Equal(t, before, after)
}

// The ways for file systems without an exchange of names.
func TestWithoutExchange(t *testing.T) {
	tree, out := place(t)
	write(t, tree+"/f", "new", 0o644)
	write(t, tree+"/d/x", "new", 0o644)
	write(t, out+"/f", "old", 0o644)
	write(t, out+"/d/y", "old", 0o644)
	for _, back := range []bool{true, false} {
		before := all(t, out)
		c := &collector{}
		must(c.find(tree, []Spec{{"f", out + "/f"}, {"d", out + "/d"}}))
		must(c.place(tree))
		must(c.stage(context.Background()))
		for _, j := range c.jobs {
			require.NoError(t, j.publishWithoutExchange())
		}
		require.Equal(t, "new", read(t, out+"/f"))
		require.Equal(t, "new", read(t, out+"/d/x"))
		if back {
			for _, j := range c.jobs {
				require.NoError(t, j.takeBack())
			}
		}
		require.NoError(t, c.clean(false))
		c.close()
		noTemps(t, out)
		after := all(t, out)
		delete(after, ".")
		delete(before, ".")
		require.Equal(t, back, fmt.Sprint(before) == fmt.Sprint(after))
	}
}

func TestSparseOutput(t *testing.T) {
	tree, out := place(t)
	write(t, tree+"/disk", "", 0o644)
	require.NoError(t, os.Truncate(tree+"/disk", 64<<20))
	_, err := collect(t, tree, "disk:"+out+"/disk")
	require.NoError(t, err)
	var st unix.Stat_t
	require.NoError(t, unix.Stat(out+"/disk", &st))
	require.EqualValues(t, 64<<20, st.Size)
	require.Less(t, st.Blocks*512, int64(1<<20))
}

func TestSocketInAnOutputIsNoted(t *testing.T) {
	tree, out := place(t)
	write(t, tree+"/d/x", "x", 0o644)
	require.NoError(t, unix.Mknod(tree+"/d/s", unix.S_IFSOCK|0o600, 0))
	r, err := collect(t, tree, "d:"+out+"/d")
	require.NoError(t, err)
	require.Equal(t, []source.Note{{Path: "d/s", Reason: "socket left out"}}, r.Notes)
}

func TestCancelledWritesNothing(t *testing.T) {
	tree, out := place(t)
	write(t, tree+"/d/x", "x", 0o644)
	write(t, tree+"/f", "x", 0o644)
	before := all(t, out)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for _, p := range []string{"d", "f"} {
		_, err := Collect(ctx, tree, []Spec{{p, out + "/new/" + p}})
		require.ErrorIs(t, err, context.Canceled)
	}
	after := all(t, out)
	require.Len(t, after, len(before))
}

func TestWorkspaceThatIsNotThere(t *testing.T) {
	_, out := place(t)
	_, err := collect(t, out+"/none", "f")
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	var missing *MissingError
	require.NotErrorAs(t, err, &missing)
}

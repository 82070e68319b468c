package contenthash_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/contenthash"
)

// faulty lets the n-th system call on files fail.
type faulty struct {
	n     int64
	fail  func() error
	calls atomic.Int64
	names map[string]bool // of calls, where one goroutine works
}

func (f *faulty) call(name string) error {
	if f.names != nil {
		f.names[name] = true
	}
	if f.calls.Add(1) == f.n {
		return f.fail()
	}
	return nil
}

// deed is something that reads files: do asks it of a tree that prepare made.
type deed struct {
	name    string
	prepare func(t *testing.T, dir string) *contenthash.Tree
	do      func(ctx context.Context, tree *contenthash.Tree, dir string) (digest.Digest, error)
}

func checksumOf(path string, o contenthash.Options) func(context.Context, *contenthash.Tree, string) (digest.Digest, error) {
	return func(ctx context.Context, tree *contenthash.Tree, dir string) (digest.Digest, error) {
		return tree.Checksum(ctx, contenthash.Dir(dir), path, o)
	}
}

func deeds(layer string) []deed {
	blank := func(*testing.T, string) *contenthash.Tree { return contenthash.New() }
	known := func(t *testing.T, dir string) *contenthash.Tree {
		tree := contenthash.New()
		sum(t, tree, dir, "/", contenthash.Options{})
		return tree
	}
	all := checksumOf("/", contenthash.Options{})
	return []deed{
		{"cold", blank, all},
		{"link", blank, checksumOf("/loop/sub/link", contenthash.Options{FollowLinks: true})},
		{"patterns", blank, checksumOf("d*", contenthash.Options{Wildcard: true, ExcludePatterns: []string{"**/b"}})},
		{"without owners", blank, checksumOf("/", contenthash.Options{IgnoreOwners: true})},
		{"validated", func(t *testing.T, dir string) *contenthash.Tree {
			tree := known(t, dir)
			tree.Unconfirm()
			tree.Seal()
			return tree
		}, all},
		{"while somebody writes", func(t *testing.T, dir string) *contenthash.Tree {
			tree := known(t, dir)
			tree.Unconfirm()
			return tree
		}, all},
		{"one reported", func(t *testing.T, dir string) *contenthash.Tree {
			tree := known(t, dir)
			require.NoError(t, tree.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: "d/a"}))
			require.NoError(t, tree.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: "e", Mode: os.ModeDir}))
			return tree
		}, all},
		{"child", known, func(ctx context.Context, tree *contenthash.Tree, dir string) (digest.Digest, error) {
			if err := tree.ApplyLayer(ctx, upperLayer(layer)); err != nil {
				return "", err
			}
			return all(ctx, tree, dir)
		}},
		{"verify", known, func(ctx context.Context, tree *contenthash.Tree, dir string) (digest.Digest, error) {
			v, err := tree.Verify(ctx, contenthash.Dir(dir), nil)
			if err != nil {
				return "", err
			}
			return digest.FromString(fmt.Sprint(v)), nil
		}},
		{"compare", blank, func(ctx context.Context, tree *contenthash.Tree, dir string) (digest.Digest, error) {
			one := contenthash.Side{Tree: tree, Open: contenthash.Dir(dir)}
			two := contenthash.Side{Tree: contenthash.New(), Open: contenthash.Dir(layer)}
			var text []byte
			for d, err := range contenthash.Compare(ctx, one, two) {
				if err != nil {
					return "", err
				}
				text = fmt.Appendf(text, "%v", d)
			}
			return digest.FromBytes(text), nil
		}},
	}
}

// Whichever system call fails, and however: the question fails with that error
// or gives the right digest, and afterwards the same tree gives the right
// digests. No descriptor and no goroutine is left.
func TestFaults(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir, layer := faultTree(t)
	faults := map[string]func(cancel func()) error{
		"EIO":       func(func()) error { return unix.EIO },
		"EPERM":     func(func()) error { return unix.EPERM },
		"ENOSPC":    func(func()) error { return unix.ENOSPC },
		"EMFILE":    func(func()) error { return unix.EMFILE },
		"ENOENT":    func(func()) error { return unix.ENOENT },
		"ESTALE":    func(func()) error { return unix.ESTALE },
		"short":     func(func()) error { return contenthash.ErrShort },
		"cancelled": func(cancel func()) error { cancel(); return nil },
	}
	for _, d := range deeds(layer) {
		t.Run(d.name, func(t *testing.T) {
			want, all := "", fresh(t, dir, "/")
			count := &faulty{n: -1, names: map[string]bool{}}
			tree := d.prepare(t, dir)
			tree.SetWorkers(1)
			tree.SetFault(count.call)
			got, err := d.do(t.Context(), tree, dir)
			require.NoError(t, err)
			want = string(got)
			require.NotEmpty(t, want)
			require.Greater(t, count.calls.Load(), int64(4))
			open := openFiles(t)
			for name, fault := range faults {
				for n := int64(1); n <= count.calls.Load(); n++ {
					if name == "short" && !count.names["read"] {
						break
					}
					d.withFault(t, dir, n, fault, want, all, fmt.Sprintf("%s at call %d", name, n))
				}
			}
			require.Equal(t, open, openFiles(t))
		})
	}
}

func (d deed) withFault(t *testing.T, dir string, n int64, fault func(func()) error, want, all, what string) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	tree := d.prepare(t, dir)
	var failed error
	f := &faulty{n: n, fail: func() error { failed = fault(cancel); return failed }}
	tree.SetWorkers(1)
	tree.SetFault(f.call)
	got, err := d.do(ctx, tree, dir)
	gone := errors.Is(failed, unix.ENOENT) || errors.Is(failed, unix.ESTALE)
	switch {
	case gone:
		// So it is if somebody removes it, and that is no error.
	case err == nil:
		// What was not noticed has changed nothing.
		require.Equal(t, want, string(got), what)
		require.True(t, failed == nil || errors.Is(failed, contenthash.ErrShort), "%s is not told", what)
	default:
		require.Empty(t, got, what)
		require.True(t, errors.Is(err, failed) || failed == nil && errors.Is(err, context.Canceled), "%s: %v", what, err)
	}
	tree.SetFault(nil)
	if gone {
		tree.Unconfirm() // and it is remembered where nobody writes
		tree.Seal()
	}
	if d.name == "child" && err != nil {
		require.Equal(t, all, sum(t, tree, dir, "/", contenthash.Options{}), what)
		return
	}
	again, err := d.do(t.Context(), tree, dir)
	require.NoError(t, err, what)
	require.Equal(t, want, string(again), what)
	require.Equal(t, all, sum(t, tree, dir, "/", contenthash.Options{}), what)
}

// Whatever changes between any two system calls: what was read of it by then is
// read again, and the digest is that of one state, the last one if that was
// reported.
func TestChangesBetweenCalls(t *testing.T) {
	edits := map[string]func(dir string) (path string, err error){
		"entries and mode": func(dir string) (string, error) {
			return "d", errors.Join(os.WriteFile(dir+"/d/new", []byte("x"), 0o644), os.Chmod(dir+"/d", 0o700))
		},
		"content": func(dir string) (string, error) {
			return "d/a", os.WriteFile(dir+"/d/a", []byte("TEXT of d/a"), 0o644)
		},
		"added":   func(dir string) (string, error) { return "d/new", os.WriteFile(dir+"/d/new", []byte("x"), 0o644) },
		"removed": func(dir string) (string, error) { return "d/b", os.Remove(dir + "/d/b") },
		"mode":    func(dir string) (string, error) { return "e", os.Chmod(dir+"/e", 0o700) },
		"type": func(dir string) (string, error) {
			return "d/b", errors.Join(os.Remove(dir+"/d/b"), os.Mkdir(dir+"/d/b", 0o755))
		},
		"target": func(dir string) (string, error) {
			return "loop", errors.Join(os.Remove(dir+"/loop"), os.Symlink("e", dir+"/loop"))
		},
	}
	for name, edit := range edits {
		for n := int64(1); ; n++ {
			dir, _ := faultTree(t)
			before := fresh(t, dir, "/")
			tree := contenthash.New()
			path := ""
			f := &faulty{n: n, fail: func() (err error) {
				path, err = edit(dir)
				return err
			}}
			tree.SetWorkers(1)
			tree.SetFault(f.call)
			got := sum(t, tree, dir, "/", contenthash.Options{})
			after := fresh(t, dir, "/")
			what := fmt.Sprintf("%s before call %d", name, n)
			if path == "" {
				require.Greater(t, n, int64(30), "calls in all")
				break
			}
			require.NotEqual(t, before, after)
			require.Contains(t, []string{before, after}, got, what)
			c := contenthash.Change{Kind: contenthash.Modify, Path: path}
			fi, err := os.Lstat(dir + "/" + path)
			if err != nil {
				c.Kind = contenthash.Delete
			} else {
				c.Mode = fi.Mode()
			}
			require.NoError(t, tree.HandleChange(c))
			if path == "d" {
				require.NoError(t, tree.HandleChange(contenthash.Change{Path: "d/new"}))
			}
			require.Equal(t, after, sum(t, tree, dir, "/", contenthash.Options{}), what)
		}
	}
}

// With many at work: a call somewhere fails, and everybody stops.
func TestFaultsAmongMany(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir := scratch(t)
	manyFiles(t, dir, 8, 20)
	want := fresh(t, dir, "/")
	open := openFiles(t)
	for n := int64(1); n < 800; n += 7 {
		tree := contenthash.New()
		tree.SetWorkers(6)
		tree.SetFault((&faulty{n: n, fail: func() error { return unix.EIO }}).call)
		_, err := tree.Checksum(t.Context(), contenthash.Dir(dir), "/", contenthash.Options{})
		require.ErrorIs(t, err, unix.EIO)
		require.Equal(t, want, sum(t, tree, dir, "/", contenthash.Options{}))
	}
	require.Equal(t, open, openFiles(t))
}

// What was read before a call failed is not read again.
func TestFaultsLoseNothing(t *testing.T) {
	dir := scratch(t)
	manyFiles(t, dir, 1, 40)
	tree := contenthash.New()
	tree.SetWorkers(1)
	reads := 0
	tree.SetFault(func(call string) error {
		if call == "read" {
			if reads++; reads == 30 {
				return unix.EIO
			}
		}
		return nil
	})
	_, err := tree.Checksum(t.Context(), contenthash.Dir(dir), "/", contenthash.Options{})
	require.ErrorIs(t, err, unix.EIO)
	require.Equal(t, fresh(t, dir, "/"), sum(t, tree, dir, "/", contenthash.Options{}))
	require.Equal(t, 41, reads)
}

// faultTree is a small tree of all that is read in ways of its own, and a layer
// that changes nothing of it.
func faultTree(t *testing.T) (dir, layer string) {
	dir, layer = scratch(t), scratch(t)
	for _, f := range []string{"d/a", "d/b", "d/sub/c", "e/a", "x"} {
		write(t, dir, f, "text of "+f)
	}
	for _, l := range [][2]string{{"../a", "/d/sub/link"}, {"d", "/loop"}} {
		require.NoError(t, os.Symlink(l[0], dir+l[1]))
	}
	require.NoError(t, unix.Mkfifo(dir+"/e/fifo", 0o644))
	require.NoError(t, unix.Setxattr(dir+"/d/a", "user.x", []byte("1"), 0))
	write(t, layer, "d/a", "text of d/a")
	require.NoError(t, unix.Setxattr(layer+"/d/a", "user.x", []byte("1"), 0))
	require.NoError(t, os.Mkdir(layer+"/e", 0o755))
	require.NoError(t, unix.Mkfifo(layer+"/e/fifo", 0o644))
	return dir, layer
}

// openFiles are the descriptors of this process.
func openFiles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	var out []string
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			out = append(out, target)
		}
	}
	slices.Sort(out)
	return out
}

package overlayfs

import (
	"errors"
	"os"
	"testing"

	"github.com/containerd/continuity/sysx"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The tests of this file try what the kernel does, since drivers rest on it.

func eachClass(t *testing.T, f func(t *testing.T, s stack, user bool)) {
	needRoot(t)
	for name, user := range map[string]bool{"trusted": false, "user": true} {
		t.Run(name, func(t *testing.T) { f(t, newStack(t), user) })
	}
}

func attribute(t *testing.T, user bool, path, name string) string {
	t.Helper()
	value, err := sysx.LGetxattr(path, xattr(user, name))
	if errors.Is(err, unix.ENODATA) {
		return "(none)"
	}
	require.NoError(t, err)
	return string(value)
}

func TestOpaque(t *testing.T) {
	eachClass(t, func(t *testing.T, s stack, user bool) {
		m := s.writable(s.tree("a", "covered/file", "other/file", "foo/bar"))
		m.UserXattr = user
		s.mount(m)
		require.NoError(t, os.Mkdir(s.path("m/foo/made"), 0o755))
		require.NoError(t, os.Mkdir(s.path("m/tmp"), 0o755))
		require.NoError(t, os.Rename(s.path("m/tmp"), s.path("m/foo/moved")))
		require.NoError(t, os.RemoveAll(s.path("m/covered")))
		require.NoError(t, os.Mkdir(s.path("m/covered"), 0o755))
		require.ErrorIs(t, os.Rename(s.path("m/other"), s.path("m/x")), unix.EXDEV,
			"a lower directory cannot be renamed")
		s.unmount()

		require.Equal(t, "(none)", attribute(t, user, s.path("upper/foo/made"), "opaque"))
		require.Equal(t, "y", attribute(t, user, s.path("upper/foo/moved"), "opaque"),
			"a directory renamed into a merged one is opaque though nothing lies below")
		require.Equal(t, "y", attribute(t, user, s.path("upper/covered"), "opaque"))

		bottom := s.tree("bottom", "foo/moved/hidden", "foo/made/seen")
		s.mount(Mount{Lower: []string{s.path("upper"), bottom}, UserXattr: user})
		require.Equal(t, []string{"covered/", "foo/", "foo/made/", "foo/made/seen=", "foo/moved/"}, s.show())
	})
}

// Marks of one class mean nothing to a mount of the other: that is why a
// store keeps its class.
func TestClassesDoNotMix(t *testing.T) {
	eachClass(t, func(t *testing.T, s stack, user bool) {
		a := s.tree("a", "d/file")
		m := s.writable(a)
		m.UserXattr = user
		s.mount(m)
		require.NoError(t, os.RemoveAll(s.path("m/d")))
		require.NoError(t, os.Mkdir(s.path("m/d"), 0o755))
		s.unmount()
		s.mount(Mount{Lower: []string{s.path("upper"), a}, UserXattr: !user})
		require.Equal(t, []string{"d/", "d/file="}, s.show())
	})
}

// A redirect mark, as other tools leave it, is not followed: what it points
// to depends on the layers below, which need not be the ones it was made on.
func TestRedirectIsNotFollowed(t *testing.T) {
	needRoot(t)
	for name, method := range methods {
		t.Run(name, func(t *testing.T) {
			s := newStack(t)
			top, bottom := s.tree("top", "new/own"), s.tree("bottom", "old/below")
			require.NoError(t, sysx.LSetxattr(s.path("top/new"), xattr(false, "redirect"), []byte("/old"), 0))
			require.NoError(t, Mount{Lower: []string{top, bottom}}.mountWith(s.path("m"), method))
			require.NoFileExists(t, s.path("m/new/below"))
			require.FileExists(t, s.path("m/old/below"))
		})
	}
}

func TestForeignWhiteout(t *testing.T) {
	eachClass(t, func(t *testing.T, s stack, user bool) {
		top, bottom := s.tree("top", "d/"), s.tree("bottom", "other/f")
		require.NoError(t, unix.Mknod(s.path("top/d/gone"), unix.S_IFCHR, 0))
		m := Mount{Lower: []string{top, bottom}, UserXattr: user}

		s.mount(m)
		names, err := os.ReadDir(s.path("m/d"))
		require.NoError(t, err)
		require.Len(t, names, 1, "a whiteout in a directory of one layer shows up in readdir")
		require.NoFileExists(t, s.path("m/d/gone"))
		s.unmount()

		require.NoError(t, sysx.LSetxattr(s.path("top/d"), xattr(user, "origin"), nil, 0))
		s.mount(m)
		names, err = os.ReadDir(s.path("m/d"))
		require.NoError(t, err)
		require.Empty(t, names, "an empty origin on the directory hides it")
		s.unmount()

		below := s.tree("below", "d/gone", "d/stays")
		s.mount(Mount{Lower: []string{top, below, bottom}, UserXattr: user})
		require.Equal(t, []string{"d/", "d/stays=", "other/", "other/f="}, s.show(), "it still hides what lies below")
	})
}

// A copied-up file and a moved directory say where they came from.
func TestOriginAndInode(t *testing.T) {
	eachClass(t, func(t *testing.T, s stack, user bool) {
		m := s.writable(s.tree("a", "file=1"))
		m.UserXattr = user
		s.mount(m)
		require.NoError(t, os.Chmod(s.path("m/file"), 0o600))
		s.unmount()
		require.NotEqual(t, "(none)", attribute(t, user, s.path("upper/file"), "origin"))
		require.Equal(t, "1", read(t, s.path("upper/file")), "a changed mode copies the content, too: metacopy is off")
		require.Equal(t, "(none)", attribute(t, user, s.path("upper/file"), "metacopy"))
	})
}

func TestRenameOfMountedUpper(t *testing.T) {
	eachClass(t, func(t *testing.T, s stack, user bool) {
		require.NoError(t, os.MkdirAll(s.path("entry/fs"), 0o755))
		require.NoError(t, os.MkdirAll(s.path("entry/work"), 0o755))
		m := Mount{Lower: []string{s.tree("a", "f")}, Upper: s.path("entry/fs"), Work: s.path("entry/work"), UserXattr: user}
		s.mount(m)
		require.NoError(t, os.Rename(s.path("entry"), s.path("renamed")))
		require.NoError(t, os.WriteFile(s.path("m/later"), []byte("x"), 0o644))
		require.NoError(t, os.Remove(s.path("m/f")))
		require.Equal(t, "x", read(t, s.path("renamed/fs/later")))
		require.True(t, isWhiteout(s.path("renamed/fs/f")))
		busy, err := InUse(s.path("renamed/fs"))
		require.NoError(t, err)
		require.True(t, busy)
	})
}

func TestVolatile(t *testing.T) {
	eachClass(t, func(t *testing.T, s stack, user bool) {
		m := s.writable(s.tree("a", "f"))
		m.UserXattr, m.Volatile = user, true
		require.NoError(t, RemoveVolatileMark(m.Work), "before the first mount there is no mark")
		s.mount(m)
		require.NoError(t, os.WriteFile(s.path("m/new"), []byte("1"), 0o644))
		s.unmount()

		require.Error(t, m.Mount(s.path("m")), "the kernel refuses a work directory with the mark")
		require.Zero(t, mounts(t, s.dir))
		again := m
		again.Volatile = false
		require.Error(t, again.Mount(s.path("m")), "whatever the next mount is")

		require.NoError(t, RemoveVolatileMark(m.Work))
		require.NoError(t, RemoveVolatileMark(m.Work), "twice is harmless")
		s.mount(m)
		require.Equal(t, []string{"f=", "new=1"}, s.show())
	})
}

func TestRemoveVolatileMarkKeepsOtherMarks(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(dir+"/work/incompat/volatile/dirty", 0o755))
	require.NoError(t, os.MkdirAll(dir+"/work/incompat/unknown", 0o755))
	require.NoError(t, os.Chmod(dir+"/work", 0))
	require.NoError(t, RemoveVolatileMark(dir))
	require.NoDirExists(t, dir+"/work/incompat/volatile")
	require.DirExists(t, dir+"/work/incompat/unknown")
	require.NoError(t, RemoveVolatileMark(dir+"/missing"))
}

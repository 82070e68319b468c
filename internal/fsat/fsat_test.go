package fsat

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Both ways of opening, with openat2 and without, keep to the same rules.
func TestOpenStaysBeneath(t *testing.T) {
	base := t.TempDir()
	require.NoError(t, os.MkdirAll(base+"/root/a/b", 0o755))
	require.NoError(t, os.MkdirAll(base+"/out", 0o755))
	for _, f := range []string{"/root/f", "/root/a/b/f", "/out/f"} {
		require.NoError(t, os.WriteFile(base+f, nil, 0o644))
	}
	for name, target := range map[string]string{"up": "../out", "abs": base + "/out", "in": "a", "a/self": ".", "last": "f"} {
		require.NoError(t, os.Symlink(target, filepath.Join(base, "root", name)))
	}
	for _, stepwise := range []bool{false, true} {
		r, err := OpenRoot(base + "/root")
		require.NoError(t, err)
		r.stepwise.Store(stepwise)
		for path, want := range map[string]bool{
			"": true, "f": true, "a": true, "a/b": true, "a/b/f": true,
			"up/f": false, "abs/f": false, "in/b": false, "in/b/f": false, "a/self/b/f": false, "last": false, "a/self": false,
			"none": false, "a/none/f": false, "f/x": false, "a/b/f/x": false,
		} {
			fd, err := r.Open(path, unix.O_RDONLY, 0)
			require.Equal(t, want, err == nil, "%q: %v", path, err)
			if err == nil {
				Close(fd)
			} else {
				require.True(t, Absent(err), "%q: %v", path, err)
			}
		}
		fd, err := r.Open("a/self", unix.O_PATH, 0)
		require.NoError(t, err, "a link itself can be named")
		target, err := Readlink(fd, "")
		require.NoError(t, err)
		require.Equal(t, ".", target)
		Close(fd)
		require.NoError(t, r.Close())
	}
}

func TestDescriptorsAreNotLeaked(t *testing.T) {
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(list)
	}
	base := t.TempDir()
	long := strings.TrimSuffix(strings.Repeat(strings.Repeat("n", 250)+"/", 40), "/")
	r, err := OpenRoot(base)
	require.NoError(t, err)
	before := count()
	for _, stepwise := range []bool{false, true} {
		r.stepwise.Store(stepwise)
		for _, path := range []string{long, "a/b/c/d", strings.Repeat("x", 5000)} {
			_, err := r.Open(path, unix.O_RDONLY, 0)
			require.Error(t, err)
		}
	}
	require.Equal(t, before, count())
	require.NoError(t, r.Close())
}

func TestErrorKeepsErrnoAndClass(t *testing.T) {
	for errno, class := range map[unix.Errno]error{
		unix.ENOENT: errdefs.ErrNotFound, unix.EACCES: errdefs.ErrPermissionDenied, unix.EROFS: errdefs.ErrPermissionDenied,
		unix.ENOSPC: errdefs.ErrResourceExhausted, unix.ENOTDIR: errdefs.ErrInvalidArgument, unix.EBUSY: errdefs.ErrUnavailable,
	} {
		err := Error("open", "a\nb", &os.PathError{Op: "x", Path: "y", Err: errno})
		require.ErrorIs(t, err, errno)
		require.ErrorIs(t, err, class)
		require.Contains(t, err.Error(), `open "a\nb": `)
	}
	require.NoError(t, Error("open", "x", nil))
	require.ErrorIs(t, Error("x", "y", context.Canceled), context.Canceled)
}

func TestKept(t *testing.T) {
	for name, want := range map[string][2]bool{ // for a user, for root
		"user.x": {true, true}, "user.overlayish": {true, true}, "user.overlay.opaque": {false, false},
		"trusted.x": {false, true}, "trusted.overlay.whiteout": {false, false},
		"security.capability": {false, true}, "security.selinux": {false, false}, "security.ima": {false, false},
		"system.posix_acl_access": {true, true}, "system.posix_acl_default": {true, true}, "system.nfs4_acl": {false, false},
		"btrfs.compression": {false, false}, "": {false, false},
	} {
		require.Equal(t, want, [2]bool{Kept(name, false), Kept(name, true)}, name)
	}
}

// Every way of copying gives the same content, and holes stay holes.
func TestCopy(t *testing.T) {
	dir := t.TempDir()
	src, err := os.Create(dir + "/src")
	require.NoError(t, err)
	defer src.Close()
	rnd := rand.New(rand.NewPCG(1, 2))
	const size = 40<<20 + 17
	for _, at := range []int64{0, 5 << 20, 5<<20 + 4096, 39<<20 + 3} {
		block := make([]byte, 100_000)
		for i := range block {
			block[i] = byte(rnd.Uint32())
		}
		_, err := src.WriteAt(block, at)
		require.NoError(t, err)
	}
	require.NoError(t, src.Truncate(size))
	want, err := os.ReadFile(dir + "/src")
	require.NoError(t, err)

	for name, prepare := range map[string]func(*Copier){
		"best":           func(*Copier) {},
		"no clone":       func(c *Copier) { c.noClone.Store(true) },
		"read and write": func(c *Copier) { c.noClone.Store(true); c.noRange.Store(true) },
	} {
		dst, err := os.Create(dir + "/dst")
		require.NoError(t, err)
		c := &Copier{}
		prepare(c)
		var done int64
		require.NoError(t, c.Copy(t.Context(), int(dst.Fd()), int(src.Fd()), size, func(n int64) { done += n }))
		require.EqualValues(t, size, done, name)
		have, err := os.ReadFile(dir + "/dst")
		require.NoError(t, err)
		require.True(t, string(want) == string(have), name)
		var st unix.Stat_t
		require.NoError(t, unix.Fstat(int(dst.Fd()), &st))
		require.Less(t, st.Blocks*512, int64(4<<20), name)
		require.NoError(t, dst.Close())

		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if name != "best" { // a clone is over before anybody can cancel it
			dst, err = os.Create(dir + "/dst")
			require.NoError(t, err)
			require.ErrorIs(t, c.Copy(ctx, int(dst.Fd()), int(src.Fd()), size, nil), context.Canceled)
			require.NoError(t, dst.Close())
		}
	}
}

func TestRemoveAllFollowsNothing(t *testing.T) {
	base := t.TempDir()
	require.NoError(t, os.MkdirAll(base+"/d/e/f", 0o755))
	require.NoError(t, os.MkdirAll(base+"/out", 0o755))
	require.NoError(t, os.WriteFile(base+"/out/victim", nil, 0o644))
	require.NoError(t, os.Symlink(base+"/out", base+"/d/e/link"))
	require.NoError(t, os.Symlink(base+"/out", base+"/link"))
	require.NoError(t, os.Chmod(base+"/d/e/f", 0))
	require.NoError(t, os.Chmod(base+"/d/e", 0o500))
	r, err := OpenRoot(base)
	require.NoError(t, err)
	for _, name := range []string{"d", "link", "none"} {
		require.NoError(t, RemoveAll(r.Fd(), name))
		_, err := os.Lstat(base + "/" + name)
		require.ErrorIs(t, err, os.ErrNotExist)
	}
	require.FileExists(t, base+"/out/victim")
	require.NoError(t, r.Close())
}

func TestTempNames(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		name := TempName()
		require.True(t, IsTemp(name))
		require.False(t, seen[name])
		seen[name] = true
	}
	for _, name := range []string{"", ".lamina-.tmp", ".lamina-x.tmp", "x" + TempName(), TempName() + "x", ".lamina.toml"} {
		require.False(t, IsTemp(name), name)
	}
}

func TestRealPath(t *testing.T) {
	base, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(base+"/real/sub", 0o755))
	require.NoError(t, os.Symlink("real", base+"/link"))
	require.NoError(t, os.Symlink("gone", base+"/dangling"))
	require.NoError(t, os.Symlink("loop", base+"/loop"))
	for in, want := range map[string]string{
		"/link/sub": "/real/sub", "/link/none/x": "/real/none/x", "/dangling": "/dangling", "/dangling/x": "/dangling/x", "/none": "/none",
	} {
		got, err := RealPath(base + in)
		require.NoError(t, err, in)
		require.Equal(t, base+want, got)
	}
	_, err = RealPath(base + "/loop/x")
	require.Error(t, err)
	require.True(t, Inside("/a/b", "/a"))
	require.True(t, Inside("/a", "/a"))
	require.True(t, Inside("/a", "/"))
	require.False(t, Inside("/ab", "/a"))
	require.False(t, Inside("/a", "/a/b"))
}

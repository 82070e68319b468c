package snapshot_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/sysx"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot"
)

// stage is an overlay driver with the committed layer base, which holds a, b
// and d/e.
func stage(t *testing.T) (d snapshot.Driver, root string) {
	t.Helper()
	needRoot(t)
	root = t.TempDir()
	d = openWith(t, snapshot.Overlay, root, &steps{})
	_, err := d.Prepare(t.Context(), "w", "")
	require.NoError(t, err)
	mounted(t, d, "w", false, func(dir string) {
		require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
		for _, name := range []string{"a", "b", "d/e"} {
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644))
		}
	})
	require.NoError(t, d.Commit(t.Context(), "base", "w"))
	return d, root
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// Even a snapshot without a parent is mounted as a real overlay, on the empty
// layer: a whiteout in its layer does not show.
func TestWhiteoutsNeverShow(t *testing.T) {
	d, root := stage(t)
	_, err := d.Prepare(t.Context(), "k", "")
	require.NoError(t, err)
	upper := filepath.Join(root, "snapshots", "active", "k", "fs")
	require.NoError(t, unix.Mknod(filepath.Join(upper, "gone"), unix.S_IFCHR, 0))
	require.NoError(t, os.WriteFile(filepath.Join(upper, "kept"), nil, 0o644))
	for _, readOnly := range []bool{true, false} {
		mounted(t, d, "k", readOnly, func(dir string) { require.Equal(t, []string{"kept"}, names(t, dir)) })
	}
	require.NoError(t, d.Commit(t.Context(), "n", "k"))
	mounted(t, d, "n", true, func(dir string) { require.Equal(t, []string{"kept"}, names(t, dir)) })
	// A view of one layer for others, which containerd's own driver binds.
	mounts, err := d.View(t.Context(), "v", "n")
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, mount.All(mounts, dir))
	require.Equal(t, []string{"kept"}, names(t, dir))
	require.ErrorIs(t, os.WriteFile(filepath.Join(dir, "x"), nil, 0o644), unix.EROFS)
	require.NoError(t, unix.Unmount(dir, 0))
}

// The topmost layer's root is what a mount shows of its root: a child starts
// with the parent's.
func TestRootIsInherited(t *testing.T) {
	for _, driver := range []string{snapshot.Overlay, snapshot.Native} {
		t.Run(driver, func(t *testing.T) {
			needRoot(t)
			root := t.TempDir()
			d := openWith(t, driver, root, &steps{})
			_, err := d.Prepare(t.Context(), "k", "")
			require.NoError(t, err)
			var want unix.Stat_t
			mounted(t, d, "k", false, func(dir string) {
				require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o644))
				require.NoError(t, os.Chown(dir, 12, 34))
				require.NoError(t, os.Chmod(dir, 0o2750|os.ModeSetgid))
				require.NoError(t, unix.Setxattr(dir, "user.of", []byte("base"), 0))
				require.NoError(t, unix.UtimesNano(dir, []unix.Timespec{{Sec: 1}, {Sec: 2, Nsec: 3}}))
				require.NoError(t, unix.Stat(dir, &want))
			})
			require.NoError(t, d.Commit(t.Context(), "n", "k"))
			_, err = d.Prepare(t.Context(), "k", "n")
			require.NoError(t, err)
			for _, key := range []string{"n", "k"} {
				mounted(t, d, key, true, func(dir string) {
					var got unix.Stat_t
					require.NoError(t, unix.Stat(dir, &got))
					require.Equal(t, [4]uint64{uint64(want.Mode), uint64(want.Uid), uint64(want.Gid), uint64(want.Mtim.Nano())},
						[4]uint64{uint64(got.Mode), uint64(got.Uid), uint64(got.Gid), uint64(got.Mtim.Nano())}, key)
					value, err := sysx.Getxattr(dir, "user.of")
					require.NoError(t, err)
					require.Equal(t, "base", string(value))
				})
			}
		})
	}
}

// The overlay marks of the parent's root must not come along: an opaque root
// would hide all layers below.
func TestRootMarksStay(t *testing.T) {
	d, root := stage(t)
	_, err := d.Prepare(t.Context(), "k", "base")
	require.NoError(t, err)
	path := filepath.Join(root, "snapshots", "committed", "base", "fs")
	require.NoError(t, unix.Setxattr(path, "trusted.overlay.opaque", []byte("y"), 0))
	_, err = d.Prepare(t.Context(), "k2", "base")
	require.NoError(t, err)
	mounted(t, d, "k2", false, func(dir string) { require.Equal(t, []string{"a", "b", "d"}, names(t, dir)) })
	_, err = sysx.Getxattr(filepath.Join(root, "snapshots", "active", "k2", "fs"), "trusted.overlay.opaque")
	require.ErrorIs(t, err, unix.ENODATA)
}

// A volatile mount leaves a mark that keeps the kernel from mounting again;
// the driver takes it away, for its own mounts and for those of others.
func TestVolatileMark(t *testing.T) {
	d, root := stage(t)
	require.True(t, d.Info().Features["volatile"])
	_, err := d.Prepare(t.Context(), "k", "base")
	require.NoError(t, err)
	mark := filepath.Join(root, "snapshots", "active", "k", "work", "work", "incompat", "volatile")
	mounted(t, d, "k", false, func(string) {})
	require.DirExists(t, mark)
	mounted(t, d, "k", false, func(string) {
		// While it is mounted the mark stays, whoever asks.
		_, err := d.Mounts(t.Context(), "k")
		require.NoError(t, err)
		require.DirExists(t, mark)
	})
	mounts, err := d.Mounts(t.Context(), "k")
	require.NoError(t, err)
	require.NoDirExists(t, mark)
	require.NotContains(t, mounts[0].Options, "volatile")
}

// The driver asks before each writable mount: a second one with the same
// upper directory, from whatever mount, is refused.
func TestUpperIsNeverShared(t *testing.T) {
	d, _ := stage(t)
	mounts, err := d.Prepare(t.Context(), "k", "base")
	require.NoError(t, err)
	foreign := t.TempDir()
	require.NoError(t, mount.All(mounts, foreign))
	busy, err := d.InUse(t.Context(), "k")
	require.NoError(t, err)
	require.True(t, busy)
	err = d.Mount(t.Context(), "k", t.TempDir(), false)
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorContains(t, err, "writable layer")
	require.NoError(t, unix.Unmount(foreign, 0))
	mounted(t, d, "k", false, func(dir string) { require.Equal(t, []string{"a", "b", "d"}, names(t, dir)) })
}

// The work directory goes when the mount has gone, not before.
func TestWorkGoesAfterCommit(t *testing.T) {
	d, root := stage(t)
	work := func(name string) string { return filepath.Join(root, "snapshots", "committed", name, "work") }
	_, err := d.Prepare(t.Context(), "never mounted", "base")
	require.NoError(t, err)
	require.NoError(t, d.Commit(t.Context(), "n1", "never mounted"))
	require.NoDirExists(t, work("n1"))

	_, err = d.Prepare(t.Context(), "k", "base")
	require.NoError(t, err)
	mounted(t, d, "k", false, func(dir string) {
		require.NoError(t, d.Commit(t.Context(), "n2", "k"))
		busy, err := d.InUse(t.Context(), "n2")
		require.NoError(t, err)
		require.True(t, busy, "a mount follows its renamed upper directory")
		require.NoError(t, d.Cleanup(t.Context()))
		require.DirExists(t, work("n2"))
		require.NoError(t, os.Remove(filepath.Join(dir, "a")))
	})
	require.NoError(t, d.Cleanup(t.Context()))
	require.NoDirExists(t, work("n2"))
	mounted(t, d, "n2", true, func(dir string) { require.Equal(t, []string{"b", "d"}, names(t, dir)) })

	_, err = d.Prepare(t.Context(), "k", "base")
	require.NoError(t, err)
	mounted(t, d, "k", false, func(string) {})
	require.NoError(t, d.Commit(t.Context(), "n3", "k"))
	require.NoError(t, d.Close())
	require.NoDirExists(t, work("n3"))
}

// Directories adopted from another owner are reached through links in
// otherwise ordinary entries.
func TestAdoptedEntries(t *testing.T) {
	d, root := stage(t)
	at := func(elem ...string) string { return filepath.Join(append([]string{root, "snapshots"}, elem...)...) }
	for _, key := range []string{"k", "gone"} {
		_, err := d.Prepare(t.Context(), key, "base")
		require.NoError(t, err)
		require.NoError(t, os.MkdirAll(at("snapshots", key), 0o711))
		for _, dir := range []string{"fs", "work"} {
			require.NoError(t, os.Rename(at("active", key, dir), at("snapshots", key, dir)))
			require.NoError(t, os.Symlink("../../snapshots/"+key+"/"+dir, at("active", key, dir)))
		}
	}
	require.NoError(t, os.MkdirAll(at("snapshots", "other", "fs"), 0o711))

	write := func(name string) {
		mounted(t, d, "k", false, func(dir string) {
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), make([]byte, 64<<10), 0o644))
		})
	}
	write("x")
	write("y")
	require.FileExists(t, at("snapshots", "k", "fs", "x"))
	used, err := d.Usage(t.Context(), "k")
	require.NoError(t, err)
	require.EqualValues(t, 3, used.Inodes)
	require.NoError(t, d.Commit(t.Context(), "n", "k"))
	require.NoError(t, d.Cleanup(t.Context()))
	mounts, err := d.View(t.Context(), "v", "n")
	require.NoError(t, err)
	for _, check := range []func(func(string)){
		func(do func(string)) { mounted(t, d, "n", true, do) },
		func(do func(string)) {
			dir := t.TempDir()
			require.NoError(t, mount.All(mounts, dir))
			do(dir)
			require.NoError(t, unix.Unmount(dir, 0))
		},
	} {
		check(func(dir string) { require.Equal(t, []string{"a", "b", "d", "x", "y"}, names(t, dir)) })
	}
	require.NoError(t, d.Remove(t.Context(), "v"))
	p, err := d.Detach(t.Context(), "n")
	require.NoError(t, err)
	require.NoError(t, d.Restore(t.Context(), p))
	require.NoError(t, d.Remove(t.Context(), "n"))
	require.NoError(t, d.Remove(t.Context(), "gone"))
	require.NoError(t, d.Cleanup(t.Context()))
	require.Equal(t, []string{"other"}, names(t, at("snapshots")))
}

// A link that no adoption makes leads no removal out of the tree.
func TestRemovalFollowsNoOtherLink(t *testing.T) {
	d, root := stage(t)
	precious := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(precious, "file"), nil, 0o644))
	for i, target := range []string{precious, "../../snapshots/../../..", "../../snapshots/", "../../snapshots/../fs"} {
		key := string(rune('a' + i))
		_, err := d.Prepare(t.Context(), key, "")
		require.NoError(t, err)
		path := filepath.Join(root, "snapshots", "active", key, "fs")
		require.NoError(t, os.Remove(path))
		require.NoError(t, os.Symlink(target, path))
		p, err := d.Detach(t.Context(), key)
		require.NoError(t, err)
		err = d.Discard(t.Context(), p)
		require.True(t, errdefs.IsDataLoss(err), "%v", err)
	}
	require.FileExists(t, filepath.Join(precious, "file"))
	require.DirExists(t, filepath.Join(root, "snapshots", "committed", "base", "fs"))
}

// The mounts for others keep to what OCI runtimes expect: overlay's own
// options, paths with characters that mean something in options.
func TestMountOptions(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), `odd,name:with\marks`)
	d := openWith(t, snapshot.Overlay, root, &steps{})
	chain(t, d, root, 2)
	mounts, err := d.Prepare(t.Context(), "k", "l2")
	require.NoError(t, err)
	require.Len(t, mounts, 1)
	require.Equal(t, "overlay", mounts[0].Type)
	for _, o := range []string{"index=off", "metacopy=off", "redirect_dir=nofollow", "xino=off"} {
		require.Contains(t, mounts[0].Options, o)
	}
	require.False(t, mounts[0].ReadOnly())
	dir := t.TempDir()
	require.NoError(t, mount.All(mounts, dir))
	requireChain(t, dir, 2)
	require.NoError(t, unix.Unmount(dir, 0))
	mounted(t, d, "k", false, func(dir string) { requireChain(t, dir, 2) })

	first, err := d.Prepare(t.Context(), "first", "")
	require.NoError(t, err)
	require.Equal(t, []mount.Mount{{
		Type: "bind", Source: filepath.Join(root, "snapshots", "active", "first", "fs"), Options: []string{"rbind", "rw"},
	}}, first)
	view, err := d.View(t.Context(), "v", "l2")
	require.NoError(t, err)
	require.True(t, view[0].ReadOnly())
	require.NotContains(t, strings.Join(view[0].Options, ","), "upperdir")
}

// A child by rebase counts like any other, a detached one does not.
func TestRebasedAndDetachedChildren(t *testing.T) {
	d, _ := stage(t)
	_, err := d.Prepare(t.Context(), "k", "")
	require.NoError(t, err)
	require.NoError(t, d.Commit(t.Context(), "n", "k", func(i *snapshots.Info) error { i.Parent = "base"; return nil }))
	err = d.Remove(t.Context(), "base")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	p, err := d.Detach(t.Context(), "n")
	require.NoError(t, err)
	require.NoError(t, d.Remove(t.Context(), "base"), "a detached child does not count")
	err = d.Restore(t.Context(), p)
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.NoError(t, d.Discard(context.Background(), p))
}

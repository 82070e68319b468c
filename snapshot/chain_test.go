package snapshot_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

// mounted mounts key for the time of do.
func mounted(t *testing.T, d snapshot.Driver, key string, readOnly bool, do func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, d.Mount(t.Context(), key, dir, readOnly))
	defer func() { require.NoError(t, unix.Unmount(dir, 0)) }()
	do(dir)
}

// chain commits layers l1 to ln, each with a file of its own and one that all
// of them replace.
func chain(t *testing.T, d snapshot.Driver, root string, n int) {
	t.Helper()
	parent := ""
	for i := 1; i <= n; i++ {
		key := fmt.Sprint("w", i)
		_, err := d.Prepare(t.Context(), key, parent)
		require.NoError(t, err)
		dir := filepath.Join(root, "snapshots", "active", key, "fs")
		require.NoError(t, os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), nil, 0o644))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "all"), []byte(fmt.Sprint(i)), 0o644))
		parent = fmt.Sprint("l", i)
		require.NoError(t, d.Commit(t.Context(), parent, key))
	}
}

func requireChain(t *testing.T, dir string, n int) {
	t.Helper()
	top, err := os.ReadFile(filepath.Join(dir, "all"))
	require.NoError(t, err)
	require.Equal(t, fmt.Sprint(n), string(top))
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, names, n+1)
}

// The kernel stacks 500 lower layers; the driver stacks as many, however
// long the paths are, by its own mounts and by those of containerd.
func TestDeepChain(t *testing.T) {
	needRoot(t)
	// Its length and that of inode numbers have to leave room for 500 names in
	// a page; the paths of the layers alone would fill 20.
	root := filepath.Join(t.TempDir(), strings.Repeat("long-directory-name/", 5))
	d := openWith(t, snapshot.Overlay, root, &steps{})
	depth := d.Info().MaxDepth
	require.Equal(t, 500, depth)
	chain(t, d, root, depth)
	top := fmt.Sprint("l", depth)

	check := func(d snapshot.Driver) {
		mounted(t, d, top, true, func(dir string) { requireChain(t, dir, depth) })
		for i, create := range []func() ([]mount.Mount, error){
			func() ([]mount.Mount, error) { return d.View(t.Context(), "v", top) },
			func() ([]mount.Mount, error) { return d.Prepare(t.Context(), "k", top) },
			func() ([]mount.Mount, error) { return d.Mounts(t.Context(), "v") },
			func() ([]mount.Mount, error) { return d.Mounts(t.Context(), "k") },
		} {
			mounts, err := create()
			require.NoError(t, err)
			dir := t.TempDir()
			require.NoError(t, mount.All(mounts, dir), "mounts %d", i)
			requireChain(t, dir, depth)
			require.NoError(t, unix.Unmount(dir, 0))
		}
		mounted(t, d, "k", false, func(dir string) {
			requireChain(t, dir, depth)
			require.NoError(t, os.Remove(filepath.Join(dir, "f1")))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "f500"), []byte("new"), 0o644))
		})
		// With the snapshot's own layer it is one too many for a read-only
		// mount, and as a committed one nobody could mount it.
		err := d.Mount(t.Context(), "k", t.TempDir(), true)
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	}
	check(d)
	require.NoError(t, d.Remove(t.Context(), "v"))
	require.NoError(t, d.Remove(t.Context(), "k"))
	// Again with nothing remembered.
	check(openWith(t, snapshot.Overlay, root, &steps{}))

	require.NoError(t, d.Commit(t.Context(), "l501", "k"))
	_, err := d.Prepare(t.Context(), "k", "l501")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorContains(t, err, "500")
}

// Short links are replaced when an inode number comes back, and go with the
// snapshot.
func TestShortLinks(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), strings.Repeat("long-directory-name/", 10))
	d := openWith(t, snapshot.Overlay, root, &steps{})
	chain(t, d, root, 40)
	links := func() (n int) {
		names, err := os.ReadDir(filepath.Join(root, "snapshots", "l"))
		require.NoError(t, err)
		return len(names)
	}
	require.Positive(t, links())
	// As a removal that was cut would leave them: wrong ones for all inodes.
	for i := 1; i <= 40; i++ {
		fi, err := os.Stat(filepath.Join(root, "snapshots", "committed", fmt.Sprint("l", i), "fs"))
		require.NoError(t, err)
		link := filepath.Join(root, "snapshots", "l", snapshot.ShortName(fi))
		_ = os.Remove(link)
		require.NoError(t, os.Symlink("../committed/none/fs", link))
	}
	again := openWith(t, snapshot.Overlay, root, &steps{})
	mounts, err := again.View(t.Context(), "v", "l40")
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, mount.All(mounts, dir))
	requireChain(t, dir, 40)
	require.NoError(t, unix.Unmount(dir, 0))

	require.NoError(t, again.Remove(t.Context(), "v"))
	for i := 40; i > 0; i-- {
		require.NoError(t, again.Remove(t.Context(), fmt.Sprint("l", i)))
	}
	require.NoError(t, again.Cleanup(context.Background()))
	require.Equal(t, 1, links(), "the empty layer's")
}

// A file takes 65,000 links on ext4; more children than that are counted by
// further files.
func TestMoreChildrenThanLinks(t *testing.T) {
	root := scratch(t)
	d := openWith(t, snapshot.Native, root, &steps{})
	chain(t, d, root, 1)
	_, err := d.Prepare(t.Context(), "k", "l1")
	require.NoError(t, err)
	// The second file is there already, as if the first one were full.
	dir := filepath.Join(root, "snapshots", "committed", "l1")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "id.1"), nil, 0o600))
	other := filepath.Join(root, "snapshots", "active", "k", "parent")
	require.NoError(t, os.Remove(other))
	require.NoError(t, os.Link(filepath.Join(dir, "id.1"), other))
	err = d.Remove(t.Context(), "l1")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.NoError(t, d.Remove(t.Context(), "k"))
	require.NoError(t, d.Remove(t.Context(), "l1"))
}

// On a file system with a limit the next file is made when it is reached.
func TestLinkLimit(t *testing.T) {
	if testing.Short() {
		t.Skip("makes 65,000 links")
	}
	root := t.TempDir()
	d := openWith(t, snapshot.Native, root, &steps{})
	chain(t, d, root, 1)
	dir := filepath.Join(root, "snapshots", "committed", "l1")
	id := filepath.Join(dir, "id")
	require.NoError(t, os.WriteFile(id, nil, 0o600))
	many := t.TempDir()
	for i := 0; ; i++ {
		err := os.Link(id, filepath.Join(many, fmt.Sprint(i)))
		if err != nil {
			require.ErrorIs(t, err, unix.EMLINK)
			break
		}
		if i == 70_000 {
			t.Log("this file system has no limit that matters")
			return
		}
	}
	_, err := d.Prepare(t.Context(), "k", "l1")
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(dir, "id.1"))
	require.NoError(t, os.RemoveAll(many))
	err = d.Remove(t.Context(), "l1")
	require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
	require.ErrorContains(t, err, "parent of 1:")
	require.NoError(t, d.Remove(t.Context(), "k"))
	require.NoError(t, d.Remove(t.Context(), "l1"))
}

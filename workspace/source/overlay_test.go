package source

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// mountOverlay mounts an overlay with the options that workspaces have.
func mountOverlay(t *testing.T, lower, upper string) string {
	t.Helper()
	merged, work := t.TempDir(), t.TempDir()
	err := unix.Mount("overlay", merged, "overlay", 0,
		"index=off,metacopy=off,redirect_dir=nofollow,xino=off,lowerdir="+lower+",upperdir="+upper+",workdir="+work)
	if err != nil {
		t.Skipf("overlayfs cannot be mounted here: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(merged, unix.MNT_DETACH) })
	return merged
}

// A workspace is an overlay, and may become a layer below another one: then
// inode and device numbers change and hard links come apart when written to.
// What the tree recorded must go on to hold.
func TestWorkspaceOnOverlay(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: overlayfs is tried by the drivers' tests")
	}
	base := t.TempDir() // on a file system that can be an upper layer
	makeTree(t, base, "src/", "empty/", "one/", "two/")
	src := base + "/src"
	makeTree(t, src, sample...)
	age(t, src)
	require.NoError(t, unix.Setxattr(src+"/README", "user.x", []byte("1"), 0))

	first := mountOverlay(t, base+"/empty", base+"/one")
	r := syncDirs(t, src, first, nil)
	requireSynced(t, src, first)
	settle(r.Tree)
	write(t, first+"/cmd/main.o", "built")
	require.NoError(t, unix.Unmount(first, 0))

	second := mountOverlay(t, base+"/one:"+base+"/empty", base+"/two")
	r = syncDirs(t, src, second, r.Tree)
	require.Zero(t, r.Changed)
	requireSynced(t, src, second, "cmd/main.o")

	write(t, src+"/README", "changed")
	require.NoError(t, os.RemoveAll(src+"/a"))
	require.NoError(t, os.Chmod(src+"/cmd/main.go", 0o600))
	write(t, src+"/one", "other")
	makeTree(t, src, "a=file now")
	write(t, second+"/a/product", "goes: the source wins")
	write(t, second+"/a-b", "by the command")
	require.NoError(t, os.RemoveAll(second+"/empty"))
	for range 2 {
		r = syncDirs(t, src, second, r.Tree)
		requireSynced(t, src, second, "cmd/main.o")
	}
	require.Zero(t, r.Changed)

	// A link made in the lower layer, one name written by the command: the
	// copy comes apart from its other names.
	require.NoError(t, os.WriteFile(second+"/cmd/two", []byte("command"), 0o644))
	r = syncDirs(t, src, second, r.Tree)
	requireSynced(t, src, second, "cmd/main.o")
}

package source

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// nobody is the ordinary user that root's tests become.
const nobody = 65534

// TestAsOrdinaryUser runs the tests named TestUser... (and, being run as such
// a user, all others) once more without root's rights.
func TestAsOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: all tests run as an ordinary user already")
	}
	exe, err := os.Executable()
	require.NoError(t, err)
	// The test binary and its temporary directory must be in reach of nobody.
	dir, err := os.MkdirTemp("", "source-user-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	bin := filepath.Join(dir, "test")
	content, err := os.ReadFile(exe)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(bin, content, 0o755))
	tmp := filepath.Join(dir, "tmp")
	require.NoError(t, os.Mkdir(tmp, 0o777))
	require.NoError(t, os.Chown(tmp, nobody, nobody))

	cmd := exec.CommandContext(t.Context(), bin, "-test.run", "TestUser|TestFirstSync|TestSecondSync|TestXattrs|TestCancelled|TestDeep|TestScanRefuses", "-test.v", "-test.timeout", "60s")
	cmd.Dir = tmp
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody, Groups: []uint32{}}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestUserUnreadable")
	require.Contains(t, string(out), "--- PASS: TestFirstSyncIsExact")
}

func asUser(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		t.Skip("root: runs as an ordinary user from TestAsOrdinaryUser")
	}
}

func TestUserUnreadable(t *testing.T) {
	asUser(t)
	for name, path := range map[string]string{"file": "d/f", "directory": "d"} {
		src, dst := t.TempDir(), t.TempDir()
		makeTree(t, src, "d/f=x", "g=y")
		readable := scan(t, src, nil)
		require.NoError(t, os.Chmod(src+"/"+path, 0o000))
		_, err := Scan(context.Background(), src, Options{}, nil)
		require.True(t, errdefs.IsPermissionDenied(err), "%v", err)
		require.ErrorContains(t, err, `"`+path+`"`, name)
		_, err = readable.SyncTo(context.Background(), src, dst, nil, nil)
		require.True(t, errdefs.IsPermissionDenied(err) || errdefs.IsAborted(err), "%v", err)
		require.NoError(t, os.Chmod(src+"/"+path, 0o700))
	}
	src := t.TempDir()
	require.NoError(t, os.Chmod(src, 0o000))
	_, err := Scan(context.Background(), src, Options{}, nil)
	require.True(t, errdefs.IsPermissionDenied(err), "%v", err)
	require.NoError(t, os.Chmod(src, 0o700))
}

// Directories without rights for their own user, as the module cache of Go
// has, on both sides.
func TestUserReadOnlyDirectories(t *testing.T) {
	asUser(t)
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "mod/pkg/a.go=a", "mod/pkg/b.go=b", "mod/pkg/sub/c.go=c", "x=1")
	lock := func(mode os.FileMode, dirs ...string) {
		for _, d := range dirs {
			require.NoError(t, os.Chmod(d, mode))
		}
	}
	all := []string{src + "/mod/pkg/sub", src + "/mod/pkg", src + "/mod"}
	lock(0o555, all...)
	t.Cleanup(func() {
		for _, d := range []string{"/mod", "/mod/pkg", "/mod/pkg/sub"} {
			_ = os.Chmod(src+d, 0o755)
			_ = os.Chmod(dst+d, 0o755)
		}
	})
	r := syncDirs(t, src, dst, nil)
	requireSynced(t, src, dst)

	// an edit, an addition and a removal below them
	lock(0o755, src+"/mod", src+"/mod/pkg")
	write(t, src+"/mod/pkg/a.go", "changed")
	write(t, src+"/mod/pkg/new.go", "new")
	require.NoError(t, os.Remove(src+"/mod/pkg/b.go"))
	lock(0o555, src+"/mod/pkg", src+"/mod")
	r = syncDirs(t, src, dst, r.Tree)
	require.Equal(t, 2, r.Changed)
	require.Equal(t, 1, r.Removed)
	requireSynced(t, src, dst)

	// a command that locked its workspace
	lock(0o000, dst+"/mod/pkg", dst+"/mod")
	lock(0o555, dst)
	r = syncDirs(t, src, dst, r.Tree)
	var st unix.Stat_t
	require.NoError(t, unix.Stat(dst, &st))
	require.EqualValues(t, 0o555, st.Mode&0o777, "the workspace itself is not the source's")
	lock(0o755, dst)
	requireSynced(t, src, dst)

	// the source drops them, products inside and all
	lock(0o755, src+"/mod", src+"/mod/pkg", src+"/mod/pkg/sub")
	require.NoError(t, os.RemoveAll(src+"/mod"))
	r = syncDirs(t, src, dst, r.Tree)
	requireSynced(t, src, dst)
}

func TestUserCannotKeep(t *testing.T) {
	asUser(t)
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "f=x")
	require.NoError(t, os.Chmod(src+"/f", 0o400))
	require.NoError(t, unix.Mkfifo(src+"/p", 0o600))
	tree := scan(t, src, nil)
	// A device of somebody else, as it would be in a source that root made.
	tree.nodes = append(tree.nodes, node{name: "zero", parent: -1, link: 2, typ: CharDevice, rdev: unix.Mkdev(1, 5), mode: 0o666})
	tree.nodes[0].uid = 0
	tree.index()
	r, err := tree.SyncTo(context.Background(), src, dst, nil, nil)
	require.NoError(t, err)
	require.Len(t, r.Notes, 1)
	require.Equal(t, "zero", r.Notes[0].Path)
	require.Contains(t, r.Notes[0].Reason, "device 1:5 left out")
	require.Equal(t, "x", read(t, dst+"/f"))
	require.Equal(t, 2, r.Changed)
	// user.* of a file that its owner may not write
	require.NoError(t, os.Chmod(src+"/f", 0o600))
	require.NoError(t, unix.Setxattr(src+"/f", "user.x", []byte("1"), 0))
	require.NoError(t, os.Chmod(src+"/f", 0o400))
	r = syncDirs(t, src, dst, r.Tree)
	requireSynced(t, src, dst)
	require.Equal(t, 1, r.Changed)
}

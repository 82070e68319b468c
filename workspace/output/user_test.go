package output

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// TestAsOrdinaryUser runs tests once more without root's rights.
func TestAsOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: all tests run as an ordinary user already")
	}
	exe, err := os.Executable()
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "output-user-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	content, err := os.ReadFile(exe)
	require.NoError(t, err)
	bin, tmp := filepath.Join(dir, "test"), filepath.Join(dir, "tmp")
	require.NoError(t, os.WriteFile(bin, content, 0o755))
	require.NoError(t, os.Mkdir(tmp, 0o700))
	const nobody = 65534
	require.NoError(t, os.Chown(tmp, nobody, nobody))
	cmd := exec.CommandContext(t.Context(), bin, "-test.v", "-test.run", "TestUser|TestCollect|TestUnchanged|TestNothing|TestLate", "-test.timeout", "60s")
	cmd.Dir = tmp
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody, Groups: []uint32{}}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestUserUnwritable")
	require.Contains(t, string(out), "--- PASS: TestCollect")
}

func TestUserUnwritable(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root: runs as an ordinary user from TestAsOrdinaryUser")
	}
	tree, out := place(t)
	write(t, tree+"/f", "f", 0o644)
	write(t, tree+"/d/x", "x", 0o644)
	write(t, out+"/locked/f", "old", 0o644)
	require.NoError(t, os.Chmod(out+"/locked", 0o555))
	t.Cleanup(func() { _ = os.Chmod(out+"/locked", 0o755) })
	for _, dest := range []string{"/locked/f", "/locked/new", "/locked/a/b/c"} {
		_, err := collect(t, tree, "d:"+out+"/d", "f:"+out+dest)
		require.True(t, errdefs.IsPermissionDenied(err), "%v", err)
		require.ErrorContains(t, err, out+"/locked")
		require.NoDirExists(t, out+"/d")
	}
	require.Equal(t, "old", read(t, out+"/locked/f"))

	require.NoError(t, os.Chmod(tree+"/f", 0))
	_, err := collect(t, tree, "d:"+out+"/d", "f:"+out+"/g")
	require.True(t, errdefs.IsPermissionDenied(err), "%v", err)
	require.NoDirExists(t, out+"/d")
	noTemps(t, out)

	// A directory that nobody may change, old and new, is replaced all the same.
	require.NoError(t, os.Chmod(tree+"/d", 0o555))
	t.Cleanup(func() { _ = os.Chmod(tree+"/d", 0o755); _ = os.Chmod(out+"/d", 0o755) })
	for _, content := range []string{"x", "y"} {
		require.NoError(t, os.Chmod(tree+"/d", 0o755))
		write(t, tree+"/d/x", content, 0o444)
		require.NoError(t, os.Chmod(tree+"/d", 0o555))
		_, err = collect(t, tree, "d:"+out+"/d")
		require.NoError(t, err)
		require.Equal(t, content, read(t, out+"/d/x"))
		require.NoError(t, os.Chmod(tree+"/d/x", 0o644))
	}
	noTemps(t, out)
}

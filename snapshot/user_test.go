package snapshot_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
)

// An ordinary user, who may mount in a user namespace only, stacks, cleans,
// compares and applies as root does: the same tests again, in a process of
// such a user.
func TestOrdinaryUser(t *testing.T) {
	needRoot(t)
	if limit, err := os.ReadFile("/proc/sys/user/max_user_namespaces"); err != nil || string(limit) == "0\n" {
		t.Skip("this kernel has no user namespaces")
	}
	const uid = 64123 // any id that owns nothing
	const tests = "^(TestOverlay|TestStackIsFlatAndCountsAsChild|TestCleanDropsWhatIsTheParents|TestRawLayerAndItsCleanCopy|" +
		"TestDeletedAndMadeAnew|TestDiffOfUnrelatedTrees)$/^(|Stack.*|Layers.*|Clean.*|Diff|Apply.*|file|directory|mode)$"
	// t.TempDir is closed to others, and so is the test binary.
	dir, err := os.MkdirTemp("", "snapshot-test-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, snapshot.RemoveTree(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	self := filepath.Join(dir, "self")
	exe, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(self, exe, 0o600))
	require.NoError(t, os.Chmod(self, 0o755))
	own := filepath.Join(dir, "own")
	require.NoError(t, os.Mkdir(own, 0o700))
	require.NoError(t, os.Chown(own, uid, uid))

	cmd := exec.CommandContext(t.Context(), self, "-test.run="+tests, "-test.v")
	cmd.Dir = "/"
	cmd.Env = []string{"TMPDIR=" + own, "LAMINA_TEST_OWN_MOUNTS=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// Known as root in there, as tests of mounts ask for that.
		Credential:  &syscall.Credential{NoSetGroups: true},
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	for _, passed := range []string{
		"--- PASS: TestDiffOfUnrelatedTrees", "--- PASS: TestRawLayerAndItsCleanCopy", "--- PASS: TestOverlay/StackMounts", "--- PASS: TestOverlay/Diff",
	} {
		require.Contains(t, string(out), passed)
	}
}

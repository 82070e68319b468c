package bench_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/hack/internal/bench"
)

// TestLoopDisk looks for what makes runs on it alike: ext4, all blocks there,
// and nothing left behind, whatever happened on it.
func TestLoopDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: a file system is mounted")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("no loop devices:", err)
	}
	const size = 32 << 20
	dir, failed := t.TempDir(), errors.New("failed")
	for _, want := range []error{nil, failed} {
		used := ""
		err := bench.WithLoopDisk(t.Context(), dir, size, func(root string) error {
			used = root
			var fs unix.Statfs_t
			require.NoError(t, unix.Statfs(root, &fs))
			require.EqualValues(t, unix.EXT4_SUPER_MAGIC, fs.Type)
			var image unix.Stat_t
			require.NoError(t, unix.Stat(filepath.Join(filepath.Dir(root), "image"), &image))
			require.GreaterOrEqual(t, image.Blocks*512, int64(size))
			require.NoError(t, os.WriteFile(filepath.Join(root, "file"), []byte("text"), 0o600))
			return want
		})
		require.ErrorIs(t, err, want)
		require.NotEmpty(t, used)
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, left)
	}
	require.Error(t, bench.WithLoopDisk(t.Context(), filepath.Join(dir, "missing"), size, nil))
}

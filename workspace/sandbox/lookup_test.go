package sandbox

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestLookUp(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o644))
	good := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(good, nil, 0o755))

	_, err := lookUp("file", []string{"PATH=" + dir})
	require.ErrorIs(t, err, unix.EACCES, "it is there and may not be executed")
	found, err := lookUp("file", []string{"PATH=" + dir + ":" + filepath.Dir(good)})
	require.NoError(t, err)
	require.Equal(t, good, found)
	_, err = lookUp("other", []string{"PATH=" + file + ":" + dir})
	require.ErrorIs(t, err, unix.ENOENT)
	if os.Geteuid() != 0 {
		require.NoError(t, os.Chmod(dir, 0))
		defer func() { require.NoError(t, os.Chmod(dir, 0o700)) }()
		_, err = lookUp("file", []string{"PATH=" + dir})
		require.ErrorIs(t, err, unix.ENOENT, "who may not look finds nothing")
	}
}

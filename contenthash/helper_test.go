package contenthash_test

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/contenthash/contenthashtest"
)

func needRoot(t testing.TB, why string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: " + why)
	}
}

// scratch is a directory for many small files: in memory where that can hold
// extended attributes of all kinds, else on disk.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "contenthash-")
	if err != nil || !takesXattrs(dir) {
		return t.TempDir()
	}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

func options(q contenthashtest.Query) contenthash.Options {
	return contenthash.Options{
		FollowLinks:     q.FollowLinks,
		Wildcard:        q.Wildcard,
		IncludePatterns: q.Include,
		ExcludePatterns: q.Exclude,
		RequiredPaths:   q.Required,
	}
}

func takesXattrs(dir string) bool {
	names := []string{"user.test"}
	if os.Geteuid() == 0 {
		names = append(names, "trusted.test", "security.test")
	}
	for _, name := range names {
		if unix.Setxattr(dir, name, nil, 0) != nil || unix.Removexattr(dir, name) != nil {
			return false
		}
	}
	return true
}

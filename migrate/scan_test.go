package migrate_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// The class of attributes is told by marks in the layers, by the owner of the
// databases, or by who asks. A layer that makes sense over its own parents only
// comes over as any other, and shows what it showed.
func TestLayersThatFollow(t *testing.T) {
	needsRoot(t)
	for _, class := range []string{"trusted", "user"} {
		t.Run(class, func(t *testing.T) {
			b := legacytest.NewBuilder(t.TempDir(), "overlayfs")
			b.Finalized("base", "", nil)
			b.Finalized("moved", "base", nil)
			b.Pair("child", "m", "moved")
			require.NoError(t, b.Write())
			require.NoError(t, os.Mkdir(filepath.Join(b.Dir, "snapshots", "snapshots", "1", "fs", "dir"), 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(b.Dir, "snapshots", "snapshots", "1", "fs", "dir", "in"), nil, 0o644))
			data := func(n, dir string) string { return filepath.Join(b.Dir, "snapshots", "snapshots", n, dir) }
			options := "redirect_dir=on,metacopy=on"
			if class == "user" {
				options = "userxattr"
			}
			dir := t.TempDir()
			require.NoError(t, unix.Mount("overlay", dir, "overlay", 0, "index=off,"+options+
				",lowerdir="+data("1", "fs")+",upperdir="+data("2", "fs")+",workdir="+data("2", "work")))
			func() {
				defer func() { require.NoError(t, unix.Unmount(dir, 0)) }()
				require.NoError(t, os.Chmod(filepath.Join(dir, "own-base"), 0o640))
				require.NoError(t, os.Mkdir(filepath.Join(dir, "opaque"), 0o755))
				if class == "trusted" {
					require.NoError(t, os.Rename(filepath.Join(dir, "dir"), filepath.Join(dir, "renamed")))
				}
			}()
			if class == "user" {
				require.NoError(t, unix.Setxattr(filepath.Join(data("2", "fs"), "opaque"), "user.overlay.opaque", []byte("y"), 0))
			}

			p := run(t, b.Dir, migrate.Options{}).Plan
			require.Equal(t, class, p.Attributes)
			m := open(t, b.Dir)
			for _, id := range []cache.ID{"moved", "child"} {
				ref, err := m.Get(t.Context(), id, cache.GetOptions{})
				require.NoError(t, err)
				mount, err := ref.Mount(t.Context())
				require.NoError(t, err)
				content, err := os.ReadFile(filepath.Join(mount.Path(), "own-base"))
				require.NoError(t, err)
				require.Equal(t, "content of base", string(content))
				require.DirExists(t, filepath.Join(mount.Path(), "opaque"))
				if class == "trusted" {
					require.FileExists(t, filepath.Join(mount.Path(), "renamed", "in"))
					require.NoDirExists(t, filepath.Join(mount.Path(), "dir"))
				}
				require.NoError(t, mount.Unmount())
				require.NoError(t, ref.Release(t.Context()))
			}
			check(t, m)
		})
	}
}

// Nobody has marked anything: the owner of the databases says what the daemon
// was.
func TestAttributesByOwner(t *testing.T) {
	needsRoot(t)
	for _, want := range []string{"trusted", "user"} {
		b := legacytest.NewBuilder(t.TempDir(), "overlayfs")
		b.Finalized("a", "", nil)
		require.NoError(t, b.Write())
		if want == "user" {
			require.NoError(t, os.Chown(filepath.Join(b.Dir, "metadata_v2.db"), 1000, 1000))
		}
		require.Equal(t, want, run(t, b.Dir, migrate.Options{DryRun: true}).Plan.Attributes)
	}
}

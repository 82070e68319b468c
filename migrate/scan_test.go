package migrate_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// Layers that our mounts cannot show come over as lazy, or not at all; a mark
// of overlayfs that any layer has is no reason.
func TestLayersThatFollow(t *testing.T) {
	needsRoot(t)
	marked := func(dir, attr string) {
		require.NoError(t, unix.Setxattr(dir, attr, []byte("/elsewhere"), 0))
	}
	for _, class := range []string{"trusted", "user"} {
		t.Run(class, func(t *testing.T) {
			b := legacytest.NewBuilder(t.TempDir(), "overlayfs")
			d := b.Blob("layer", nil)
			b.Finalized("opaque", "", nil)
			b.Finalized("redirected", "opaque", nil)
			b.Finalized("child", "redirected", nil)
			b.Finalized("hollow", "opaque", legacytest.Row{"cache.blob": d, "cache.diffID": d})
			require.NoError(t, b.Write())
			data := func(n string) string { return filepath.Join(b.Dir, "snapshots", "snapshots", n, "fs") }
			require.NoError(t, os.Mkdir(filepath.Join(data("1"), "d"), 0o755))
			marked(filepath.Join(data("1"), "d"), class+".overlay.opaque")
			require.NoError(t, os.Mkdir(filepath.Join(data("2"), "d"), 0o755))
			marked(filepath.Join(data("2"), "d"), class+".overlay.redirect")
			require.NoError(t, os.Truncate(filepath.Join(data("4"), "own-hollow"), 0))
			require.NoError(t, os.Truncate(filepath.Join(data("4"), "own-hollow"), 1<<20))
			marked(filepath.Join(data("4"), "own-hollow"), class+".overlay.metacopy")

			p := run(t, b.Dir, migrate.Options{DryRun: true}).Plan
			require.Equal(t, class, p.Attributes)
			comparePlan(t, p, want{
				"opaque": "finalized", "redirected": "only the old daemon's mounts can show", "child": "does not come along", "hollow": "lazy",
			})
		})
	}
}

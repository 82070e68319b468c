package peer_test

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/hack/peer"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// The peer opens what a rollback gave back, and finds all its records with
// their trees: after a migration, and after a session in which Lamina looked at
// them and made something of its own.
func TestPeerOpensWhatARollbackGaveBack(t *testing.T) {
	needsRoot(t)
	const archives = "../../migrate/testdata"
	for _, name := range []string{"v0.12.5-clean", "v0.34.1-clean", "v0.34.1-crash-many", "v0.8.3-to-v0.34.1"} {
		t.Run(name, func(t *testing.T) {
			ctx, dir := t.Context(), t.TempDir()
			e, err := legacytest.Load(archives, name)
			require.NoError(t, err)
			require.NoError(t, legacytest.Unpack(archives, name, dir))
			worker := filepath.Join(dir, "runc-overlayfs")
			reports, err := migrate.Run(ctx, dir, migrate.Options{})
			require.NoError(t, err)
			require.NoError(t, reports[0].Err)

			m, err := cache.Open(ctx, cache.Options{Root: worker, NoCreate: true, SyncInterval: -1})
			require.NoError(t, err)
			for id, r := range e.Records {
				if r.Kind != "finalized" {
					continue
				}
				ref, err := m.Get(ctx, cache.ID(id), cache.GetOptions{})
				require.NoError(t, err)
				mut, err := m.New(ctx, ref, cache.NewOptions{})
				require.NoError(t, err)
				imm, err := mut.Commit(ctx)
				require.NoError(t, err)
				require.NoError(t, imm.Release(ctx))
				require.NoError(t, ref.Release(ctx))
			}
			require.NoError(t, m.Close())

			back, err := migrate.Rollback(ctx, dir, migrate.Options{})
			require.NoError(t, err)
			require.NoError(t, back[0].Err)
			require.NotEmpty(t, back[0].Records)

			s, err := peer.Opener().Open(ctx, worker)
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			mounted := 0
			for id, r := range e.Records {
				if r.Kind != "finalized" && r.Kind != "committed" {
					continue
				}
				ref, err := s.Get(ctx, id)
				require.NoError(t, err, id)
				require.NoError(t, peer.Read(ctx, ref, func(dir string) error {
					listing, err := legacytest.Listing(dir)
					require.Equal(t, r.Tree, legacytest.Sum(listing), id)
					return err
				}))
				require.NoError(t, ref.Release(ctx))
				mounted++
			}
			require.Greater(t, mounted, 20)
		})
	}
}

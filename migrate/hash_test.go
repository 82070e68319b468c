package migrate_test

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// Migrated records have the content hashes that their daemon gave them, and
// from the first change on those of today.
func TestContentHashes(t *testing.T) {
	eachArchive(t, func(t *testing.T, worker string, e *legacytest.Expect) {
		run(t, filepath.Dir(worker), migrate.Options{})
		m, err := cache.Open(t.Context(), cache.Options{
			Root: worker, NoCreate: true, SyncInterval: -1, Unconfirm: contenthash.UnconfirmStored,
		})
		require.NoError(t, err)
		defer func() { require.NoError(t, m.Close()) }()
		sums := checksum.New(m, checksum.Options{})
		defer func() { require.NoError(t, sums.Close()) }()
		compared, changed := 0, 0
		for id, r := range e.Records {
			rec, err := m.Lookup(t.Context(), cache.ID(id))
			if err != nil || string(rec.ID) != id || rec.State != cache.Committed && rec.State != cache.Finalized {
				continue
			}
			compareHashes(t, m, sums, rec.ID, r.ContentHash)
			compared += len(r.ContentHash)
			if rec.State != cache.Committed || r.ContentHash == nil {
				continue
			}
			mut, err := m.GetMutable(t.Context(), rec.ID)
			if err != nil {
				require.ErrorContains(t, err, "make a new record with it as parent")
				continue
			}
			imm, err := mut.Commit(t.Context())
			require.NoError(t, err)
			now := r.ContentHashNow
			if now == nil {
				now = r.ContentHash
			}
			compareHashes(t, m, sums, imm.ID(), now)
			changed++
			require.NoError(t, imm.Release(t.Context()))
		}
		require.Positive(t, compared)
		require.Positive(t, changed)
		for f, err := range checksum.Check(t.Context(), m) {
			require.NoError(t, err)
			t.Errorf("finding: %+v", f)
		}
	})
}

func compareHashes(t *testing.T, m *cache.Manager, sums *checksum.Keeper, id cache.ID, want map[string]string) {
	t.Helper()
	if want == nil {
		return
	}
	ref, err := m.Get(t.Context(), id, cache.GetOptions{})
	require.NoError(t, err)
	defer func() { require.NoError(t, ref.Release(t.Context())) }()
	for path, d := range want {
		got, err := sums.Checksum(t.Context(), ref, path, contenthash.Options{})
		require.NoError(t, err)
		require.Equal(t, d, got.String(), "%s of %s", path, id)
	}
}

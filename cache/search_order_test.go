package cache_test

import (
	"context"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

// A record that was reopened has a new id and its old place in the store: what
// is promised in the order of ids is sorted all the same.
func TestOrderAfterReopen(t *testing.T) {
	ctx := context.Background()
	m, err := cache.Open(ctx, cache.Options{
		Root: filepath.Join(t.TempDir(), "store"), Driver: snapshottest.NewMemory(), SyncInterval: -1,
	})
	require.NoError(t, err)
	var ids []cache.ID
	for range 3 {
		mut, err := m.New(ctx, nil, cache.NewOptions{Retain: true, Values: []cache.Value{{Name: "v", Index: "k"}}})
		require.NoError(t, err)
		ref, err := mut.Commit(ctx)
		require.NoError(t, err)
		ids = append(ids, ref.ID())
		require.NoError(t, ref.Release(ctx))
	}
	mut, err := m.GetMutable(ctx, ids[0])
	require.NoError(t, err)
	want := []cache.ID{ids[1], ids[2], mut.ID()}
	require.True(t, slices.IsSorted(want))
	got, err := m.Search(ctx, "k")
	require.NoError(t, err)
	require.Equal(t, want, got)
	u, err := m.DiskUsage(ctx, nil)
	require.NoError(t, err)
	got = nil
	for _, e := range u.Entries {
		got = append(got, e.Record.ID)
	}
	require.Equal(t, want, got)
	require.NoError(t, mut.Release(ctx))
	for f, err := range m.Check(ctx) {
		require.NoError(t, err)
		require.Fail(t, f.Code, f.Message)
	}
	require.NoError(t, m.Close())
}

package metadata_test

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/metadata"
)

func TestSmoke(t *testing.T) {
	ctx := context.Background()
	path := filepath.Join(t.TempDir(), "lamina.db")
	s, err := metadata.Open(ctx, path, metadata.Options{})
	require.NoError(t, err)
	id := s.NewID()
	r := &metadata.Record{ID: id, State: metadata.Committed, Op: metadata.Base, Key: "k", Values: []metadata.Value{{Name: "n", Data: []byte("d"), Index: "foo"}}, Size: 7}
	require.NoError(t, s.Update(ctx, func(tx *metadata.Tx) error { return tx.Create(r) }))
	s.Touch(id, time.Unix(5, 0))
	require.NoError(t, s.View(ctx, func(tx *metadata.Tx) error {
		got, err := tx.Get(id)
		require.NoError(t, err)
		require.EqualValues(t, 1, got.UsageCount)
		for id := range tx.ByIndex("foo") {
			require.Equal(t, r.ID, id)
		}
		return nil
	}))
	require.NoError(t, s.Close())
	s, err = metadata.Open(ctx, path, metadata.Options{})
	require.NoError(t, err)
	require.NoError(t, s.View(ctx, func(tx *metadata.Tx) error {
		for f, err := range tx.Check() {
			require.NoError(t, err)
			t.Error(f)
		}
		_, err := tx.Get("nope")
		require.True(t, errdefs.IsNotFound(err))
		return nil
	}))
	require.EqualValues(t, 0, s.Stats().Transactions)
	require.NoError(t, s.Close())
}

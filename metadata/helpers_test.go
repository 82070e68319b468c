package metadata_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/metadata"
)

// storePath names a store that does not exist yet.
func storePath(t testing.TB) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "lamina.db")
}

// open opens a store; when the test ends, the store must be whole.
func open(t testing.TB, path string, o metadata.Options) *metadata.Store {
	t.Helper()
	s, err := metadata.Open(t.Context(), path, o)
	require.NoError(t, err)
	t.Cleanup(func() {
		// Tests that leave damage behind close the store themselves.
		err := s.View(context.Background(), func(tx *metadata.Tx) error {
			for f, err := range tx.Check() {
				require.NoError(t, err)
				t.Errorf("finding %s: %s", f.Code, f.Message)
			}
			return nil
		})
		if !errors.Is(err, metadata.ErrClosed) && !errors.Is(err, metadata.ErrUnknownOutcome) {
			require.NoError(t, err)
		}
		require.NoError(t, s.Close())
	})
	return s
}

func fresh(t testing.TB) *metadata.Store {
	t.Helper()
	return open(t, storePath(t), metadata.Options{})
}

func update(t testing.TB, s *metadata.Store, fn func(*metadata.Tx) error) {
	t.Helper()
	require.NoError(t, s.Update(t.Context(), fn))
}

func view(t testing.TB, s *metadata.Store, fn func(*metadata.Tx)) {
	t.Helper()
	require.NoError(t, s.View(t.Context(), func(tx *metadata.Tx) error { fn(tx); return nil }))
}

// rec is a small valid record.
func rec(id metadata.ID, change ...func(*metadata.Record)) *metadata.Record {
	r := &metadata.Record{ID: id, State: metadata.Finalized, Op: metadata.Layer, Key: "key-" + string(id), Durable: true, Type: "regular", Size: 1}
	for _, c := range change {
		c(r)
	}
	return r
}

func values(v ...metadata.Value) func(*metadata.Record) {
	return func(r *metadata.Record) { r.Values = v }
}

func indexed(keys ...string) func(*metadata.Record) {
	return func(r *metadata.Record) {
		for i, k := range keys {
			r.Values = append(r.Values, metadata.Value{Name: string(rune('a' + i)), Index: k})
		}
	}
}

func over(parents ...metadata.ID) func(*metadata.Record) {
	return func(r *metadata.Record) { r.Parents = parents }
}

func create(t testing.TB, s *metadata.Store, records ...*metadata.Record) {
	t.Helper()
	update(t, s, func(tx *metadata.Tx) error {
		for _, r := range records {
			if err := tx.Create(r); err != nil {
				return err
			}
		}
		return nil
	})
}

func get(t testing.TB, s *metadata.Store, id metadata.ID) *metadata.Record {
	t.Helper()
	var r *metadata.Record
	view(t, s, func(tx *metadata.Tx) {
		var err error
		r, err = tx.Get(id)
		require.NoError(t, err)
	})
	return r
}

func search(t testing.TB, s *metadata.Store, key string) []metadata.ID {
	t.Helper()
	var ids []metadata.ID
	view(t, s, func(tx *metadata.Tx) { ids = slices.Collect(tx.ByIndex(key)) })
	return ids
}

func findings(t testing.TB, s *metadata.Store) []metadata.Finding {
	t.Helper()
	var out []metadata.Finding
	view(t, s, func(tx *metadata.Tx) {
		for f, err := range tx.Check() {
			require.NoError(t, err)
			out = append(out, f)
		}
	})
	return out
}

// raw changes the file of a closed store behind its back.
func raw(t testing.TB, path string, fn func(*bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, nil)
	require.NoError(t, err)
	require.NoError(t, db.Update(fn))
	require.NoError(t, db.Close())
}

package metadata_test

import (
	"context"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/metadata"
)

// TestMarks: what was found out about the content is written without a new
// revision, and nothing else is.
func TestMarks(t *testing.T) {
	s := fresh(t)
	ctx := context.Background()
	r := full("r")
	r.Durable, r.Size = false, metadata.SizeUnknown
	create(t, s, r)
	mark := func(change func(*metadata.Record)) error {
		return s.Update(ctx, func(tx *metadata.Tx) error {
			rec, err := tx.Get("r")
			if err != nil {
				return err
			}
			change(rec)
			return tx.Mark(rec)
		})
	}
	require.NoError(t, mark(func(r *metadata.Record) { r.Size, r.Description, r.Labels = 4096, "other", nil }))
	want := full("r")
	want.Revision, want.Size, want.Durable = 1, 4096, false
	sameRecord(t, want, get(t, s, "r"))

	require.NoError(t, mark(func(r *metadata.Record) { r.Durable, r.Was = true, "" }))
	want.Durable, want.Was = true, ""
	sameRecord(t, want, get(t, s, "r"))
	require.NoError(t, s.View(ctx, func(tx *metadata.Tx) error {
		totals, err := tx.Totals()
		require.NoError(t, err)
		require.Len(t, totals, 1)
		require.Equal(t, int64(4096), totals[0].Bytes)
		for id := range tx.Unsettled() {
			require.Fail(t, "it is settled", string(id))
		}
		for f, err := range tx.Check() {
			require.NoError(t, err)
			require.Fail(t, "finding", "%+v", f)
		}
		return nil
	}))

	require.NoError(t, mark(func(r *metadata.Record) { r.Was = "another" }))
	sameRecord(t, want, get(t, s, "r"))
	require.ErrorIs(t, mark(func(r *metadata.Record) { r.Revision++ }), errdefs.ErrFailedPrecondition)
	require.ErrorIs(t, mark(func(r *metadata.Record) { r.Size = -2 }), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, mark(func(r *metadata.Record) { r.ID = "none" }), errdefs.ErrNotFound)
	sameRecord(t, want, get(t, s, "r"))
}

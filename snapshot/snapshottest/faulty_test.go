package snapshottest_test

import (
	"context"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

var errOops = errors.New("oops")

func faulty(t *testing.T) *snapshottest.Faulty {
	d, err := snapshot.Open(t.Context(), t.TempDir(), snapshot.Options{Driver: snapshot.Native})
	require.NoError(t, err)
	f := snapshottest.NewFaulty(d)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	return f
}

func prepare(t *testing.T, f *snapshottest.Faulty, key string) error {
	m, err := f.Prepare(t.Context(), key, "")
	require.Equal(t, err == nil, m != nil)
	return err
}

func TestFailAt(t *testing.T) {
	f := faulty(t)
	require.NoError(t, prepare(t, f, "a"))
	f.FailAt(2, errOops)
	require.NoError(t, prepare(t, f, "b"))
	require.ErrorIs(t, prepare(t, f, "c"), errOops)
	require.NoError(t, prepare(t, f, "c"), "it was not done, and fails once")
	f.FailAfterAt(1, errOops)
	require.ErrorIs(t, prepare(t, f, "d"), errOops)
	_, err := f.Stat(t.Context(), "d")
	require.NoError(t, err, "it was done")
	want := []snapshottest.Call{
		{Op: "Prepare", Key: "a", Done: true},
		{Op: "Prepare", Key: "b", Done: true},
		{Op: "Prepare", Key: "c", Err: errOops},
		{Op: "Prepare", Key: "c", Done: true},
		{Op: "Prepare", Key: "d", Done: true, Err: errOops},
		{Op: "Stat", Key: "d", Done: true},
	}
	require.Equal(t, want, f.Calls())
}

func TestFailOp(t *testing.T) {
	f := faulty(t)
	f.FailOp("Commit", "n", errOops)
	f.FailOpAfter("Remove", "", errOops)
	f.FailOp("Mount", "", errOops)
	for _, key := range []string{"a", "b"} {
		require.NoError(t, prepare(t, f, key))
	}
	require.ErrorIs(t, f.Commit(t.Context(), "n", "a"), errOops)
	require.ErrorIs(t, f.Commit(t.Context(), "n", "b"), errOops)
	require.NoError(t, f.Commit(t.Context(), "m", "a"))
	require.ErrorIs(t, f.Remove(t.Context(), "m"), errOops)
	_, err := f.Stat(t.Context(), "m")
	require.Error(t, err)
	require.ErrorIs(t, f.Mount(t.Context(), "b", t.TempDir(), true), errOops)
	require.Equal(t, 2, f.Count("Commit", "n"))
	require.Equal(t, 3, f.Count("Commit", ""))
	f.Clear()
	require.Empty(t, f.Calls())
	require.NoError(t, f.Commit(t.Context(), "n", "b"))
	require.NoError(t, f.Remove(t.Context(), "n"))
}

func TestBlock(t *testing.T) {
	f := faulty(t)
	require.NoError(t, prepare(t, f, "a"))
	require.NoError(t, prepare(t, f, "b"))
	reached, release := f.Block("Remove", "a")
	done := make(chan error)
	go func() { done <- f.Remove(context.Background(), "a") }()
	<-reached
	require.NoError(t, f.Remove(t.Context(), "b"), "others go on")
	_, err := f.Stat(t.Context(), "a")
	require.NoError(t, err)

	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errOops)
	require.ErrorIs(t, f.Remove(ctx, "a"), errOops)
	release()
	release()
	require.NoError(t, <-done)
	require.Error(t, f.Remove(t.Context(), "a"), "gone, and no longer blocked")
}

// Every method passes its call on; the suite over a Faulty without rules
// would say so too, but takes long.
func TestFaultyCountsAll(t *testing.T) {
	f, ctx := faulty(t), t.Context()
	p := snapshot.Pending{}
	calls := map[string]func() error{
		"Stat":    func() error { _, err := f.Stat(ctx, "k"); return err },
		"Usage":   func() error { _, err := f.Usage(ctx, "k"); return err },
		"Mounts":  func() error { _, err := f.Mounts(ctx, "k"); return err },
		"Prepare": func() error { _, err := f.Prepare(ctx, "k", "none"); return err },
		"View":    func() error { _, err := f.View(ctx, "k", "none"); return err },
		"Commit":  func() error { return f.Commit(ctx, "n", "k") },
		"Remove":  func() error { return f.Remove(ctx, "k") },
		"Detach":  func() error { _, err := f.Detach(ctx, "k"); return err },
		"Discard": func() error { return f.Discard(ctx, p) },
		"Restore": func() error { return f.Restore(ctx, p) },
		"Mount":   func() error { return f.Mount(ctx, "k", t.TempDir(), true) },
		"Dir":     func() error { _, _, err := f.Dir(ctx, "k"); return err },
		"InUse":   func() error { _, err := f.InUse(ctx, "k"); return err },
		"Walk":    func() error { return f.Walk(ctx, nil, "no filter(") },
	}
	for op, call := range calls {
		require.Error(t, call(), op)
		require.Equal(t, 1, f.Count(op, ""), op)
		f.FailOp(op, "", errOops)
		require.ErrorIs(t, call(), errOops, op)
	}
	f.Clear()
	require.NoError(t, f.Settle(ctx))
	require.NoError(t, f.Cleanup(ctx))
	require.NoError(t, f.Sync(ctx))
	_, err := f.Pending(ctx)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	var ops []string
	for _, c := range f.Calls() {
		require.True(t, c.Done)
		ops = append(ops, c.Op)
	}
	require.Equal(t, []string{"Settle", "Cleanup", "Sync", "Pending", "Close"}, ops)
	require.Equal(t, snapshot.Native, f.Info().Name)
}

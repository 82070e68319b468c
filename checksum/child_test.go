package checksum_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
)

// A child with one changed file costs one read, whether its ancestors' trees
// are in memory or stored, and however many layers are in between.
func TestChildReadsWhatItsLayerHolds(t *testing.T) {
	forKinds(t, func(w *world) {
		base := w.commit(nil, func(dir string) { manyFiles(w, dir, 10) })
		w.sum(base, "/")
		change := func(n int) func(dir string) {
			return func(dir string) { write(t, dir, fmt.Sprintf("d%03d/f00", n), "changed") }
		}
		all := 200
		first := w.commit(base, change(1))
		second := w.commit(first, change(2))
		w.release(base, first)
		for _, restart := range []bool{false, true} {
			if restart {
				id := second.ID()
				w.release(second)
				require.NoError(t, checksum.Drop(w.ctx, w.Manager, id))
				w.restart()
				second = w.get(id)
			}
			cost := w.cost(second, func() { require.Equal(t, w.sum(second, "/"), w.fresh(second, "/")) })
			if w.kind.layers {
				require.Equal(t, 2, cost.files, "restart: %t", restart)
			} else {
				require.Equal(t, all, cost.files, "a copy has to be scanned")
			}
			require.NoError(t, w.sums.Flush(w.ctx))
		}
		w.release(second)
	})
}

// A merge starts from its lowest input; it is extracted by the question.
func TestMergeReadsWhatItsLayersHold(t *testing.T) {
	w := newWorld(t, kinds[0])
	base := w.commit(nil, func(dir string) { manyFiles(w, dir, 10) })
	w.sum(base, "/")
	top := w.commit(nil, func(dir string) {
		write(t, dir, "d001/f01", "over it")
		write(t, dir, "new", "beside it")
	})
	merge, err := w.Merge(w.ctx, []*cache.ImmutableRef{base, top}, cache.MergeOptions{})
	require.NoError(t, err)
	require.Equal(t, cache.Lazy, merge.Record().State)
	got := w.sum(merge, "/")
	require.EqualValues(t, 2, w.sums.Stats(merge.ID()).FilesRead)
	require.Equal(t, w.fresh(merge, "/"), got)

	child := w.commit(merge, func(dir string) { write(t, dir, "d002/f02", "child") })
	got = w.sum(child, "/")
	require.EqualValues(t, 1, w.sums.Stats(child.ID()).FilesRead)
	require.Equal(t, w.fresh(child, "/"), got)
	w.release(base, top, merge, child)
}

// A layer stands in a stack once, at its topmost place: so a merge may not begin
// with the layers of its lowest input, nor with what is known of that.
func TestMergeThatTurnsLayersRound(t *testing.T) {
	w := newWorld(t, kinds[0])
	base := w.commit(nil, func(dir string) { write(w, dir, "f", "of the base") })
	child := w.commit(base, func(dir string) { write(w, dir, "f", "of the child") })
	w.sum(base, "/")
	w.sum(child, "/")
	merged, err := w.Merge(w.ctx, []*cache.ImmutableRef{child, base}, cache.MergeOptions{})
	require.NoError(t, err)
	require.Equal(t, w.sum(base, "/f"), w.sum(merged, "/f"))
	require.Equal(t, w.fresh(merged, "/"), w.sum(merged, "/"))
	w.release(base, child, merged)
}

// Everything that a layer can do to the one below.
func TestChildOfAllChanges(t *testing.T) {
	forKinds(t, func(w *world) {
		base := w.commit(nil, func(dir string) {
			manyFiles(w, dir, 8)
			require.NoError(t, os.Symlink("d001", filepath.Join(dir, "link")))
		})
		w.sum(base, "/")
		child := w.commit(base, func(dir string) {
			at := func(name string) string { return filepath.Join(dir, name) }
			require.NoError(t, os.Remove(at("d000/f00")))
			require.NoError(t, os.RemoveAll(at("d001")))
			require.NoError(t, os.RemoveAll(at("d002")))
			write(t, dir, "d002/new", "opaque")
			require.NoError(t, os.RemoveAll(at("d003")))
			write(t, dir, "d003", "a file now")
			require.NoError(t, os.Chmod(at("d004"), 0o700))
			require.NoError(t, os.Chmod(at("d005/f05"), 0o600))
			require.NoError(t, os.Rename(at("d006/f01"), at("d007/f01")))
			require.NoError(t, os.Mkdir(at("tmp"), 0o755))
			write(t, dir, "tmp/x", "moved")
			require.NoError(t, os.Rename(at("tmp"), at("d001")))
			require.NoError(t, os.Link(at("d007/f02"), at("d007/twin")))
		})
		for _, path := range []string{"/", "d001", "link", "d002", "d003", "d007"} {
			require.Equal(t, w.fresh(child, path), w.sum(child, path), path)
		}
		w.release(base, child)
	})
}

// A writer that reports every change spares the validation, and the digest is
// stored with its Commit.
func TestWriterReports(t *testing.T) {
	forKinds(t, func(w *world) {
		ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 5) })
		w.sum(ref, "/")
		for round := range 3 {
			id := ref.ID()
			w.release(ref)
			if round == 1 {
				w.restart()
				ref = w.get(id)
				w.sum(ref, "/") // loads it
				w.release(ref)
			}
			mut, writer, err := w.sums.Reopen(w.ctx, id, cache.ReopenOptions{})
			require.NoError(t, err)
			require.NotEqual(t, id, mut.ID())
			w.in(mut, func(dir string) { write(t, dir, "d002/f02", fmt.Sprint("round", round)) })
			require.NoError(t, writer.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: "d002/f02"}))
			tx := w.Manager.Stats().Transactions
			ref, err = writer.Commit(w.ctx, cache.CommitOptions{})
			require.NoError(t, err)
			require.EqualValues(t, 1, w.Manager.Stats().Transactions-tx)
			before := w.sums.Stats(ref.ID())
			got := w.sum(ref, "/")
			after := w.sums.Stats(ref.ID())
			require.EqualValues(t, 1, after.FilesRead-before.FilesRead)
			require.LessOrEqual(t, after.Stats-before.Stats, uint64(3), "what was not reported is not looked at")
			require.Equal(t, w.fresh(ref, "/"), got)
			require.NoError(t, w.sums.Flush(w.ctx))
			require.Empty(t, w.findings())
		}
		// It is stored as confirmed: a restart looks at nothing.
		id, want := ref.ID(), w.sum(ref, "/")
		w.release(ref)
		w.restart()
		ref = w.get(id)
		require.Equal(t, reads{}, w.cost(ref, func() { require.Equal(t, want, w.sum(ref, "/")) }))
		w.release(ref)
	})
}

// One that does not report everything vouches for nothing.
func TestWriterDoesNotReport(t *testing.T) {
	forKinds(t, func(w *world) {
		ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 3) })
		w.sum(ref, "/")
		id := ref.ID()
		w.release(ref)
		mut, writer, err := w.sums.Reopen(w.ctx, id, cache.ReopenOptions{})
		require.NoError(t, err)
		w.in(mut, func(dir string) { write(t, dir, "d001/f01", "silently") })
		writer.Unreported()
		ref, err = writer.Commit(w.ctx, cache.CommitOptions{})
		require.NoError(t, err)
		require.Equal(t, w.fresh(ref, "/"), w.sum(ref, "/"))
		id = ref.ID()
		w.release(ref)

		// One that is cut off leaves its changes to a successor who knows
		// nothing of them.
		mut, _, err = w.sums.Reopen(w.ctx, id, cache.ReopenOptions{})
		require.NoError(t, err)
		w.in(mut, func(dir string) { write(t, dir, "d002/f02", "and died") })
		id = mut.ID()
		require.NoError(t, mut.Release(w.ctx))
		mut, writer, err = w.sums.Reopen(w.ctx, id, cache.ReopenOptions{})
		require.NoError(t, err)
		require.Equal(t, id, mut.ID())
		ref, err = writer.Commit(w.ctx, cache.CommitOptions{})
		require.NoError(t, err)
		require.Equal(t, w.fresh(ref, "/"), w.sum(ref, "/"))
		w.release(ref)
	})
}

// A new record, and a new child, whose holder reports what it writes.
func TestWriterOfNewRecords(t *testing.T) {
	forKinds(t, func(w *world) {
		mut, writer, err := w.sums.New(w.ctx, nil, cache.NewOptions{})
		require.NoError(t, err)
		w.in(mut, func(dir string) { manyFiles(w, dir, 3) })
		require.NoError(t, writer.HandleChange(contenthash.Change{Kind: contenthash.Add, Path: "d000", Mode: os.ModeDir}))
		mid, err := writer.Checksum(w.ctx, "/", contenthash.Options{})
		require.NoError(t, err)
		base, err := writer.Commit(w.ctx, cache.CommitOptions{})
		require.NoError(t, err)
		require.Equal(t, mid.String(), w.sum(base, "/"))
		require.Equal(t, w.fresh(base, "/"), w.sum(base, "/"))

		mut, writer, err = w.sums.New(w.ctx, base, cache.NewOptions{Retain: true})
		require.NoError(t, err)
		w.in(mut, func(dir string) { write(t, dir, "d001/f01", "child") })
		require.NoError(t, writer.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: "d001/f01"}))
		child, err := writer.Commit(w.ctx, cache.CommitOptions{})
		require.NoError(t, err)
		before := w.sums.Stats(child.ID())
		require.Equal(t, w.fresh(child, "/"), w.sum(child, "/"))
		require.EqualValues(t, 1, w.sums.Stats(child.ID()).FilesRead-before.FilesRead, "on any driver")
		w.release(base, child)
	})
}

// A commit that fails leaves the writer as it was.
func TestWriterCommitFails(t *testing.T) {
	w := newWorld(t, kinds[0])
	base := w.commit(nil, func(dir string) { manyFiles(w, dir, 30) })
	w.sum(base, "/")
	mut, writer, err := w.sums.New(w.ctx, base, cache.NewOptions{})
	require.NoError(t, err)
	w.release(base)
	mnt, err := mut.Mount(w.ctx, cache.MountOptions{})
	require.NoError(t, err)
	write(t, mnt.Path(), "a", "1")
	require.NoError(t, writer.HandleChange(contenthash.Change{Path: "a"}))
	_, err = writer.Commit(w.ctx, cache.CommitOptions{})
	require.ErrorContains(t, err, "mounted writable")
	write(t, mnt.Path(), "b", "2")
	require.NoError(t, writer.HandleChange(contenthash.Change{Path: "b"}))
	require.NoError(t, mnt.Unmount())
	ref, err := writer.Commit(w.ctx, cache.CommitOptions{})
	require.NoError(t, err)
	require.Empty(t, w.findings())
	require.Equal(t, w.fresh(ref, "/"), w.sum(ref, "/"))
	id := ref.ID()
	w.release(ref)
	w.restart()
	ref = w.get(id)
	require.Equal(t, w.fresh(ref, "/"), w.sum(ref, "/"))
	w.release(ref)
}

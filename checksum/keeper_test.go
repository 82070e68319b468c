package checksum_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
)

// 64 who ask at once are served by one who reads.
func TestManyAskers(t *testing.T) {
	w := newWorld(t, kinds[0])
	ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 10) })
	before := w.Manager.Stats().Transactions
	cost := w.cost(ref, func() {
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				if _, err := w.sums.Checksum(w.ctx, ref, "/", contenthash.Options{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
	require.Equal(t, reads{1, 200}, cost)
	require.NoError(t, w.sums.Flush(w.ctx))
	require.EqualValues(t, 1, w.Manager.Stats().Transactions-before)
	w.release(ref)
}

// One who gives up takes nobody along: neither while the tree is loaded, nor
// while the record is mounted.
func TestCancelledAsker(t *testing.T) {
	w := newWorld(t, kinds[0])
	ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 3) })
	reached, release := w.driver.Block("Mount", "")
	ctx, cancel := context.WithCancel(w.ctx)
	ask := func(ctx context.Context, answers chan error) {
		_, err := w.sums.Checksum(ctx, ref, "/", contenthash.Options{})
		answers <- err
	}
	first, second := make(chan error, 1), make(chan error, 1)
	go ask(ctx, first)
	<-reached
	go ask(w.ctx, second)
	waiting, stop := context.WithCancel(w.ctx)
	third := make(chan error, 1)
	go ask(waiting, third)
	stop()
	require.ErrorIs(t, <-third, context.Canceled)
	cancel()
	require.ErrorIs(t, <-first, context.Canceled)
	release()
	require.NoError(t, <-second)
	w.release(ref)
}

// The trees that were used last stay in memory, and no more of them; what is
// forgotten was saved before.
func TestTreesInMemoryAreBounded(t *testing.T) {
	w := newWorld(t, kinds[0])
	require.NoError(t, w.sums.Close())
	w.sums = checksum.New(w.Manager, checksum.Options{Trees: 2})
	var refs []*cache.ImmutableRef
	for i := range 5 {
		ref := w.commit(nil, func(dir string) { write(t, dir, "f", fmt.Sprint(i)) })
		w.sum(ref, "/")
		require.NoError(t, w.sums.Flush(w.ctx))
		refs = append(refs, ref)
	}
	for _, ref := range refs {
		require.Equal(t, reads{}, w.cost(ref, func() { w.sum(ref, "/") }))
	}
	inMemory := 0
	for _, ref := range refs {
		if w.sums.Holds(ref.ID()) {
			inMemory++
		}
	}
	require.Equal(t, 2, inMemory)
	require.True(t, w.sums.Holds(refs[4].ID()))
	w.release(refs...)
}

// A tree that is in use, or not saved yet, is not forgotten, however few may
// stay.
func TestTreesInUseStay(t *testing.T) {
	w := newWorld(t, kinds[0])
	require.NoError(t, w.sums.Close())
	w.sums = checksum.New(w.Manager, checksum.Options{Trees: 1})
	var refs []*cache.ImmutableRef
	for i := range 4 {
		refs = append(refs, w.commit(nil, func(dir string) { write(t, dir, "f", fmt.Sprint(i)) }))
	}
	key := refs[0].Record().Key
	reached, release := w.driver.Block("Mount", key)
	answers := make(chan error, 2)
	ask := func() {
		_, err := w.sums.Checksum(w.ctx, refs[0], "/", contenthash.Options{})
		answers <- err
	}
	go ask()
	<-reached
	for _, ref := range refs[1:] {
		w.sum(ref, "/")
	}
	go ask()
	release()
	require.NoError(t, <-answers)
	require.NoError(t, <-answers)
	mounts := 0
	for _, c := range w.driver.Calls() {
		if c.Op == "Mount" && c.Key == key {
			mounts++
		}
	}
	require.Equal(t, 2, mounts, "one to write to it, and one for both who asked")

	w.restart()
	for _, ref := range refs {
		ref = w.get(ref.ID())
		require.Equal(t, reads{}, w.cost(ref, func() { w.sum(ref, "/") }))
		w.release(ref)
	}
}

// Two who keep the tree of one record do not spoil what the other stored.
func TestTwoKeepers(t *testing.T) {
	w := newWorld(t, kinds[0])
	ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 30) })
	want := w.sum(ref, "/")
	require.NoError(t, w.sums.Flush(w.ctx))
	pages := 0
	require.NoError(t, w.ViewAttachments(w.ctx, ref.ID(), func(a *cache.Attachments) error {
		for range a.Names(cache.TreePrefix) {
			pages++
		}
		return nil
	}))
	require.Greater(t, pages, 3)
	var trees [2]*checksum.Tree
	for i := range trees {
		var err error
		trees[i], err = checksum.Load(w.ctx, w.Manager, ref)
		require.NoError(t, err)
		// Each forgets something in another page.
		require.NoError(t, trees[i].HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: fmt.Sprintf("d%03d/f00", 2+25*i)}))
	}
	for _, tree := range trees {
		require.NoError(t, tree.Save(w.ctx, w.Manager))
		require.Empty(t, w.findings())
	}
	id := ref.ID()
	w.release(ref)
	w.restart()
	ref = w.get(id)
	require.Equal(t, reads{1, 1}, w.cost(ref, func() { require.Equal(t, want, w.sum(ref, "/")) }))
	w.release(ref)
}

// What is saved for a record that was reopened or removed meanwhile is dropped.
func TestSaveOfARecordThatMovedOn(t *testing.T) {
	w := newWorld(t, kinds[0])
	for _, how := range []string{"reopen", "remove"} {
		ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 2) })
		tree, err := checksum.Load(w.ctx, w.Manager, ref)
		require.NoError(t, err)
		_, err = tree.Checksum(w.ctx, checksum.Files(ref), "/", contenthash.Options{})
		require.NoError(t, err)
		id := ref.ID()
		w.release(ref)
		if how == "remove" {
			_, err = w.Remove(w.ctx, id)
			require.NoError(t, err)
			require.Error(t, tree.Save(w.ctx, w.Manager))
			continue
		}
		mut, err := w.GetMutable(w.ctx, id)
		require.NoError(t, err)
		require.Error(t, tree.Save(w.ctx, w.Manager))
		_, err = mut.Attachment(w.ctx, cache.TreeIndex)
		require.Error(t, err)
		ref, err = mut.Commit(w.ctx)
		require.NoError(t, err)
		w.release(ref)
	}
}

// A tree that the cache dropped at a reopen is stored whole again by the
// writer that has it in memory.
func TestWriterWithoutUnconfirm(t *testing.T) {
	w := newWorld(t, kinds[0])
	w.plain = true
	w.restart()
	ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 30) })
	w.sum(ref, "/")
	require.NoError(t, w.sums.Flush(w.ctx))
	id := ref.ID()
	w.release(ref)
	mut, writer, err := w.sums.Reopen(w.ctx, id, cache.ReopenOptions{})
	require.NoError(t, err)
	w.in(mut, func(dir string) { write(t, dir, "d002/f02", "told") })
	require.NoError(t, writer.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: "d002/f02"}))
	ref, err = writer.Commit(w.ctx, cache.CommitOptions{})
	require.NoError(t, err)
	require.Empty(t, w.findings())
	want := w.sum(ref, "/")
	id = ref.ID()
	w.release(ref)
	w.restart()
	require.Empty(t, w.findings())
	ref = w.get(id)
	require.Equal(t, reads{}, w.cost(ref, func() { require.Equal(t, want, w.sum(ref, "/")) }))
	w.release(ref)
}

// What differs between two records is told by their digests: nothing is read
// that is known.
func TestCompare(t *testing.T) {
	w := newWorld(t, kinds[0])
	base := w.commit(nil, func(dir string) { manyFiles(w, dir, 5) })
	w.sum(base, "/")
	child := w.commit(base, func(dir string) {
		write(t, dir, "d001/f01", "new")
		require.NoError(t, os.Remove(filepath.Join(dir, "d002/f02")))
	})
	var got []string
	cost := w.cost(child, func() {
		for d, err := range w.sums.Compare(w.ctx, base, child) {
			require.NoError(t, err)
			got = append(got, fmt.Sprint(d.Path, " ", d.Change))
		}
	})
	require.Equal(t, []string{"d001/f01 1", "d002/f02 2"}, got)
	require.Equal(t, 1, cost.files)
	w.release(base, child)
}

// While somebody swaps a directory of the record for a link that leads out of
// it, a digest is one of the two trees', or an error, but never what lies
// outside.
func TestNothingOutsideIsRead(t *testing.T) {
	forKinds(t, func(w *world) {
		outside := w.TempDir()
		write(w, outside, "secret", "outside")
		mut, writer, err := w.sums.New(w.ctx, nil, cache.NewOptions{})
		require.NoError(w, err)
		mnt, err := mut.Mount(w.ctx, cache.MountOptions{})
		require.NoError(w, err)
		dir := mnt.Path()
		write(w, dir, "dir/secret", "inside")
		require.NoError(w, os.Symlink(outside, filepath.Join(dir, "link")))
		swap := func() {
			require.NoError(w, os.Rename(filepath.Join(dir, "dir"), filepath.Join(dir, "tmp")))
			require.NoError(w, os.Rename(filepath.Join(dir, "link"), filepath.Join(dir, "dir")))
			require.NoError(w, os.Rename(filepath.Join(dir, "tmp"), filepath.Join(dir, "link")))
		}
		ask := func(path string) (string, error) {
			d, err := writer.Checksum(w.ctx, path, contenthash.Options{})
			return d.String(), err
		}
		want, err := ask("dir/secret")
		require.NoError(w, err)

		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				default:
					swap()
				}
			}
		}()
		for range 50 {
			for _, path := range []string{"dir/secret", "link/secret"} {
				if got, err := ask(path); err == nil {
					require.Equal(w, want, got)
				}
			}
		}
		close(stop)
		<-done
		require.NoError(w, mnt.Unmount())
		writer.Unreported()
		ref, err := writer.Commit(w.ctx, cache.CommitOptions{})
		require.NoError(w, err)
		require.Equal(w, w.fresh(ref, "/"), w.sum(ref, "/"))
		w.release(ref)
	})
}

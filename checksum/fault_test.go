package checksum_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
)

// faults lets one durable step, or one call of the driver, fail.
type faults struct {
	*world
	at  int
	err error

	// What the background does takes steps, too.
	mu    sync.Mutex
	steps int
	on    bool
}

func (f *faults) switchOn(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.on = on
}

func (f *faults) step(string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.on {
		return nil
	}
	if f.steps++; f.steps == f.at {
		return f.err
	}
	return nil
}

// TestStoreFaults lets each durable step of keeping hashes fail: of a save, a
// reopen, a reported commit, a finalize, what a child inherits. Whatever fails,
// the digests stay those of the files, before a restart and after it, and the
// same call works once the fault is over.
func TestStoreFaults(t *testing.T) {
	errnos := []error{unix.ENOSPC, unix.EIO, context.Canceled}
	for at := 1; ; at++ {
		w := newWorld(t, kinds[0])
		f := &faults{world: w, at: at, err: fmt.Errorf("injected: %w", errnos[at%len(errnos)])}
		w.step = f.step
		w.restart()
		f.scenario()
		w.restart()
		require.Empty(t, w.findings())
		f.mu.Lock()
		steps := f.steps
		f.mu.Unlock()
		if steps < at {
			require.Greater(t, at, 8, "the steps of the scenario")
			return
		}
	}
}

// try does something under the fault, and again if that met it.
func (f *faults) try(what string, do func() error) {
	f.Helper()
	f.switchOn(true)
	err := do()
	f.switchOn(false)
	if err == nil {
		return
	}
	require.ErrorIs(f, err, f.err, "%s at step %d", what, f.at)
	require.NoError(f, do(), "%s again after step %d", what, f.at)
}

// same compares what is known with the files.
func (f *faults) same(ref *cache.ImmutableRef, what string) {
	f.Helper()
	require.Equal(f, f.fresh(ref, "/"), f.sum(ref, "/"), "%s with step %d failing", what, f.at)
}

func (f *faults) scenario() {
	ref := f.commit(nil, func(dir string) { manyFiles(f, dir, 15) })
	f.same(ref, "new")
	f.try("save", func() error { return f.sums.Flush(f.ctx) })
	f.same(ref, "saved")

	id := ref.ID()
	f.release(ref)
	ref = f.rewritten(id)
	f.same(ref, "rewritten")
	f.try("finalize", func() error { return ref.Finalize(f.ctx) })
	f.same(ref, "finalized")

	child := f.commit(ref, func(dir string) {
		write(f, dir, "d000/f00", "child")
		require.NoError(f, os.RemoveAll(dir+"/d001"))
	})
	f.same(child, "child")
	f.try("save of the child", func() error { return f.sums.Flush(f.ctx) })
	ids := []cache.ID{ref.ID(), child.ID()}
	f.release(ref, child)
	f.restart()
	for _, id := range ids {
		ref := f.get(id)
		f.same(ref, "after a restart")
		f.release(ref)
	}
}

// rewritten reopens a record, reports a change and commits it.
func (f *faults) rewritten(id cache.ID) (ref *cache.ImmutableRef) {
	f.try("reopen and commit", func() (err error) {
		mut, writer, err := f.sums.Reopen(f.ctx, id, cache.ReopenOptions{})
		if err != nil {
			return err
		}
		defer func() {
			if err != nil { // the next try goes on with it
				id = mut.ID()
				err = errors.Join(err, mut.Release(f.ctx))
			}
		}()
		mnt, err := mut.Mount(f.ctx, cache.MountOptions{})
		if err != nil {
			return err
		}
		write(f, mnt.Path(), "d001/f01", "changed")
		if err := mnt.Unmount(); err != nil {
			return err
		}
		if err := writer.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: "d001/f01"}); err != nil {
			return err
		}
		ref, err = writer.Commit(f.ctx, cache.CommitOptions{})
		return err
	})
	return ref
}

// A stored page that cannot be read is told, and nothing is answered from what
// is left.
func TestStoredTreeThatCannotBeRead(t *testing.T) {
	w := newWorld(t, kinds[0])
	ref := w.commit(nil, func(dir string) { manyFiles(w, dir, 30) })
	want := w.sum(ref, "/")
	id := ref.ID()
	w.release(ref)
	w.restart()
	ref = w.get(id)
	w.driver.FailOp("Mount", "", unix.EIO)
	require.Equal(t, want, w.sum(ref, "/"), "nothing is mounted for what is stored")
	_, err := w.sums.Checksum(w.ctx, ref, "/d000", contenthash.Options{IgnoreOwners: true})
	require.ErrorIs(t, err, unix.EIO)
	w.driver.Clear()
	_, err = w.sums.Checksum(w.ctx, ref, "/d000", contenthash.Options{IgnoreOwners: true})
	require.NoError(t, err)
	_, err = w.sums.Checksum(w.ctx, ref, "/nothing", contenthash.Options{})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	w.release(ref)
}

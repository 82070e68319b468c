package cache_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
)

// holdFiles are the files by which processes hold records.
func (w *world) holdFiles() []string {
	entries, err := os.ReadDir(filepath.Join(w.root, "holds"))
	require.NoError(w, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// heldBy requires that err names the helper as the holder.
func heldBy(t testing.TB, err error, h *helper) {
	t.Helper()
	require.ErrorIs(t, err, cache.ErrLocked)
	var locked *cache.LockedError
	require.ErrorAs(t, err, &locked)
	require.Len(t, locked.Holders, 1)
	require.Equal(t, cache.HolderProcess, locked.Holders[0].Kind)
	require.Equal(t, h.cmd.Process.Pid, locked.Holders[0].PID)
	require.Equal(t, "the holder", locked.Holders[0].Command)
	require.False(t, locked.Holders[0].Since.IsZero())
}

func TestAWriterInAnotherProcess(t *testing.T) {
	forKinds(t, func(w *world) {
		mut := w.new(nil, cache.NewOptions{Retain: true}, "a", "1")
		w.release(mut)
		id := mut.ID()
		writer, path := startHolder(w, id, true, true)
		w.reopenStore()
		_, err := w.GetMutable(w.ctx, id)
		heldBy(w, err, writer)
		out, err := w.Remove(w.ctx, id)
		require.NoError(w, err)
		heldBy(w, out[0].Err, writer)
		refs := w.Refs(id)
		require.Len(w, refs, 1)
		require.Equal(w, writer.cmd.Process.Pid, refs[0].PID)
		require.NoError(w, os.WriteFile(filepath.Join(path, "b"), []byte("2"), 0o644))

		w.closeStore()
		writer.quit()
		w.reopenStore()
		require.Empty(w, w.Refs(id))
		mut, err = w.GetMutable(w.ctx, id)
		require.NoError(w, err)
		imm := w.commit(mut)
		require.Equal(w, "a=1 b=2", w.tree(imm))
		w.release(imm)
		require.Empty(w, w.holdFiles(), "the holder took its file along")
	})
}

func TestAReaderInAnotherProcess(t *testing.T) {
	forKinds(t, func(w *world) {
		imm := w.layer(nil, "a", "1")
		w.release(imm)
		id := imm.ID()
		reader, path := startHolder(w, id, false, true)
		second, _ := startHolder(w, id, false, false)
		w.reopenStore()
		require.Len(w, w.Refs(id), 2)
		w.closeStore()
		second.quit()
		w.reopenStore()
		_, err := w.GetMutable(w.ctx, id)
		heldBy(w, err, reader)
		out, err := w.Remove(w.ctx, id)
		require.NoError(w, err)
		heldBy(w, out[0].Err, reader)

		imm = w.get(id)
		require.NoError(w, imm.Finalize(w.ctx), "a reader does not mind")
		child := w.layer(imm, "b", "2")
		require.Equal(w, "a=1 b=2", w.tree(child))
		require.Equal(w, "a=1", readTree(w, path))
		w.release(imm, child)
		require.NoError(w, removeOne(w, child.ID()))

		reader.kill()
		require.NoError(w, removeOne(w, id), "the kernel frees what a killed process held")
		w.closeStore()
		require.True(w, w.dirty(), "the dead reader's mount is still there")
		w.reopenStore()
		w.closeStore()
		require.False(w, w.dirty())
	})
}

// An exclusive hold stays with the process that committed the record, and
// keeps others from giving its snapshot another name.
func TestFinalizeIsRefusedByAnExclusiveHolder(t *testing.T) {
	forKinds(t, func(w *world) {
		mut := w.new(nil, cache.NewOptions{Retain: true}, "a", "1")
		hold, err := mut.Detach(w.ctx)
		require.NoError(w, err)
		require.True(w, hold.Exclusive())
		require.Equal(w, mut.ID(), hold.ID())
		require.Len(w, w.Refs(mut.ID()), 1)
		w.closeStore()
		require.True(w, w.dirty(), "somebody works in it")

		w.reopenStore()
		mut, err = w.Attach(w.ctx, hold)
		require.NoError(w, err)
		w.write(mut, "b", "2")
		imm := w.commit(mut)
		err = imm.Finalize(w.ctx)
		require.ErrorIs(w, err, cache.ErrLocked)
		_, err = w.New(w.ctx, imm, cache.NewOptions{})
		require.ErrorIs(w, err, cache.ErrLocked)
		require.NoError(w, hold.Release())
		require.NoError(w, hold.Release())
		require.NoError(w, imm.Finalize(w.ctx))
		require.Equal(w, "a=1 b=2", w.tree(imm))
		w.release(imm)
		require.Empty(w, w.holdFiles())
	})
}

func TestHoldsThatCannotBeTaken(t *testing.T) {
	w := newWorld(t, nativeKind)
	fresh := w.new(nil, cache.NewOptions{}, "", "")
	_, err := fresh.Detach(w.ctx)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "it is in memory only")
	imm := w.commit(fresh)
	twin, err := imm.Clone()
	require.NoError(t, err)
	shared, err := imm.Detach(w.ctx)
	require.NoError(t, err)
	require.False(t, shared.Exclusive())
	_, err = imm.Detach(w.ctx)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "Detach ended the handle")
	_, err = w.Attach(w.ctx, shared)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "it is for reading")
	second, err := twin.Detach(w.ctx)
	require.NoError(t, err, "readers share")
	require.NoError(t, shared.Release())
	require.Len(t, w.Refs(imm.ID()), 1)
	require.NoError(t, second.Release())
	require.Empty(t, w.Refs(imm.ID()))

	mut, err := w.GetMutable(w.ctx, imm.ID())
	require.NoError(t, err)
	hold, err := mut.Detach(w.ctx)
	require.NoError(t, err)
	other := newWorld(t, nativeKind)
	_, err = other.Attach(w.ctx, hold)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "it is of another store")
	require.NoError(t, hold.Release())
	_, err = w.Attach(w.ctx, hold)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "it was released")
}

func TestAwaitHold(t *testing.T) {
	w := newWorld(t, overlayKind)
	imm := w.layer(nil, "a", "1")
	w.release(imm)
	id := imm.ID()
	w.closeStore()
	require.NoError(t, cache.AwaitHold(w.ctx, w.root, id, true), "nobody holds it")
	require.Empty(t, w.holdFiles(), "who looks makes no file")

	reader, _ := startHolder(w, id, false, false)
	require.NoError(t, cache.AwaitHold(w.ctx, w.root, id, false), "readers do not exclude each other")
	ctx, cancel := context.WithTimeout(w.ctx, 20*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, cache.AwaitHold(ctx, w.root, id, true), context.DeadlineExceeded)
	for _, end := range []func(*helper){(*helper).quit, (*helper).kill} {
		outcome := make(chan error, 1)
		go func() { outcome <- cache.AwaitHold(w.ctx, w.root, id, true) }()
		end(reader)
		require.NoError(t, <-outcome)
		reader, _ = startHolder(w, id, false, false)
	}
	reader.kill()
}

// Those who look whether a record is held stand in nobody's way, neither in
// that of each other nor of who wants to hold it.
func TestLookingAtHoldsDisturbsNobody(t *testing.T) {
	w := newWorld(t, nativeKind)
	imm := w.layer(nil, "a", "1")
	anchor, err := imm.Detach(w.ctx) // so that the file stays
	require.NoError(t, err)
	stop := make(chan struct{})
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := cache.AwaitHold(w.ctx, w.root, imm.ID(), false); err != nil {
					panic(err)
				}
				w.Refs(imm.ID())
			}
		})
	}
	for range 300 {
		ref := w.get(imm.ID())
		hold, err := ref.Detach(w.ctx)
		require.NoError(t, err)
		require.NoError(t, hold.Release())
	}
	close(stop)
	group.Wait()
	require.NoError(t, anchor.Release())
	require.Empty(t, w.holdFiles())
}

// A test takes no lock, so nothing but a holder excludes a holder.
func TestHoldFilesAreMadeByHoldersOnly(t *testing.T) {
	w := newWorld(t, nativeKind)
	imm := w.layer(nil, "a", "1")
	require.NoError(t, imm.Finalize(w.ctx))
	other := w.layer(nil, "b", "2")
	w.release(imm, other)
	mut, err := w.GetMutable(w.ctx, other.ID())
	require.NoError(t, err)
	w.release(mut)
	w.Refs(imm.ID())
	_, err = w.DiskUsage(w.ctx, nil)
	require.NoError(t, err)
	require.NoError(t, removeOne(w, imm.ID()))
	w.check()
	require.Empty(t, w.holdFiles())
}

// Whatever an id holds, its hold is a file in the directory of holds.
func TestHoldsOfOddIDs(t *testing.T) {
	w := newWorld(t, nativeKind)
	w.closeStore()
	seen := map[string]bool{}
	for _, id := range []cache.ID{"..", ".", "../x", "a/b", "\x00", "A", "a", "sha-", cache.ID(make([]byte, 1000))} {
		require.NoError(t, cache.AwaitHold(w.ctx, w.root, id, true))
		path := cache.HoldPath(w.root, id)
		require.Equal(t, filepath.Join(w.root, "holds"), filepath.Dir(path))
		require.False(t, seen[path], "%q", id)
		seen[path] = true
	}
}

// The mounts of a detached record outlive the manager, and end with their own
// Unmount.
func TestDetachedMountsOutliveTheManager(t *testing.T) {
	w := newWorld(t, overlayKind)
	mut := w.new(nil, cache.NewOptions{Retain: true}, "a", "1")
	mnt, err := mut.Mount(w.ctx, cache.MountOptions{})
	require.NoError(t, err)
	lost, err := w.layer(nil, "x", "y").Mount(w.ctx)
	require.NoError(t, err)
	hold, err := mut.Detach(w.ctx)
	require.NoError(t, err)
	w.closeStore()
	require.Equal(t, "a=1", readTree(t, mnt.Path()))
	_, err = os.Lstat(lost.Path())
	require.ErrorIs(t, err, os.ErrNotExist, "Close ended the mount that nobody detached")
	require.NoError(t, lost.Unmount())
	require.NoError(t, mnt.Unmount())
	require.NoError(t, mnt.Unmount())
	require.NoError(t, hold.Release())
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(w.root))
	require.NoError(t, err)
	require.Empty(t, mounts)
}

// A process that dies without a word leaves mounts, which the next open takes
// away: those of the dead only.
func TestMountsOfAKilledProcessAreCleaned(t *testing.T) {
	w := newWorld(t, overlayKind)
	dead, alive := w.layer(nil, "a", "1"), w.layer(nil, "b", "2")
	w.release(dead, alive)
	killed, deadPath := startHolder(w, dead.ID(), false, true)
	living, livePath := startHolder(w, alive.ID(), false, true)
	killed.kill()
	require.Equal(t, "a=1", readTree(t, deadPath), "a mount does not die with its process")
	w.reopenStore()
	_, err := os.Lstat(deadPath)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.Equal(t, "b=2", readTree(t, livePath))
	require.ErrorIs(t, os.WriteFile(filepath.Join(livePath, "x"), nil, 0o600), unix.EROFS)
	require.NoError(t, removeOne(w, dead.ID()))
	living.quit()
}

// So it is if the next one to open the store is in another mount namespace.
func TestMountsOfAKilledProcessAreCleanedFromAfar(t *testing.T) {
	w := newWorld(t, overlayKind)
	dead, alive := w.layer(nil, "a", "1"), w.layer(nil, "b", "2")
	w.release(dead, alive)
	killed, deadPath := startHolder(w, dead.ID(), false, true)
	living, livePath := startHolder(w, alive.ID(), false, true)
	killed.kill()
	startHelperIn(t, &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}, "private", w.root, w.kind.name, w.boot).quit()
	_, err := os.Lstat(deadPath)
	require.ErrorIs(t, err, os.ErrNotExist)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(deadPath))
	require.NoError(t, err)
	require.Empty(t, mounts)
	require.Equal(t, "b=2", readTree(t, livePath))
	living.quit()
}

// Who takes a hold while another one gives his up, and takes the file along,
// has it all the same.
func TestHoldsTakenAndGivenUpAtOnce(t *testing.T) {
	w := newWorld(t, nativeKind)
	imm := w.layer(nil, "a", "1")
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			for range 300 {
				ref, err := imm.Clone()
				if err == nil {
					var hold *cache.Hold
					if hold, err = ref.Detach(w.ctx); err == nil {
						if _, err := os.Lstat(cache.HoldPath(w.root, imm.ID())); err != nil {
							panic("held, and nobody can see it: " + err.Error())
						}
						err = hold.Release()
					}
				}
				if err != nil {
					panic(err)
				}
			}
		})
	}
	group.Wait()
	w.release(imm)
}

// Of those who want a hold for themselves one has it, and whoever leaves last,
// with it or without, leaves no file.
func TestHoldsThatAreFoughtOver(t *testing.T) {
	root := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(root, "holds"), 0o700))
	const id = cache.ID("one")
	for round := range 3000 {
		var group sync.WaitGroup
		errs := make([]error, 4)
		for i := range errs {
			group.Go(func() {
				hold, err := cache.TakeHold(root, id, i > 0, "test", time.Now())
				if locked := (*cache.LockedError)(nil); errors.As(err, &locked) {
					return
				}
				if err == nil {
					err = hold.Release()
				}
				errs[i] = err
			})
		}
		group.Wait()
		require.NoError(t, errors.Join(errs...))
		require.NoFileExists(t, cache.HoldPath(root, id), "round %d", round)
	}
}

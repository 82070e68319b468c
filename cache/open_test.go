package cache_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/snapshot"
)

func (w *world) clean() bool {
	_, clean := os.Lstat(filepath.Join(w.root, "clean"))
	return clean == nil && !w.dirty()
}

// times are the change times of all that lies below a root, but for the name
// of the holder, which each writing open writes down.
func times(t testing.TB, root string) map[string]time.Time {
	out := map[string]time.Time{}
	require.NoError(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Base(path) == cache.StoreFile+".holder" {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		out[path] = time.Unix(st.Ctim.Unix())
		return nil
	}))
	delete(out, root) // the holder's file comes and goes in it
	return out
}

func TestOpeningACleanStoreDoesNothing(t *testing.T) {
	forKinds(t, func(w *world) {
		for range 3 {
			imm := w.layer(nil, "a", "1")
			require.NoError(w, imm.Finalize(w.ctx))
			w.release(imm)
		}
		w.new(nil, cache.NewOptions{Retain: true}, "b", "2")
		w.closeStore()
		require.True(w, w.clean())
		before := times(w, w.root)
		w.opts = func(o *cache.Options) {
			o.Step = func(name string) error { return errors.New("a step of an open that has nothing to do: " + name) }
		}
		w.reopenStore()
		require.Empty(w, w.driver.Calls())
		require.Zero(w, w.Stats().Transactions)
		require.True(w, w.clean())
		w.closeStore()
		w.opts = nil
		if w.kind.name != containerdKind.name { // which opens a database of its own
			require.Equal(w, before, times(w, w.root))
		}
	})
}

// The mark speaks of names: what changes none leaves it.
func TestMarks(t *testing.T) {
	forKinds(t, func(w *world) {
		imm := w.layer(nil, "a", "1")
		w.release(imm)
		require.True(w, w.dirty())
		w.reopenStore()
		require.True(w, w.clean())
		mut, err := w.GetMutable(w.ctx, imm.ID())
		require.NoError(w, err)
		require.NoError(w, mut.SetValue(w.ctx, cache.Value{Name: "k"}))
		imm = w.commit(mut)
		require.True(w, w.clean(), "Reopen and Commit change no name")
		require.NoError(w, imm.Finalize(w.ctx))
		require.True(w, w.dirty())
		w.release(imm)

		w.reopenStore()
		require.Equal(w, "a=1", w.treeOf(imm.ID()))
		require.True(w, w.dirty(), "a mount outlives a kill")
		w.reopenStore()
		require.NoError(w, removeOne(w, imm.ID()))
		require.True(w, w.dirty())
		w.reopenStore()
		require.True(w, w.clean())

		kept := w.new(nil, cache.NewOptions{}, "b", "2")
		w.closeStore()
		require.True(w, w.dirty(), "a handle was out: its snapshot has no record")
		require.NoError(w, kept.Release(w.ctx))
		w.reopenStore()
		require.Empty(w, w.names())
		w.closeStore()
		require.True(w, w.clean())

		// Whatever the reason, with both marks there the store is dirty.
		require.NoError(w, os.WriteFile(filepath.Join(w.root, "dirty"), nil, 0o600))
		w.reopenStore()
		require.NotEmpty(w, w.driver.Calls())
		w.closeStore()
		require.True(w, w.clean())
	})
}

// The store is dirty before the first name changes, not after.
func TestTheMarkComesBeforeTheName(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), "store")
	ctx := context.Background()
	var names []string
	opened := false
	o := cache.Options{Root: root, DriverName: "overlay", BootID: "this boot", Step: func(name string) error {
		if opened {
			_, err := os.Lstat(filepath.Join(root, "dirty"))
			names = append(names, name)
			if name != "mark dirty" && name != "tx begin" && name != "tx commit" && name != "close commit" {
				require.NoError(t, err, name)
			}
		}
		return nil
	}}
	for round := range 2 {
		m, err := cache.Open(ctx, o)
		require.NoError(t, err)
		opened = true
		mut, err := m.New(ctx, nil, cache.NewOptions{})
		require.NoError(t, err)
		if round > 0 { // making the store left it dirty
			require.Equal(t, "mark dirty", names[0])
		}
		require.Contains(t, names, "make.rename")
		require.NoError(t, mut.Release(ctx))
		require.NoError(t, m.Close())
		names, opened = nil, false
	}
}

func TestOpenWithAnotherDriver(t *testing.T) {
	needRoot(t)
	ctx := context.Background()
	root := filepath.Join(t.TempDir(), "store")
	refused := func(o cache.Options, class error) {
		t.Helper()
		o.Root = root
		m, err := cache.Open(ctx, o)
		require.ErrorIs(t, err, class)
		require.Nil(t, m)
	}
	_, err := cache.Open(ctx, cache.Options{Root: filepath.Join(t.TempDir(), "other"), DriverName: "zfs"})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)

	m, err := cache.Open(ctx, cache.Options{Root: root, DriverName: "overlay"})
	require.NoError(t, err)
	meta, err := m.Meta(ctx)
	require.NoError(t, err)
	require.Equal(t, "overlay", meta.Driver)
	require.Equal(t, "trusted", meta.Attributes)
	require.NoError(t, m.Close())

	refused(cache.Options{DriverName: "native"}, errdefs.ErrFailedPrecondition)
	refused(cache.Options{DriverName: "zfs"}, errdefs.ErrFailedPrecondition)
	native, err := nativeKind.open(t.TempDir())
	require.NoError(t, err)
	refused(cache.Options{Driver: native}, errdefs.ErrFailedPrecondition)
	require.NoError(t, native.Close())

	// The same name, with marks in another class of attributes.
	s, err := overlay.NewSnapshotter(t.TempDir())
	require.NoError(t, err)
	user := snapshot.Adapt("overlay", s, snapshot.AdaptOptions{Attributes: snapshot.User})
	refused(cache.Options{Driver: user}, errdefs.ErrFailedPrecondition)
	require.NoError(t, user.Close())

	m, err = cache.Open(ctx, cache.Options{Root: root})
	require.NoError(t, err, "asked for nothing, it takes the store's own")
	require.Equal(t, "overlay", m.Driver().Name)
	require.NoError(t, m.Close())
}

func TestReadOnly(t *testing.T) {
	w := newWorld(t, overlayKind)
	base := w.layer(nil, "a", "1")
	mut := w.new(base, cache.NewOptions{Values: []cache.Value{{Name: "k", Index: "key"}}}, "b", "2")
	top := w.commit(mut)
	require.NoError(t, top.Attach(w.ctx, "log", []byte("text")))
	kept := w.new(nil, cache.NewOptions{Retain: true}, "c", "3")
	w.release(base, top, kept)
	w.closeStore()

	// The store as it lies on a file system that cannot be written.
	frozen := filepath.Join(t.TempDir(), "frozen")
	require.NoError(t, os.Mkdir(frozen, 0o700))
	require.NoError(t, unix.Mount(w.root, frozen, "", unix.MS_BIND, ""))
	defer func() { require.NoError(t, unix.Unmount(frozen, unix.MNT_DETACH)) }()
	require.NoError(t, unix.Mount("", frozen, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	before := times(t, w.root)

	for _, boot := range []string{"this boot", "another boot"} {
		m, err := cache.Open(w.ctx, cache.Options{Root: frozen, ReadOnly: true, BootID: boot})
		require.NoError(t, err)
		second, err := cache.Open(w.ctx, cache.Options{Root: frozen, ReadOnly: true, BootID: boot})
		require.NoError(t, err, "those who look do not exclude each other")
		require.NoError(t, second.Close())

		ids, err := m.Search(w.ctx, "key")
		require.NoError(t, err)
		require.Equal(t, []cache.ID{top.ID()}, ids)
		u, err := m.DiskUsage(w.ctx, nil)
		require.NoError(t, err)
		require.EqualValues(t, 3, u.Records)
		for _, err := range m.Check(w.ctx) {
			require.NoError(t, err)
		}
		imm, err := m.Get(w.ctx, top.ID(), cache.GetOptions{})
		require.NoError(t, err)
		data, err := imm.Attachment(w.ctx, "log")
		require.NoError(t, err)
		require.Equal(t, "text", string(data))

		refused := func(err error) {
			t.Helper()
			require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		}
		refused(imm.Finalize(w.ctx))
		refused(imm.SetValue(w.ctx, cache.Value{Name: "x"}))
		_, err = m.New(w.ctx, nil, cache.NewOptions{})
		refused(err)
		_, err = m.GetMutable(w.ctx, kept.ID())
		refused(err)
		_, err = m.Remove(w.ctx, top.ID())
		refused(err)
		_, err = m.Sync(w.ctx)
		refused(err)
		_, err = imm.Mount(w.ctx)
		refused(err)
		require.NoError(t, imm.Release(w.ctx))
		require.NoError(t, m.Close())
	}
	require.Equal(t, before, times(t, w.root))
	require.True(t, w.clean())

	_, err := cache.Open(w.ctx, cache.Options{Root: frozen, BootID: "this boot", NoCreate: true})
	require.Error(t, err, "a store that cannot be written can only be looked at")
	require.Equal(t, before, times(t, w.root))
	_, err = cache.Open(w.ctx, cache.Options{Root: filepath.Join(t.TempDir(), "none"), ReadOnly: true})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

// An open that fails leaves the store to the next one.
func TestAnOpenThatFailsLetsGo(t *testing.T) {
	w := newWorld(t, overlayKind)
	imm := w.layer(nil, "a", "1")
	w.release(imm)
	w.closeStore()
	require.NoError(t, os.Rename(filepath.Join(w.root, "clean"), filepath.Join(w.root, "dirty")))
	w.opts = func(o *cache.Options) { w.driver.FailOp("Settle", "", errInjected) }
	require.ErrorIs(t, w.tryOpen(), errInjected)
	w.opts = nil
	ctx, cancel := context.WithCancel(w.ctx)
	cancel()
	_, err := cache.Open(ctx, cache.Options{Root: w.root, DriverName: "overlay"})
	require.ErrorIs(t, err, context.Canceled)
	w.reopenStore()
	require.Equal(t, "a=1", w.treeOf(imm.ID()))
}

package cache_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

func TestLifeOfARecord(t *testing.T) {
	forKinds(t, func(w *world) {
		base := w.layer(nil, "a", "1")
		require.Equal(w, cache.Committed, base.Record().State)
		id := base.ID()

		top := w.layer(base, "b", "2")
		require.Equal(w, cache.Finalized, base.Record().State, "a parent is finalized")
		require.Equal(w, []cache.ID{id}, top.Record().Parents)
		require.Equal(w, "a=1 b=2", w.tree(top))
		require.Equal(w, "a=1", w.tree(base))

		require.NoError(w, top.Finalize(w.ctx))
		require.NoError(w, top.Finalize(w.ctx))
		require.Equal(w, "a=1 b=2", w.tree(top))
		w.release(base, top)

		w.reopenStore()
		top = w.get(top.ID())
		require.Equal(w, "a=1 b=2", w.tree(top))
		w.release(top)

		out, err := w.Remove(w.ctx, id)
		require.NoError(w, err)
		require.ErrorIs(w, out[0].Err, errdefs.ErrFailedPrecondition, "a parent outlives its children")
		require.ErrorContains(w, out[0].Err, string(top.ID()))
		out, err = w.Remove(w.ctx, id, top.ID())
		require.NoError(w, err)
		for _, r := range out {
			require.NoError(w, r.Err)
			require.Positive(w, r.Freed)
		}
		_, err = w.Get(w.ctx, id, cache.GetOptions{})
		require.ErrorIs(w, err, errdefs.ErrNotFound)
	})
}

func TestTransactionsPerOperation(t *testing.T) {
	w := newWorld(t, overlayKind)
	var mut *cache.MutableRef
	var imm *cache.ImmutableRef
	var err error
	count := func(what string, want int, fn func()) {
		t.Helper()
		require.Equal(t, want, w.transactions(fn), what)
		require.NoError(t, err, what)
	}
	count("New", 0, func() { mut, err = w.New(w.ctx, nil, cache.NewOptions{}) })
	count("SetValue in memory", 0, func() { err = mut.SetValue(w.ctx, cache.Value{Name: "n", Index: "i"}) })
	count("Commit", 1, func() { imm, err = mut.Commit(w.ctx) })
	count("Finalize", 1, func() { err = imm.Finalize(w.ctx) })
	count("Finalize again", 0, func() { err = imm.Finalize(w.ctx) })
	count("New over a parent", 0, func() { mut, err = w.New(w.ctx, imm, cache.NewOptions{}) })
	count("Release of a mutable", 0, func() { err = mut.Release(w.ctx) })
	count("Release", 0, func() { err = imm.Release(w.ctx) })
	count("Get", 0, func() { imm, err = w.Get(w.ctx, imm.ID(), cache.GetOptions{}) })
	count("Mount", 0, func() {
		mnt, merr := imm.Mount(w.ctx)
		require.NoError(t, merr)
		err = mnt.Unmount()
	})
	w.release(imm)
	count("New retained", 1, func() { mut, err = w.New(w.ctx, nil, cache.NewOptions{Retain: true}) })
	count("SetValue", 1, func() { err = mut.SetValue(w.ctx, cache.Value{Name: "n", Index: "i"}) })
	count("Commit", 1, func() { imm, err = mut.Commit(w.ctx) })
	w.release(imm)
	count("Reopen", 1, func() { mut, err = w.GetMutable(w.ctx, imm.ID()) })
	count("Commit", 1, func() { imm, err = mut.Commit(w.ctx) })
	w.release(imm)
	ids := []cache.ID{imm.ID()}
	for range 20 {
		l := w.layer(nil, "", "")
		ids = append(ids, l.ID())
		w.release(l)
	}
	count("removal of many", 1, func() { _, err = w.Remove(w.ctx, ids...) })
}

// A commit asks nothing of the driver, a reopen neither.
func TestCommitDoesNotTouchTheDriver(t *testing.T) {
	w := newWorld(t, overlayKind)
	mut := w.new(nil, cache.NewOptions{}, "a", "1")
	before := len(w.driver.Calls())
	imm := w.commit(mut)
	require.Len(t, w.driver.Calls(), before, "driver calls of Commit")
	w.release(imm)
	mut, err := w.GetMutable(w.ctx, imm.ID())
	require.NoError(t, err)
	imm = w.commit(mut)
	require.Len(t, w.driver.Calls(), before, "driver calls of Reopen and Commit by the same process")
	w.release(imm)

	w.reopenStore()
	mut, err = w.GetMutable(w.ctx, imm.ID())
	require.NoError(t, err)
	before = len(w.driver.Calls())
	w.release(w.commit(mut))
	calls := w.driver.Calls()[before:]
	require.Len(t, calls, 1)
	require.Equal(t, "InUse", calls[0].Op, "another process may have written")
}

func TestReopen(t *testing.T) {
	forKinds(t, func(w *world) {
		mut := w.new(nil, cache.NewOptions{
			Type: "regular", Description: "d", Labels: map[string]string{"l": "1"},
			Values: []cache.Value{{Name: "k", Data: []byte("v"), Index: "key"}},
		}, "a", "1")
		require.NoError(w, mut.Attach(w.ctx, "log", []byte("text")))
		require.NoError(w, mut.Attach(w.ctx, cache.FileList, []byte("[]")))
		first := w.commit(mut)
		require.Equal(w, mut.ID(), first.ID(), "Commit keeps the id")
		key := first.Record().Key

		_, err := w.GetMutable(w.ctx, first.ID())
		require.ErrorIs(w, err, cache.ErrLocked)
		var locked *cache.LockedError
		require.ErrorAs(w, err, &locked)
		require.Contains(w, locked.Holders[0].Site, "_test.go", "a handle knows where it was acquired")
		w.release(first)

		again, err := w.GetMutable(w.ctx, first.ID())
		require.NoError(w, err)
		require.NotEqual(w, first.ID(), again.ID())
		rec := again.Record()
		require.Equal(w, key, rec.Key, "same snapshot")
		require.True(w, rec.Retain)
		require.True(w, rec.Interrupted)
		require.Equal(w, "d", rec.Description)
		_, err = w.Get(w.ctx, first.ID(), cache.GetOptions{})
		require.ErrorIs(w, err, errdefs.ErrNotFound)
		ids, err := w.Search(w.ctx, "key")
		require.NoError(w, err)
		require.Equal(w, []cache.ID{again.ID()}, ids)
		data, err := again.Attachment(w.ctx, "log")
		require.NoError(w, err)
		require.Equal(w, "text", string(data))
		_, err = again.Attachment(w.ctx, cache.FileList)
		require.ErrorIs(w, err, errdefs.ErrNotFound, "it described the old tree")

		w.write(again, "b", "2")
		second := w.commit(again)
		require.Equal(w, again.ID(), second.ID())
		require.False(w, second.Record().Retain, "Commit restores the policy")
		require.False(w, second.Record().Interrupted)
		require.Equal(w, "a=1 b=2", w.tree(second))
		w.release(second)

		w.reopenStore()
		_, err = w.Get(w.ctx, first.ID(), cache.GetOptions{})
		require.ErrorIs(w, err, errdefs.ErrNotFound)
		second = w.get(second.ID())
		require.NoError(w, second.Finalize(w.ctx))
		w.release(second)
		_, err = w.GetMutable(w.ctx, second.ID())
		require.ErrorIs(w, err, errdefs.ErrFailedPrecondition)
	})
}

func TestInterruptedReopenIsContinued(t *testing.T) {
	forKinds(t, func(w *world) {
		imm := w.layer(nil, "a", "1")
		w.release(imm)
		mut, err := w.GetMutable(w.ctx, imm.ID())
		require.NoError(w, err)
		w.write(mut, "b", "2")
		w.release(mut)
		w.reopenStore()
		_, err = w.Get(w.ctx, mut.ID(), cache.GetOptions{})
		require.ErrorIs(w, err, errdefs.ErrFailedPrecondition)
		mut, err = w.GetMutable(w.ctx, mut.ID())
		require.NoError(w, err)
		require.True(w, mut.Record().Interrupted)
		imm = w.commit(mut)
		require.Equal(w, "a=1 b=2", w.tree(imm))
		w.release(imm)
	})
}

func TestParentsCannotBeReopened(t *testing.T) {
	w := newWorld(t, overlayKind)
	base := w.layer(nil, "a", "1")
	top := w.layer(base, "b", "2")
	w.release(base, top)
	_, err := w.GetMutable(w.ctx, base.ID())
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

func TestMutableWithoutRecordDiesWithItsHandle(t *testing.T) {
	forKinds(t, func(w *world) {
		base := w.layer(nil, "a", "1")
		mut := w.new(base, cache.NewOptions{Values: []cache.Value{{Name: "k", Index: "key"}}}, "b", "2")
		ids, err := w.Search(w.ctx, "key")
		require.NoError(w, err)
		require.Empty(w, ids, "it is in memory only")
		w.release(base)
		out, err := w.Remove(w.ctx, base.ID())
		require.NoError(w, err)
		require.ErrorIs(w, out[0].Err, cache.ErrLocked, "a child in memory holds its parent")
		w.release(mut)
		require.ErrorIs(w, mut.SetValue(w.ctx, cache.Value{Name: "x"}), errdefs.ErrFailedPrecondition)
		out, err = w.Remove(w.ctx, base.ID())
		require.NoError(w, err)
		require.NoError(w, out[0].Err)
	})
}

// While a mutable is given up its id is not found, for it was never anybody's.
func TestAMutableThatIsGivenUpIsNotFound(t *testing.T) {
	forKinds(t, func(w *world) {
		mut := w.new(nil, cache.NewOptions{}, "a", "1")
		reached, release := w.driver.Block("Detach", mut.Record().Key)
		defer release()
		released := make(chan error, 1)
		go func() { released <- mut.Release(w.ctx) }()
		<-reached
		_, err := w.Get(w.ctx, mut.ID(), cache.GetOptions{})
		require.ErrorIs(w, err, errdefs.ErrNotFound)
		_, err = w.Lookup(w.ctx, mut.ID())
		require.ErrorIs(w, err, errdefs.ErrNotFound)
		release()
		require.NoError(w, <-released)
		_, err = w.Get(w.ctx, mut.ID(), cache.GetOptions{})
		require.ErrorIs(w, err, errdefs.ErrNotFound)
	})
}

func TestRetainWritesTheRecord(t *testing.T) {
	w := newWorld(t, overlayKind)
	mut := w.new(nil, cache.NewOptions{Values: []cache.Value{{Name: "k", Index: "key"}}}, "a", "1")
	require.NoError(t, mut.Attach(w.ctx, "x", []byte("y")))
	require.Equal(t, 1, w.transactions(func() {
		require.NoError(t, mut.Edit(w.ctx, func(e *cache.Edit) error { e.SetRetain(true); return nil }))
	}))
	ids, err := w.Search(w.ctx, "key")
	require.NoError(t, err)
	require.Equal(t, []cache.ID{mut.ID()}, ids)
	w.release(mut)
	w.reopenStore()
	mut, err = w.GetMutable(w.ctx, mut.ID())
	require.NoError(t, err)
	data, err := mut.Attachment(w.ctx, "x")
	require.NoError(t, err)
	require.Equal(t, "y", string(data))
	w.release(mut)
}

func TestHandles(t *testing.T) {
	w := newWorld(t, overlayKind)
	one := w.layer(nil, "a", "1")
	two, err := one.Clone()
	require.NoError(t, err)
	require.Len(t, w.Refs(one.ID()), 2)
	w.release(one, one, one)
	require.Len(t, w.Refs(one.ID()), 1, "a double release takes nobody else's count")
	_, err = one.Clone()
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.Equal(t, "a=1", w.tree(two))
	w.release(two)
	require.Empty(t, w.Refs(one.ID()))

	mut := w.new(nil, cache.NewOptions{}, "", "")
	imm := w.commit(mut)
	_, err = mut.Commit(w.ctx)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "Commit consumed the handle")
	w.release(mut, imm)
}

func TestUsesAreCountedOnce(t *testing.T) {
	w := newWorld(t, overlayKind)
	now := time.Unix(1_700_000_000, 0).UTC()
	w.opts = func(o *cache.Options) { o.Now = func() time.Time { return now } }
	w.reopenStore()
	mut, err := w.New(w.ctx, nil, cache.NewOptions{Retain: true})
	require.NoError(t, err)
	imm := w.commit(mut)
	w.release(imm)
	id := imm.ID()
	for range 2 {
		now = now.Add(time.Hour)
		w.release(w.get(id))
	}
	last := now
	now = now.Add(time.Hour)
	quiet, err := w.Get(w.ctx, id, cache.GetOptions{NoUpdate: true})
	require.NoError(t, err)
	w.release(quiet)
	for range 3 {
		_, err := w.DiskUsage(w.ctx, nil)
		require.NoError(t, err)
		w.check()
	}
	w.reopenStore()
	rec, err := w.Lookup(w.ctx, id)
	require.NoError(t, err)
	require.Equal(t, uint64(3), rec.UsageCount)
	require.True(t, last.Equal(rec.LastUsed), "%s, not %s", rec.LastUsed, last)
}

func TestMounts(t *testing.T) {
	forKinds(t, func(w *world) {
		mut, err := w.New(w.ctx, nil, cache.NewOptions{})
		require.NoError(w, err)
		one, err := mut.Mount(w.ctx, cache.MountOptions{})
		require.NoError(w, err)
		two, err := mut.Mount(w.ctx, cache.MountOptions{})
		require.NoError(w, err)
		ro, err := mut.Mount(w.ctx, cache.MountOptions{ReadOnly: true})
		require.NoError(w, err)
		require.NoError(w, os.WriteFile(filepath.Join(one.Path(), "f"), []byte("x"), 0o644))
		require.Equal(w, "f=x", readTree(w, two.Path()))
		require.Equal(w, "f=x", readTree(w, ro.Path()), "a reader sees what the writer beside it writes")
		require.ErrorIs(w, os.WriteFile(filepath.Join(ro.Path(), "g"), nil, 0o644), unix.EROFS)
		_, err = mut.Commit(w.ctx)
		require.ErrorIs(w, err, errdefs.ErrFailedPrecondition, "it is mounted writable")
		require.NoError(w, one.Unmount())
		require.NoError(w, one.Unmount())
		require.NoError(w, two.Unmount())
		again, err := mut.Mount(w.ctx, cache.MountOptions{})
		require.NoError(w, err, "the reader beside it keeps the one kernel mount alive")
		require.NoError(w, os.WriteFile(filepath.Join(again.Path(), "h"), []byte("y"), 0o644))
		require.Equal(w, "f=x h=y", readTree(w, ro.Path()))
		require.NoError(w, again.Unmount())
		require.NoError(w, ro.Unmount())

		alone, err := mut.Mount(w.ctx, cache.MountOptions{ReadOnly: true})
		require.NoError(w, err)
		require.NotContains(w, mountLine(w, alone.Path()), "upperdir")
		require.ErrorIs(w, os.WriteFile(filepath.Join(alone.Path(), "g"), nil, 0o644), unix.EROFS)
		require.NoError(w, alone.Unmount())

		imm := w.commit(mut)
		for _, state := range []cache.State{cache.Committed, cache.Finalized} {
			require.Equal(w, state, imm.Record().State)
			mnt, err := imm.Mount(w.ctx)
			require.NoError(w, err)
			require.NotContains(w, mountLine(w, mnt.Path()), "upperdir")
			require.ErrorIs(w, os.WriteFile(filepath.Join(mnt.Path(), "g"), nil, 0o644), unix.EROFS)
			require.NoError(w, imm.Finalize(w.ctx), "mounts go on working")
			require.Equal(w, "f=x h=y", readTree(w, mnt.Path()))
			require.NoError(w, mnt.Unmount())
		}
		mnt, err := imm.Mount(w.ctx)
		require.NoError(w, err)
		w.release(imm)
		out, err := w.Remove(w.ctx, imm.ID())
		require.NoError(w, err)
		require.ErrorIs(w, out[0].Err, cache.ErrLocked, "a mount holds its record")
		require.NoError(w, mnt.Unmount())
	})
}

func mountLine(t testing.TB, path string) string {
	data, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, " "+path+" ") {
			return line
		}
	}
	t.Fatalf("%s is not mounted", path)
	return ""
}

func TestSearch(t *testing.T) {
	w := newWorld(t, overlayKind)
	ids := map[string]cache.ID{}
	for _, key := range []string{"foo", "foo::bar", "foobar", "", "\x00", "foo\x00", strings.Repeat("k", 4096), "\xff\xfe"} {
		mut, err := w.New(w.ctx, nil, cache.NewOptions{Values: []cache.Value{{Name: "k", Index: key}}})
		require.NoError(t, err)
		imm := w.commit(mut)
		ids[key] = imm.ID()
		w.release(imm)
	}
	for key, id := range ids {
		found, err := w.Search(w.ctx, key)
		require.NoError(t, err)
		if key == "" {
			require.Empty(t, found, "no index was declared")
			continue
		}
		require.Equal(t, []cache.ID{id}, found, "%q", key)
	}
	found, err := w.SearchPrefix(w.ctx, "foo")
	require.NoError(t, err)
	require.Len(t, found, 4)
	_, err = w.New(w.ctx, nil, cache.NewOptions{Values: []cache.Value{{Name: "k", Index: strings.Repeat("k", 1<<20)}}})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// TestWhatCannotBeStoredIsRefusedAtOnce, and not by the commit of the work that
// was done meanwhile: a mutable is in memory only.
func TestWhatCannotBeStoredIsRefusedAtOnce(t *testing.T) {
	w := newWorld(t, overlayKind)
	long := strings.Repeat("x", 1025)
	_, err := w.New(w.ctx, nil, cache.NewOptions{Type: long})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	mut := w.new(nil, cache.NewOptions{}, "file", "text")
	for what, edit := range map[string]func(*cache.Edit) error{
		"type":        func(e *cache.Edit) error { e.SetType(long); return nil },
		"description": func(e *cache.Edit) error { e.SetDescription(strings.Repeat("x", 65537)); return nil },
		"label":       func(e *cache.Edit) error { e.SetLabel("", "x"); return nil },
		"attachment":  func(e *cache.Edit) error { return e.Attach(long, nil) },
		"no name":     func(e *cache.Edit) error { return e.Attach("", nil) },
		"value": func(e *cache.Edit) error {
			return e.SetValue(cache.Value{Name: "v", Index: strings.Repeat("x", 1<<20)})
		},
	} {
		require.ErrorIs(t, mut.Edit(w.ctx, edit), errdefs.ErrInvalidArgument, what)
	}
	require.NoError(t, mut.Edit(w.ctx, func(e *cache.Edit) error { e.SetType(""); return nil }))
	imm := w.commit(mut)
	require.Equal(t, cache.TypeRegular, imm.Record().Type)
	w.release(imm)
}

func TestCommitTakesValuesFromTheParent(t *testing.T) {
	w := newWorld(t, overlayKind)
	mut := w.new(nil, cache.NewOptions{Values: []cache.Value{{Name: "k", Index: "key"}, {Name: "o", Index: "other"}}}, "", "")
	base := w.commit(mut)
	mut = w.new(base, cache.NewOptions{}, "", "")
	var top *cache.ImmutableRef
	var err error
	require.Equal(t, 1, w.transactions(func() {
		top, err = mut.CommitWith(w.ctx, cache.CommitOptions{Take: []string{"k"}, Cost: time.Second})
	}))
	require.NoError(t, err)
	require.Equal(t, time.Second, top.Record().Cost)
	ids, err := w.Search(w.ctx, "key")
	require.NoError(t, err)
	require.Equal(t, []cache.ID{top.ID()}, ids)
	require.Len(t, base.Values(), 1)
	w.release(base, top)
}

func TestBadInput(t *testing.T) {
	w := newWorld(t, overlayKind)
	long := cache.ID(strings.Repeat("x", 4096))
	for _, id := range []cache.ID{"", "nothing", "../..", "\x00", long} {
		_, err := w.Get(w.ctx, id, cache.GetOptions{})
		require.True(t, errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrInvalidArgument), "%q: %v", id, err)
		require.Less(t, len(err.Error()), 1000)
		_, err = w.GetMutable(w.ctx, id)
		require.Error(t, err)
		out, err := w.Remove(w.ctx, id)
		require.NoError(t, err)
		require.Error(t, out[0].Err)
	}
	ctx, cancel := context.WithCancel(w.ctx)
	cancel()
	_, err := w.Get(ctx, "x", cache.GetOptions{})
	require.ErrorIs(t, err, context.Canceled)

	for name, prepare := range map[string]func(dir string) error{
		"a file":           func(dir string) error { return os.WriteFile(dir, nil, 0o600) },
		"others may write": func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o777)) },
		"somebody else's":  func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 12345, 12345)) },
		"legacy state": func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "metadata_v2.db"), nil, 0o600))
		},
		"not a store there": func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "lamina.db"), []byte("x"), 0o600))
		},
	} {
		dir := filepath.Join(t.TempDir(), "root")
		require.NoError(t, prepare(dir))
		before, err := os.ReadFile(filepath.Join(dir, "lamina.db"))
		_ = err
		_, err = cache.Open(w.ctx, cache.Options{Root: dir})
		require.Error(t, err, name)
		after, _ := os.ReadFile(filepath.Join(dir, "lamina.db"))
		require.Equal(t, before, after, name)
	}
	_, err = cache.Open(w.ctx, cache.Options{Root: filepath.Join(t.TempDir(), "none"), NoCreate: true})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

func TestSecondOpenerIsToldWhoHasTheStore(t *testing.T) {
	w := newWorld(t, overlayKind)
	_, err := cache.Open(w.ctx, cache.Options{Root: w.root, LockTimeout: 50 * time.Millisecond})
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "pid")
}

// A record is found under its aliases until it is reopened: after that none of
// its names is.
func TestAliases(t *testing.T) {
	w := newWorld(t, overlayKind)
	imm := w.layer(nil, "a", "1")
	id := imm.ID()
	w.release(imm)
	w.tamper(func(_ snapshot.Driver, s *metadata.Store) {
		edit(w, s, id, func(rec *cache.Record) { rec.Aliases = []cache.ID{"twin"} })
	})
	w.reopenStore()
	imm = w.get("twin")
	require.Equal(t, id, imm.ID())
	require.Len(t, w.Refs(id), 1)
	_, err := w.GetMutable(w.ctx, "twin")
	require.ErrorIs(t, err, cache.ErrLocked)
	w.release(imm)
	mut, err := w.GetMutable(w.ctx, "twin")
	require.NoError(t, err)
	w.gone("twin")
	w.gone(id)
	imm = w.commit(mut)
	require.Empty(t, imm.Record().Aliases)
	require.Equal(t, "a=1", w.tree(imm))
	w.release(imm)

	w.tamper(func(_ snapshot.Driver, s *metadata.Store) {
		edit(w, s, imm.ID(), func(rec *cache.Record) { rec.Aliases = []cache.ID{"another"} })
	})
	w.reopenStore()
	out, err := w.Remove(w.ctx, imm.ID(), "another")
	require.NoError(t, err)
	require.NoError(t, errors.Join(out[0].Err, out[1].Err))
	w.gone("another")
}

// A mutable that is retained no longer dies with its handle, as one that never
// was does.
func TestNoLongerRetained(t *testing.T) {
	forKinds(t, func(w *world) {
		mut := w.new(nil, cache.NewOptions{Retain: true}, "f", "x")
		require.NoError(w, mut.Edit(w.ctx, func(e *cache.Edit) error { e.SetRetain(false); return nil }))
		mnt, err := mut.Mount(w.ctx, cache.MountOptions{})
		require.NoError(w, err)
		require.ErrorIs(w, mut.Release(w.ctx), errdefs.ErrFailedPrecondition)
		require.NoError(w, mnt.Unmount())
		_, err = w.Lookup(w.ctx, mut.ID())
		require.NoError(w, err)
		require.NoError(w, mut.Release(w.ctx))
		_, err = w.Lookup(w.ctx, mut.ID())
		require.ErrorIs(w, err, errdefs.ErrNotFound)
		require.NoError(w, mut.Release(w.ctx), "again")
	})
}

package cache_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

// The fault test. One history touches every operation. It runs again and again,
// each time with the next call of the driver, the next durable step, or the
// next chance to cancel a context failing. Whatever fails must say so, must
// work when it is called again, and must leave nothing behind.

// call is one operation of the history. Called again after a failure it must
// succeed.
type call struct {
	name string
	do   func(ctx context.Context, s *story) error
}

// story is the history's state.
type story struct {
	m    *cache.Manager
	muts map[string]*cache.MutableRef
	imms map[string]*cache.ImmutableRef
	ids  map[string]cache.ID
	all  []cache.ID // all ids that were ever seen
}

func (s *story) mutable(name string, mut *cache.MutableRef, err error) error {
	if err == nil {
		s.muts[name], s.ids[name] = mut, mut.ID()
		s.all = append(s.all, mut.ID())
	}
	return err
}

func (s *story) immutable(name string, imm *cache.ImmutableRef, err error) error {
	if err == nil {
		s.imms[name] = imm
		s.all = append(s.all, imm.ID())
	}
	return err
}

func newCall(name, parent string, o cache.NewOptions) call {
	return call{"New " + name, func(ctx context.Context, s *story) error {
		mut, err := s.m.New(ctx, s.imms[parent], o)
		return s.mutable(name, mut, err)
	}}
}

func writeCall(name string) call {
	return call{"Write " + name, func(ctx context.Context, s *story) error {
		mnt, err := s.muts[name].Mount(ctx, cache.MountOptions{})
		if err != nil {
			return err
		}
		err = os.WriteFile(filepath.Join(mnt.Path(), name), []byte(s.ids[name]), 0o644)
		return errors.Join(err, mnt.Unmount())
	}}
}

func readCall(name, want string) call {
	return call{"Read " + name, func(ctx context.Context, s *story) error {
		mnt, err := s.imms[name].Mount(ctx)
		if err != nil {
			return err
		}
		entries, err := os.ReadDir(mnt.Path())
		names := ""
		for _, e := range entries {
			names += e.Name()
		}
		if err == nil && names != want {
			err = fmt.Errorf("%s has %q, not %q", name, names, want)
		}
		return errors.Join(err, mnt.Unmount())
	}}
}

func commitCall(name string) call {
	return call{"Commit " + name, func(ctx context.Context, s *story) error {
		imm, err := s.muts[name].Commit(ctx)
		return s.immutable(name, imm, err)
	}}
}

func releaseCall(name string) call {
	return call{"Release " + name, func(ctx context.Context, s *story) error {
		if mut := s.muts[name]; mut != nil {
			if err := mut.Release(ctx); err != nil {
				return err
			}
		}
		if imm := s.imms[name]; imm != nil {
			return imm.Release(ctx)
		}
		return nil
	}}
}

func reopenCall(name string) call {
	return call{"GetMutable " + name, func(ctx context.Context, s *story) error {
		mut, err := s.m.GetMutable(ctx, s.ids[name])
		return s.mutable(name, mut, err)
	}}
}

func removeCall(names ...string) call {
	return call{fmt.Sprint("Remove ", names), func(ctx context.Context, s *story) error {
		var ids []cache.ID
		for _, name := range names {
			ids = append(ids, s.ids[name])
		}
		out, err := s.m.Remove(ctx, ids...)
		for _, r := range out {
			if !errors.Is(r.Err, errdefs.ErrNotFound) { // gone with the first call
				err = errors.Join(err, r.Err)
			}
		}
		return err
	}}
}

var calls = []call{
	newCall("a", "", cache.NewOptions{Retain: true, Values: []cache.Value{{Name: "n", Index: "a"}}}),
	writeCall("a"),
	commitCall("a"),
	newCall("b", "a", cache.NewOptions{}),
	writeCall("b"),
	{"Edit b", func(ctx context.Context, s *story) error {
		return s.muts["b"].SetValue(ctx, cache.Value{Name: "n", Index: "b"})
	}},
	commitCall("b"),
	{"Clone b", func(_ context.Context, s *story) error {
		imm, err := s.imms["b"].Clone()
		return s.immutable("b2", imm, err)
	}},
	{"Finalize b", func(ctx context.Context, s *story) error { return s.imms["b"].Finalize(ctx) }},
	{"Get b", func(ctx context.Context, s *story) error {
		imm, err := s.m.Get(ctx, s.ids["b"], cache.GetOptions{})
		return s.immutable("b3", imm, err)
	}},
	readCall("b", "ab"),
	newCall("c", "", cache.NewOptions{}),
	writeCall("c"),
	commitCall("c"),
	releaseCall("c"),
	reopenCall("c"),
	writeCall("c"),
	commitCall("c"),
	readCall("c", "c"),
	{"Edit c", func(ctx context.Context, s *story) error {
		return s.imms["c"].Edit(ctx, func(e *cache.Edit) error {
			return errors.Join(e.SetValue(cache.Value{Name: "n", Index: "c"}), e.Attach("log", []byte("text")))
		})
	}},
	{"Search", func(ctx context.Context, s *story) error {
		found, err := s.m.SearchPrefix(ctx, "")
		if err == nil && len(found) != 3 {
			err = fmt.Errorf("found %v", found)
		}
		return err
	}},
	{"DiskUsage", func(ctx context.Context, s *story) error {
		_, err := s.m.DiskUsage(ctx, nil)
		return err
	}},
	newCall("d", "b", cache.NewOptions{}),
	writeCall("d"),
	releaseCall("d"),
	newCall("e", "", cache.NewOptions{Retain: true}),
	releaseCall("e"),
	reopenCall("e"),
	writeCall("e"),
	{"Edit e", func(ctx context.Context, s *story) error {
		return s.muts["e"].Edit(ctx, func(e *cache.Edit) error { e.SetDescription("e"); return nil })
	}},
	releaseCall("e"),
	newCall("f", "b3", cache.NewOptions{Retain: true}),
	releaseCall("f"),
	newCall("g", "", cache.NewOptions{}),
	commitCall("g"),
	releaseCall("b"), releaseCall("b2"), releaseCall("b3"), releaseCall("a"), releaseCall("c"), releaseCall("g"),
	removeCall("g"),
	removeCall("b", "f", "a"),
	removeCall("c"),
}

// faultRun runs the history on a fresh copy of a store.
type faultRun struct {
	*testing.T
	fresh string
	dir   string
	kind  kind
	// step, if set, makes the cache open the driver itself.
	step func(string) error
	// ctx is for one call.
	ctx func() context.Context
	// injected is what failing calls must wrap.
	injected error
	failed   []string
	// entries are those of the store after the first run, without a failure.
	entries map[string]int
}

// run returns the driver that was used.
func (f *faultRun) run(prepare func(*snapshottest.Faulty)) *snapshottest.Faulty {
	dir, err := os.MkdirTemp(f.dir, "run-")
	require.NoError(f, err)
	defer func() { require.NoError(f, os.RemoveAll(dir)) }()
	root := filepath.Join(dir, "store")
	require.NoError(f, cloneTree(f.fresh, root))

	ctx := context.Background()
	o := cache.Options{Root: root, BootID: "this boot", FlushInterval: -1, SyncInterval: -1}
	var faulty *snapshottest.Faulty
	if f.step != nil {
		o.DriverName, o.Step = f.kind.name, f.step
	} else {
		d, err := f.kind.open(root)
		require.NoError(f, err)
		faulty = snapshottest.NewFaulty(d)
		o.Driver = faulty
	}
	m, err := cache.Open(ctx, o)
	require.NoError(f, err)
	if prepare != nil {
		prepare(faulty)
	}
	s := &story{m: m, muts: map[string]*cache.MutableRef{}, imms: map[string]*cache.ImmutableRef{}, ids: map[string]cache.ID{}}
	f.failed = nil
	for _, c := range calls {
		err := c.do(f.ctx(), s)
		if err == nil {
			continue
		}
		f.failed = append(f.failed, c.name)
		require.ErrorIs(f, err, f.injected, "%v", f.failed)
		require.NoError(f, c.do(ctx, s), "%s, called again after %v; failed: %v", c.name, err, f.failed)
	}
	for _, id := range s.all {
		require.Empty(f, m.Refs(id), "%v", f.failed)
	}
	if err := m.Close(); err != nil {
		require.ErrorIs(f, err, f.injected)
		f.failed = append(f.failed, "Close")
	}
	if faulty != nil {
		require.NoError(f, faulty.Driver().Close())
	}
	f.after(root, s)
	return faulty
}

// after opens the store again: what is left is what the history left.
func (f *faultRun) after(root string, s *story) {
	ctx := context.Background()
	d, err := f.kind.open(root)
	require.NoError(f, err)
	m, err := cache.Open(ctx, cache.Options{Root: root, BootID: "this boot", Driver: d, FlushInterval: -1, SyncInterval: -1})
	require.NoError(f, err)
	for finding, err := range m.Check(ctx) {
		require.NoError(f, err)
		require.Fail(f, "finding", "%v: %+v", f.failed, finding)
	}
	var ids []cache.ID
	for rec, err := range m.Records(ctx) {
		require.NoError(f, err)
		ids = append(ids, rec.ID)
	}
	require.Equal(f, []cache.ID{s.ids["e"]}, ids, "%v", f.failed)
	pending, err := d.Pending(ctx)
	require.NoError(f, err)
	require.Len(f, pending, 1, "%v", f.failed)
	require.NoError(f, d.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		require.Equal(f, pending[0].Key, info.Name, "%v", f.failed)
		return nil
	}))
	u, err := m.DiskUsage(ctx, nil)
	require.NoError(f, err)
	if f.kind.name != containerdKind.name {
		require.Equal(f, onDisk(f, root), u.Snapshots, "%v", f.failed)
	}
	require.Zero(f, u.Pending)
	require.NoError(f, errors.Join(m.Close(), d.Close()))
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(root))
	require.NoError(f, err)
	require.Empty(f, mounts, "%v", f.failed)
	left, err := os.ReadDir(filepath.Join(root, "mounts"))
	require.NoError(f, err)
	require.Empty(f, left, "%v", f.failed)
	require.Empty(f, openBelow(f, root), "%v", f.failed)
	if names := entries(f, root); f.entries == nil {
		f.entries = names
	} else {
		require.Equal(f, f.entries, names, "%v", f.failed)
	}
}

// openBelow lists the files below a directory that this process has open.
func openBelow(t testing.TB, root string) (paths []string) {
	files, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, file := range files {
		path, err := os.Readlink("/proc/self/fd/" + file.Name())
		if err == nil && strings.HasPrefix(path, root+"/") { // else it was closed since
			paths = append(paths, path)
		}
	}
	return paths
}

// entries counts the entries of the directories of a store, those of its
// snapshots left out.
func entries(t testing.TB, root string) map[string]int {
	counts := map[string]int{}
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil || rel == "." {
			return err
		}
		dir := filepath.Dir(rel)
		counts[dir]++
		if parent := filepath.Base(dir); parent == "active" || parent == "committed" || rel == "containerd" {
			return fs.SkipDir
		}
		return nil
	}))
	return counts
}

// onDisk measures what the snapshots of a store occupy.
func onDisk(t testing.TB, root string) (bytes int64) {
	for _, dir := range []string{"active", "committed", "new", "trash"} {
		trees, err := filepath.Glob(filepath.Join(root, "snapshots", dir, "*"))
		require.NoError(t, err)
		for _, tree := range trees {
			require.NoError(t, filepath.WalkDir(tree, func(_ string, d fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				info, err := d.Info()
				if err != nil {
					return err
				}
				bytes += info.Sys().(*syscall.Stat_t).Blocks * 512
				return nil
			}))
		}
	}
	return bytes
}

// forFaults runs the test in a directory with a fresh store for each kind.
func forFaults(t *testing.T, kinds []kind, fn func(f *faultRun)) {
	needRoot(t)
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			t.Parallel()
			f := &faultRun{T: t, dir: fastDir(t), kind: k, ctx: context.Background, injected: errors.New("injected")}
			f.fresh = filepath.Join(f.dir, "fresh")
			require.NoError(t, os.Mkdir(f.fresh, 0o700))
			d, err := k.open(f.fresh)
			require.NoError(t, err)
			m, err := cache.Open(f.ctx(), cache.Options{Root: f.fresh, Driver: d, BootID: "this boot", SyncInterval: -1})
			require.NoError(t, err)
			require.NoError(t, errors.Join(m.Close(), d.Close()))
			fn(f)
		})
	}
}

func TestEveryDriverCallFails(t *testing.T) {
	forFaults(t, kinds, func(f *faultRun) {
		n := len(f.run(nil).Calls())
		require.Greater(f, n, 30)
		seen := map[string]bool{}
		for i := 1; i <= n; i++ {
			for _, failAt := range []func(*snapshottest.Faulty){
				func(d *snapshottest.Faulty) { d.FailAt(i, f.injected) },
				func(d *snapshottest.Faulty) { d.FailAfterAt(i, f.injected) },
			} {
				f.run(failAt)
				for _, name := range f.failed {
					seen[name] = true
				}
			}
		}
		f.Logf("rig: %d calls failed in turn, before and after their work", n)
		f.Logf("noticed by %v", slices.Sorted(maps.Keys(seen)))
		for _, name := range []string{"New a", "New b", "Finalize b", "Write a", "Read b", "Release d", "Remove [c]"} {
			require.True(f, seen[name], "no failure of %s", name)
		}
	})
}

func TestEveryStepFails(t *testing.T) {
	forFaults(t, []kind{overlayKind, nativeKind}, func(f *faultRun) {
		seen, n := f.failEachStep(syscall.EIO)
		require.Greater(f, n, 40)
		for _, c := range calls {
			switch c.name[:3] {
			case "New", "Com", "Fin", "Rem":
				require.True(f, seen[c.name], "no failure of %s", c.name)
			}
		}
		require.True(f, seen["GetMutable c"])
	})
}

// On a full disk the store tries a transaction again without what merely rides
// along, so not every step that fails makes its call fail.
func TestEveryStepMeetsAFullDisk(t *testing.T) {
	forFaults(t, []kind{nativeKind}, func(f *faultRun) {
		seen, _ := f.failEachStep(syscall.ENOSPC)
		require.True(f, seen["New a"])
		require.True(f, seen["Commit b"])
	})
}

// failEachStep runs the history once for each durable step, which fails.
func (f *faultRun) failEachStep(errno syscall.Errno) (noticed map[string]bool, steps int) {
	f.injected = errno
	noticed = map[string]bool{}
	for i := 1; ; i++ {
		n := 0
		f.step = func(name string) error {
			if n++; n == i {
				return &os.PathError{Op: name, Err: errno}
			}
			return nil
		}
		f.run(nil)
		for _, name := range f.failed {
			noticed[name] = true
		}
		if i > n {
			f.Logf("rig: %d steps failed in turn with %v", n, errno)
			f.Logf("noticed by %v", slices.Sorted(maps.Keys(noticed)))
			return noticed, n
		}
	}
}

func TestEveryContextEnds(t *testing.T) {
	forFaults(t, []kind{overlayKind, nativeKind}, func(f *faultRun) {
		f.injected = context.Canceled
		seen := map[string]bool{}
		n := 1
		for i := 1; i <= n; i++ {
			n = 0
			cancel := func() {}
			f.ctx = func() context.Context {
				var ctx context.Context
				cancel()
				ctx, cancel = context.WithCancel(context.Background())
				return ctx
			}
			f.step = func(name string) error {
				// Cleaning a layer takes time and can be taken up again, so
				// it is given up.
				if strings.HasPrefix(name, "clean") {
					return nil
				}
				if n++; n == i {
					cancel()
				}
				return nil
			}
			f.run(nil)
			cancel()
			for _, name := range f.failed {
				seen[name] = true
			}
		}
		f.Logf("noticed by %v", slices.Sorted(maps.Keys(seen)))
		require.Contains(f, seen, "New a")
		require.Contains(f, seen, "Remove [c]")
		require.NotContains(f, seen, "Finalize b", "what the driver has begun is ended")
	})
}

// What is called with a context that has ended does nothing, or needs none.
func TestContextHasEnded(t *testing.T) {
	forFaults(t, []kind{overlayKind, nativeKind}, func(f *faultRun) {
		f.injected = context.Canceled
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		f.ctx = func() context.Context { return ended }
		f.run(nil)
		var idle []string
		for _, c := range calls {
			if !slices.Contains(f.failed, c.name) {
				idle = append(idle, c.name)
			}
		}
		require.Equal(f, []string{
			"Edit b", "Clone b", // in memory
			"Release c", "Release d", "Release e", "Release e", "Release f",
			"Release b", "Release b2", "Release b3", "Release a", "Release c", "Release g",
		}, idle)
	})
}

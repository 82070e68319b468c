package cache_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kind is a way to get a driver for a root.
type kind struct {
	name string
	open func(t testing.TB, root string) snapshot.Driver
}

var (
	overlayKind = kind{"overlay", func(t testing.TB, root string) snapshot.Driver { return openDriver(t, root, "overlay") }}
	nativeKind  = kind{"native", func(t testing.TB, root string) snapshot.Driver { return openDriver(t, root, "native") }}
	kinds       = []kind{overlayKind, nativeKind}
)

func openDriver(t testing.TB, root, name string) snapshot.Driver {
	d, err := snapshot.Open(context.Background(), root, snapshot.Options{Driver: name})
	require.NoError(t, err)
	return d
}

// needRoot skips what mounts.
func needRoot(t testing.TB) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
}

// world is a store in a directory of its own, with what a test needs to open
// it again and to look at it from outside.
type world struct {
	testing.TB
	ctx    context.Context
	kind   kind
	root   string
	driver *snapshottest.Faulty
	*cache.Manager
	opts func(*cache.Options)
}

// newWorld opens a fresh store, which the end of the test checks.
func newWorld(t testing.TB, k kind) *world {
	needRoot(t)
	w := &world{TB: t, ctx: t.Context(), kind: k, root: filepath.Join(t.TempDir(), "store")}
	require.NoError(t, os.Mkdir(w.root, 0o700))
	w.ctx = context.Background()
	w.reopenStore()
	t.Cleanup(w.finish)
	return w
}

// forKinds runs the test on each driver.
func forKinds(t *testing.T, fn func(w *world)) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) { fn(newWorld(t, k)) })
	}
}

// open opens the store, closing it first if it is open.
func (w *world) reopenStore() {
	w.Helper()
	if w.Manager != nil {
		w.closeStore()
	}
	w.driver = snapshottest.NewFaulty(w.kind.open(w, w.root))
	o := cache.Options{Root: w.root, Driver: w.driver, BootID: "this boot"}
	if w.opts != nil {
		w.opts(&o)
	}
	var err error
	w.Manager, err = cache.Open(w.ctx, o)
	require.NoError(w, err)
}

func (w *world) closeStore() {
	w.Helper()
	require.NoError(w, w.Manager.Close())
	w.Manager = nil
	w.driver.Clear()
	require.NoError(w, w.driver.Close())
}

// finish proves the store: nothing is found, nothing is mounted.
func (w *world) finish() {
	if w.Failed() {
		if w.Manager != nil {
			_ = w.Manager.Close()
			_ = w.driver.Close()
		}
		return
	}
	if w.Manager == nil {
		w.reopenStore()
	}
	w.driver.Clear()
	w.check()
	w.closeStore()
	w.reopenStore()
	w.check()
	w.closeStore()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(w.root))
	require.NoError(w, err)
	require.Empty(w, mounts, "mounts are left")
}

func (w *world) check() {
	w.Helper()
	require.Empty(w, w.findings())
}

func (w *world) findings() (found []cache.Finding) {
	for f, err := range w.Check(w.ctx) {
		require.NoError(w, err)
		found = append(found, f)
	}
	return found
}

// new makes a mutable record with one file in it.
func (w *world) new(parent *cache.ImmutableRef, o cache.NewOptions, file, text string) *cache.MutableRef {
	w.Helper()
	mut, err := w.New(w.ctx, parent, o)
	require.NoError(w, err)
	if file != "" {
		w.write(mut, file, text)
	}
	return mut
}

func (w *world) write(mut *cache.MutableRef, file, text string) {
	w.Helper()
	mnt, err := mut.Mount(w.ctx, cache.MountOptions{})
	require.NoError(w, err)
	require.NoError(w, os.WriteFile(filepath.Join(mnt.Path(), file), []byte(text), 0o644))
	require.NoError(w, mnt.Unmount())
}

// layer makes a committed record with one file in it.
func (w *world) layer(parent *cache.ImmutableRef, file, text string) *cache.ImmutableRef {
	w.Helper()
	return w.commit(w.new(parent, cache.NewOptions{}, file, text))
}

func (w *world) commit(mut *cache.MutableRef) *cache.ImmutableRef {
	w.Helper()
	imm, err := mut.Commit(w.ctx)
	require.NoError(w, err)
	return imm
}

func (w *world) get(id cache.ID) *cache.ImmutableRef {
	w.Helper()
	imm, err := w.Get(w.ctx, id, cache.GetOptions{})
	require.NoError(w, err)
	return imm
}

func (w *world) release(refs ...interface{ Release(context.Context) error }) {
	w.Helper()
	for _, r := range refs {
		require.NoError(w, r.Release(w.ctx))
	}
}

// tree reads all files of a record through a mount: "name=text" each.
func (w *world) tree(imm *cache.ImmutableRef) string {
	w.Helper()
	mnt, err := imm.Mount(w.ctx)
	require.NoError(w, err)
	defer func() { require.NoError(w, mnt.Unmount()) }()
	return readTree(w, mnt.Path())
}

func readTree(t testing.TB, dir string) string {
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	var out []string
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		require.NoError(t, err)
		out = append(out, e.Name()+"="+string(text))
	}
	return strings.Join(out, " ")
}

// transactions counts the store's write transactions during fn.
func (w *world) transactions(fn func()) int {
	before := w.Stats().Transactions
	fn()
	return int(w.Stats().Transactions - before)
}

package cache_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

func TestMain(m *testing.M) {
	if name := os.Getenv(helperEnv); name != "" {
		os.Exit(runHelper(name, os.Args[1:]))
	}
	// That a file system has no fs-verity is of no interest here.
	if err := log.SetLevel("error"); err != nil {
		panic(err)
	}
	if os.Geteuid() == 0 && os.Getenv(namespaceEnv) == "" {
		os.Exit(inOwnNamespace())
	}
	goleak.VerifyTestMain(m)
}

// kind is a way to get a driver for a root.
type kind struct {
	name string
	open func(root string) (snapshot.Driver, error)
}

var (
	overlayKind    = kind{"overlay", openDriver("overlay")}
	nativeKind     = kind{"native", openDriver("native")}
	containerdKind = kind{"containerd-overlayfs", openContainerd}
	kinds          = []kind{overlayKind, nativeKind, containerdKind}
)

func kindNamed(name string) kind {
	return kinds[slices.IndexFunc(kinds, func(k kind) bool { return k.name == name })]
}

func openDriver(name string) func(root string) (snapshot.Driver, error) {
	return func(root string) (snapshot.Driver, error) {
		return snapshot.Open(context.Background(), root, snapshot.Options{Driver: name})
	}
}

// openContainerd adapts containerd's own snapshotter.
func openContainerd(root string) (snapshot.Driver, error) {
	s, err := overlay.NewSnapshotter(filepath.Join(root, "containerd"), overlay.AsynchronousRemove)
	if err != nil {
		return nil, err
	}
	return snapshot.Adapt("containerd-overlayfs", s, snapshot.AdaptOptions{Root: root, Attributes: snapshot.Trusted}), nil
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
	boot string
	opts func(*cache.Options)
	// broken stores are not checked at the end.
	broken bool
}

// newWorld opens a fresh store, which the end of the test checks.
func newWorld(t testing.TB, k kind) *world {
	needRoot(t)
	w := &world{TB: t, ctx: context.Background(), kind: k, root: filepath.Join(t.TempDir(), "store"), boot: "this boot"}
	require.NoError(t, os.Mkdir(w.root, 0o700))
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

// reopenStore opens the store, closing it first if it is open.
func (w *world) reopenStore() {
	w.Helper()
	require.NoError(w, w.tryOpen())
}

// tryOpen is reopenStore for stores that may refuse.
func (w *world) tryOpen() error {
	w.Helper()
	if w.Manager != nil {
		w.closeStore()
	}
	d, err := w.kind.open(w.root)
	require.NoError(w, err)
	w.driver = snapshottest.NewFaulty(d)
	o := cache.Options{Root: w.root, Driver: w.driver, BootID: w.boot, SyncInterval: -1}
	if w.opts != nil {
		w.opts(&o)
	}
	if w.Manager, err = cache.Open(w.ctx, o); err != nil {
		w.Manager = nil
		return errors.Join(err, d.Close())
	}
	return nil
}

func (w *world) closeStore() {
	w.Helper()
	require.NoError(w, w.Manager.Close())
	w.Manager = nil
	w.driver.Clear()
	require.NoError(w, w.driver.Close())
}

// crash leaves the store as a kill would at this moment. What the process had
// open goes on in a directory that nobody looks at any more.
func (w *world) crash() {
	w.Helper()
	root := filepath.Join(w.TempDir(), "store")
	require.NoError(w, cloneTree(w.root, root))
	w.driver.Clear()
	require.NoError(w, w.Manager.Close())
	require.NoError(w, w.driver.Close())
	w.Manager, w.root = nil, root
}

// tamper changes a closed store behind the cache's back, and marks it dirty.
func (w *world) tamper(fn func(d snapshot.Driver, s *metadata.Store)) {
	w.Helper()
	if w.Manager != nil {
		w.closeStore()
	}
	d, err := w.kind.open(w.root)
	require.NoError(w, err)
	s, err := metadata.Open(w.ctx, filepath.Join(w.root, cache.StoreFile), metadata.Options{FlushInterval: -1})
	require.NoError(w, err)
	fn(d, s)
	require.NoError(w, errors.Join(s.Close(), d.Close()))
	err = os.Rename(filepath.Join(w.root, "clean"), filepath.Join(w.root, "dirty"))
	require.True(w, err == nil || errors.Is(err, fs.ErrNotExist), err)
}

// finish proves the store: nothing is found, nothing is mounted.
func (w *world) finish() {
	if w.Failed() || w.broken {
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

func walk(w *world, d snapshot.Driver) (out []snapshots.Info) {
	w.Helper()
	require.NoError(w, d.Walk(w.ctx, func(_ context.Context, info snapshots.Info) error {
		out = append(out, info)
		return nil
	}))
	return out
}

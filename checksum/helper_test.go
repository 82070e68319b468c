package checksum_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

const namespaceEnv = "LAMINA_CHECKSUM_TEST_NAMESPACE"

// The tests run in a mount namespace of their own: another process that makes
// a namespace meanwhile would copy our mounts and keep them in use.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(namespaceEnv) != "" {
		goleak.VerifyTestMain(m)
		return
	}
	// The signal at our death belongs to the thread that starts the child.
	runtime.LockOSThread()
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), namespaceEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, "run the tests in a mount namespace:", err)
		os.Exit(1)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

// kinds are the drivers; layers says that a child costs what its layer holds.
var kinds = []kind{
	{name: "overlay", layers: true},
	{name: "native"},
	{name: "containerd-overlayfs"},
}

type kind struct {
	name   string
	layers bool
}

func (k kind) open(root string) (snapshot.Driver, error) {
	if k.name != "containerd-overlayfs" {
		return snapshot.Open(context.Background(), root, snapshot.Options{Driver: k.name})
	}
	s, err := overlay.NewSnapshotter(filepath.Join(root, "containerd"))
	if err != nil {
		return nil, err
	}
	return snapshot.Adapt(k.name, s, snapshot.AdaptOptions{Root: root, Attributes: snapshot.Trusted}), nil
}

// world is a store with a Keeper.
type world struct {
	testing.TB
	ctx    context.Context
	kind   kind
	root   string
	driver *snapshottest.Faulty
	*cache.Manager
	sums *checksum.Keeper
	log  *logged
	opts checksum.Options
	// plain opens the cache without Options.Unconfirm, step is Options.Step.
	plain bool
	step  func(string) error
}

// logged collects what is logged.
type logged struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func newWorld(t testing.TB, k kind) *world {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	w := &world{TB: t, ctx: context.Background(), kind: k, root: filepath.Join(t.TempDir(), "store"), log: &logged{}}
	w.open()
	t.Cleanup(w.finish)
	return w
}

func forKinds(t *testing.T, fn func(w *world)) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) { fn(newWorld(t, k)) })
	}
}

func (w *world) open() {
	w.Helper()
	require.NoError(w, os.MkdirAll(w.root, 0o700))
	d, err := w.kind.open(w.root)
	require.NoError(w, err)
	w.driver = snapshottest.NewFaulty(d)
	logger := slog.New(slog.NewTextHandler(w.log, nil))
	o := cache.Options{Root: w.root, Driver: w.driver, BootID: "this boot", SyncInterval: -1, Logger: logger, Step: w.step}
	if !w.plain {
		o.Unconfirm = contenthash.UnconfirmStored
	}
	w.Manager, err = cache.Open(w.ctx, o)
	require.NoError(w, err)
	w.opts.Logger = logger
	w.sums = checksum.New(w.Manager, w.opts)
}

func (w *world) close() {
	w.Helper()
	require.NoError(w, w.sums.Close())
	require.NoError(w, w.Manager.Close())
	require.NoError(w, w.driver.Close())
	w.Manager = nil
}

func (w *world) restart() {
	w.Helper()
	w.close()
	w.open()
}

// finish proves the store and its trees.
func (w *world) finish() {
	if w.Manager == nil {
		w.open()
	}
	if !w.Failed() {
		require.NoError(w, w.sums.Flush(w.ctx))
		require.Empty(w, w.findings())
	}
	w.close()
}

func (w *world) findings() (found []cache.Finding) {
	for f, err := range w.Check(w.ctx) {
		require.NoError(w, err)
		found = append(found, f)
	}
	for f, err := range checksum.Check(w.ctx, w.Manager) {
		require.NoError(w, err)
		found = append(found, f)
	}
	return found
}

// in runs change on a writable mount.
func (w *world) in(mut *cache.MutableRef, change func(dir string)) {
	w.Helper()
	mnt, err := mut.Mount(w.ctx, cache.MountOptions{})
	require.NoError(w, err)
	change(mnt.Path())
	require.NoError(w, mnt.Unmount())
}

// commit makes a committed record.
func (w *world) commit(parent *cache.ImmutableRef, change func(dir string)) *cache.ImmutableRef {
	w.Helper()
	mut, err := w.New(w.ctx, parent, cache.NewOptions{})
	require.NoError(w, err)
	w.in(mut, change)
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

func (w *world) release(refs ...*cache.ImmutableRef) {
	w.Helper()
	for _, r := range refs {
		require.NoError(w, r.Release(w.ctx))
	}
}

func (w *world) sum(ref *cache.ImmutableRef, path string) string {
	w.Helper()
	d, err := w.sums.Checksum(w.ctx, ref, path, contenthash.Options{})
	require.NoError(w, err)
	return d.String()
}

// fresh is the digest of somebody who knows nothing.
func (w *world) fresh(ref *cache.ImmutableRef, path string) string {
	w.Helper()
	d, err := contenthash.New().Checksum(w.ctx, checksum.Files(ref), path, contenthash.Options{})
	require.NoError(w, err)
	return d.String()
}

// reads are what a question cost: mounts and files that were read.
type reads struct{ mounts, files int }

// cost runs ask and counts.
func (w *world) cost(ref *cache.ImmutableRef, ask func()) reads {
	w.Helper()
	tree := func() contenthash.Stats { return w.sums.Stats(ref.ID()) }
	before, calls := tree(), len(w.driver.Calls())
	ask()
	r := reads{files: int(tree().FilesRead - before.FilesRead)}
	for _, c := range w.driver.Calls()[calls:] {
		if c.Op == "Mount" {
			r.mounts++
		}
	}
	return r
}

func write(t testing.TB, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
}

// manyFiles makes dirs directories of 20 files each.
func manyFiles(t testing.TB, dir string, dirs int) {
	t.Helper()
	for d := range dirs {
		for f := range 20 {
			write(t, dir, fmt.Sprintf("d%03d/f%02d", d, f), fmt.Sprint(d, f))
		}
	}
}

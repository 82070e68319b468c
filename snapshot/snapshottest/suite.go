package snapshottest

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot"
)

// Run is the conformance suite of snapshot.Driver: containerd's own suite as
// it is, and what that one does not try. open makes the driver below root, or
// opens it again after Close. The name is handed to containerd's suite, which
// treats some snapshotters specially: one that stacks with overlayfs must be
// called "overlayfs".
//
// It needs root, as most of it mounts, and is skipped without.
func Run(t *testing.T, name string, open func(t *testing.T, root string) snapshot.Driver) {
	if os.Geteuid() != 0 {
		t.Skip("the conformance suite mounts, which needs root")
	}
	t.Run("Containerd", func(t *testing.T) {
		testsuite.SnapshotterSuite(t, name, func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
			d := open(t, root)
			return d, d.Close, nil
		})
	})
	for _, part := range []map[string]func(*testing.T, *env){
		contractTests, removalTests, mountTests, nameTests, raceTests, applyTests, stackTests,
	} {
		for title, test := range part {
			t.Run(title, func(t *testing.T) { test(t, newEnv(t, open)) })
		}
	}
}

// env is a driver to be tested, with shorthands that fail the test.
type env struct {
	snapshot.Driver
	t    *testing.T
	ctx  context.Context
	root string
	open func(t *testing.T, root string) snapshot.Driver
}

func newEnv(t *testing.T, open func(t *testing.T, root string) snapshot.Driver) *env {
	e := &env{t: t, ctx: t.Context(), root: t.TempDir(), open: open}
	e.Driver = open(t, e.root)
	// After the test's own context: cleanups must still work.
	t.Cleanup(func() { require.NoError(t, e.Close()) })
	return e
}

// reopen closes the driver and opens it again.
func (e *env) reopen() {
	require.NoError(e.t, e.Close())
	e.Driver = e.open(e.t, e.root)
}

// tree is what a directory should hold: contents of files by path; a path
// that ends with a slash is a directory.
type tree map[string]string

func writeTree(t *testing.T, dir string, files tree) {
	for path, content := range files {
		full := filepath.Join(dir, path)
		require.NoError(t, os.MkdirAll(filepath.Dir(full), 0o755))
		if path[len(path)-1] == '/' {
			require.NoError(t, os.MkdirAll(full, 0o755))
			continue
		}
		require.NoError(t, os.WriteFile(full, []byte(content), 0o644))
	}
}

func readTree(t *testing.T, dir string) tree {
	out := tree{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			out[rel+"/"] = ""
			return nil
		}
		content, err := os.ReadFile(path)
		out[rel] = string(content)
		return err
	}))
	return out
}

// mounted mounts key for the time of do.
func (e *env) mounted(key string, readOnly bool, do func(dir string)) {
	e.t.Helper()
	dir := e.t.TempDir()
	require.NoError(e.t, e.Mount(e.ctx, key, dir, readOnly))
	defer func() { require.NoError(e.t, unix.Unmount(dir, 0)) }()
	do(dir)
}

// mountedBy mounts as containerd does, for the time of do.
func (e *env) mountedBy(mounts []mount.Mount, do func(dir string)) {
	e.t.Helper()
	dir := e.t.TempDir()
	require.NoError(e.t, mount.All(mounts, dir))
	defer func() { require.NoError(e.t, unix.Unmount(dir, 0)) }()
	do(dir)
}

func (e *env) prepare(key, parent string, opts ...snapshots.Opt) {
	e.t.Helper()
	_, err := e.Prepare(e.ctx, key, parent, opts...)
	require.NoError(e.t, err)
}

// layer commits files on parent under name.
func (e *env) layer(name, parent string, files tree) {
	e.t.Helper()
	e.prepare(name+"-w", parent)
	e.mounted(name+"-w", false, func(dir string) { writeTree(e.t, dir, files) })
	require.NoError(e.t, e.Commit(e.ctx, name, name+"-w"))
}

// requireTree looks at key through a read-only mount.
func (e *env) requireTree(want tree, key string) {
	e.t.Helper()
	e.mounted(key, true, func(dir string) { require.Equal(e.t, want, readTree(e.t, dir)) })
}

// all is every snapshot there is, by key.
func (e *env) all() map[string]snapshots.Info {
	e.t.Helper()
	out := map[string]snapshots.Info{}
	require.NoError(e.t, e.Walk(e.ctx, func(_ context.Context, info snapshots.Info) error {
		require.NotContains(e.t, out, info.Name, "walked twice")
		out[info.Name] = info
		return nil
	}))
	return out
}

// pending are the keys of one kind.
func (e *env) pending(kind snapshot.PendingKind) []string {
	e.t.Helper()
	list, err := e.Pending(e.ctx)
	require.NoError(e.t, err)
	keys := []string{}
	for _, p := range list {
		if p.Kind == kind {
			keys = append(keys, p.Key)
		}
	}
	return keys
}

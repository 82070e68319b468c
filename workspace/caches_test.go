package workspace_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/workspace"
	"github.com/lamina-build/lamina/workspace/cachemount"
	"github.com/lamina-build/lamina/workspace/output"
)

func withCache(target string, sharing cachemount.Sharing) func(*workspace.Job) {
	return func(j *workspace.Job) {
		j.Caches = append(j.Caches, cachemount.Spec{ID: "tools", Target: target, Sharing: sharing})
	}
}

// TestCacheDirectories outlive the workspace, and are in nothing that it has.
func TestCacheDirectories(t *testing.T) {
	forDrivers(t, func(b *bench) {
		b.write("src/f", "1")
		all := func(j *workspace.Job) {
			j.Outputs = []output.Spec{{Path: "deep", Dest: filepath.Join(b.dst, "all")}}
		}
		script := "test -d deep/er/cache; echo x >> deep/er/cache/log; echo p > deep/product; cat deep/er/cache/log"
		b.run(script, withCache("deep/er/cache", cachemount.Locked), all)
		require.Equal(t, "x\n", b.stdout.String())
		require.FileExists(t, filepath.Join(b.dst, "all/product"))
		require.NoDirExists(t, filepath.Join(b.dst, "all/er"), "nothing of it is in an output")
		b.run("find . -mindepth 1 | sort", func(j *workspace.Job) { j.NoMemo = true })
		require.Equal(t, "./deep\n./deep/product\n./src\n./src/f\n", b.stdout.String(), "nor in the workspace")

		// Another workspace finds it, at another place; what is in it does not
		// count, the place and the way to share it do.
		other := func(j *workspace.Job) { j.Key = "other" }
		b.run("cat c/log", other, withCache("c", cachemount.Shared))
		require.Equal(t, "x\n", b.stdout.String())
		b.run("echo y >> c/log", func(j *workspace.Job) { j.Key = "third" }, withCache("c", ""))
		require.True(t, b.run("cat c/log", other, withCache("c", "")).Cached)
		require.Equal(t, []string{"mounts"}, b.run("cat c/log", other, withCache("c", cachemount.Locked)).Why)
		require.Equal(t, "x\ny\n", b.stdout.String())
		require.Contains(t, b.run("true", other).Why, "mounts")

		b.look(func(m *cache.Manager) {
			ids, err := m.Search(b.ctx, "cache-dir:tools")
			require.NoError(t, err)
			require.Len(t, ids, 1)
			rec, err := m.Lookup(b.ctx, ids[0])
			require.NoError(t, err)
			require.Equal(t, cache.TypeCacheMount, rec.Type)
			require.Equal(t, cache.Mutable, rec.State)
		})
	})
}

func TestCacheDirectoriesThatCannotBe(t *testing.T) {
	b := newBench(t, "overlay")
	b.write("f", "1")
	inside := func(j *workspace.Job) { j.Outputs = []output.Spec{{Path: "c/x", Dest: filepath.Join(b.dst, "x")}} }
	_, err := workspace.Run(b.ctx, b.job("true", withCache("c", ""), inside))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = workspace.Run(b.ctx, b.job("true", withCache("c", ""), withCache("c/d", "")))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = workspace.Run(b.ctx, b.job("true", withCache("c", ""), func(j *workspace.Job) { j.Private = false }))
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	_, err = workspace.Run(b.ctx, b.job("true", withCache("f", "")))
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, `"f" is there and no directory`)
	b.run("ls") // it goes on
	require.Equal(t, "f\n", b.stdout.String())
	require.NoFileExists(t, filepath.Join(b.src, "c"))
	require.NoError(t, os.RemoveAll(b.dst))
}

// TestLabels are set when the command runs, stay, and do not count.
func TestLabels(t *testing.T) {
	b := newBench(t, "native")
	labels := func(want map[string]string) {
		b.Helper()
		b.look(func(m *cache.Manager) {
			id, err := workspace.Find(b.ctx, m, "k")
			require.NoError(t, err)
			rec, err := m.Lookup(b.ctx, id)
			require.NoError(t, err)
			require.Equal(t, want, rec.Labels)
		})
	}
	with := func(l map[string]string) func(*workspace.Job) { return func(j *workspace.Job) { j.Labels = l } }
	b.run("true", with(map[string]string{"team": "a", "stage": "1"}))
	labels(map[string]string{"team": "a", "stage": "1"})
	require.True(t, b.run("true", with(map[string]string{"team": "b"})).Cached)
	b.run("echo", with(map[string]string{"team": "b", "stage": ""}))
	labels(map[string]string{"team": "b"})
	b.look(func(m *cache.Manager) {
		id, err := workspace.Find(b.ctx, m, "k")
		require.NoError(t, err)
		imm, err := m.Get(b.ctx, id, cache.GetOptions{})
		require.NoError(t, err)
		_, err = imm.Finalize(b.ctx), imm.Release(b.ctx)
		require.NoError(t, err)
	})
	b.run("echo 2", with(map[string]string{"more": "c"}))
	labels(map[string]string{"team": "b", "more": "c"})
}

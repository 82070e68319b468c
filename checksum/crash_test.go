package checksum_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/checksum"
	"github.com/lamina-build/lamina/contenthash"
)

// TestCrashes runs a record through a save, a reopen, a reported commit, a
// finalize and a child. Before each durable step the store is copied aside as
// a kill there would leave it, while files are half changed. Whatever record a
// copy holds, its digest is that of its files, and no stored tree is damaged.
func TestCrashes(t *testing.T) {
	for _, k := range kinds[:2] {
		t.Run(k.name, func(t *testing.T) {
			c := &crashes{world: newWorld(t, k)}
			c.world.step = c.step
			c.restart()
			c.on = true
			c.scenario()
			c.on = false
			require.Greater(t, c.copies, 10, c.names)
		})
	}
}

type crashes struct {
	*world
	on     bool
	copies int
	names  []string
}

// step is called before each durable step.
func (c *crashes) step(name string) error {
	if !c.on {
		return nil
	}
	c.on = false
	defer func() { c.on = true }()
	c.copies++
	c.names = append(c.names, name)
	root := filepath.Join(c.TempDir(), "store")
	// What is mounted in it is not part of what a kill leaves.
	out, err := exec.CommandContext(c.ctx, "cp", "-a", "-x", c.root, root).CombinedOutput()
	require.NoError(c, err, string(out))
	c.look(root, fmt.Sprintf("copy %d, before %q", c.copies, name))
	require.NoError(c, os.RemoveAll(root))
	return nil
}

// look opens a copy and compares all its records with their files.
func (c *crashes) look(root, what string) {
	ctx := context.Background()
	d, err := c.kind.open(root)
	require.NoError(c, err, what)
	m, err := cache.Open(ctx, cache.Options{
		Root: root, Driver: d, BootID: "this boot", SyncInterval: -1, Unconfirm: contenthash.UnconfirmStored,
	})
	require.NoError(c, err, what)
	sums := checksum.New(m, checksum.Options{})
	var ids []cache.ID
	for rec, err := range m.Records(ctx) {
		require.NoError(c, err, what)
		ids = append(ids, rec.ID)
	}
	for _, id := range ids {
		ref, err := m.Get(ctx, id, cache.GetOptions{})
		if errdefs.IsFailedPrecondition(err) {
			// Nobody knows what its holder changed: the next one commits it.
			mut, _, err := sums.Reopen(ctx, id, cache.ReopenOptions{})
			require.NoError(c, err, what)
			ref, err = mut.Commit(ctx)
			require.NoError(c, err, what)
		} else {
			require.NoError(c, err, what)
		}
		want, err := contenthash.New().Checksum(ctx, checksum.Files(ref), "/", contenthash.Options{})
		require.NoError(c, err, what)
		got, err := sums.Checksum(ctx, ref, "/", contenthash.Options{})
		require.NoError(c, err, what)
		require.Equal(c, want, got, what)
		require.NoError(c, ref.Release(ctx))
	}
	for f, err := range checksum.Check(ctx, m) {
		require.NoError(c, err, what)
		require.Fail(c, "a finding", "%s: %v", what, f)
	}
	require.NoError(c, sums.Close())
	require.NoError(c, m.Close())
	require.NoError(c, d.Close())
}

func (c *crashes) scenario() {
	ref := c.commit(nil, func(dir string) { manyFiles(c, dir, 2) })
	c.sum(ref, "/")
	require.NoError(c, c.sums.Flush(c.ctx))
	for round := range 2 {
		id := ref.ID()
		c.release(ref)
		mut, writer, err := c.sums.Reopen(c.ctx, id, cache.ReopenOptions{})
		require.NoError(c, err)
		c.in(mut, func(dir string) { write(c, dir, "d001/f01", fmt.Sprint(round)) })
		if round == 0 {
			require.NoError(c, writer.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: "d001/f01"}))
		} else {
			writer.Unreported()
		}
		ref, err = writer.Commit(c.ctx, cache.CommitOptions{})
		require.NoError(c, err)
		c.sum(ref, "/")
		require.NoError(c, c.sums.Flush(c.ctx))
	}
	require.NoError(c, ref.Finalize(c.ctx))
	child := c.commit(ref, func(dir string) { write(c, dir, "d000/f00", "child") })
	c.sum(child, "/")
	require.NoError(c, c.sums.Flush(c.ctx))
	c.release(ref, c.grandchild(child))
}

// grandchild is made by a holder that reports, and loses pages of what it
// inherits; then it is merged.
func (c *crashes) grandchild(child *cache.ImmutableRef) *cache.ImmutableRef {
	mut, writer, err := c.sums.New(c.ctx, child, cache.NewOptions{Retain: true})
	require.NoError(c, err)
	c.in(mut, func(dir string) {
		require.NoError(c, os.RemoveAll(filepath.Join(dir, "d001")))
		manyFiles(c, dir, 1)
	})
	require.NoError(c, writer.HandleChange(contenthash.Change{Kind: contenthash.Delete, Path: "d001"}))
	for f := range 20 {
		require.NoError(c, writer.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: fmt.Sprintf("d000/f%02d", f)}))
	}
	ref, err := writer.Commit(c.ctx, cache.CommitOptions{})
	require.NoError(c, err)
	c.sum(ref, "/")
	require.NoError(c, c.sums.Flush(c.ctx))
	other := c.commit(nil, func(dir string) { write(c, dir, "d000/f05", "of the other") })
	merged, err := c.Merge(c.ctx, []*cache.ImmutableRef{ref, other}, cache.MergeOptions{})
	require.NoError(c, err)
	c.sum(merged, "/")
	require.NoError(c, c.sums.Flush(c.ctx))
	c.release(child, other, merged)
	return ref
}

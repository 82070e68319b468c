package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
)

// fillBytes takes all blocks that are free, to the last one.
func (d *disk) fillBytes() {
	d.Helper()
	f, err := os.OpenFile(filepath.Join(d.dir, "filler"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	require.NoError(d, err)
	defer func() { require.NoError(d, f.Close()) }()
	for size := 4 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); errors.Is(err, unix.ENOSPC) {
			size /= 2
		} else {
			require.NoError(d, err)
		}
	}
	require.NoError(d, unix.Syncfs(int(f.Fd())))
	// What was reserved for delayed allocation is free again after the sync.
	for _, size := range []int{4096, 512, 1} {
		for {
			if _, err := f.Write(make([]byte, size)); err != nil {
				break
			}
		}
	}
}

// fillInodes makes files until there is no free inode.
func (d *disk) fillInodes() {
	d.Helper()
	dir := filepath.Join(d.dir, "filler")
	require.NoError(d, os.MkdirAll(dir, 0o700))
	for n := 0; ; n++ {
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprint(n)), os.O_WRONLY|os.O_CREATE, 0o600)
		if errors.Is(err, unix.ENOSPC) {
			return
		}
		require.NoError(d, err)
		require.NoError(d, f.Close())
	}
}

// On a disk without a free byte or inode nothing can be made, everything else
// goes on, and removal makes room.
func TestFullDisk(t *testing.T) {
	if !inOwnMounts(t) {
		return
	}
	for _, c := range []struct {
		name, kind string
		size       int64
		fill       func(d *disk)
	}{
		{"bytes", "ext4", 24 << 20, (*disk).fillBytes},
		{"inodes", "ext4", 24 << 20, (*disk).fillInodes},
		// The smallest that mkfs.btrfs makes; its inodes have no end.
		{"bytes on btrfs", "btrfs", 128 << 20, (*disk).fillBytes},
	} {
		t.Run(c.name, func(t *testing.T) { testFullDisk(newDisk(t, c.kind, c.size), t, c.fill) })
	}
}

func testFullDisk(d *disk, t *testing.T, fill func(d *disk)) {
	ctx := context.Background()
	root := filepath.Join(d.dir, "store")
	lamina := func(args ...string) (string, error) {
		cmd := exec.Command(laminaBinary, append([]string{"--root", root}, args...)...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}

	m := openRoot(t, root)
	var ids []cache.ID
	var parent *cache.ImmutableRef
	for n := range 12 {
		mut, err := m.New(ctx, parent, cache.NewOptions{Values: []cache.Value{{Name: "n", Index: fmt.Sprint(n)}}})
		require.NoError(t, err)
		mnt, err := mut.Mount(ctx, cache.MountOptions{})
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(mnt.Path(), fmt.Sprint(n)), make([]byte, 100_000), 0o600))
		require.NoError(t, mnt.Unmount())
		imm, err := mut.Commit(ctx)
		require.NoError(t, err)
		ids = append(ids, imm.ID())
		if n%4 == 0 {
			if parent != nil {
				require.NoError(t, parent.Release(ctx))
			}
			parent = imm
			continue
		}
		require.NoError(t, imm.Release(ctx))
	}
	require.NoError(t, parent.Release(ctx))
	require.NoError(t, m.Close())
	fill(d)

	// An ordinary command opens the store and looks.
	out, err := lamina("ls")
	require.NoError(t, err, out)
	m = openRoot(t, root)
	mut, err := m.New(ctx, nil, cache.NewOptions{Retain: true})
	if err == nil {
		// There was room for a few names and a page: then a write fails.
		mnt, err := mut.Mount(ctx, cache.MountOptions{})
		require.NoError(t, err)
		require.ErrorIs(t, os.WriteFile(filepath.Join(mnt.Path(), "f"), make([]byte, 1<<20), 0o600), unix.ENOSPC)
		require.NoError(t, mnt.Unmount())
		require.NoError(t, mut.Release(ctx))
		ids = append(ids, mut.ID())
	} else {
		require.ErrorIs(t, err, unix.ENOSPC)
		require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	}
	for n, id := range ids[:12] {
		imm, err := m.Get(ctx, id, cache.GetOptions{})
		require.NoError(t, err)
		mnt, err := imm.Mount(ctx)
		require.NoError(t, err)
		_, err = os.Stat(filepath.Join(mnt.Path(), fmt.Sprint(n)))
		require.NoError(t, err)
		require.NoError(t, mnt.Unmount())
		require.NoError(t, imm.Release(ctx))
		found, err := m.Search(ctx, fmt.Sprint(n))
		require.NoError(t, err)
		require.Equal(t, []cache.ID{id}, found)
	}
	require.NoError(t, m.Close())

	// Removal by the command, in a process of its own, frees space.
	before := freeSpace(t, d.dir)
	out, err = lamina("rm", string(ids[3]), string(ids[11]))
	require.NoError(t, err, out)
	require.Greater(t, freeSpace(t, d.dir), before)
	// What it made free is taken again, so that prune meets the same disk.
	fill(d)
	before = freeSpace(t, d.dir)
	out, err = lamina("du", "--json", "--verbose")
	require.NoError(t, err, out)
	out, err = lamina("prune", "--yes", "--filter", "id=="+string(ids[7]), "--filter", "id=="+string(ids[10]))
	require.NoError(t, err, out)
	require.Contains(t, out, "removed 2 records")
	require.Greater(t, freeSpace(t, d.dir), before)

	m = openRoot(t, root)
	results, err := m.Remove(ctx, ids...)
	require.NoError(t, err)
	for _, r := range results {
		if !slices.Contains([]cache.ID{ids[3], ids[7], ids[10], ids[11]}, r.ID) {
			require.NoError(t, r.Err)
		}
	}
	for f, err := range m.Check(ctx) {
		require.NoError(t, err)
		require.Fail(t, "finding", "%+v", f)
	}
	mut, err = m.New(ctx, nil, cache.NewOptions{Retain: true})
	require.NoError(t, err, "there is room again")
	require.NoError(t, mut.Release(ctx))
	require.NoError(t, m.Close())
}

func openRoot(t *testing.T, root string) *cache.Manager {
	t.Helper()
	m, err := cache.Open(context.Background(), cache.Options{Root: root, SyncInterval: -1})
	require.NoError(t, err)
	return m
}

func freeSpace(t *testing.T, dir string) uint64 {
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(dir, &st))
	return st.Bfree + st.Ffree
}

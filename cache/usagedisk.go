package cache

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache/policy"
)

// measureRest measures what no record stands for.
func (m *Manager) measureRest(ctx context.Context, u *Usage) (err error) {
	var db unix.Stat_t
	if err := unix.Stat(filepath.Join(m.root, StoreFile), &db); err != nil {
		return &os.PathError{Op: "stat", Path: filepath.Join(m.root, StoreFile), Err: err}
	}
	u.Database = db.Blocks * 512
	if u.Pending, err = blocksBelow(ctx, filepath.Join(m.root, "snapshots", "trash")); err != nil {
		return fmt.Errorf("measure pending removals: %w", err)
	}
	blobs, inUse, dirs, err := m.measureBlobs(ctx, u.Entries)
	if err != nil {
		return fmt.Errorf("measure blobs: %w", err)
	}
	u.Blobs, u.InUse, u.Database = blobs, u.InUse+inUse, u.Database+dirs
	u.FSTotal, u.FSFree, err = m.fileSystem()
	return err
}

// blocksBelow is what the entries of a directory occupy. They may go
// meanwhile.
func blocksBelow(ctx context.Context, dir string) (sum int64, err error) {
	names, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return 0, err
	}
	for _, n := range names {
		used, err := fs.DiskUsage(ctx, filepath.Join(dir, n.Name()))
		if err != nil && !errors.Is(err, iofs.ErrNotExist) {
			return 0, err
		}
		sum += used.Size
	}
	return sum, nil
}

// filesBelow is what the files below a directory occupy, and what the
// directories do, with itself. Any may go meanwhile.
func filesBelow(ctx context.Context, dir string) (files, dirs int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d iofs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.Is(err, iofs.ErrNotExist) {
			return nil
		}
		var st unix.Stat_t
		if err == nil {
			if err = unix.Lstat(path, &st); errors.Is(err, unix.ENOENT) {
				return nil
			}
		}
		if err != nil {
			return &os.PathError{Op: "measure", Path: path, Err: err}
		}
		if d.IsDir() {
			dirs += st.Blocks * 512
		} else {
			files += st.Blocks * 512
		}
		return nil
	})
	return files, dirs, err
}

// fileSystem is the size of the store's file system, and what is free of it
// for users without privileges.
func (m *Manager) fileSystem() (total, free int64, err error) {
	if m.diskFigures != nil {
		d, err := m.diskFigures()
		return d.Total, d.Free, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(m.root, &st); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: m.root, Err: err}
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, nil
}

// disk is fileSystem for policies.
func (m *Manager) disk() (policy.Disk, error) {
	total, free, err := m.fileSystem()
	return policy.Disk{Total: total, Free: free}, err
}

package snapshot

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// measure counts the inodes of a tree and the bytes of their blocks, each
// inode once. The tree may change meanwhile. What lies in a directory that
// may not be read is left out.
func measure(ctx context.Context, root string) (snapshots.Usage, error) {
	// An adopted tree is reached through a link.
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return snapshots.Usage{}, err
	}
	type inode struct{ dev, ino uint64 }
	var used snapshots.Usage
	seen := map[inode]bool{}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil && path != root && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)) {
			return nil // counted already, by its name in the directory above
		}
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) && path != root {
			return nil
		}
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		// Only what has several names can be met twice.
		if st.Nlink > 1 && !d.IsDir() {
			id := inode{st.Dev, st.Ino}
			if seen[id] {
				return nil
			}
			seen[id] = true
		}
		used.Inodes++
		used.Size += st.Blocks * 512 // st_blocks counts in these units always
		return nil
	})
	if err != nil {
		return snapshots.Usage{}, err
	}
	return used, nil
}

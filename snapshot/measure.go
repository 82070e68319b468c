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
// inode once. A file that has names outside of the tree, too, is counted where
// it is from. The tree may change meanwhile. What lies in a directory that may
// not be read is left out.
func measure(ctx context.Context, root string) (snapshots.Usage, error) {
	// An adopted tree is reached through a link.
	root, err := filepath.EvalSymlinks(root)
	if err != nil {
		return snapshots.Usage{}, err
	}
	type links struct {
		left   uint64 // names not met yet
		blocks int64
	}
	var used snapshots.Usage
	linked := map[inodeID]*links{}
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
			l := linked[inodeID{st.Dev, st.Ino}]
			if l == nil {
				l = &links{left: uint64(st.Nlink), blocks: st.Blocks}
				linked[inodeID{st.Dev, st.Ino}] = l
			}
			l.left--
			return nil
		}
		used.Inodes++
		used.Size += st.Blocks * 512 // st_blocks counts in these units always
		return nil
	})
	if err != nil {
		return snapshots.Usage{}, err
	}
	for _, l := range linked {
		if l.left == 0 {
			used.Inodes++
			used.Size += l.blocks * 512
		}
	}
	return used, nil
}

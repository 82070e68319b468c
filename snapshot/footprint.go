package snapshot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// Footprinter is what a Driver may have beside: it knows what a name occupies
// on the disk in addition to its Usage.
type Footprinter interface {
	// Footprint is the size in bytes of the blocks that the driver keeps for
	// key beside its files: directories, descriptions, overlayfs's work
	// directory. It is free, too, once key is removed.
	Footprint(ctx context.Context, key string) (int64, error)
}

var _ Footprinter = (*tree)(nil)

// Footprint implements Footprinter. It costs a few system calls, however many
// files the snapshot has.
func (t *tree) Footprint(ctx context.Context, key string) (int64, error) {
	size, err := t.footprint(ctx, key)
	if err != nil {
		return 0, fmt.Errorf("footprint of %q: %w", key, asNotFound(err))
	}
	return size, nil
}

func (t *tree) footprint(ctx context.Context, key string) (size int64, err error) {
	if a, ok, err := t.awaited(encodeKey(key)); err != nil || ok {
		return t.footprintAwaited(ctx, a, err)
	}
	e, s, err := t.load(key)
	if err != nil {
		return 0, err
	}
	at := t.at(e)
	fi, err := os.Lstat(at)
	if err != nil {
		return 0, err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		size = st.Blocks * 512
	}
	names, err := os.ReadDir(at)
	if err != nil {
		return 0, err
	}
	for _, n := range names {
		if n.Name() == "fs" && e.kind(s) != snapshots.KindView {
			continue // that is the usage
		}
		if n.Name() == "work" && e.dir == dirCommitted {
			continue // it goes with the next Cleanup
		}
		used, err := measure(ctx, filepath.Join(at, n.Name()))
		if err != nil {
			if os.IsNotExist(err) {
				continue
			}
			return 0, err
		}
		size += used.Size
	}
	return size, nil
}

// footprintAwaited is the footprint of an adopted snapshot without an entry.
func (t *tree) footprintAwaited(ctx context.Context, a adoption, err error) (size int64, _ error) {
	if err != nil || t.info.Name == Native {
		return 0, err // its data directory is its tree
	}
	all, err := measure(ctx, t.path(dirAdopted, a.dir))
	if err != nil {
		return 0, err
	}
	tree, err := measure(ctx, t.path(dirAdopted, a.dir, "fs"))
	return all.Size - tree.Size, err
}

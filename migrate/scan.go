package migrate

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/migrate/buildkit"
	"github.com/lamina-build/lamina/snapshot"
)

// marks are what overlayfs left in the attributes of a layer.
type marks struct {
	trusted, user bool
	// follows says that the layer holds a redirected directory or a file
	// without its data: it shows what it should only over the layers that it was
	// made over, and with options that trust such marks.
	follows bool
}

// scan looks for marks of overlayfs in the layers that may be adopted. It sets
// what the state cannot know from the databases, and returns the class of
// attributes that the layers were made with.
func scan(ctx context.Context, s *buildkit.State) (class string, err error) {
	if s.Snapshotter != buildkit.Overlayfs {
		return "", nil
	}
	var layers []*buildkit.Snapshot
	for _, snap := range s.Snapshots {
		if snap.Present && snap.Kind != buildkit.View {
			layers = append(layers, snap)
		}
	}
	var (
		mu   sync.Mutex
		all  marks
		errs []error
		next int
		wg   sync.WaitGroup
	)
	for range min(runtime.NumCPU(), 8) {
		wg.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				stop := i >= len(layers) || len(errs) > 0
				mu.Unlock()
				if stop {
					return
				}
				m, err := scanLayer(ctx, filepath.Join(s.DataDir(layers[i].Dir), "fs"))
				mu.Lock()
				layers[i].Follows = m.follows
				all.trusted, all.user = all.trusted || m.trusted, all.user || m.user
				if err != nil {
					errs = append(errs, err)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return "", err
	}
	switch {
	case all.user && !all.trusted, os.Geteuid() != 0:
		return snapshot.User, nil
	}
	return snapshot.Trusted, nil
}

// scanLayer looks at each directory, and at each file that has a size and no
// data: nothing else has a mark that matters.
func scanLayer(ctx context.Context, dir string) (m marks, err error) {
	names := make([]byte, 4<<10)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
		case d.Type().IsRegular():
			info, err := d.Info()
			if err != nil {
				return err
			}
			if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Blocks > 0 || st.Size == 0 {
				return nil
			}
		default:
			return nil
		}
		n, err := unix.Llistxattr(path, names)
		for errors.Is(err, unix.ERANGE) {
			names = make([]byte, 2*len(names))
			n, err = unix.Llistxattr(path, names)
		}
		if errors.Is(err, unix.ENOTSUP) {
			return nil
		}
		if err != nil {
			return &os.PathError{Op: "listxattr", Path: path, Err: err}
		}
		for name := range strings.SplitSeq(string(names[:n]), "\x00") {
			m.see(name)
		}
		return nil
	})
	return m, err
}

func (m *marks) see(name string) {
	mark, trusted := strings.CutPrefix(name, "trusted.overlay.")
	if !trusted {
		var user bool
		if mark, user = strings.CutPrefix(name, "user.overlay."); !user {
			return
		}
		m.user = true
	}
	m.trusted = m.trusted || trusted
	m.follows = m.follows || mark == "redirect" || mark == "metacopy"
}

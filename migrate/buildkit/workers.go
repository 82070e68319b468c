package buildkit

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Worker is a worker's directory below a daemon's root.
type Worker struct {
	Name, Dir string
	// Reason says why its state cannot be taken over, empty if it may be.
	Reason string
}

// Workers lists the workers in dir, which is a daemon's root or the directory
// of one worker. Nothing but names is looked at. Errors: ErrNotBuildKit;
// errdefs.ErrPermissionDenied.
func Workers(dir string) ([]Worker, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, classify(err)
	}
	if name := filepath.Base(dir); isWorker(dir, name) {
		return []Worker{worker(dir, name)}, nil
	}
	var found []Worker
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		prefixed := strings.HasPrefix(f.Name(), "runc-") || strings.HasPrefix(f.Name(), "containerd-")
		if info, err := os.Stat(path); err == nil && info.IsDir() && (prefixed || HasRecords(path)) {
			found = append(found, worker(path, f.Name()))
		}
	}
	switch {
	case len(found) > 0:
		return found, nil
	case len(files) == 0:
		return nil, fmt.Errorf("%s is empty: %w; name the root of a daemon, such as /var/lib/buildkit, or a worker's directory in it", dir, ErrNotBuildKit)
	}
	return nil, fmt.Errorf("%s: %w; name the root of a daemon, such as /var/lib/buildkit, or a worker's directory in it", dir, ErrNotBuildKit)
}

// isWorker recognises a worker's directory by its databases.
func isWorker(dir, name string) bool {
	if HasRecords(dir) {
		return true
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, f := range files {
		if newerRecords(f.Name()) || f.Name() == names {
			return true
		}
	}
	return strings.HasPrefix(name, "runc-") || strings.HasPrefix(name, "containerd-")
}

func worker(dir, name string) Worker {
	w := Worker{Name: name, Dir: dir}
	if strings.HasPrefix(name, "containerd-") {
		w.Reason = "its snapshots, leases and blobs are in containerd's own directory, not here"
	}
	return w
}

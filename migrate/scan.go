package migrate

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/migrate/buildkit"
	"github.com/lamina-build/lamina/snapshot"
)

// scanned bounds how many directories are looked at for marks. Most daemons
// leave one with the first directory that a build replaces.
const scanned = 2000

// attributes is the class of the extended attributes with which overlayfs
// marked the layers, empty for a snapshotter that has none. Layers of a daemon
// without root have those of the class user. What its databases do not tell by
// their owner, as when they were copied, the layers may: those of one class
// alone decide.
//
// Nobody reads all layers here: what else in them matters to a mount is looked
// for by the driver, when it first uses one.
func attributes(ctx context.Context, s *buildkit.State) (class string, err error) {
	if s.Snapshotter != buildkit.Overlayfs {
		return "", nil
	}
	if class := snapshot.DefaultAttributes(); class == snapshot.User {
		return class, nil // nothing else can be mounted
	}
	var m marks
	left := scanned
	for _, snap := range s.Named {
		if !snap.Present || snap.Kind == buildkit.View {
			continue
		}
		if err := m.scan(ctx, filepath.Join(s.DataDir(snap.Dir), "fs"), &left); err != nil {
			return "", err
		}
		if m.trusted || left <= 0 {
			break
		}
	}
	owner, err := os.Stat(filepath.Join(s.Dir, s.Files[0].Name))
	if err != nil {
		return "", err
	}
	st, ok := owner.Sys().(*syscall.Stat_t)
	if !m.trusted && (m.user || ok && st.Uid != 0) {
		return snapshot.User, nil
	}
	return snapshot.Trusted, nil
}

// marks are what overlayfs left in the attributes of layers.
type marks struct{ trusted, user bool }

// scan looks at the directories of a layer, as long as some are left to look
// at.
func (m *marks) scan(ctx context.Context, dir string, left *int) error {
	names := make([]byte, 4<<10)
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil || !d.IsDir() {
			return err
		}
		if *left--; *left < 0 || m.trusted {
			return fs.SkipAll
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
			m.trusted = m.trusted || strings.HasPrefix(name, "trusted.overlay.")
			m.user = m.user || strings.HasPrefix(name, "user.overlay.")
		}
		return nil
	})
}

package contenthash

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// Root is the directory that holds the files of a snapshot, for as long as
// somebody reads them.
type Root struct {
	dir     *os.File
	release func() error
}

// NewRoot makes a Root of an open directory. release is called once when the
// directory is closed, to take back what was done to have it (a mount); it may
// be nil.
func NewRoot(dir *os.File, release func() error) *Root {
	return &Root{dir: dir, release: release}
}

// OnClose has then called after the directory is closed and r's own release.
func (r *Root) OnClose(then func()) *Root {
	release := r.release
	r.release = func() (err error) {
		if release != nil {
			err = release()
		}
		then()
		return err
	}
	return r
}

// at is the directory as the place of other calls.
func (r *Root) at() *fsat.Root { return fsat.RootAt(int(r.dir.Fd())) }

func (r *Root) close() error {
	err := r.dir.Close()
	if r.release != nil {
		err = errors.Join(err, r.release())
	}
	return err
}

// Opener gives access to the files when they are needed. It is not called for
// questions that a tree can answer by itself.
type Opener func(ctx context.Context) (*Root, error)

// Dir is an Opener for a directory by its path, which may lead through links.
func Dir(path string) Opener {
	return func(context.Context) (*Root, error) {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			return nil, err
		}
		return NewRoot(f, nil), nil
	}
}

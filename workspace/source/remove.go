package source

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// removeDropped removes what prev names and the tree does not, the contents of
// a directory before it. What is no directory goes, whatever it is by now; a
// directory goes if nothing else is in it.
func (s *syncer) removeDropped(ctx context.Context) error {
	for p := int32(len(s.prev.nodes)) - 1; p >= 0; p-- {
		if s.back[p] >= 0 {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := s.removeOne(p); err != nil {
			return fsat.Error("remove from workspace", s.prev.path(p), err)
		}
	}
	return nil
}

func (s *syncer) removeOne(p int32) error {
	n := &s.prev.nodes[p]
	dir := s.prev.path(n.parent)
	for again := false; ; again = true {
		err := s.removeIn(dir, n.name)
		switch {
		case err == nil:
			s.gone[p] = true
			s.touchAbove(n.parent)
			return nil
		case fsat.Absent(err), errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.EEXIST):
			return nil
		case errors.Is(err, unix.EACCES) && !again:
			s.touchAbove(n.parent)
			if err := s.unlockPath(dir); err != nil {
				return err
			}
		default:
			return err
		}
	}
}

func (s *syncer) removeIn(dir, name string) error {
	fd, err := s.dst.OpenDir(dir)
	if err != nil {
		return err
	}
	defer fsat.Close(fd)
	err = unix.Unlinkat(fd, name, 0)
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EPERM) {
		if rerr := unix.Unlinkat(fd, name, unix.AT_REMOVEDIR); !errors.Is(rerr, unix.ENOTDIR) {
			return rerr
		}
	}
	return err
}

// touchAbove marks the tree's directories of prev's directory p and above.
func (s *syncer) touchAbove(p int32) {
	for ; p >= 0; p = s.prev.nodes[p].parent {
		if k := s.back[p]; k >= 0 && s.t.nodes[k].typ == Dir {
			s.touched[k].Store(true)
		}
	}
}

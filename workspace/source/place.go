package source

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// openPlace opens the workspace's copy of directory d, or the workspace for
// -1, as the place of other calls.
func (s *syncer) openPlace(d int32) (int, error) {
	fd, err := s.dst.OpenDir(s.t.path(d))
	if errors.Is(err, unix.EACCES) {
		if err := s.unlock(d); err != nil {
			return -1, err
		}
		return s.dst.OpenDir(s.t.path(d))
	}
	return fd, err
}

// unlock gives the user, who owns them, all rights in directory d and those
// above it. finishDirs sets the modes that they should have.
func (s *syncer) unlock(d int32) error {
	for up := d; up >= 0; up = s.t.nodes[up].parent {
		s.touched[up].Store(true)
	}
	return s.unlockPath(s.t.path(d))
}

func (s *syncer) unlockPath(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var st unix.Stat_t
	if err := unix.Fstat(s.dst.Fd(), &st); err != nil {
		return err
	}
	if st.Mode&0o700 != 0o700 {
		if err := unix.Fchmod(s.dst.Fd(), st.Mode&0o7777|0o700); err != nil {
			return err
		}
		s.topMode, s.topFixed = st.Mode&0o7777, true
	}
	for end := 0; end < len(path); end++ {
		start := end
		for end < len(path) && path[end] != '/' {
			end++
		}
		if err := s.unlockOne(path[:max(start-1, 0)], path[start:end]); err != nil {
			return err
		}
	}
	return nil
}

func (s *syncer) unlockOne(dir, name string) error {
	fd, err := s.dst.OpenDir(dir)
	if err != nil {
		return err
	}
	defer fsat.Close(fd)
	var st unix.Stat_t
	if err := fsat.Lstat(fd, name, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Mode&0o700 == 0o700 {
		return nil
	}
	return fsat.Chmod(fd, name, st.Mode&0o7777|0o700)
}

// inDir calls do with the workspace's copy of directory d, again with more
// rights if that lacked some. do must bear being repeated.
func (s *syncer) inDir(d int32, do func(fd int) error) error {
	fd, err := s.openPlace(d)
	if err != nil {
		return err
	}
	defer fsat.Close(fd)
	if d >= 0 {
		s.touched[d].Store(true)
	}
	err = do(fd)
	if errors.Is(err, unix.EACCES) {
		if err := s.unlock(d); err != nil {
			return err
		}
		err = do(fd)
	}
	return err
}

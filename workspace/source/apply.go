package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

func (s *syncer) note(k int32, format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notes = append(s.notes, Note{Path: s.t.path(k), Reason: fmt.Sprintf(format, args...)})
}

// makeDirs makes the directories that are missing, those above first.
func (s *syncer) makeDirs(ctx context.Context) error {
	for k := range s.t.nodes {
		n := &s.t.nodes[k]
		if n.typ != Dir || s.act[k] != create {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err := s.inDir(n.parent, func(fd int) error {
			if err := fsat.RemoveAll(fd, n.name); err != nil {
				return err
			}
			return unix.Mkdirat(fd, n.name, 0o700)
		})
		if err != nil {
			return fsat.Error("make workspace directory", s.t.path(int32(k)), err)
		}
	}
	return nil
}

// makeFiles makes and repairs all that is no directory and no second name.
func (s *syncer) makeFiles(ctx context.Context) error {
	var list []int32
	for k := range s.t.nodes {
		n := &s.t.nodes[k]
		if n.typ != Dir && n.link == int32(k) && s.act[k] != keep {
			list = append(list, int32(k))
			if s.act[k] == create {
				s.meter.total += n.size
			}
		}
	}
	slices.Reverse(list) // the newest task is done first: so in path order
	return runTasks(ctx, list, func() (func(context.Context, int32, func(int32)) error, error) {
		r := newReader()
		return func(ctx context.Context, k int32, _ func(int32)) error { return s.makeOne(ctx, r, k) }, nil
	})
}

func (s *syncer) makeOne(ctx context.Context, r *reader, k int32) error {
	n := &s.t.nodes[k]
	if s.act[k] == attrs {
		done, err := s.repairFile(k)
		if done || err != nil {
			return err
		}
		s.act[k] = create
	}
	if n.typ == File {
		return s.copyFile(ctx, r, k)
	}
	made := false
	err := s.inDir(n.parent, func(fd int) error {
		if err := fsat.RemoveAll(fd, n.name); err != nil {
			return err
		}
		var err error
		made, err = s.makeSmall(fd, k)
		return err
	})
	if made {
		s.count.Add(1)
	}
	return fsat.Error("make in workspace", s.t.path(k), err)
}

// makeSmall makes a link, a FIFO or a device in the directory fd, with its
// attributes.
func (s *syncer) makeSmall(fd int, k int32) (made bool, err error) {
	n := &s.t.nodes[k]
	switch n.typ {
	case Symlink:
		err = unix.Symlinkat(n.target, fd, n.name)
	case FIFO:
		err = unix.Mknodat(fd, n.name, unix.S_IFIFO|0o600, 0)
	case CharDevice, BlockDevice:
		kind := uint32(unix.S_IFCHR)
		if n.typ == BlockDevice {
			kind = unix.S_IFBLK
		}
		err = unix.Mknodat(fd, n.name, kind|0o600, int(n.rdev))
		if errors.Is(err, unix.EPERM) {
			s.note(k, "device %d:%d left out: %v", unix.Major(n.rdev), unix.Minor(n.rdev), err)
			return false, nil
		}
	}
	if err != nil {
		return false, err
	}
	at, err := fsat.OpenAt(fd, n.name, unix.O_PATH, 0)
	if err != nil {
		return true, err
	}
	defer fsat.Close(at)
	if s.asRoot {
		err := unix.Fchownat(fd, n.name, int(n.uid), int(n.gid), unix.AT_SYMLINK_NOFOLLOW)
		if err := s.noteOwner(k, err); err != nil {
			return true, err
		}
		if err := s.setXattrs(k, at, true); err != nil {
			return true, err
		}
	}
	if n.typ != Symlink {
		if err := fsat.Chmod(fd, n.name, n.mode); err != nil {
			return true, err
		}
	}
	if err := fsat.SetMtime(fd, n.name, n.mtime.sec, int64(n.mtime.nsec)); err != nil {
		return true, err
	}
	return true, s.record(k, at)
}

// copyFile makes a regular file anew.
func (s *syncer) copyFile(ctx context.Context, r *reader, k int32) (err error) {
	n, path := &s.t.nodes[k], s.t.path(k)
	in, err := s.src.Open(path, fsat.ForReading, 0)
	if fsat.Absent(err) || errors.Is(err, unix.ENXIO) {
		return &ChangedError{Path: path}
	}
	if err != nil {
		return fsat.Error("open source file", path, err)
	}
	defer fsat.Close(in)
	var before, after unix.Stat_t
	if err := unix.Fstat(in, &before); err != nil {
		return fsat.Error("stat source file", path, err)
	}
	var now node
	if !now.fill(n.name, &before) || now.typ != File || !now.sameStat(n) {
		return &ChangedError{Path: path}
	}
	out := -1
	err = s.inDir(n.parent, func(fd int) error {
		if err := fsat.RemoveAll(fd, n.name); err != nil {
			return err
		}
		var err error
		out, err = fsat.OpenAt(fd, n.name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
		return err
	})
	if err != nil {
		return fsat.Error("make in workspace", path, err)
	}
	defer func() {
		if cerr := unix.Close(out); cerr != nil && err == nil {
			s.out[k].copy = copied{}
			err = fsat.Error("write in workspace", path, cerr)
		}
	}()
	err = s.copier.Copy(ctx, out, in, n.size, s.meter.add)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return &ChangedError{Path: path}
	case err != nil:
		return fsat.Error("copy source file", path, err)
	}
	if err := unix.Fstat(in, &after); err != nil {
		return fsat.Error("stat source file", path, err)
	}
	if !sameFile(&before, &after) {
		return &ChangedError{Path: path}
	}
	// Where the stat data could have missed a change since the scan, only the
	// content itself says that it is what was scanned.
	if !n.readForSure(s.t.started) {
		_, sum, err := r.sum(ctx, out, n, func(int64) {})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fsat.Error("read in workspace", path, err)
		}
		if sum != n.sum {
			return &ChangedError{Path: path}
		}
	}
	if err := s.setAttrs(k, out); err != nil {
		return fsat.Error("set attributes in workspace of", path, err)
	}
	s.bytes.Add(n.size)
	s.count.Add(1)
	return nil
}

// repairFile sets the attributes of a file whose content is right; false if
// that takes rights which only a new file has.
func (s *syncer) repairFile(k int32) (bool, error) {
	path := s.t.path(k)
	fd, err := s.dst.Open(path, fsat.ForReading, 0)
	if fsat.Absent(err) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENXIO) {
		return false, nil
	}
	if err != nil {
		return false, fsat.Error("open in workspace", path, err)
	}
	defer fsat.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, fsat.Error("stat in workspace", path, err)
	}
	if st.Dev != s.seen[k].node.dev || st.Ino != s.seen[k].node.ino {
		return false, nil
	}
	if err := s.setAttrs(k, fd); err != nil {
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			return false, nil
		}
		return false, fsat.Error("set attributes in workspace of", path, err)
	}
	s.count.Add(1)
	return true, nil
}

// setAttrs gives an open file or directory of the workspace the entry's
// attributes and records how it looks then.
func (s *syncer) setAttrs(k int32, fd int) error {
	n := &s.t.nodes[k]
	if s.asRoot { // first: a change of owner clears setuid and capabilities
		if err := s.noteOwner(k, unix.Fchown(fd, int(n.uid), int(n.gid))); err != nil {
			return err
		}
	}
	// Before the mode, which may take the right to set them.
	if err := s.setXattrs(k, fd, false); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, n.mode); err != nil {
		return err
	}
	if err := fsat.SetMtime(fd, "", n.mtime.sec, int64(n.mtime.nsec)); err != nil {
		return err
	}
	return s.record(k, fd)
}

// noteOwner makes a note of an owner that cannot be given, as for ids that a
// user namespace does not map.
func (s *syncer) noteOwner(k int32, err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		n := &s.t.nodes[k]
		s.note(k, "owner %d:%d not kept: %v", n.uid, n.gid, err)
		return nil
	}
	return err
}

func (s *syncer) setXattrs(k int32, fd int, path bool) error {
	refused, err := fsat.SetXattrs(fd, path, s.t.nodes[k].xattrs, s.asRoot)
	for _, r := range refused {
		s.note(k, "%s", r)
	}
	return err
}

// record notes how the finished copy looks.
func (s *syncer) record(k int32, fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	n := &s.t.nodes[k]
	see := &s.seen[k]
	see.node.fill(n.name, &st)
	see.there, see.nlink = true, uint64(st.Nlink)
	s.out[k].copy = see.copied()
	if see.node.mode != n.mode {
		s.note(k, "mode %04o not kept: it became %04o", n.mode, see.node.mode)
	}
	return nil
}

// finishDirs sets the attributes of directories, what they hold first, since
// every change in a directory changes its time.
func (s *syncer) finishDirs(context.Context) error {
	for k := int32(len(s.t.nodes)) - 1; k >= 0; k-- {
		n := &s.t.nodes[k]
		if n.typ != Dir || s.act[k] == keep && !s.touched[k].Load() {
			continue
		}
		path := s.t.path(k)
		fd, err := s.dst.Open(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if errors.Is(err, unix.EACCES) {
			if err = s.unlock(k); err == nil {
				fd, err = s.dst.Open(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
			}
		}
		if err != nil {
			return fsat.Error("open workspace directory", path, err)
		}
		was, see := s.before(k), s.seen[k].node.mode
		err = s.setAttrs(k, fd)
		fsat.Close(fd)
		if err != nil {
			return fsat.Error("set attributes in workspace of", path, err)
		}
		if s.act[k] != create && was != nil && was.copy.set && see == was.copy.mode {
			old := *was
			if old.mtime = n.mtime; s.sameSourceAttrs(n, &old) {
				continue // its time alone
			}
		}
		s.count.Add(1)
	}
	return nil
}

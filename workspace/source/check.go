package source

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// check looks at the place of every entry and decides what has to be done.
func (s *syncer) check(ctx context.Context) error {
	dirs := []int32{-1}
	for i := range s.t.nodes {
		if s.t.nodes[i].typ == Dir {
			dirs = append(dirs, int32(i))
		}
	}
	return runTasks(ctx, dirs, func() (func(context.Context, int32, func(int32)) error, error) {
		return func(_ context.Context, d int32, _ func(int32)) error { return s.checkDir(d) }, nil
	})
}

func (s *syncer) checkDir(d int32) error {
	kids := s.t.children(d)
	if len(kids) == 0 {
		return nil
	}
	fd, err := s.openPlace(d)
	if fsat.Absent(err) {
		for _, k := range kids {
			s.act[k] = create
		}
		return nil
	}
	if err != nil {
		return fsat.Error("open workspace directory", s.t.path(d), err)
	}
	defer fsat.Close(fd)
	var st unix.Stat_t
	for _, k := range kids {
		n := &s.t.nodes[k]
		err := fsat.Lstat(fd, n.name, &st)
		if errors.Is(err, unix.EACCES) {
			if err = s.unlock(d); err == nil {
				err = fsat.Lstat(fd, n.name, &st)
			}
		}
		if errors.Is(err, unix.ENOENT) {
			s.act[k] = create
			continue
		}
		if err != nil {
			return fsat.Error("stat in workspace", s.t.path(k), err)
		}
		see := &s.seen[k]
		known := see.node.fill(n.name, &st)
		see.there, see.nlink = true, uint64(st.Nlink)
		if !known || see.node.typ != n.typ {
			s.act[k] = create
			continue
		}
		if s.act[k], err = s.decide(fd, k); err != nil {
			return fsat.Error("read in workspace", s.t.path(k), err)
		}
		if s.act[k] == keep {
			s.out[k].copy = s.seen[k].copied()
		}
	}
	return nil
}

func (s *seen) copied() copied {
	return copied{set: true, mode: s.node.mode, size: s.node.size, mtime: s.node.mtime, ctime: s.node.ctime}
}

// before is prev's entry of the same path and type, or nil.
func (s *syncer) before(k int32) *node {
	if m := s.match[k]; m >= 0 && s.prev.nodes[m].typ == s.t.nodes[k].typ {
		return &s.prev.nodes[m]
	}
	return nil
}

// decide compares an entry with what stands in its place in the directory fd,
// which is of the right type.
func (s *syncer) decide(fd int, k int32) (action, error) {
	n, now, was := &s.t.nodes[k], &s.seen[k].node, s.before(k)
	undisturbed := was != nil && was.copy.set && s.seen[k].copied() == was.copy
	if n.typ == Dir {
		if undisturbed && s.sameSourceAttrs(n, was) {
			return keep, nil
		}
		return attrs, nil
	}
	if undisturbed && was.copy.leftForSure(s.prev.synced) {
		switch {
		case n.target != was.target || n.rdev != was.rdev || n.size != was.size:
			return create, nil
		case n.sum != was.sum && n.sameHeader(was):
			return create, nil
		case n.sum != was.sum:
			return verify, nil // attributes changed, and maybe the content
		case s.sameSourceAttrs(n, was):
			return keep, nil
		case n.typ == File:
			return attrs, nil
		}
		return create, nil
	}
	// Stat data cannot tell. Without the right size and time there is no use
	// in reading.
	if !s.fits(n, now, was) {
		if n.typ == File && now.size == n.size && timeFits(n, now, was) {
			return verify, nil
		}
		return create, nil
	}
	if n.typ == File {
		return verify, nil
	}
	same, err := s.sameSmall(fd, n, now)
	if err != nil || !same {
		return create, err
	}
	return keep, nil
}

// sameSourceAttrs says whether the source's attributes are those of last time.
func (s *syncer) sameSourceAttrs(n, was *node) bool {
	return n.mode == was.mode && n.mtime == was.mtime &&
		(!s.asRoot || n.uid == was.uid && n.gid == was.gid) && fsat.EqualXattrs(n.xattrs, was.xattrs)
}

// fits says whether the attributes in the workspace that stat shows are right,
// or are what the last sync could make of the same.
func (s *syncer) fits(n, now, was *node) bool {
	mode := now.mode == n.mode || was != nil && was.copy.set && was.mode == n.mode && now.mode == was.copy.mode
	owner := !s.asRoot || now.uid == n.uid && now.gid == n.gid
	return mode && owner && timeFits(n, now, was) && now.size == n.size
}

// timeFits also knows file systems that keep less of a time than they get.
func timeFits(n, now, was *node) bool {
	return now.mtime == n.mtime ||
		was != nil && was.copy.set && was.mtime == n.mtime && now.mtime == was.copy.mtime
}

// sameSmall compares what is no regular file and no directory.
func (s *syncer) sameSmall(fd int, n, now *node) (bool, error) {
	if n.rdev != now.rdev {
		return false, nil
	}
	at, err := fsat.OpenAt(fd, n.name, unix.O_PATH, 0)
	if err != nil {
		return false, ignoreAbsent(err)
	}
	defer fsat.Close(at)
	if n.typ == Symlink {
		target, err := fsat.Readlink(at, "")
		if err != nil || target != n.target {
			return false, ignoreAbsent(err)
		}
	}
	if !s.asRoot {
		return true, nil
	}
	have, err := fsat.Xattrs(at, true, true)
	return err == nil && fsat.EqualXattrs(have, n.xattrs), err
}

func ignoreAbsent(err error) error {
	if fsat.Absent(err) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// verifyContents reads the copies of which stat data cannot tell whether they
// are right.
func (s *syncer) verifyContents(ctx context.Context) error {
	var list []int32
	for k, a := range s.act {
		if a == verify && s.t.nodes[k].link == int32(k) {
			list = append(list, int32(k))
		}
	}
	return runTasks(ctx, list, func() (func(context.Context, int32, func(int32)) error, error) {
		r := newReader()
		return func(ctx context.Context, k int32, _ func(int32)) (err error) {
			s.act[k], err = s.verifyFile(ctx, r, k)
			if s.act[k] == keep {
				s.out[k].copy = s.seen[k].copied()
			}
			return err
		}, nil
	})
}

func (s *syncer) verifyFile(ctx context.Context, r *reader, k int32) (action, error) {
	n, now, path := &s.t.nodes[k], &s.seen[k].node, s.t.path(k)
	fd, err := s.dst.Open(path, fsat.ForReading, 0)
	if fsat.Absent(err) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENXIO) {
		return create, nil
	}
	if err != nil {
		return create, fsat.Error("open in workspace", path, err)
	}
	defer fsat.Close(fd)
	_, sum, err := r.sum(ctx, fd, n, func(int64) {})
	if ctx.Err() != nil {
		return create, context.Cause(ctx)
	}
	if err != nil {
		return create, fsat.Error("read in workspace", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return create, fsat.Error("stat in workspace", path, err)
	}
	var after node
	if !after.fill(n.name, &st) || after.typ != File || !after.sameStat(now) || sum != n.sum {
		return create, nil
	}
	have, err := fsat.Xattrs(fd, false, s.asRoot)
	if err != nil {
		return create, fsat.Error("read extended attributes in workspace", path, err)
	}
	if !s.fits(n, now, s.before(k)) || !fsat.EqualXattrs(have, n.xattrs) {
		return attrs, nil
	}
	return keep, nil
}

// checkLinks decides about names that share a file, on either side.
func (s *syncer) checkLinks(context.Context) error {
	names := map[int32]uint64{} // how many names of a first one are as they should be
	for k := range s.t.nodes {
		if l := s.t.nodes[k].link; l != int32(k) && s.shares(int32(k), l) {
			names[l]++
		}
	}
	taken := map[[2]uint64]bool{}
	for k := range s.t.nodes {
		see := &s.seen[k]
		if s.t.nodes[k].link != int32(k) || s.t.nodes[k].typ == Dir || s.act[k] == create || see.nlink < 2 {
			continue
		}
		id := [2]uint64{see.node.dev, see.node.ino}
		// Two files of the source may not be one in the workspace, and the
		// attributes of a file that a command linked elsewhere are not ours
		// alone to change.
		if taken[id] || s.act[k] == attrs && see.nlink != 1+names[int32(k)] {
			s.act[k] = create
			s.out[k].copy = copied{}
		}
		taken[id] = true
	}
	for k := range s.t.nodes {
		l := s.t.nodes[k].link
		if l == int32(k) {
			continue
		}
		if s.act[l] != create && s.shares(int32(k), l) {
			s.act[k] = keep
			s.out[k].copy = s.out[l].copy
		} else {
			s.act[k] = create
			s.out[k].copy = copied{}
		}
	}
	return nil
}

// shares says whether two places in the workspace hold the same file.
func (s *syncer) shares(k, l int32) bool {
	a, b := &s.seen[k], &s.seen[l]
	return a.there && b.there && a.node.dev == b.node.dev && a.node.ino == b.node.ino
}

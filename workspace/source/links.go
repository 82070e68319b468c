package source

import (
	"context"
	"errors"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// makeLinks makes the further names of files, then records once more how the
// files look: a link changes the ctime of all names.
func (s *syncer) makeLinks(ctx context.Context) error {
	stale := map[int32]bool{}
	for k := range s.t.nodes {
		n := &s.t.nodes[k]
		if n.link == int32(k) {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if s.act[k] == create && s.out[n.link].copy.set {
			if err := s.makeLink(ctx, int32(k)); err != nil {
				return err
			}
			s.count.Add(1)
			stale[n.link] = true
		}
	}
	// Removing a name of a file counts as a change of it, too.
	if removed := slices.Contains(s.gone, true); removed || s.count.Load() > 0 {
		for k := range s.t.nodes {
			if l := s.t.nodes[k].link; s.seen[l].nlink > 1 && s.t.nodes[k].typ != Dir && s.out[k].copy.set {
				stale[l] = true
			}
		}
	}
	for k := range s.t.nodes {
		l := s.t.nodes[k].link
		if !stale[l] || !s.out[l].copy.set {
			continue
		}
		fd, err := s.dst.Open(s.t.path(int32(k)), unix.O_PATH, 0)
		if err == nil {
			var st unix.Stat_t
			if err = unix.Fstat(fd, &st); err == nil {
				s.seen[k].node.fill(s.t.nodes[k].name, &st)
				s.out[k].copy = s.seen[k].copied()
			}
			fsat.Close(fd)
		}
		if err != nil {
			return fsat.Error("stat in workspace", s.t.path(int32(k)), err)
		}
	}
	return nil
}

// makeLink makes one further name; where the file system has no such links, a
// file of its own.
func (s *syncer) makeLink(ctx context.Context, k int32) error {
	n := &s.t.nodes[k]
	lead := &s.t.nodes[n.link]
	from, err := s.openPlace(lead.parent)
	if err != nil {
		return fsat.Error("open workspace directory", s.t.path(lead.parent), err)
	}
	defer fsat.Close(from)
	err = s.inDir(n.parent, func(fd int) error {
		if err := fsat.RemoveAll(fd, n.name); err != nil {
			return err
		}
		return unix.Linkat(from, lead.name, fd, n.name, 0)
	})
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EMLINK), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EXDEV):
		s.note(k, "hard link to %q not kept: %v", s.t.path(n.link), err)
		s.count.Add(-1) // the copy counts itself
		return s.makeOne(ctx, newReader(), k)
	case err != nil:
		return fsat.Error("link in workspace", s.t.path(k), err)
	}
	return nil
}

package snapshot

import (
	"context"
	"errors"
	"path"
	"slices"
	"strings"
)

// change is one name of a difference.
type change struct {
	found
	// gone says that the name is to go, and the rest counts for nothing but
	// the name.
	gone bool
	// opaque says of a directory that nothing shows of what was there before.
	opaque bool
	// below are the changes in a directory, sorted by name.
	below []change

	// While two trees are compared: the file is the same but, perhaps, for
	// its hard links; the directory's own attributes are the same.
	same bool
	// twin is the file in the lower tree that it is the same as, twins how
	// many names that one has.
	twin  inodeID
	twins int
}

// changesOf is what one layer says, all of it.
func changesOf(ctx context.Context, layer *union) (list []change, err error) {
	names, err := readNames(layer.parts[0].File)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		f, ok, err := layer.in(0, name)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		c := change{found: f, gone: f.name == ""}
		c.name = name
		if !c.gone && f.isDir() {
			if c.below, c.opaque, err = changesBelow(ctx, layer, &f); err != nil {
				return nil, within(name, err)
			}
		}
		list = append(list, c)
	}
	sortChanges(list)
	return list, nil
}

func changesBelow(ctx context.Context, layer *union, f *found) (list []change, opaque bool, err error) {
	sub := &union{marks: layer.marks}
	defer func() { err = errors.Join(err, sub.close()) }()
	place, err := layer.place(f)
	if err != nil {
		return nil, false, err
	}
	if opaque, err = sub.add(place); err != nil {
		return nil, false, err
	}
	list, err = changesOf(ctx, sub)
	return list, opaque, err
}

func sortChanges(list []change) {
	slices.SortFunc(list, func(a, b change) int { return strings.Compare(a.name, b.name) })
}

// A differ compares two trees.
type differ struct {
	comparer
	// The names of files with several links, as they are met: of lower's only
	// those that upper shows with the same file.
	lower, upper map[inodeID][]string
	// skipped says that directories were left out, as they are the same;
	// full forbids it; torn says that some file may have names in them.
	skipped, full, torn bool
}

// difference is what turns the tree of lower into that of upper. Directories
// that both have from the same layers are not looked into, unless a file that
// matters may have more names there.
//
// Files count as the same if their hard links are the same, too: the names
// that are linked with it in upper must be those in lower that are still there
// with the same file. Otherwise the group would be torn apart, or grow
// together, where the difference is applied.
func difference(ctx context.Context, lower, upper *union) ([]change, error) {
	for full := false; ; full = true {
		d := &differ{
			comparer: comparer{ctx: ctx}, full: full,
			lower: map[inodeID][]string{}, upper: map[inodeID][]string{},
		}
		list, err := d.dirs("", lower, upper)
		if err != nil {
			return nil, err
		}
		list = d.settle("", list)
		if !d.skipped || !d.torn {
			return list, nil
		}
	}
}

func (d *differ) dirs(at string, lower, upper *union) (list []change, err error) {
	if lower.same(upper) && !d.full {
		d.skipped = true
		return nil, nil
	}
	was, err := lower.list()
	if err != nil {
		return nil, err
	}
	is, err := upper.list()
	if err != nil {
		return nil, err
	}
	for len(was) > 0 || len(is) > 0 {
		if err := context.Cause(d.ctx); err != nil {
			return nil, err
		}
		var c change
		keep := true
		switch {
		case len(is) == 0 || len(was) > 0 && was[0].name < is[0].name:
			c = change{found: found{name: was[0].name}, gone: true}
			was = was[1:]
		case len(was) == 0 || is[0].name < was[0].name:
			c, err = d.added(at, upper, &is[0])
			is = is[1:]
		default:
			c, keep, err = d.both(at, lower, upper, &was[0], &is[0])
			was, is = was[1:], is[1:]
		}
		if err != nil {
			return nil, within(c.name, err)
		}
		if keep {
			list = append(list, c)
		}
	}
	return list, nil
}

// added is a name of upper with all that is below it.
func (d *differ) added(at string, upper *union, f *found) (c change, err error) {
	c.found = *f
	at = path.Join(at, f.name)
	if !f.isDir() {
		d.note(d.upper, at, f)
		return c, nil
	}
	sub, err := upper.sub(f)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, sub.close()) }()
	c.below, err = d.dirs(at, &union{marks: upper.marks}, sub)
	return c, err
}

// note remembers a name of a file that may have others.
func (d *differ) note(in map[inodeID][]string, at string, f *found) {
	if f.st.Nlink > 1 {
		in[f.id()] = append(in[f.id()], at)
	}
}

func (f *found) id() inodeID { return inodeID{f.st.Dev, f.st.Ino} }

// both compares what the trees have under one name; keep is false where there
// is no difference for sure.
func (d *differ) both(at string, lower, upper *union, was, is *found) (c change, keep bool, err error) {
	c.found = *is
	switch {
	case is.isDir() && was.isDir():
		return d.bothDirs(at, lower, upper, was, is)
	case is.isDir():
		c, err = d.added(at, upper, is)
		return c, true, err
	}
	at = path.Join(at, is.name)
	d.note(d.upper, at, is)
	c.same = was.id() == is.id()
	if !c.same && sameStat(&was.st, &is.st) {
		c.same, err = d.sameFiles(lower, upper, was, is)
	}
	if err != nil || !c.same {
		return c, true, err
	}
	d.note(d.lower, at, was)
	c.twin, c.twins = was.id(), int(was.st.Nlink)
	return c, was.st.Nlink > 1 || is.st.Nlink > 1, nil
}

func (d *differ) bothDirs(at string, lower, upper *union, was, is *found) (c change, keep bool, err error) {
	c.found = *is
	low, err := lower.sub(was)
	if err != nil {
		return c, false, err
	}
	defer func() { err = errors.Join(err, low.close()) }()
	up, err := upper.sub(is)
	if err != nil {
		return c, false, err
	}
	defer func() { err = errors.Join(err, up.close()) }()
	if c.same = sameStat(&was.st, &is.st); c.same {
		if c.same, err = sameXattrs(lower.marks, upper.marks, low.top(), up.top()); err != nil {
			return c, false, err
		}
	}
	c.below, err = d.dirs(path.Join(at, is.name), low, up)
	return c, !c.same || len(c.below) > 0, err
}

// settle drops what turned out to be the same, now that all links are known.
func (d *differ) settle(at string, list []change) []change {
	kept := list[:0]
	for _, c := range list {
		at := path.Join(at, c.name)
		c.below = d.settle(at, c.below)
		switch {
		case c.gone, c.isDir() && !c.same:
		case c.isDir():
			if len(c.below) == 0 {
				continue
			}
		case !c.same:
			d.torn = d.torn || len(linked(d.upper, c.id(), at)) < int(c.st.Nlink)
		default:
			is, was := linked(d.upper, c.id(), at), linked(d.lower, c.twin, at)
			d.torn = d.torn || len(is) < int(c.st.Nlink) || len(was) < c.twins
			if slices.Equal(is, was) {
				continue
			}
		}
		kept = append(kept, c)
	}
	return kept
}

// linked are the names of the file that has the name at.
func linked(names map[inodeID][]string, id inodeID, at string) []string {
	if all := names[id]; all != nil {
		return all
	}
	return []string{at}
}

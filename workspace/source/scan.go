package source

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/patternmatcher"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// Scan reads what the directory dir holds. With the tree of an earlier scan as
// prev only files are read whose stat data differ from prev's or are not
// certain (see the package's description); prev may be nil, and any tree will
// do: it saves reading and changes no result.
//
// dir may be reached through symbolic links. One that does not exist is
// NotFound, a file InvalidArgument, one that may not be read PermissionDenied,
// and so is anything unreadable in it, by its path. A bad pattern, or a source
// that lies in a skipped path, is InvalidArgument. A file that goes on changing
// while it is read is a ChangedError. Files that vanish meanwhile are not in
// the tree.
func Scan(ctx context.Context, dir string, o Options, prev *Tree) (*Tree, error) {
	root, err := openSource(dir)
	if err != nil {
		return nil, err
	}
	defer fsat.Close(root.Fd())
	rules, err := o.rules(dir)
	if err != nil {
		return nil, err
	}
	if o.now == nil {
		o.now = time.Now
	}
	t := &Tree{root: unix.Geteuid() == 0, now: o.now, started: stampOf(o.now())}
	if prev == nil || prev.root != t.root {
		prev = emptyTree() // another user saw other attributes
	}
	s := &scanner{root: root, rules: rules, prev: prev, asRoot: t.root}
	if err := s.walk(ctx); err != nil {
		return nil, err
	}
	s.flatten(t)
	if err := s.read(ctx, t, o.Progress); err != nil {
		return nil, err
	}
	t.index()
	return t, nil
}

// scanner is one scan. Directories are tasks for a few workers; the rest is
// done by the goroutine that called.
type scanner struct {
	// fixed
	root   *fsat.Root
	rules  *rules
	prev   *Tree
	asRoot bool

	mu      sync.Mutex
	folders []*folder // every folder, parents first
	notes   []Note

	// toRead are the files whose content has to be read.
	toRead []int32
}

// folder is a directory under way. Only the worker that has it as its task
// changes it.
type folder struct {
	path  string
	prev  int32 // the directory of that path in the previous tree
	known bool  // there is one
	match patternmatcher.MatchInfo
	// onlyFor says that the directory itself is not source and stays for the
	// sake of what it holds.
	onlyFor bool

	entries []found
	xattrs  []fsat.Xattr
	sure    bool // the attributes of prev hold
	gone    bool // vanished while its parent was read
	kept    bool // decided when all folders are read
}

// found is one entry of a folder.
type found struct {
	node   node
	prev   int32 // the entry of that path in the previous tree, or -1
	sub    *folder
	nlink  uint64
	sure   bool // what prev read of it still holds
	missed bool // not in the tree after all
}

// walk reads all directories.
func (s *scanner) walk(ctx context.Context) error {
	top := &folder{prev: -1, known: true, kept: true}
	s.folders = []*folder{top}
	return runTasks(ctx, []*folder{top}, func() (func(context.Context, *folder, func(*folder)) error, error) {
		w := &scanWorker{scanner: s, buf: make([]byte, 32<<10)}
		var err error
		w.match, err = s.rules.matcher()
		return w.folder, err
	})
}

// scanWorker is what one goroutine has for itself.
type scanWorker struct {
	*scanner
	buf   []byte
	names []string
	match *patternmatcher.PatternMatcher
	add   func(*folder)
	st    unix.Stat_t
}

// folder reads one directory and queues those in it.
func (w *scanWorker) folder(_ context.Context, f *folder, add func(*folder)) error {
	w.add = add
	fd, err := w.root.Open(f.path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		if f.path != "" && fsat.Absent(err) {
			return w.gone(f, err)
		}
		return fsat.Error("open source directory", f.path, err)
	}
	defer fsat.Close(fd)
	if f.path != "" && !f.sure {
		if f.xattrs, err = fsat.Xattrs(fd, false, w.asRoot); err != nil {
			return fsat.Error("read extended attributes of source", f.path, err)
		}
	}
	clear(w.names)
	w.names, err = fsat.Names(fd, w.buf, w.names[:0])
	if err != nil {
		return fsat.Error("read source directory", f.path, err)
	}
	slices.Sort(w.names)
	f.entries = make([]found, 0, len(w.names))
	var before []int32
	if f.known {
		before = w.prev.children(f.prev)
	}
	for _, name := range w.names {
		for len(before) > 0 && w.prev.nodes[before[0]].name < name {
			before = before[1:]
		}
		at := int32(-1)
		if len(before) > 0 && w.prev.nodes[before[0]].name == name {
			at = before[0]
			name = w.prev.nodes[at].name // one string instead of two
		}
		if err := w.entry(f, fd, name, at); err != nil {
			return err
		}
	}
	return nil
}

// gone handles a directory that vanished, or is another thing now, since its
// parent was read.
func (w *scanWorker) gone(f *folder, err error) error {
	if !errors.Is(err, unix.ENOENT) {
		return &ChangedError{Path: f.path}
	}
	f.gone = true
	return nil
}

// entry looks at one name of the open directory fd and adds it to f.
func (w *scanWorker) entry(f *folder, fd int, name string, prev int32) error {
	path := name
	if w.match != nil || len(w.rules.skip) > 0 {
		path = join(f.path, name)
	}
	if w.rules.skip[path] {
		return nil
	}
	var match patternmatcher.MatchInfo
	excluded := false
	if w.match != nil {
		var err error
		if excluded, match, err = w.match.MatchesUsingParentResults(path, f.match); err != nil {
			return fsat.Error("match exclude patterns with", path, err)
		}
		if excluded && !w.match.Exclusions() {
			return nil
		}
	}
	if err := fsat.Lstat(fd, name, &w.st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return fsat.Error("stat source", join(f.path, name), err)
	}
	e := found{prev: prev, nlink: uint64(w.st.Nlink)}
	if !e.node.fill(name, &w.st) || fsat.IsTemp(name) && e.node.typ != Symlink {
		if !excluded {
			w.leaveOut(join(f.path, name), e.node.typ)
		}
		return nil
	}
	if excluded && (e.node.typ != Dir || !mayReturn(w.match, path)) {
		return nil
	}
	if prev >= 0 {
		was := &w.prev.nodes[prev]
		e.sure = was.typ == e.node.typ && e.node.sameStat(was) && e.node.readForSure(w.prev.started)
	}
	if e.node.typ == Dir {
		e.sub = &folder{
			path: join(f.path, name), prev: prev, known: prev >= 0,
			match: match, sure: e.sure, onlyFor: excluded || w.rules.above[path],
		}
		if e.sure {
			e.sub.xattrs = w.prev.nodes[prev].xattrs
		}
	} else if err := w.small(f, fd, &e); err != nil {
		return err
	}
	f.entries = append(f.entries, e)
	if e.sub != nil {
		w.mu.Lock()
		w.folders = append(w.folders, e.sub)
		w.mu.Unlock()
		w.add(e.sub)
	}
	return nil
}

// small completes what is no directory and no regular file: its target and
// attributes are read on the spot.
func (w *scanWorker) small(f *folder, fd int, e *found) error {
	if e.node.typ == File {
		return nil
	}
	if e.sure {
		was := &w.prev.nodes[e.prev]
		e.node.target, e.node.xattrs = was.target, was.xattrs
		return nil
	}
	path := join(f.path, e.node.name)
	changed := func(err error) error {
		if fsat.Absent(err) || errors.Is(err, unix.EINVAL) {
			return &ChangedError{Path: path}
		}
		return fsat.Error("read source", path, err)
	}
	if e.node.typ == Symlink {
		var err error
		if e.node.target, err = fsat.Readlink(fd, e.node.name); err != nil {
			return changed(err)
		}
	}
	if !w.asRoot {
		return nil // only root can give these files attributes
	}
	at, err := fsat.OpenAt(fd, e.node.name, unix.O_PATH, 0)
	if err != nil {
		return changed(err)
	}
	defer fsat.Close(at)
	e.node.xattrs, err = fsat.Xattrs(at, true, true)
	return fsat.Error("read extended attributes of source", path, err)
}

func (s *scanner) leaveOut(path string, typ Type) {
	reason := "socket left out"
	if typ != 0 {
		reason = "unfinished output left out"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notes = append(s.notes, Note{Path: path, Reason: reason})
}

// fill takes over what lstat says; false for types that a tree does not hold.
func (n *node) fill(name string, st *unix.Stat_t) bool {
	*n = node{
		name: name, mode: st.Mode & 0o7777, uid: st.Uid, gid: st.Gid,
		dev: st.Dev, ino: st.Ino,
		mtime: stampOfSpec(st.Mtim), ctime: stampOfSpec(st.Ctim),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		n.typ = Dir
	case unix.S_IFREG:
		n.typ, n.size = File, st.Size
	case unix.S_IFLNK:
		// Linux ignores a link's mode; some file systems show odd ones.
		n.typ, n.mode = Symlink, 0o777
	case unix.S_IFIFO:
		n.typ = FIFO
	case unix.S_IFCHR:
		n.typ, n.rdev = CharDevice, st.Rdev
	case unix.S_IFBLK:
		n.typ, n.rdev = BlockDevice, st.Rdev
	default:
		return false
	}
	return true
}

func stampOfSpec(ts unix.Timespec) stamp { return stamp{ts.Sec, int32(ts.Nsec)} }

// sameStat compares what decides whether a file is read again.
func (n *node) sameStat(o *node) bool {
	return n.dev == o.dev && n.ino == o.ino && n.mode == o.mode && n.size == o.size && n.mtime == o.mtime && n.ctime == o.ctime
}

// flatten puts the entries of all folders into t in path order, leaving out
// directories that are not source and hold none, and finds hard links.
func (s *scanner) flatten(t *Tree) {
	total := 0
	for i := len(s.folders) - 1; i >= 0; i-- {
		f := s.folders[i]
		f.kept = (f.kept || !f.onlyFor) && !f.gone
		for j := range f.entries {
			e := &f.entries[j]
			if e.sub != nil && !e.sub.kept {
				e.missed = true
			}
			if !e.missed {
				f.kept = true
				total++
			}
		}
	}
	t.nodes = make([]node, 0, total)
	first := map[[2]uint64]int32{}
	type place struct {
		f    *folder
		next int
		at   int32
	}
	stack := []place{{s.folders[0], 0, -1}}
	for len(stack) > 0 {
		top := &stack[len(stack)-1]
		if top.next == len(top.f.entries) {
			top.f.entries = nil
			stack = stack[:len(stack)-1]
			continue
		}
		e := &top.f.entries[top.next]
		top.next++
		if e.missed {
			continue
		}
		i := int32(len(t.nodes))
		t.nodes = append(t.nodes, e.node)
		n := &t.nodes[i]
		n.parent, n.link = top.at, i
		if e.node.typ != Dir && e.nlink > 1 {
			id := [2]uint64{n.dev, n.ino}
			if l, ok := first[id]; ok && t.nodes[l].typ == n.typ {
				n.link = l
			} else {
				first[id] = i
			}
		}
		switch {
		case e.sub != nil:
			n.xattrs = e.sub.xattrs
			stack = append(stack, place{e.sub, 0, i})
		case n.typ == File && n.link == i && e.sure:
			was := &s.prev.nodes[e.prev]
			n.sum, n.xattrs = was.sum, was.xattrs
		case n.typ == File && n.link == i:
			s.toRead = append(s.toRead, i)
		}
	}
	slices.SortFunc(s.notes, func(a, b Note) int { return strings.Compare(a.Path, b.Path) })
	t.notes = s.notes
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

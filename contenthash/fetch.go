package contenthash

import (
	"context"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// fetch reads what one round of a run wants, and puts it into the tree.
//
// Nodes are only removed or replaced by the fetch itself or by something that
// raises the tree's rev. What is read after that is dropped: the next round
// finds out what is still wanted.
type fetch struct {
	t       *Tree
	root    *fsat.Root
	rev     uint64
	missing map[string]bool // of the run
	pool    *pool           // of the phase under way
}

func (f *fetch) run(ctx context.Context, r *run) error {
	for path := range r.looks {
		if err := f.phase(ctx, 1, func(rd *reader) error { return f.look(rd, path) }); err != nil {
			return err
		}
	}
	var tasks []func(*reader) error
	for path, names := range r.reads {
		tasks = append(tasks, func(rd *reader) error { return f.readNamed(rd, path, names) })
	}
	if r.readRoot {
		tasks = append(tasks, f.readRoot)
	}
	if err := f.phase(ctx, f.t.workers, tasks...); err != nil {
		return err
	}
	for _, s := range r.scans {
		if err := f.phase(ctx, f.t.workers, func(rd *reader) error { return f.scan(rd, s) }); err != nil {
			return err
		}
	}
	return nil
}

// phase runs tasks, and those that they make, to their end.
func (f *fetch) phase(ctx context.Context, workers int, tasks ...func(*reader) error) error {
	if len(tasks) == 0 {
		return nil
	}
	f.pool = newPool(workers, func() *reader { return f.t.borrow(ctx) }, f.t.giveBack)
	for _, task := range tasks {
		f.pool.push(task)
	}
	return f.pool.run(ctx)
}

// borrow takes a reader that an earlier worker has left, or makes one.
func (t *Tree) borrow(ctx context.Context) *reader {
	r, ok := t.readers.Get().(*reader)
	if !ok {
		r = newReader()
	}
	r.done, r.now, r.fault = ctx.Done(), t.now, t.fault
	t.mu.RLock()
	r.ownerless = t.ownerless
	t.mu.RUnlock()
	return r
}

func (t *Tree) giveBack(r *reader) {
	t.mu.Lock()
	t.stats.add(r.stats)
	t.mu.Unlock()
	r.stats, r.done = Stats{}, nil
	t.readers.Put(r)
}

// apply runs change on the tree, unless what was read is out of date.
func (f *fetch) apply(change func()) {
	f.t.mu.Lock()
	defer f.t.mu.Unlock()
	if f.t.rev != f.rev {
		return
	}
	change()
}

// current runs look, which only reads the tree; false if what it would see is
// not what the run asked about.
func (f *fetch) current(look func()) bool {
	f.t.mu.RLock()
	defer f.t.mu.RUnlock()
	if f.t.rev != f.rev {
		return false
	}
	look()
	return true
}

// look looks at each name on the way to path, up to the first that is no
// directory.
func (f *fetch) look(rd *reader, path string) error {
	at := f.root.Fd()
	defer func() {
		if at != f.root.Fd() {
			fsat.Close(at)
		}
	}()
	var n *node
	if !f.current(func() { n = f.t.root }) {
		return nil // a change may put another root in place
	}
	for rest, more := path, true; more; {
		var name string
		name, rest, more = strings.Cut(rest, "/")
		got, err := rd.entry(at, name, kindUnknown, false)
		if err != nil {
			return failed("look at", path, err)
		}
		var c *node
		isDir := false
		f.apply(func() {
			c = f.put(n, name, got)
			isDir = c != nil && c.kind == kindDir
		})
		if got.gone {
			f.missing[strings.TrimSuffix(path[:len(path)-len(rest)], "/")] = true
		}
		if !isDir || !more {
			return nil
		}
		next, err := rd.openAt(at, name, unix.O_PATH|unix.O_DIRECTORY)
		if at != f.root.Fd() {
			fsat.Close(at)
		}
		at = f.root.Fd()
		if moved(err) {
			return nil // the next round looks again
		}
		if err != nil {
			return failed("open", path, err)
		}
		at, n = next, c
	}
	return nil
}

// put enters what was read of the name in the directory n, and returns its
// node. The caller holds mu.
func (f *fetch) put(n *node, name string, got facts) *node {
	c := n.child(name)
	if got.gone {
		if c != nil {
			f.t.drop(c)
			n.dir.listed = false
		}
		return nil
	}
	if c == nil {
		n.dir.listed = false // there is one more than was known
		c = &node{name: name}
		f.t.become(c, got.kind)
		f.t.add(n, c)
	}
	f.t.learn(c, got)
	return c
}

// readNamed reads the digests of some entries of the directory path.
func (f *fetch) readNamed(rd *reader, path string, names []string) error {
	var nodes []*node
	ok := f.current(func() {
		dir := f.t.find(path)
		for _, name := range names {
			if dir == nil {
				return
			}
			if c := dir.child(name); c != nil {
				nodes = append(nodes, c)
			}
		}
	})
	if !ok || len(nodes) == 0 {
		return nil
	}
	return f.readAll(rd, path, nodes)
}

// readRoot reads the digest of the root's header.
func (f *fetch) readRoot(rd *reader) error {
	v := visit{header: true}
	if !f.current(func() { v.node = f.t.root }) {
		return nil
	}
	return f.visitDir(rd, v)
}

// readAll reads the digests of entries of one directory, and gives half of
// them away whenever somebody else has nothing to do.
func (f *fetch) readAll(rd *reader, path string, nodes []*node) error {
	fd, err := rd.openDir(f.root, path)
	if moved(err) {
		f.lost(path)
		return nil
	}
	if err != nil {
		return failed("open", path, err)
	}
	defer fsat.Close(fd)
	return f.readIn(rd, fd, path, nodes)
}

// flush is how many results are entered at a time.
const flush = 64

func (f *fetch) readIn(rd *reader, fd int, path string, nodes []*node) error {
	type result struct {
		n *node
		facts
	}
	results := make([]result, 0, min(len(nodes), flush))
	enter := func() {
		f.apply(func() {
			for _, r := range results {
				if r.n.parent != nil && r.n.parent.dir != nil {
					f.put(r.n.parent, r.n.name, r.facts)
				}
			}
		})
		results = results[:0]
	}
	defer func() { enter() }() // what was read is kept whatever happens
	for len(nodes) > 0 {
		hungry, over := f.pool.look()
		if over {
			return nil
		}
		if half := len(nodes) / 2; half > 0 && hungry {
			rest := nodes[half:]
			nodes = nodes[:half]
			f.pool.push(func(rd *reader) error { return f.readAll(rd, path, rest) })
		}
		n := nodes[0]
		nodes = nodes[1:]
		got, err := f.readNode(rd, fd, n)
		if err != nil {
			return failed("hash", joinPath(path, n.name), err)
		}
		if results = append(results, result{n, got}); len(results) == flush {
			enter()
		}
	}
	return nil
}

// readNode reads the digest of n in the directory fd, or finds that the one
// that is known still holds.
func (f *fetch) readNode(rd *reader, fd int, n *node) (facts, error) {
	// n changes only by this worker, or by something that raises rev.
	var known Stat
	var check bool
	var hint kind
	f.current(func() {
		known, hint = n.stat, n.kind
		check = n.has(fDigest) && n.has(fStat) && !n.has(fRacy)
	})
	if check {
		got, err := rd.entry(fd, n.name, hint, false)
		if err != nil || got.gone || (got.kind == hint && got.stat == known) {
			return got, err
		}
		hint = got.kind
	}
	return rd.entry(fd, n.name, hint, true)
}

// lost notes that the directory path is not there as it was known: it and all
// above it have to be looked at again.
func (f *fetch) lost(path string) {
	f.apply(func() {
		n := f.t.find(path)
		if n == nil {
			return
		}
		f.t.oldest = 0
		for p := n; p != nil; p = p.parent {
			p.epoch = 0
			if p.dir != nil {
				p.dir.listed = false
			}
			f.t.touch(p)
		}
	})
}

func joinPath(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// scan reads the names in a directory and below, with digests if asked to.
func (f *fetch) scan(rd *reader, s scan) error {
	v := visit{path: s.path, deep: true, header: s.hash, hash: s.hash, prune: s.prune}
	isDir := false
	f.current(func() {
		v.node = f.t.find(s.path)
		isDir = v.node != nil && v.node.kind == kindDir
	})
	if !isDir {
		return nil
	}
	return f.visitDir(rd, v)
}

// visit is a directory to be read.
type visit struct {
	node *node
	path string
	// header wants the digest of the directory's header, hash those of its
	// entries, deep what is below.
	header, hash, deep bool
	prune              *pruner
}

func (f *fetch) visitDir(rd *reader, v visit) error {
	if len(v.path) > maxPath {
		return failed("open", v.path[:maxName]+"...", unix.ENAMETOOLONG)
	}
	var ready bool
	if !f.current(func() { ready = f.ready(v) }) {
		return nil
	}
	fd := -1
	if !ready {
		var err error
		fd, err = rd.openDir(f.root, v.path)
		if moved(err) {
			f.lost(v.path)
			return nil
		}
		if err != nil {
			return failed("open", v.path, err)
		}
		defer fsat.Close(fd)
		if err := f.readDir(rd, fd, v); err != nil {
			return failed("read", v.path, err)
		}
	}
	if !v.deep {
		return nil
	}
	var files, dirs []*node
	f.current(func() { files, dirs = f.below(v) })
	for _, d := range dirs {
		next := v
		next.node, next.path, next.header = d, joinPath(v.path, d.name), v.hash
		f.pool.push(func(rd *reader) error { return f.visitDir(rd, next) })
	}
	if len(files) == 0 {
		return nil
	}
	if fd < 0 {
		return f.readAll(rd, v.path, files)
	}
	return f.readIn(rd, fd, v.path, files)
}

// ready says that the facts of the directory itself hold.
func (f *fetch) ready(v visit) bool {
	n := v.node
	return n.dir != nil && f.t.trusts(n) && (n.dir.listed || !v.deep) && (n.has(fDigest) || !v.header)
}

// below finds the entries that have to be read and the directories to visit.
func (f *fetch) below(v visit) (files, dirs []*node) {
	if v.node.dir == nil {
		return nil, nil
	}
	for _, c := range v.node.dir.children {
		switch {
		case c.kind == kindDir:
			done := v.hash && c.dir.hasSum && c.dir.sumEpoch >= f.t.trusted
			if !done && !v.prune.skips(c) {
				dirs = append(dirs, c)
			}
		case c.kind == kindUnknown, v.hash && !(c.has(fDigest) && f.t.trusts(c)):
			files = append(files, c)
		}
	}
	return files, dirs
}

// readDir reads what is wanted of an open directory itself, or finds that what
// is known holds.
func (f *fetch) readDir(rd *reader, fd int, v visit) error {
	for range attempts {
		started := rd.now()
		var st, after unix.Stat_t
		rd.stats.Stats++
		if err := rd.fstat(fd, &st); err != nil {
			return err
		}
		got := factsOf(&st, started)
		if f.holds(v, got) {
			return nil
		}
		head := rd.header(&st)
		var err error
		if head.xattrs, err = rd.xattrs(fd, "", rd.attrs); err != nil {
			return err
		}
		rd.head = head.appendTo(rd.head[:0])
		digest := sum256(rd.head)
		got.digest = &digest
		var names []dirent
		if v.deep {
			rd.stats.DirsListed++
			if names, err = rd.list(fd, rd.buf); err != nil {
				return err
			}
			slices.SortFunc(names, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
		}
		if err := rd.fstat(fd, &after); err != nil {
			return err
		}
		if !same(&st, &after) {
			continue
		}
		f.apply(func() {
			f.t.learn(v.node, got)
			if v.deep {
				f.t.setNames(v.node, names)
			}
		})
		return nil
	}
	return ErrChanged
}

// holds says that a look showed what is known of a directory to hold and to be
// enough, and notes it.
func (f *fetch) holds(v visit, got facts) (ok bool) {
	f.apply(func() {
		n := v.node
		if n.dir == nil || !n.has(fStat) || n.has(fRacy) || n.stat != got.stat {
			return
		}
		n.epoch = f.t.epoch
		ok = f.ready(v)
	})
	return ok
}

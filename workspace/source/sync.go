package source

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// Result says what a sync did.
type Result struct {
	// Changed counts the entries that were made, written again, or whose
	// attributes were set again. A directory whose time alone was set back,
	// because something was built in it, does not count.
	Changed int
	// Removed counts the entries that the source had before and has no more.
	Removed int
	// Bytes is the content copied.
	Bytes int64
	// Notes lists what could not be kept as it is in the source among what
	// this sync touched, and what the scan left out.
	Notes []Note
	// Tree is what the workspace holds of the source now, to be kept beside
	// the workspace and given to the next Scan and SyncTo as prev. After an
	// error it names all that may have been left behind, and must be kept too,
	// or what the source drops until then would stay for ever.
	Tree *Tree
}

// SyncTo makes the directory dst hold what the tree names, copied from the
// directory src that was scanned, and removes from it what prev names and the
// tree does not. prev is what the last sync into dst returned; without it,
// what is in dst and not in the tree counts as built there and stays.
//
// After it the entries of the tree are in dst with content, mode, modification
// time, links and extended attributes as scanned, and with their owners when
// root does it. The access rights of the user decide: what cannot be kept (a
// device that an ordinary user may not make, an attribute that the file system
// does not know) is in Notes. Files are replaced, never written in place, so
// hard links that a command made of them keep their old content.
//
// A source that is not as scanned any more is a ChangedError; a full disk is
// ResourceExhausted with ENOSPC in its chain. After an error the sync can be
// repeated; see Result.Tree.
func (t *Tree) SyncTo(ctx context.Context, src, dst string, prev *Tree, p Progress) (Result, error) {
	from, err := openSource(src)
	if err != nil {
		return Result{}, err
	}
	defer fsat.Close(from.Fd())
	to, err := fsat.OpenRoot(dst)
	if err != nil {
		return Result{}, fsat.Error("open workspace", dst, err)
	}
	defer fsat.Close(to.Fd())
	if same, err := sameDir(from.Fd(), to.Fd()); err != nil {
		return Result{}, fsat.Error("stat workspace", dst, err)
	} else if same {
		return Result{}, fsat.Refuse(errdefs.ErrInvalidArgument, dst, "the workspace is the source directory itself")
	}
	if prev == nil {
		prev = emptyTree()
	}
	s := &syncer{
		t: t, prev: prev, src: from, dst: to, asRoot: unix.Geteuid() == 0,
		out:     slices.Clone(t.nodes),
		act:     make([]action, len(t.nodes)),
		seen:    make([]seen, len(t.nodes)),
		touched: make([]atomic.Bool, len(t.nodes)),
		gone:    make([]bool, len(prev.nodes)),
		meter:   meter{tell: p},
	}
	s.pair()
	err = s.run(ctx)
	return s.result(err), err
}

func sameDir(a, b int) (bool, error) {
	var sa, sb unix.Stat_t
	if err := errors.Join(unix.Fstat(a, &sa), unix.Fstat(b, &sb)); err != nil {
		return false, err
	}
	return sa.Dev == sb.Dev && sa.Ino == sb.Ino, nil
}

// Intent names everything that a SyncTo with the same prev may leave behind if
// it is cut off half way. A caller that wants no stray file after a kill keeps
// it beside the workspace before SyncTo, and what SyncTo returned after it. It
// serves as prev like any other tree and describes no source.
func (t *Tree) Intent(prev *Tree) *Tree {
	if prev == nil {
		return t
	}
	s := &syncer{t: t, prev: prev, out: t.nodes, gone: make([]bool, len(prev.nodes))}
	s.pair()
	return s.union(t.started, prev.synced)
}

// action is what has to be done about an entry.
type action uint8

const (
	keep   action = iota // it is as it should be
	verify               // looks right, but only its content can tell
	attrs                // the content is right, the attributes are not
	create               // it is not there, or is another thing
)

// seen is what lstat said about an entry's place in the workspace.
type seen struct {
	node  node // the parts that stat tells
	nlink uint64
	there bool
}

// syncer is one sync. Work on an entry touches only that entry's slots.
type syncer struct {
	// fixed
	t, prev  *Tree
	src, dst *fsat.Root
	asRoot   bool
	match    []int32 // per node: prev's node of that path, or -1
	back     []int32 // per node of prev: the tree's node of that path, or -1

	// by entry
	out     []node // the tree's nodes with their copies, as they get done
	act     []action
	seen    []seen
	touched []atomic.Bool // directories whose times or modes were disturbed
	gone    []bool        // entries of prev that were removed

	copier fsat.Copier
	meter  meter
	bytes  atomic.Int64
	count  atomic.Int64

	mu       sync.Mutex
	notes    []Note
	topMode  uint32 // the mode to give back to the workspace itself
	topFixed bool
}

// pair finds the entries of the same path in both trees.
func (s *syncer) pair() {
	s.match, s.back = fill(len(s.t.nodes)), fill(len(s.prev.nodes))
	s.pairIn(-1, -1)
	for i, p := range s.match {
		if p >= 0 {
			s.pairIn(int32(i), p)
		}
	}
}

func (s *syncer) pairIn(d, p int32) {
	before := s.prev.children(p)
	if len(before) == 0 {
		return
	}
	for _, k := range s.t.children(d) {
		name := s.t.nodes[k].name
		for len(before) > 0 && s.prev.nodes[before[0]].name < name {
			before = before[1:]
		}
		if len(before) > 0 && s.prev.nodes[before[0]].name == name {
			s.match[k], s.back[before[0]] = before[0], k
		}
	}
}

func fill(n int) []int32 {
	list := make([]int32, n)
	for i := range list {
		list[i] = -1
	}
	return list
}

// run does the sync step by step. Each step leaves the workspace in a state
// that the next sync can start from.
func (s *syncer) run(ctx context.Context) (err error) {
	defer func() {
		if s.topFixed {
			if cerr := unix.Fchmod(s.dst.Fd(), s.topMode); cerr != nil && err == nil {
				err = fsat.Error("set mode of workspace", "", cerr)
			}
		}
	}()
	steps := []func(context.Context) error{
		s.check, s.verifyContents, s.checkLinks,
		s.removeDropped, s.makeDirs, s.makeFiles, s.makeLinks, s.finishDirs,
	}
	for _, step := range steps {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (s *syncer) result(err error) Result {
	r := Result{Changed: int(s.count.Load()), Bytes: s.bytes.Load()}
	for _, gone := range s.gone {
		if gone {
			r.Removed++
		}
	}
	r.Notes = append(slices.Clone(s.t.notes), s.notes...)
	slices.SortStableFunc(r.Notes, func(a, b Note) int { return strings.Compare(a.Path, b.Path) })
	now := time.Now
	if s.t.now != nil {
		now = s.t.now
	}
	synced := stampOf(now())
	if err != nil {
		// Copies that are certain from before stay judged by their own sync.
		if s.prev.synced.before(synced) {
			synced = s.prev.synced
		}
		r.Tree = s.union(s.t.started, synced)
		return r
	}
	r.Tree = s.finished(s.out, s.t.started, synced)
	return r
}

func (s *syncer) finished(nodes []node, started, synced stamp) *Tree {
	t := &Tree{nodes: nodes, notes: s.t.notes, root: s.t.root, started: started, synced: synced, now: s.t.now}
	t.index()
	return t
}

// union is the tree that names what the tree names, and what prev names that
// was not removed.
func (s *syncer) union(started, synced stamp) *Tree {
	if s.prev.started.before(started) && len(s.prev.nodes) > 0 {
		started = s.prev.started
	}
	u := unioner{
		syncer: s,
		nodes:  make([]node, 0, len(s.out)),
		fromT:  fill(len(s.t.nodes)), fromPrev: fill(len(s.prev.nodes)),
	}
	u.dir(-1, -1, -1)
	return s.finished(u.nodes, started, synced)
}

// unioner puts two trees together in path order.
type unioner struct {
	*syncer
	nodes           []node
	fromT, fromPrev []int32 // where their nodes went
}

// none is a directory that a tree does not have.
const none = -2

// dir adds what the directories d of the tree and p of prev hold, below the
// new node at.
func (u *unioner) dir(d, p, at int32) {
	var now, before []int32
	if d != none {
		now = u.t.children(d)
	}
	if p != none {
		before = u.prev.children(p)
	}
	for len(now) > 0 || len(before) > 0 {
		switch {
		case len(now) == 0 || len(before) > 0 && u.prev.nodes[before[0]].name < u.t.nodes[now[0]].name:
			b := before[0]
			before = before[1:]
			if u.gone[b] {
				continue
			}
			i := u.add(u.prev.nodes[b], at, u.fromPrev, b)
			u.dir(none, b, i)
		default:
			n := now[0]
			now = now[1:]
			b := int32(none)
			if len(before) > 0 && u.prev.nodes[before[0]].name == u.t.nodes[n].name {
				b = before[0]
				before = before[1:]
			}
			i := u.add(u.out[n], at, u.fromT, n)
			if u.out[n].typ != Dir {
				continue // what prev had below has to go for it anyway
			}
			u.dir(n, b, i)
		}
	}
}

// add appends a node that was node i of a tree whose nodes went where moved
// says.
func (u *unioner) add(n node, at int32, moved []int32, i int32) int32 {
	to := int32(len(u.nodes))
	moved[i] = to
	n.parent = at
	if n.link = moved[n.link]; n.link < 0 {
		n.link = to // its first name is gone
	}
	u.nodes = append(u.nodes, n)
	return to
}

package snapshot_test

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/continuity/sysx"
	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/snapshot"
)

// msnap is a committed snapshot of a random case.
type msnap struct {
	name string
	tree mtree
	list []*mpart
}

// mpart is one layer of a list.
type mpart struct {
	layer  mlayer
	name   string // of the layer; a clean copy's for raw ones
	raw    string // of what it is to be a copy of
	change snapshot.Change
}

// mworld is a driver in a random case.
type mworld struct {
	*rapid.T
	ctx     context.Context
	d       snapshot.Driver
	stacker snapshot.Stacker // nil for drivers that keep trees
	tears   bool             // hard links are torn by copying up
	// foreign is containerd's snapshotter: a child does not start with its
	// parent's root, and snapshots without a parent are bind mounts, in which
	// attributes with the names of marks become marks.
	foreign bool
	// user is an overlay with user attributes. Special files cannot have such
	// ones, so the kernel counts their links wrongly.
	user   bool
	dir    string // to mount at
	prefix string
	names  []string // committed, in their order
	snaps  []*msnap
	born   int
}

func (w *mworld) no(err error) {
	w.Helper()
	if err != nil {
		w.Fatalf("%v", err)
	}
}

func (w *mworld) name(kind string) string {
	name := fmt.Sprintf("%s-%s%d", w.prefix, kind, len(w.names))
	w.names = append(w.names, name)
	return name
}

// any is a snapshot that there is.
func (w *mworld) any(label string) *msnap {
	return w.snaps[rapid.IntRange(0, len(w.snaps)-1).Draw(w.T, label)]
}

func (w *mworld) mounted(key string, readOnly bool, do func(dir string)) {
	w.Helper()
	w.no(w.d.Mount(w.ctx, key, w.dir, readOnly))
	defer func() { w.no(unix.Unmount(w.dir, 0)) }()
	do(w.dir)
}

func (w *mworld) requireTree(what, key string, want mtree) {
	w.Helper()
	w.mounted(key, true, func(dir string) { w.requireSame(what+", "+key, dir, want) })
}

func (w *mworld) requireSame(what, dir string, want mtree) {
	w.Helper()
	if diff := cmp.Diff(want.list(), w.read(dir).list()); diff != "" {
		w.Fatalf("%s:\n%s", what, diff)
	}
}

// read is what a directory holds.
func (w *mworld) read(dir string) mtree {
	out, inodes := mtree{}, map[uint64]*mfile{}
	w.no(filepath.Walk(dir, func(full string, fi os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, full)
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		if f := inodes[st.Ino]; f != nil {
			out[rel] = f
			return nil
		}
		f := &mfile{mode: st.Mode & 0o7777, uid: int(st.Uid), gid: int(st.Gid), xattr: map[string]string{}}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			f.typ = 'd'
		case unix.S_IFREG:
			data, err := os.ReadFile(full)
			if err != nil {
				return err
			}
			f.typ, f.data = 'f', string(data)
		case unix.S_IFLNK:
			f.typ = 'l'
			f.data, err = os.Readlink(full)
		case unix.S_IFIFO:
			f.typ = 'p'
		case unix.S_IFCHR:
			f.typ, f.data = 'c', fmt.Sprint(st.Rdev)
		}
		if err != nil {
			return err
		}
		names, err := sysx.LListxattr(full)
		if err != nil {
			return err
		}
		for _, name := range names {
			if name == "security.selinux" {
				continue
			}
			value, err := sysx.LGetxattr(full, name)
			if err != nil {
				return err
			}
			f.xattr[name] = string(value)
		}
		out[rel] = f
		if st.Nlink > 1 && f.typ != 'd' {
			inodes[st.Ino] = f
		}
		return nil
	}))
	return out
}

// editor is an active snapshot that is being written, and its model.
type editor struct {
	*mworld
	at   string
	tree mtree
}

// change is the file of a path, about to be changed in the given way.
func (e *editor) change(p string) *mfile {
	f := e.tree[p]
	if f.dir() || e.tears && f.born != e.born {
		c := *f
		if !f.dir() {
			c.born = e.born
		}
		f = &c
		e.tree[p] = f
	}
	f.xattr = maps.Clone(f.xattr)
	if f.xattr == nil {
		f.xattr = map[string]string{}
	}
	return f
}

func (e *editor) full(p string) string { return filepath.Join(e.at, p) }

func (e *editor) remove(p string) {
	if e.tree[p] == nil {
		return // and perhaps a file is where its directory would be
	}
	e.no(os.RemoveAll(e.full(p)))
	e.tree.remove(p)
}

// room makes way for a new file at p: its directories are there, it is not.
func (e *editor) room(p string) {
	if dir := path.Dir(p); dir != "." {
		e.mkdir(dir)
	}
	e.remove(p)
}

func (e *editor) mkdir(p string) {
	if e.tree[p].dir() {
		return
	}
	e.room(p)
	e.no(os.Mkdir(e.full(p), 0o755))
	e.tree[p] = &mfile{typ: 'd', mode: 0o755, born: e.born}
}

// stamp sets the time of a file that was written.
func (e *editor) stamp(p string, f *mfile) {
	f.stamp = int64(rapid.IntRange(1, 2).Draw(e.T, "time"))
	times := []unix.Timespec{{Sec: f.stamp}, {Sec: f.stamp}}
	e.no(unix.UtimesNanoAt(unix.AT_FDCWD, e.full(p), times, unix.AT_SYMLINK_NOFOLLOW))
}

func (e *editor) make(p string, f *mfile) {
	e.room(p)
	switch f.typ {
	case 'f':
		e.no(os.WriteFile(e.full(p), []byte(f.data), 0o644))
	case 'l':
		e.no(os.Symlink(f.data, e.full(p)))
	case 'p':
		e.no(unix.Mkfifo(e.full(p), 0o644))
	case 'c':
		e.no(unix.Mknod(e.full(p), unix.S_IFCHR|0o644, int(unix.Mkdev(1, 3))))
	}
	f.born = e.born
	e.tree[p] = f
	e.stamp(p, f)
}

// capability is one that file systems take for valid: all of version 2.
const capability = "\x01\x00\x00\x02\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// edit makes one random change.
func (e *editor) edit() {
	// Few names, so that they meet in merges.
	draw := func(label string) string {
		return rapid.SampledFrom([]string{
			"a", "a", "b", "a/a", "a/a", "a/b", "a/b", "b/a", "a/a/a", "a/a/b", "b/a/b",
		}).Draw(e.T, label)
	}
	what := rapid.SampledFrom([]string{
		"write", "write", "write", "rewrite", "mkdir", "remove", "remove", "special", "link", "link", "link",
		"rename", "rename", "back", "torn", "torn", "copy back", "anew", "anew", "placed", "placed",
		"mode", "owner", "attribute", "attribute", "root",
	}).Draw(e.T, "what")
	p := draw("path")
	if there := e.tree.below("."); len(there) > 0 && !slices.Contains([]string{"write", "mkdir", "special", "placed"}, what) {
		p = rapid.SampledFrom(there).Draw(e.T, "which")
	}
	f := e.tree[p]
	data := rapid.SampledFrom([]string{"a", "b"}).Draw(e.T, "data")
	switch what {
	case "write":
		e.make(p, &mfile{typ: 'f', mode: 0o644, data: data})
	case "rewrite":
		if f == nil || f.typ != 'f' {
			return
		}
		e.no(os.WriteFile(e.full(p), []byte(data), 0o644))
		f = e.change(p)
		f.data = data
		// The kernel takes it away from what is written.
		delete(f.xattr, "security.capability")
		e.no(e.dropCapability(p))
		e.stamp(p, f)
	case "mkdir":
		e.mkdir(p)
	case "remove":
		e.remove(p)
	case "special":
		special := rapid.SampledFrom([]mfile{
			{typ: 'l', mode: 0o777, data: "a"},
			{typ: 'l', mode: 0o777, data: "b/c"},
			{typ: 'p', mode: 0o644},
			{typ: 'c', mode: 0o644, data: fmt.Sprint(unix.Mkdev(1, 3))},
		}).Draw(e.T, "special")
		e.make(p, &special)
	case "link":
		to := draw("to")
		if f == nil || f.dir() || f.typ == 'l' || e.user && f.typ != 'f' || e.within(to, p) {
			return
		}
		e.room(to)
		e.no(os.Link(e.full(p), e.full(to)))
		e.tree[to] = e.change(p)
	case "rename":
		to := draw("to")
		if f == nil || e.within(to, p) || f.dir() && e.tears && f.born != e.born {
			return // or refused by overlayfs
		}
		e.room(to)
		e.rename(p, to)
	case "back":
		if f == nil || f.dir() {
			return
		}
		e.rename(p, "t")
		e.rename("t", p)
	case "torn":
		// A copy of the same content and time takes its place, which parts it
		// from its links.
		if f == nil || f.typ != 'f' || len(f.xattr) > 0 {
			return
		}
		e.no(os.WriteFile(e.full("t"), []byte(f.data), 0o600))
		e.no(os.Chown(e.full("t"), f.uid, f.gid))
		e.no(os.Chmod(e.full("t"), os.FileMode(f.mode)))
		times := []unix.Timespec{{Sec: f.stamp}, {Sec: f.stamp}}
		e.no(unix.UtimesNanoAt(unix.AT_FDCWD, e.full("t"), times, 0))
		e.no(os.Rename(e.full("t"), e.full(p)))
		c := *f
		c.born = e.born
		e.tree[p] = &c
	case "copy back":
		if !f.dir() {
			return
		}
		e.no(snapshot.CopyTree(e.ctx, e.full("t"), e.full(p)))
		e.no(os.RemoveAll(e.full(p)))
		e.no(os.Rename(e.full("t"), e.full(p)))
		part := mtree{p: f}
		for _, q := range e.tree.below(p) {
			part[q] = e.tree[q]
		}
		for q, f := range part.clone() {
			f.born = e.born
			e.tree[q] = f
		}
	case "placed":
		// As npm, pip, cargo and git do it.
		e.mkdir("t")
		e.make("t/"+data, &mfile{typ: 'f', mode: 0o644, data: data})
		e.room(p)
		e.rename("t", p)
	case "anew":
		if f.dir() {
			e.remove(p)
			e.mkdir(p)
		}
	case "mode":
		if f == nil || f.typ == 'l' {
			return
		}
		mode := rapid.SampledFrom([]uint32{0o600, 0o644, 0o755}).Draw(e.T, "mode")
		e.no(os.Chmod(e.full(p), os.FileMode(mode)))
		e.change(p).mode = mode
	case "owner":
		if f == nil {
			return
		}
		id := rapid.IntRange(0, 1).Draw(e.T, "owner")
		e.no(os.Lchown(e.full(p), id, id))
		f = e.change(p)
		f.uid, f.gid = id, id
		delete(f.xattr, "security.capability")
		if f.typ == 'f' {
			e.no(e.dropCapability(p))
		}
	case "attribute":
		e.attribute(p, f)
	case "root":
		if e.foreign {
			return
		}
		mode := rapid.SampledFrom([]uint32{0o711, 0o755}).Draw(e.T, "mode")
		e.no(os.Chmod(e.at, os.FileMode(mode)))
		e.change(".").mode = mode
	}
}

// within says whether one path is, or lies in, the other.
func (e *editor) within(p, q string) bool {
	return p == q || strings.HasPrefix(p, q+"/") || strings.HasPrefix(q, p+"/")
}

func (e *editor) rename(p, to string) {
	e.no(os.Rename(e.full(p), e.full(to)))
	if !e.tree[p].dir() {
		e.change(p)
	}
	for _, q := range append(e.tree.below(p), p) {
		e.tree[to+strings.TrimPrefix(q, p)] = e.tree[q]
		delete(e.tree, q)
	}
}

// dropCapability is for file systems that leave it where the model does not.
func (e *editor) dropCapability(p string) error {
	err := unix.Lremovexattr(e.full(p), "security.capability")
	if err == unix.ENODATA {
		return nil
	}
	return err
}

// attribute sets or removes an extended attribute; some look like overlayfs's.
func (e *editor) attribute(p string, f *mfile) {
	if f == nil || f.typ != 'd' && f.typ != 'f' {
		return
	}
	name := rapid.SampledFrom([]string{
		"user.a", "trusted.a", "user.overlay.opaque", "trusted.overlay.opaque", "trusted.overlay.redirect", "security.capability",
	}).Draw(e.T, "name")
	if name == "security.capability" && f.dir() || e.foreign && strings.HasPrefix(name, "trusted.overlay.") {
		return
	}
	if _, ok := f.xattr[name]; ok {
		e.no(unix.Lremovexattr(e.full(p), name))
		delete(e.change(p).xattr, name)
		return
	}
	value := "y"
	if name == "security.capability" {
		value = capability
	}
	e.no(unix.Lsetxattr(e.full(p), name, []byte(value), 0))
	e.change(p).xattr[name] = value
}

// child makes a snapshot by editing a child of parent, nil for none.
func (w *mworld) child(parent *msnap) *msnap {
	w.born++
	base, under := emptyTree(), ""
	s := &msnap{name: w.name("s")}
	if parent != nil {
		base, under = parent.tree, parent.name
		s.list = append(s.list, parent.list...)
	}
	key := s.name + "-w"
	_, err := w.d.Prepare(w.ctx, key, under)
	w.no(err)
	e := &editor{mworld: w, tree: maps.Clone(base)}
	if !w.tears {
		e.tree = base.clone()
	}
	w.mounted(key, false, func(dir string) {
		e.at = dir
		for range rapid.IntRange(0, 8).Draw(w.T, "edits") {
			e.edit()
		}
		w.requireSame("as edited, "+key, dir, e.tree)
	})
	part := &mpart{name: s.name, change: snapshot.Change{Lower: under, Upper: s.name}}
	s.tree = e.tree
	if w.stacker == nil {
		part.layer = stateLayer(base, e.tree)
	} else {
		part.layer = historyLayer(base, e.tree, w.born)
		if rapid.IntRange(0, 3).Draw(w.T, "raw") == 0 {
			part.name, part.raw = "", s.name
		} else {
			_, err := w.stacker.Clean(w.ctx, key)
			w.no(err)
			s.tree = base.applied(part.layer)
		}
	}
	w.no(w.d.Commit(w.ctx, s.name, key))
	s.list = append(s.list, part)
	return s
}

// made makes the snapshot that a list of layers stands for.
func (w *mworld) made(kind string, list []*mpart) *msnap {
	s := &msnap{tree: emptyTree(), list: snapshot.Flatten(list)}
	var names []string
	var changes []snapshot.Change
	for _, p := range s.list {
		if w.stacker != nil && p.name == "" {
			p.name = w.name("copy")
			w.no(w.stacker.CleanCopy(w.ctx, p.name, p.raw))
		}
		names, changes = append(names, p.name), append(changes, p.change)
		s.tree = s.tree.applied(p.layer)
	}
	s.name = w.name(kind)
	if w.stacker != nil && rapid.IntRange(0, 4).Draw(w.T, "applied") > 0 {
		w.no(w.stacker.Stack(w.ctx, s.name, names))
		return s
	}
	key := s.name + "-w"
	_, err := w.d.Prepare(w.ctx, key, "")
	w.no(err)
	if w.stacker != nil {
		for i, name := range names {
			changes[i] = snapshot.Change{Upper: name, Lower: w.below(name)}
		}
	}
	w.no(snapshot.Apply(w.ctx, w.d, key, changes))
	w.no(w.d.Commit(w.ctx, s.name, key, snapshot.WithExactLayer))
	return s
}

// below is the parent of a layer.
func (w *mworld) below(name string) string {
	info, err := w.d.Stat(w.ctx, name)
	w.no(err)
	return info.Parent
}

func (w *mworld) merge() *msnap {
	var list []*mpart
	for range rapid.IntRange(1, 3).Draw(w.T, "inputs") {
		list = append(list, w.any("input").list...)
	}
	return w.made("m", list)
}

func (w *mworld) diff() *msnap {
	lower := w.any("lower")
	upper := w.any("upper")
	if rest, ok := snapshot.Remainder(lower.list, upper.list); ok {
		return w.made("d", rest)
	}
	part := &mpart{layer: stateLayer(lower.tree, upper.tree), change: snapshot.Change{Lower: lower.name, Upper: upper.name}}
	if w.stacker == nil {
		return w.made("d", []*mpart{part})
	}
	s := &msnap{name: w.name("d"), tree: emptyTree().applied(part.layer), list: []*mpart{part}}
	part.name = s.name
	w.no(w.stacker.Diff(w.ctx, s.name, lower.name, upper.name))
	return s
}

// run is one random history.
func (w *mworld) run() {
	n := rapid.IntRange(4, 6).Draw(w.T, "snapshots")
	for i := range n {
		var s *msnap
		what := "child"
		switch {
		case i == n-2:
			what = "diff"
		case i == n-1:
			what = "merge"
		case i >= 2:
			what = rapid.SampledFrom([]string{"child", "merge", "diff"}).Draw(w.T, "next")
		}
		switch what {
		case "child":
			var parent *msnap
			if len(w.snaps) > 0 && rapid.IntRange(0, 3).Draw(w.T, "parent?") > 0 {
				parent = w.any("parent")
			}
			s = w.child(parent)
		case "merge":
			s = w.merge()
		case "diff":
			s = w.diff()
		}
		w.requireTree(what, s.name, s.tree)
		w.snaps = append(w.snaps, s)
	}
	for range 2 {
		s := w.any("again")
		w.requireTree("at the end", s.name, s.tree)
	}
}

// clear removes everything, children first.
func (w *mworld) clear() error {
	for _, name := range slices.Backward(w.names) {
		for _, key := range []string{name, name + "-w"} {
			if _, err := w.d.Stat(w.ctx, key); err == nil {
				if err := w.d.Remove(w.ctx, key); err != nil {
					return err
				}
			}
		}
	}
	return w.d.Cleanup(w.ctx)
}

// Random snapshots, merges and differences of them show what the naive model
// says, on each driver: names, types, modes, owners, attributes, hard links,
// contents; and at the end of a case nothing that was there before has
// changed. The number of cases is that of the flag rapid.checks, if it is
// given.
func TestRandomMergesAndDiffs(t *testing.T) {
	needRoot(t)
	checks := 500 // for each of four
	switch {
	case os.Getenv("LAMINA_TEST_FULL") != "":
		checks = 5_000
	case testing.Short():
		checks = 50
	}
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		require.NoError(t, f.Value.Set(strconv.Itoa(checks)))
		defer func() { require.NoError(t, f.Value.Set(f.DefValue)) }()
	}
	user := func(t *testing.T, root string) snapshot.Driver {
		d, err := snapshot.Open(t.Context(), root, snapshot.Options{Driver: snapshot.Overlay, Attributes: snapshot.User})
		require.NoError(t, err)
		return d
	}
	t.Run("drivers", func(t *testing.T) {
		for name, open := range map[string]func(t *testing.T, root string) snapshot.Driver{
			"overlay": opener(snapshot.Overlay), "user": user, "native": opener(snapshot.Native), "containerd": containerds,
		} {
			// Side by side, as mounting and unmounting is mostly waiting.
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				randomMerges(t, open, mworld{tears: name != "native", foreign: name == "containerd", user: name == "user"})
			})
		}
	})
}

// randomMerges runs random cases on a driver, one after the other.
func randomMerges(t *testing.T, open func(t *testing.T, root string) snapshot.Driver, as mworld) {
	as.d = open(t, scratch(t))
	defer func() { require.NoError(t, as.d.Close()) }()
	as.stacker, _ = as.d.Stacker()
	as.ctx, as.dir = t.Context(), t.TempDir()
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		w := as
		w.T, w.prefix = rt, strconv.Itoa(n)
		defer func() {
			if err := w.clear(); err != nil {
				t.Error(err)
			}
		}()
		w.run()
	})
}

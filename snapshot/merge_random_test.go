package snapshot_test

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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

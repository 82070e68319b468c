package snapshot_test

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// This is the naive model that merges and differences are compared with: trees
// as maps, layers as the entries of a tar, applied one after the other.

// mfile is a file or directory. Names of one file share it.
type mfile struct {
	typ      byte // d, f, l (symbolic link), p (fifo), c (device)
	mode     uint32
	uid, gid int
	xattr    map[string]string
	data     string
	stamp    int64 // its time
	born     int   // the active snapshot that made it, or copied it up
}

func (f *mfile) dir() bool { return f != nil && f.typ == 'd' }

// like says whether two are the same but for the times of directories.
func (f *mfile) like(g *mfile) bool {
	return f.typ == g.typ && f.mode == g.mode && f.uid == g.uid && f.gid == g.gid &&
		maps.Equal(f.xattr, g.xattr) && f.data == g.data && (f.dir() || f.stamp == g.stamp)
}

// mtree is a tree by paths; "." is its root.
type mtree map[string]*mfile

func emptyTree() mtree { return mtree{".": {typ: 'd', mode: 0o755}} }

func (t mtree) below(dir string) []string {
	var out []string
	for p := range t {
		if p != "." && (dir == "." || strings.HasPrefix(p, dir+"/")) {
			out = append(out, p)
		}
	}
	slices.Sort(out)
	return out
}

func (t mtree) remove(p string) {
	for _, q := range t.below(p) {
		delete(t, q)
	}
	delete(t, p)
}

// linked are the names that share the file at p.
func (t mtree) linked(p string) (out []string) {
	for q, f := range t {
		if f == t[p] {
			out = append(out, q)
		}
	}
	slices.Sort(out)
	return out
}

// clone copies the files, too, with their links.
func (t mtree) clone() mtree {
	out, copies := mtree{}, map[*mfile]*mfile{}
	for p, f := range t {
		if copies[f] == nil {
			c := *f
			copies[f] = &c
		}
		out[p] = copies[f]
	}
	return out
}

// list is the tree for comparison.
func (t mtree) list() map[string]string {
	out := map[string]string{}
	for p, f := range t {
		links := ""
		if all := t.linked(p); len(all) > 1 {
			links = strings.Join(all, " ")
		}
		out[p] = describe(f, links)
	}
	return out
}

func describe(f *mfile, links string) string {
	var attrs []string
	for k, v := range f.xattr {
		attrs = append(attrs, fmt.Sprintf("%s=%x", k, v))
	}
	slices.Sort(attrs)
	return fmt.Sprintf("%c %o %d:%d %v %q [%s]", f.typ, f.mode, f.uid, f.gid, attrs, f.data, links)
}

// mentry is an entry of a layer's tar.
type mentry struct {
	gone, opaque bool
	file         *mfile
}

type mlayer map[string]mentry

// own gives a layer files of its own, as no link leads from one tar to another.
func (l mlayer) own() mlayer {
	t := mtree{}
	for p, e := range l {
		if !e.gone {
			t[p] = e.file
		}
	}
	t = t.clone()
	for p, e := range l {
		e.file = t[p]
		l[p] = e
	}
	return l
}

// applied is the tree after a layer.
func (t mtree) applied(l mlayer) mtree {
	t = maps.Clone(t)
	for _, p := range slices.Sorted(maps.Keys(l)) {
		e := l[p]
		switch {
		case e.gone:
			t.remove(p)
			continue
		case !e.file.dir() || !t[p].dir():
			t.remove(p)
		case e.opaque:
			for _, q := range t.below(p) {
				delete(t, q)
			}
		}
		t[p] = e.file
	}
	return t
}

// names are those directly in dir of either tree.
func names2(dir string, trees ...mtree) []string {
	set := map[string]bool{}
	for _, t := range trees {
		for p := range t {
			if p != "." && path.Dir(p) == dir {
				set[p] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(set))
}

// stateLayer is the difference of two trees, with no history.
func stateLayer(lower, upper mtree) mlayer {
	l := mlayer{".": {file: upper["."]}}
	same := func(p string) bool {
		was, is := lower[p], upper[p]
		return was != nil && is != nil && !is.dir() && was.like(is)
	}
	var dir func(at string, lower mtree) bool
	dir = func(at string, low mtree) (any bool) {
		for _, p := range names2(at, low, upper) {
			was, is := low[p], upper[p]
			switch {
			case is == nil:
				l[p] = mentry{gone: true}
			case is.dir() && was.dir():
				if !dir(p, low) && was.like(is) {
					continue
				}
				l[p] = mentry{file: is}
			case is.dir():
				l[p] = mentry{file: is}
				dir(p, mtree{})
			case was != nil && same(p):
				still := slices.DeleteFunc(lower.linked(p), func(q string) bool { return !same(q) })
				if slices.Equal(upper.linked(p), still) {
					continue
				}
				fallthrough
			default:
				l[p] = mentry{file: is}
			}
			any = true
		}
		return any
	}
	dir(".", lower)
	return l.own()
}

// historyLayer is what overlayfs keeps of an active snapshot: what was made or
// copied up in it, without what says nothing.
func historyLayer(lower, upper mtree, born int) mlayer {
	l := mlayer{".": {file: upper["."]}}
	alone := func(p string) bool { return len(upper.linked(p)) == 1 }
	back := func(dir string) bool {
		if !slices.Equal(lower.below(dir), upper.below(dir)) {
			return false
		}
		for _, p := range upper.below(dir) {
			if !lower[p].like(upper[p]) || !upper[p].dir() && !alone(p) {
				return false
			}
		}
		return true
	}
	var dir func(at string, low mtree) bool
	dir = func(at string, low mtree) (any bool) {
		for _, p := range names2(at, low, upper) {
			was, is := low[p], upper[p]
			switch {
			case is == nil:
				l[p] = mentry{gone: true}
			case is.dir() && was.dir() && (is.born != born || back(p)):
				if !dir(p, low) && was.like(is) {
					continue
				}
				l[p] = mentry{file: is}
			case is.dir():
				l[p] = mentry{file: is, opaque: was.dir()}
				dir(p, mtree{})
			case was == is, was != nil && was.like(is) && alone(p):
				continue
			default:
				l[p] = mentry{file: is}
			}
			any = true
		}
		return any
	}
	dir(".", lower)
	return l.own()
}

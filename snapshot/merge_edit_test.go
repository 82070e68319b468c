package snapshot_test

import (
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/snapshot"
)

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

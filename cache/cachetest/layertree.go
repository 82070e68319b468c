package cachetest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The model of layers: trees are maps, a layer is what its tar says, and a tree is
// what its layers give when they are applied one after the other.

// node is a file, directory or symbolic link. Names of one file share it.
type node struct {
	kind       byte // d, f, l; o is the mark of an opaque directory in a layer
	mode       uint32
	owner      int    // and group, which is one more
	text       string // content, or target
	xattr      string // of user.k, of files and directories
	capability bool   // files only
	stamp      int64  // the modification time, of directories none
}

// opaqueName in a directory of a layer hides what lies below.
const opaqueName = ".wh..wh..opq"

// netRaw is a capability as files have it.
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func (n *node) like(o *node) bool { return n != nil && o != nil && *n == *o }

// ltree is a tree by paths without its root.
type ltree map[string]*node

func (t ltree) remove(p string) {
	delete(t, p)
	for q := range t {
		if strings.HasPrefix(q, p+"/") {
			delete(t, q)
		}
	}
}

// names counts the names of a file.
func (t ltree) names(n *node) (count int) {
	for _, o := range t {
		if o == n {
			count++
		}
	}
	return count
}

// list describes the tree for comparison, with the names of each file.
func (t ltree) list() map[string]string {
	names := map[*node][]string{}
	for _, p := range slices.Sorted(maps.Keys(t)) {
		names[t[p]] = append(names[t[p]], p)
	}
	out := map[string]string{}
	for p, n := range t {
		out[p] = n.describe(names[n])
	}
	return out
}

func (n *node) describe(names []string) string {
	if len(names) < 2 {
		names = nil
	}
	return fmt.Sprintf("%c %o %d %q %q %t %d %q", n.kind, n.mode, n.owner, n.text, n.xattr, n.capability, n.stamp, names)
}

// llayer is what a tar holds: nil stands for a whiteout.
type llayer map[string]*node

// change is the layer that makes a tree of another one: what differs, and the
// directories above it.
func change(from, to ltree) llayer {
	l := llayer{}
	for p, n := range to {
		if !n.like(from[p]) {
			l.enter(to, p)
		}
	}
	for p := range from {
		above := to[path.Dir(p)]
		if to[p] == nil && (path.Dir(p) == "." || above != nil && above.kind == 'd' && from[path.Dir(p)].kind == 'd') {
			l[p] = nil
			l.enter(to, path.Dir(p))
		}
	}
	return l
}

// enter adds an entry of a tree, and the directories above it.
func (l llayer) enter(t ltree, p string) {
	for ; p != "."; p = path.Dir(p) {
		l[p] = t[p]
	}
}

// over applies the layer to a tree. Its files are its own.
func (l llayer) over(t ltree) ltree {
	out, own := maps.Clone(t), map[*node]*node{}
	if out == nil {
		out = ltree{}
	}
	paths := slices.Sorted(maps.Keys(l))
	for _, p := range paths {
		switch n := l[p]; {
		case n == nil:
			out.remove(p)
		case n.kind == 'o':
			for q := range out {
				if strings.HasPrefix(q, path.Dir(p)+"/") {
					delete(out, q)
				}
			}
		}
	}
	for _, p := range paths {
		n := l[p]
		if n == nil || n.kind == 'o' {
			continue
		}
		if was := out[p]; was == nil || was.kind != 'd' || n.kind != 'd' {
			out.remove(p)
		}
		if own[n] == nil {
			c := *n
			own[n] = &c
		}
		out[p] = own[n]
	}
	return out
}

// stacked is the tree of layers, bottom first.
func stacked(layers []*llayer) ltree {
	t := ltree{}
	for _, l := range layers {
		t = l.over(t)
	}
	return t
}

// tar writes the layer.
func (l llayer) tar() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	first := map[*node]string{}
	for _, p := range slices.Sorted(maps.Keys(l)) {
		n := l[p]
		h := &tar.Header{Name: p, Format: tar.FormatPAX, ModTime: time.Unix(0, 0)}
		switch {
		case n == nil:
			h.Name, h.Typeflag = path.Join(path.Dir(p), ".wh."+path.Base(p)), tar.TypeReg
		case n.kind == 'o':
			h.Typeflag = tar.TypeReg
		case first[n] != "":
			h.Typeflag, h.Linkname = tar.TypeLink, first[n]
		default:
			h.Mode, h.ModTime = int64(n.mode), time.Unix(n.stamp, 0)
			h.Uid, h.Gid, h.PAXRecords = n.owner, n.owner+1, map[string]string{}
			if n.xattr != "" {
				h.PAXRecords["SCHILY.xattr.user.k"] = n.xattr
			}
			if n.capability {
				h.PAXRecords["SCHILY.xattr.security.capability"] = netRaw
			}
			switch n.kind {
			case 'd':
				h.Typeflag = tar.TypeDir
			case 'l':
				h.Typeflag, h.Linkname = tar.TypeSymlink, n.text
			default:
				h.Typeflag, h.Size = tar.TypeReg, int64(len(n.text))
				first[n] = p
			}
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if h.Size > 0 {
			if _, err := w.Write([]byte(n.text)); err != nil {
				return nil, err
			}
		}
	}
	err := w.Close()
	return b.Bytes(), err
}

// make makes a file below dir, where there is nothing by that name.
func (n *node) make(dir, p string) error {
	at := filepath.Join(dir, p)
	var err error
	switch n.kind {
	case 'd':
		err = os.Mkdir(at, 0o700)
	case 'l':
		err = os.Symlink(n.text, at)
	default:
		err = os.WriteFile(at, []byte(n.text), 0o600)
	}
	if err != nil {
		return err
	}
	return n.set(at)
}

// set gives a file that is there its attributes. A new owner takes set-id bits
// and capabilities away, so that comes first.
func (n *node) set(at string) error {
	err := unix.Lchown(at, n.owner, n.owner+1)
	if err == nil && n.kind != 'l' {
		err = unix.Chmod(at, n.mode)
	}
	if err == nil && n.xattr != "" {
		err = unix.Setxattr(at, "user.k", []byte(n.xattr), 0)
	}
	switch {
	case err == nil && n.capability:
		err = unix.Setxattr(at, "security.capability", []byte(netRaw), 0)
	case err == nil && n.kind == 'f':
		// Not every file system takes it away with a new owner.
		if err = unix.Removexattr(at, "security.capability"); err == unix.ENODATA {
			err = nil
		}
	}
	if err != nil || n.kind == 'd' {
		return err
	}
	when := unix.Timespec{Sec: n.stamp}
	return unix.UtimesNanoAt(unix.AT_FDCWD, at, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW)
}

// readLayers reads what lies below dir.
func readLayers(dir string) (map[string]string, error) {
	t, inodes := ltree{}, map[uint64]*node{}
	err := filepath.WalkDir(dir, func(at string, d fs.DirEntry, err error) error {
		if err != nil || at == dir {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(at, &st); err != nil {
			return err
		}
		p, err := filepath.Rel(dir, at)
		if err != nil {
			return err
		}
		n := &node{mode: st.Mode & 0o7777, owner: int(st.Uid), stamp: st.Mtim.Sec}
		if st.Gid != st.Uid+1 {
			return fmt.Errorf("%s has owner %d:%d", p, st.Uid, st.Gid)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			n.kind, n.stamp = 'd', 0
			n.readXattrs(at)
		case unix.S_IFLNK:
			n.kind = 'l'
			n.text, err = os.Readlink(at)
		case unix.S_IFREG:
			if was := inodes[st.Ino]; was != nil {
				n = was
				break
			}
			n.kind, inodes[st.Ino] = 'f', n
			n.readXattrs(at)
			var data []byte
			data, err = os.ReadFile(at)
			n.text = string(data)
		default:
			return fmt.Errorf("%s has type %o", p, st.Mode&unix.S_IFMT)
		}
		t[p] = n
		return err
	})
	return t.list(), err
}

func (n *node) readXattrs(at string) {
	var value [64]byte
	if size, err := unix.Lgetxattr(at, "user.k", value[:]); err == nil {
		n.xattr = string(value[:size])
	}
	size, err := unix.Lgetxattr(at, "security.capability", value[:])
	n.capability = err == nil && string(value[:size]) == netRaw
}

package source

import (
	"io/fs"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/internal/fsat"
)

// Digest is the digest that contenthash gives to the list of all entries, with
// their owners as 0:0:
//
//	Checksum(ctx, contenthash.Dir(dir), "/", contenthash.Options{
//		IncludePatterns: []string{"**"}, IgnoreOwners: true,
//	})
//
// for a directory that holds the tree and nothing else. So BuildKit's client
// sends a build context, and so the daemon sums it up. It is a function of
// paths, types, modes, sizes, contents, links and extended attributes (but ACLs)
// alone: not of owners, times, of which names are hard links, nor of the
// directory that holds the tree.
func (t *Tree) Digest() digest.Digest {
	t.digestOnce.Do(func() {
		list, h := contenthash.NewList(), contenthash.NewHash(contenthash.Header{})
		// prefix is the path of the directory that the last entry was in.
		dir, prefix := int32(-1), "/"
		for i := range t.nodes {
			n := &t.nodes[i]
			if n.parent != dir {
				dir, prefix = n.parent, "/"
				if dir >= 0 {
					prefix = "/" + t.path(dir) + "/"
				}
			}
			list.Add(prefix+n.name, n.own(h))
		}
		t.digest = list.Digest()
	})
	return t.digest
}

// own is the digest of the entry itself, as contenthash.Hash gives it.
func (n *node) own(h *contenthash.Hash) [32]byte {
	if n.typ == File {
		return n.sum
	}
	h.Reset(n.header())
	return h.Sum()
}

// header is what of the entry but its content counts.
func (n *node) header() contenthash.Header {
	h := contenthash.Header{Mode: n.fileMode(), Size: n.size, Linkname: n.target, Xattrs: n.xattrs}
	if n.typ == CharDevice || n.typ == BlockDevice {
		h.Devmajor, h.Devminor = unix.Major(n.rdev), unix.Minor(n.rdev)
	}
	return h
}

// fileMode is type and mode in the terms of package fs.
func (n *node) fileMode() fs.FileMode {
	mode := fs.FileMode(n.mode & 0o777)
	if n.mode&unix.S_ISUID != 0 {
		mode |= fs.ModeSetuid
	}
	if n.mode&unix.S_ISGID != 0 {
		mode |= fs.ModeSetgid
	}
	if n.mode&unix.S_ISVTX != 0 {
		mode |= fs.ModeSticky
	}
	switch n.typ {
	case Dir:
		mode |= fs.ModeDir
	case Symlink:
		mode |= fs.ModeSymlink
	case FIFO:
		mode |= fs.ModeNamedPipe
	case CharDevice:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case BlockDevice:
		mode |= fs.ModeDevice
	case File:
	}
	return mode
}

// sameHeader says whether two entries of one type differ in content at most.
func (n *node) sameHeader(o *node) bool {
	return n.mode == o.mode && n.size == o.size && n.target == o.target && n.rdev == o.rdev &&
		fsat.EqualXattrs(n.xattrs, o.xattrs)
}

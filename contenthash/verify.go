package contenthash

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"

	"github.com/lamina-build/lamina/internal/fsat"
)

// Verified is what Verify found.
type Verified struct {
	// Files were read again and have the digest that is known of them.
	Files, Bytes uint64
	// Unknown are files of which no digest is known that should still hold.
	Unknown uint64
	// Differ are the paths of files that are not what they were, sorted.
	Differ []string
}

// known is a regular file of which a digest is known.
type known struct {
	name    string
	path    string
	digest  sum
	stat    Stat
	trusted bool // else the digest holds only for this stat
}

// Verify reads regular files again, header and content, and compares them with
// the digests that are known of them. pick chooses files by path; nil is all.
// The tree is not changed. Nobody should write to the files meanwhile.
func (t *Tree) Verify(ctx context.Context, open Opener, pick func(path string) bool) (v Verified, err error) {
	dirs, unknown := t.knownFiles(pick)
	v.Unknown = unknown
	if len(dirs) == 0 {
		return v, nil
	}
	root, err := open(ctx)
	if err != nil {
		return v, err
	}
	defer func() { err = errors.Join(err, root.close()) }()
	var mu sync.Mutex
	p := newPool(t.workers, func() *reader { return t.borrow(ctx) }, t.giveBack)
	for dir, files := range dirs {
		p.push(func(rd *reader) error {
			got, err := verifyDir(rd, root.at(), dir, files)
			mu.Lock()
			defer mu.Unlock()
			v.Files += got.Files
			v.Bytes += got.Bytes
			v.Unknown += got.Unknown
			v.Differ = append(v.Differ, got.Differ...)
			return err
		})
	}
	if err := p.run(ctx); err != nil {
		return v, err
	}
	slices.Sort(v.Differ)
	return v, nil
}

// knownFiles lists the files that pick chooses by their directories, and counts
// those of which no digest is known.
func (t *Tree) knownFiles(pick func(string) bool) (dirs map[string][]known, unknown uint64) {
	dirs = map[string][]known{}
	t.mu.RLock()
	defer t.mu.RUnlock()
	var visit func(n *node, path string)
	visit = func(n *node, path string) {
		for _, c := range n.dir.children {
			at := joinPath(path, c.name)
			switch {
			case c.kind == kindDir:
				visit(c, at)
			case c.kind != kindFile || pick != nil && !pick(at):
			case !c.has(fDigest):
				unknown++
			default:
				dirs[path] = append(dirs[path], known{
					name: strings.Clone(c.name), path: at, digest: c.digest, stat: c.stat,
					trusted: !t.writing && t.trusts(c),
				})
			}
		}
	}
	visit(t.root, "")
	return dirs, unknown
}

func verifyDir(rd *reader, root *fsat.Root, dir string, files []known) (v Verified, err error) {
	fd, err := rd.openDir(root, dir)
	if err != nil && !moved(err) {
		return v, failed("open", dir, err)
	}
	for _, f := range files {
		got := facts{gone: true}
		if fd >= 0 {
			if got, err = rd.entry(fd, f.name, kindFile, true); err != nil {
				err = failed("hash", f.path, err)
				break
			}
		}
		switch {
		case !got.gone && got.digest != nil && *got.digest == f.digest:
			v.Files++
			v.Bytes += uint64(max(got.stat.Size, 0))
		case !f.trusted && (got.gone || got.stat != f.stat):
			v.Unknown++ // it was changed since, which is known to be possible
		default:
			v.Differ = append(v.Differ, f.path)
		}
	}
	if fd >= 0 {
		fsat.Close(fd)
	}
	return v, err
}

package contenthash

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxLinks is how many symbolic links one lookup follows: the peer's limit,
// more than the kernel's 40.
const maxLinks = 255

// cleanPath makes a path that a caller gave relative to the root: "..", ".",
// double and trailing slashes are taken out by their letters, before any link
// is looked at, as the peer does.
func cleanPath(p string) string {
	return strings.TrimPrefix(path.Join("/", p), "/")
}

// lookup finds the node at a clean path without following links. known is
// false if the tree cannot tell, and the run has noted what to look at; with
// known and no node nothing is there.
func (r *run) lookup(p string) (n *node, known bool) {
	n = r.t.root
	if p == "" {
		return n, true
	}
	for rest, more := p, true; more; {
		var name string
		name, rest, more = strings.Cut(rest, "/")
		if n.kind != kindDir {
			return nil, true
		}
		here := strings.TrimSuffix(p[:len(p)-len(rest)], "/")
		c := n.child(name)
		switch {
		case c != nil && c.kind != kindUnknown && r.t.trusts(c):
			n = c
		case r.missing[here], c == nil && n.dir.listed && r.t.trusts(n):
			return nil, true
		default:
			r.wantLook(p)
			return nil, false
		}
	}
	return n, true
}

// resolve follows the symbolic links in a clean path inside the root, the last
// one only with follow, as the kernel would for a process whose root is the
// tree. What is not there takes part by its letters alone, so that the way may
// lead through a missing name with "..": the peer's rule.
//
// It returns where the way ends, the node there or nil, and whether the tree
// knows enough to tell.
func (r *run) resolve(p string, follow bool) (end string, n *node, known bool, err error) {
	cur, rest := "", p
	n = r.t.root
	for links := 0; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		next := cleanPath(cur + "/" + name)
		n, known = r.lookup(next)
		if !known {
			return "", nil, false, nil
		}
		if n == nil || n.kind != kindSymlink || (!follow && rest == "") {
			cur = next
			continue
		}
		if n.link == nil {
			r.wantLook(next)
			return "", nil, false, nil
		}
		if links++; links > maxLinks {
			return "", nil, false, fmt.Errorf("resolve %q: %w: %w", p, unix.ELOOP, errdefs.ErrInvalidArgument)
		}
		target := *n.link
		if strings.HasPrefix(target, "/") {
			cur = ""
		}
		rest = target + "/" + rest
	}
	return cur, n, true, nil
}

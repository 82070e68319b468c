package contenthash

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/patternmatcher"
)

// filtered answers a question with patterns: the digest of the list of all
// entries that match, each with its own digest, directories with that of their
// header. A single entry that has the name which was asked for gives its own
// digest.
func (r *run) filtered(q *query) (s sum, known bool, err error) {
	prefix, start, known, err := r.filterStart(q)
	if err != nil || !known {
		return s, false, err
	}
	f := &filter{run: r, q: q, p: "/" + q.path, known: true}
	if q.path == "" {
		f.p = ""
	}
	if start != nil {
		f.prune = newPruner(q, prefix, start)
		if err := f.visit(start, prefix, nil); err != nil {
			return s, false, err
		}
	}
	if !f.known {
		return s, false, nil
	}
	for _, required := range q.RequiredPaths {
		if !f.includes(required) {
			return s, false, fmt.Errorf("required path %q: %w", required, errdefs.ErrNotFound)
		}
	}
	return f.list(prefix)
}

// filterStart finds the directory or file at which matching starts: the path,
// or its part before the first wildcard. prefix is that part as it was asked
// for, "" or with a slash at its start: patterns see entries under the name
// that the caller used, whatever links were on the way.
func (r *run) filterStart(q *query) (prefix string, start *node, known bool, err error) {
	literal, follow := q.path, false
	if q.Wildcard {
		var rest string
		literal, rest = splitWildcards(q.path)
		follow = rest != ""
	}
	if literal == "" {
		return "", r.t.root, true, nil
	}
	_, start, known, err = r.resolve(literal, follow)
	return "/" + literal, start, known, err
}

// splitWildcards cuts a clean path before its first name with a wildcard.
func splitWildcards(p string) (literal, rest string) {
	for i := 0; i < len(p); {
		end := len(p)
		if j := strings.IndexByte(p[i:], '/'); j >= 0 {
			end = i + j
		}
		if hasWildcard(p[i:end]) {
			return strings.TrimSuffix(p[:i], "/"), p[i:]
		}
		i = end + 1
	}
	return p, ""
}

func hasWildcard(name string) bool {
	for i := 0; i < len(name); i++ {
		switch name[i] {
		case '*', '?', '[':
			return true
		case '\\':
			i++
		}
	}
	return false
}

// filter is one walk over the entries that patterns choose from.
type filter struct {
	*run
	q *query
	// p is the path that was asked for, "" or with a slash at its start.
	p     string
	prune *pruner
	// matched is the last entry that the wildcard matched.
	matched string
	found   []*candidate
	known   bool
}

// candidate is an entry that may enter the list.
type candidate struct {
	path     string
	node     *node
	included bool
	// outer is the directory around it, if that took part in the matching.
	outer            *candidate
	include, exclude patternmatcher.MatchInfo
	// follow says that a link is followed here.
	follow bool
}

// visit takes n, known under the name fn, and what is below it.
func (f *filter) visit(n *node, fn string, outer *candidate) error {
	if n.kind == kindUnknown {
		f.wantLook(n.path())
		f.known = false
		return nil
	}
	takesPart, err := f.match(fn)
	if err != nil {
		return err
	}
	// The header of the directory that was asked for with a slash at its end
	// does not count.
	if takesPart && !(n.kind == kindDir && f.q.slash && fn == f.p) {
		c := &candidate{path: fn, node: n, outer: outer, follow: f.q.FollowLinks && outer == nil}
		ok, err := f.choose(c)
		if err != nil {
			return err
		}
		if ok {
			f.take(c)
		}
		if n.kind == kindDir {
			outer = c
		}
	}
	if n.kind != kindDir || f.prune.skips(n) {
		return nil
	}
	if !n.dir.listed || !f.t.trusts(n) {
		f.wantScan(scan{path: n.path(), prune: f.prune})
		f.known = false
		return nil
	}
	for _, c := range n.dir.children {
		if err := f.visit(c, fn+"/"+c.name, outer); err != nil {
			return err
		}
	}
	return nil
}

// match says whether the wildcard lets fn take part: it matches, or something
// above it did.
func (f *filter) match(fn string) (bool, error) {
	if !f.q.Wildcard || f.p == "" {
		return true, nil
	}
	if f.matched != "" && strings.HasPrefix(fn, f.matched+"/") {
		return true, nil
	}
	ok, err := path.Match(f.p, fn)
	if err != nil {
		return false, fmt.Errorf("pattern %q: %w: %w", f.q.raw, err, errdefs.ErrInvalidArgument)
	}
	if ok {
		f.matched = fn
	}
	return ok, nil
}

// choose asks the include and exclude patterns.
func (f *filter) choose(c *candidate) (bool, error) {
	base := f.p
	if f.q.Wildcard {
		base = f.matched
	}
	name := strings.TrimSuffix(strings.TrimPrefix(c.path+"/", base+"/"), "/")
	var outer candidate
	if c.outer != nil {
		outer = *c.outer
	}
	if f.q.include != nil {
		ok, info, err := f.q.include.MatchesUsingParentResults(name, outer.include)
		if err != nil {
			return false, fmt.Errorf("match include patterns: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		c.include = info
		if !ok {
			return false, nil
		}
	}
	if f.q.exclude != nil {
		ok, info, err := f.q.exclude.MatchesUsingParentResults(name, outer.exclude)
		if err != nil {
			return false, fmt.Errorf("match exclude patterns: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		c.exclude = info
		return !ok, nil
	}
	return true, nil
}

// take includes c and before it the directories around it.
func (f *filter) take(c *candidate) {
	if c.included {
		return
	}
	if c.outer != nil {
		f.take(c.outer)
	}
	c.included = true
	f.found = append(f.found, c)
}

func (f *filter) includes(required string) bool {
	for _, c := range f.found {
		if strings.HasPrefix(c.path, required) {
			return true
		}
	}
	return false
}

// list computes the digest of what was found.
func (f *filter) list(prefix string) (s sum, known bool, err error) {
	digests := make([]sum, len(f.found))
	for i, c := range f.found {
		d, ok, err := f.digest(c)
		if err != nil {
			return s, false, err
		}
		f.known = f.known && ok
		digests[i] = d
	}
	if !f.known {
		return s, false, nil
	}
	if len(f.found) == 1 && path.Base(f.q.raw) == path.Base(f.found[0].path) {
		return digests[0], true, nil
	}
	l := NewList()
	for i, c := range f.found {
		l.Add(strings.TrimPrefix(c.path, prefix), digests[i])
	}
	return l.Sum(), true, nil
}

func (f *filter) digest(c *candidate) (s sum, known bool, err error) {
	if !c.follow || c.node.kind != kindSymlink {
		s, known = f.own(c.node)
		return s, known, nil
	}
	return f.plain(cleanPath(c.path), true)
}

// plain answers a question without patterns.
func (r *run) plain(p string, follow bool) (s sum, known bool, err error) {
	_, n, known, err := r.resolve(p, follow)
	if err != nil || !known {
		return s, false, err
	}
	if n == nil {
		return s, false, fmt.Errorf("path %q: %w", "/"+p, errdefs.ErrNotFound)
	}
	s, known = r.whole(n)
	return s, known, nil
}

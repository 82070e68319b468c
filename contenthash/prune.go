package contenthash

import (
	"path"
	"strings"
	"sync"

	"github.com/moby/patternmatcher"
)

// pruner tells directories below which nothing can match, so that they are not
// even listed. It only saves work: what it does not skip is matched entry by
// entry.
type pruner struct {
	// base is the path of the directory where matching starts.
	base string
	// names are those of the wildcard below base, nil where it cannot be taken
	// apart.
	names []string

	mu sync.Mutex // a matcher compiles its patterns when they are first used
	// exclude is nil where an excluded directory may hold something included.
	exclude *patternmatcher.PatternMatcher
}

func newPruner(q *query, prefix string, start *node) *pruner {
	p := &pruner{base: start.path()}
	if q.Wildcard && q.path != "" {
		// A class or an escape can match a slash, so names do not stand alone.
		if strings.ContainsAny(q.path, `[\`) {
			return p
		}
		if rest := strings.TrimPrefix(strings.TrimPrefix("/"+q.path, prefix), "/"); rest != "" {
			p.names = strings.Split(rest, "/")
		}
	}
	if q.exclude != nil && !q.exclude.Exclusions() {
		// A matcher of its own: this one is used by several goroutines.
		p.exclude, _ = patternmatcher.New(q.ExcludePatterns)
	}
	return p
}

// skips says that nothing below the directory n can match.
func (p *pruner) skips(n *node) bool {
	if p == nil || (len(p.names) == 0 && p.exclude == nil) {
		return false
	}
	return p.skipsPath(n.path())
}

func (p *pruner) skipsPath(dir string) bool {
	if dir == p.base {
		return false
	}
	rel := strings.TrimPrefix(dir, p.base)
	rel = strings.TrimPrefix(rel, "/")
	for _, pattern := range p.names {
		name, rest, more := strings.Cut(rel, "/")
		if ok, err := path.Match(pattern, name); err == nil && !ok {
			return true
		}
		if !more {
			return false // above what the wildcard matches, or just that
		}
		rel = rest
	}
	if p.exclude == nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	excluded, err := p.exclude.MatchesOrParentMatches(rel)
	return err == nil && excluded
}

package source

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/patternmatcher"

	"github.com/lamina-build/lamina/internal/fsat"
)

// Options say what of a directory is source.
type Options struct {
	// Exclude are patterns as in a .dockerignore file, matched against paths
	// relative to the source: `*` and `?` stay within one name, `**` goes over
	// any number, a match covers all that is below, the last match wins, `!`
	// takes back in what was excluded. They mean what they mean to BuildKit. A
	// directory that matches is kept only for the sake of what is taken back in
	// below it.
	Exclude []string

	// Skip are paths that are not source with all that is below them, such as
	// the destinations of outputs and the root of a store. Relative ones
	// count from the working directory. They need not exist, and those outside
	// the source do no harm. A directory that holds nothing but skipped paths
	// is not source either: it may have been made for them.
	Skip []string

	// Progress, if set, is told how much of the content that has to be read
	// is read.
	Progress Progress

	// now replaces the clock in tests.
	now func() time.Time
}

// Progress is told how many bytes of content are done and how many there are
// in all. Calls come one at a time, often, and from any goroutine; done never
// falls, and total is the same for one operation.
type Progress func(done, total int64)

// rules are Options made ready for one source directory.
type rules struct {
	exclude []string
	skip    map[string]bool // relative paths
	// above are the directories that hold a skipped path somewhere below.
	above map[string]bool
}

func (o Options) rules(dir string) (*rules, error) {
	r := &rules{skip: map[string]bool{}, above: map[string]bool{}}
	for _, p := range o.Exclude {
		if p = cleanPattern(p); p != "" {
			r.exclude = append(r.exclude, p)
		}
	}
	if _, err := r.matcher(); err != nil {
		return nil, err
	}
	if len(o.Skip) == 0 {
		return r, nil
	}
	real, err := fsat.RealPath(dir)
	if err != nil {
		return nil, err
	}
	for _, p := range o.Skip {
		if err := r.addSkip(real, p); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// cleanPattern is what a .dockerignore file's reader does with a line: paths
// are relative to the source whether they begin with a slash or not.
func cleanPattern(p string) string {
	p = strings.TrimSpace(p)
	not := strings.HasPrefix(p, "!")
	if not {
		p = strings.TrimSpace(p[1:])
	}
	if p != "" {
		p = filepath.Clean(p)
		if len(p) > 1 {
			p = strings.TrimPrefix(p, "/")
		}
	}
	if not {
		p = "!" + p
	}
	return p
}

// matcher makes a matcher for one goroutine, since one compiles its patterns
// while it matches; nil if nothing is excluded.
func (r *rules) matcher() (*patternmatcher.PatternMatcher, error) {
	if len(r.exclude) == 0 {
		return nil, nil
	}
	m, err := patternmatcher.New(r.exclude)
	if err != nil {
		return nil, fmt.Errorf("exclude patterns %q: %w: %w", r.exclude, err, errdefs.ErrInvalidArgument)
	}
	return m, nil
}

// mayReturn says whether a `!` pattern could take something back in below the
// excluded directory dir.
func mayReturn(m *patternmatcher.PatternMatcher, dir string) bool {
	below := dir + "/"
	for _, p := range m.Patterns() {
		if !p.Exclusion() {
			continue
		}
		literal := p.String()
		wild := strings.IndexAny(literal, `*?[\`)
		if wild >= 0 {
			literal = literal[:wild]
		}
		if strings.HasPrefix(literal, below) || wild >= 0 && strings.HasPrefix(below, literal) {
			return true
		}
	}
	return false
}

// addSkip notes what of the source at real the path p covers. Both what p
// names and, should it be a link, what the link leads to are meant.
func (r *rules) addSkip(real, p string) error {
	abs, err := filepath.Abs(p)
	if err != nil {
		return fmt.Errorf("path to skip: %w", err)
	}
	parent, err := fsat.RealPath(filepath.Dir(abs))
	if err != nil {
		return err
	}
	full, err := fsat.RealPath(abs)
	if err != nil {
		return err
	}
	for _, q := range []string{filepath.Join(parent, filepath.Base(abs)), full} {
		switch {
		case fsat.Inside(real, q):
			return fsat.Refuse(errdefs.ErrInvalidArgument, real, "the source directory lies in %q, which is not source", p)
		case fsat.Inside(q, real):
			rel := strings.TrimPrefix(q[len(real):], "/")
			r.skip[rel] = true
			for up := filepath.Dir(rel); up != "."; up = filepath.Dir(up) {
				r.above[up] = true
			}
		}
	}
	return nil
}

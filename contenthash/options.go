package contenthash

import (
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/patternmatcher"
)

// Options choose what of a path enters the digest. The zero value is the path
// itself with all that is below it.
type Options struct {
	// FollowLinks resolves a symbolic link that the path ends in, and with
	// Wildcard or patterns those that were matched themselves. Links on the
	// way are always followed.
	FollowLinks bool
	// Wildcard takes the path as a pattern of path.Match.
	Wildcard bool
	// IncludePatterns and ExcludePatterns are those of .dockerignore files,
	// relative to the path, or with Wildcard to what was matched.
	IncludePatterns []string
	ExcludePatterns []string
	// RequiredPaths begin the path of something that is included, or the
	// answer is errdefs.ErrNotFound. They count only with Wildcard or
	// patterns; without these the path itself is required.
	RequiredPaths []string
	// IgnoreOwners counts every owner as 0:0, as BuildKit's client does with
	// the files of a build context. What is known of a tree does not help with
	// that, and nothing is kept of it: each question reads the files.
	IgnoreOwners bool
}

// query is a question with its patterns compiled. A matcher may be used by one
// goroutine at a time, so a query belongs to one call of Checksum.
type query struct {
	Options
	// raw is the path as given, path the clean one.
	raw, path string
	// slash says that the path was given with one at its end.
	slash    bool
	filtered bool
	include  *patternmatcher.PatternMatcher
	exclude  *patternmatcher.PatternMatcher
}

func newQuery(p string, o Options) (*query, error) {
	if strings.IndexByte(p, 0) >= 0 {
		return nil, fmt.Errorf("path %q holds a NUL byte: %w", p, errdefs.ErrInvalidArgument)
	}
	q := &query{
		Options:  o,
		raw:      p,
		path:     cleanPath(p),
		slash:    strings.HasSuffix(p, "/"),
		filtered: o.Wildcard || len(o.IncludePatterns) > 0 || len(o.ExcludePatterns) > 0,
	}
	var err error
	if q.include, err = matcher("include", o.IncludePatterns); err != nil {
		return nil, err
	}
	if q.exclude, err = matcher("exclude", o.ExcludePatterns); err != nil {
		return nil, err
	}
	return q, nil
}

func matcher(what string, patterns []string) (*patternmatcher.PatternMatcher, error) {
	if len(patterns) == 0 {
		return nil, nil
	}
	m, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, fmt.Errorf("%s patterns %q: %w: %w", what, patterns, err, errdefs.ErrInvalidArgument)
	}
	return m, nil
}

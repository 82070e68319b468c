package contenthashtest

import (
	"math/rand/v2"
	"path"
	"strings"
)

// Query is one question: a path and the options of a checksum.
type Query struct {
	Path                       string
	FollowLinks, Wildcard      bool
	Include, Exclude, Required []string
}

var patterns = []string{
	"**", "*", "*.go", "foo*", "a", "a/**", "**/foo", "**/*.txt", "!a", "!**/x.go", "foo/", "*/b", "**/a/*", "?", "[a-c]",
	" foo bar ", `a\*`, "..", ".", "b/../a", "c/*/a", "ab", "-",
}

// Queries makes the questions of a seed about its tree: the root first, then
// plain ones, then some with patterns.
func (t Tree) Queries(seed uint64) []Query {
	r := rand.New(rand.NewPCG(seed, 2))
	out := []Query{{Path: "/"}}
	for range 6 {
		out = append(out, Query{Path: t.path(r), FollowLinks: r.IntN(2) == 0})
	}
	for range 8 {
		q := Query{Path: t.path(r), FollowLinks: r.IntN(2) == 0}
		if r.IntN(3) == 0 {
			q.Path = pick(r, []string{"", "/"})
		}
		if q.Wildcard = r.IntN(2) == 0; q.Wildcard && r.IntN(4) > 0 {
			q.Path = wild(r, q.Path)
		}
		if strings.Contains(q.Path, `\`) {
			q.Wildcard = false // escapes are a known difference, tested apart
		}
		if r.IntN(2) == 0 {
			q.Include = some(r)
		}
		if r.IntN(2) == 0 {
			q.Exclude = some(r)
		}
		if r.IntN(6) == 0 {
			q.Required = []string{"/" + pick(r, t.Entries).Path}
		}
		out = append(out, q)
	}
	return out
}

func some(r *rand.Rand) (out []string) {
	for range 1 + r.IntN(3) {
		out = append(out, pick(r, patterns))
	}
	return out
}

// path makes a path: of something that is there, through what is there, or
// made up, written in one way or another.
func (t Tree) path(r *rand.Rand) string {
	p := pick(r, t.Entries).Path
	switch r.IntN(6) {
	case 0, 1:
		p = path.Join(p, pick(r, names))
	case 2:
		p = p + "/../" + pick(r, names)
	case 3:
		p = path.Join(p, pick(r, names), pick(r, names))
	}
	switch r.IntN(6) {
	case 0:
		p += "/"
	case 1:
		p = strings.ReplaceAll(p, "/", "//")
	case 2:
		p = "./" + p
	}
	if r.IntN(2) == 0 {
		p = "/" + p
	}
	return p
}

// wild puts a wildcard into a path.
func wild(r *rand.Rand, p string) string {
	parts := strings.Split(p, "/")
	i := r.IntN(len(parts))
	switch r.IntN(8) {
	case 0:
		parts[i] = "[a-f]*"
	case 1:
		parts[i] = "?"
	case 2:
		parts[i] = "[^a]*"
	case 3:
		parts[i] = "*o*"
	case 4:
		parts[i] = "f[^x]o"
	default:
		parts[i] = "*"
	}
	return strings.Join(parts, "/")
}

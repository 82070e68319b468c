package cachemount

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache/policy"
)

// Sharing says how several builds use the directory of one id.
type Sharing string

// The ways to share.
const (
	Shared  Sharing = "shared"
	Private Sharing = "private"
	Locked  Sharing = "locked"
)

// Spec is one cache directory of a build.
type Spec struct {
	// ID names the directory: any text, 1024 bytes at most.
	ID string
	// Target is where the build sees it, relative to its workspace.
	Target string
	// Sharing is Shared if empty.
	Sharing Sharing
}

// maxID keeps ids readable in lists and short enough for an index key.
const maxID = 1024

// String is the form that ParseSpec reads.
func (s Spec) String() string {
	return fmt.Sprintf("type=cache,id=%s,target=%s,sharing=%s", s.ID, s.Target, s.Sharing)
}

const specExample = "type=cache,id=go-build,target=.cache/go-build,sharing=locked"

// ParseSpec reads the form type=cache,id=ID,target=PATH[,sharing=shared|private|locked],
// its parts in any order. Without id the target is the id. "destination" and
// "dst" are other words for target. Errors are *policy.SyntaxError, which point
// at the place.
func ParseSpec(text string) (s Spec, err error) {
	at := 0
	seen := map[string]int{}
	bad := func(at int, format string, args ...any) (Spec, error) {
		return Spec{}, &policy.SyntaxError{What: "mount", Text: text, At: at, Reason: fmt.Sprintf(format, args...), Example: specExample}
	}
	for part := range strings.SplitSeq(text, ",") {
		name, value, ok := strings.Cut(part, "=")
		if name == "destination" || name == "dst" {
			name = "target"
		}
		valueAt := at + len(part) - len(value)
		if _, twice := seen[name]; twice {
			return bad(at, "%s is there twice", name)
		}
		if !ok || value == "" {
			return bad(at+len(strings.TrimSuffix(part, "=")), "%q needs a value", name)
		}
		seen[name] = valueAt
		switch name {
		case "type":
			if value != "cache" {
				return bad(valueAt, "there is no type %q, but cache", value)
			}
		case "id":
			s.ID = value
		case "target":
			s.Target = value
		case "sharing":
			s.Sharing = Sharing(value)
		default:
			return bad(at, "there is no %q, but type, id, target and sharing", name)
		}
		at += len(part) + 1
	}
	for _, name := range []string{"type", "target"} {
		if _, there := seen[name]; !there {
			return bad(len(text), "%s is missing", name)
		}
	}
	if why, field := s.complete(); why != "" {
		return bad(seen[field], "%s", why)
	}
	return s, nil
}

// complete fills in what was left out, and says what is wrong, and of which
// field.
func (s *Spec) complete() (why, field string) {
	if s.Target == "" || strings.ContainsRune(s.Target, 0) || path.IsAbs(s.Target) {
		return "the target is a path relative to the workspace", "target"
	}
	s.Target = path.Clean(s.Target)
	if s.Target == "." || s.Target == ".." || strings.HasPrefix(s.Target, "../") {
		return "the target is a directory inside the workspace", "target"
	}
	if s.ID == "" {
		s.ID = s.Target
	}
	if len(s.ID) > maxID || strings.ContainsRune(s.ID, 0) {
		return fmt.Sprintf("an id has %d bytes at most, and none of them is NUL", maxID), "id"
	}
	if s.Sharing == "" {
		s.Sharing = Shared
	}
	if !slices.Contains([]Sharing{Shared, Private, Locked}, s.Sharing) {
		return fmt.Sprintf("there is no sharing %q, but shared, private and locked", s.Sharing), "sharing"
	}
	return "", ""
}

// Check completes the specs of one build and refuses those that exclude each
// other: targets inside each other, and one id that is shared in two ways.
// Errors are InvalidArgument.
func Check(specs []Spec) ([]Spec, error) {
	out := slices.Clone(specs)
	for i := range out {
		if why, _ := out[i].complete(); why != "" {
			return nil, fmt.Errorf("cache directory %q: %s: %w", specs[i].ID, why, errdefs.ErrInvalidArgument)
		}
		for _, other := range out[:i] {
			if Inside(out[i].Target, other.Target) || Inside(other.Target, out[i].Target) {
				return nil, fmt.Errorf("cache directories at %q and %q are inside each other: %w", other.Target, out[i].Target, errdefs.ErrInvalidArgument)
			}
			if out[i].ID == other.ID && out[i].Sharing != other.Sharing {
				return nil, fmt.Errorf("cache directory %q cannot be %s and %s in one build: %w", out[i].ID, other.Sharing, out[i].Sharing, errdefs.ErrInvalidArgument)
			}
		}
	}
	return out, nil
}

// Inside says whether a clean relative path is dir or lies below it.
func Inside(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, dir+"/") || dir == "."
}

// Package output takes what a command made out of a workspace: declared files
// and directories are copied to places of the caller, all of them or none.
package output

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// Spec is one declared output.
type Spec struct {
	// Path names a file or a directory in the workspace, relative to it.
	// Symbolic links on the way and at the end are followed inside the
	// workspace; an absolute link counts from the workspace.
	Path string
	// Dest is where the output goes: this very name, not a directory that it
	// is put into. A relative one counts from the working directory. With a
	// slash at its end the output has to be a directory.
	Dest string
}

// ParseSpec reads the form PATH[:DEST]; without DEST the output goes to the
// same path below the working directory. The first colon separates, and there
// may be only one: a backslash before a colon or a backslash makes it part of
// the name, any other backslash stands for itself. An empty part, NUL bytes,
// and a PATH that is absolute, the workspace itself, or holds ".." are
// InvalidArgument.
func ParseSpec(s string) (Spec, error) {
	parts, err := split(s)
	if err != nil {
		return Spec{}, err
	}
	out := Spec{Path: parts[0], Dest: parts[0]}
	if len(parts) == 2 {
		out.Dest = parts[1]
	}
	if err := out.check(); err != nil {
		return Spec{}, err
	}
	out.Path = path.Clean(out.Path)
	if len(parts) == 1 {
		out.Dest = out.Path
	}
	return out, nil
}

// String is the form that ParseSpec reads.
func (s Spec) String() string {
	esc := strings.NewReplacer(`\`, `\\`, `:`, `\:`)
	return esc.Replace(s.Path) + ":" + esc.Replace(s.Dest)
}

func split(s string) ([]string, error) {
	parts := []string{""}
	for i := 0; i < len(s); i++ {
		last := &parts[len(parts)-1]
		switch {
		case s[i] == '\\' && i+1 < len(s) && (s[i+1] == ':' || s[i+1] == '\\'):
			i++
			*last += s[i : i+1]
		case s[i] != ':':
			*last += s[i : i+1]
		case len(parts) == 2:
			return nil, fmt.Errorf(`output %q has more than one colon (write \: for one in a name): %w`, s, errdefs.ErrInvalidArgument)
		default:
			parts = append(parts, "")
		}
	}
	return parts, nil
}

// check refuses what no output can be.
func (s Spec) check() error {
	why := ""
	switch {
	case s.Path == "":
		why = "its path is empty"
	case s.Dest == "":
		why = "its destination is empty"
	case strings.ContainsRune(s.Path+s.Dest, 0):
		why = "a name holds a NUL byte"
	case path.IsAbs(s.Path):
		why = "its path is not relative to the workspace"
	case path.Clean(s.Path) == ".":
		why = "its path is the workspace itself"
	default:
		for name := range strings.SplitSeq(s.Path, "/") {
			if name == ".." {
				why = `its path holds ".."`
			}
		}
	}
	if why == "" {
		return nil
	}
	return fmt.Errorf("output %q: %s: %w", s.String(), why, errdefs.ErrInvalidArgument)
}

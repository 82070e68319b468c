package output

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
	"github.com/lamina-build/lamina/workspace/source"
)

// Result says what Collect did.
type Result struct {
	// Written and Unchanged count the outputs; the latter were at their
	// destination already.
	Written, Unchanged int
	// Bytes is the content copied.
	Bytes int64
	// Notes lists what could not be kept as it is in the workspace. Paths
	// begin with the output's.
	Notes []source.Note
}

// MissingError names all outputs that are not in the workspace. Its class is
// NotFound.
type MissingError struct {
	// Paths are those of the specs, in their order.
	Paths []string
}

func (e *MissingError) Error() string {
	names := make([]string, len(e.Paths))
	for i, p := range e.Paths {
		names[i] = strconv.Quote(p)
	}
	if len(names) == 1 {
		return "output " + names[0] + " does not exist in the workspace"
	}
	return "outputs " + strings.Join(names, ", ") + " do not exist in the workspace"
}

// Unwrap gives the class.
func (e *MissingError) Unwrap() error { return errdefs.ErrNotFound }

// Collect copies outputs of the workspace in the directory tree to their
// destinations, all or none: first all are looked for and all destinations
// checked, then all are copied to names beside their destinations, then all
// are renamed. A reader of a destination sees the old or the new, whole. What
// goes wrong before the last step leaves every destination as it was, and so
// does an error in the last step where the file system can exchange names.
//
// Content, modes, times, symbolic links inside a directory, hard links inside
// a directory, holes and extended attributes are kept, owners when root
// collects. An output is a regular file or a directory. A link that leads out
// of the workspace finds nothing there.
//
//   - A destination that already has the same content, modes, links and
//     attributes is left alone with its times, so that what depends on it is
//     not made again.
//   - A file replaces a file or a symbolic link (the link itself, it is not
//     followed); a directory replaces a directory as a whole, with all that is
//     in it, or a symbolic link. A file in place of a directory or the other
//     way round is FailedPrecondition.
//   - Missing directories above a destination are made.
//   - Destinations that are the same, or one in the other, or hold the
//     workspace or the working directory, are InvalidArgument; one that is in
//     the workspace, too.
//   - A destination that may not be written is PermissionDenied.
//
// Outputs that are missing are a MissingError with all their names. The
// workspace must not change meanwhile; a file seen changing is
// source.ErrChanged. A kill can leave names like ".lamina-….tmp" beside a
// destination; source.Scan does not take them for source.
func Collect(ctx context.Context, tree string, outs []Spec) (Result, error) {
	if len(outs) == 0 {
		return Result{}, nil
	}
	c := &collector{asRoot: os.Geteuid() == 0}
	defer c.close()
	if err := c.find(tree, outs); err != nil {
		return Result{}, err
	}
	if err := c.place(tree); err != nil {
		return Result{}, err
	}
	err := c.stage(ctx)
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = c.publish()
	}
	err = errors.Join(err, c.clean(err != nil))
	if err != nil {
		return Result{}, err
	}
	for _, j := range c.jobs {
		if j.same {
			c.result.Unchanged++
		} else {
			c.result.Written++
		}
	}
	return c.result, nil
}

// collector is one Collect.
type collector struct {
	asRoot bool
	jobs   []*job
	made   []string // directories made above destinations, those above first
	copier fsat.Copier
	result Result
}

// job is one output on its way.
type job struct {
	spec Spec
	from *os.File // O_PATH
	st   unix.Stat_t

	// dest is the destination with the links above it resolved; parent and
	// base are its directory, open once that exists, and its name there.
	dest, base string
	parent     *fsat.Root

	same bool   // nothing to do
	temp string // the copy beside the destination; after publish the old one
	done bool   // published
	// replaced says that temp holds what was at the destination before.
	replaced bool
	// final says that what was there is lost and cannot be put back.
	final bool
}

func (j *job) isDir() bool { return j.st.Mode&unix.S_IFMT == unix.S_IFDIR }

func (j *job) fail(what string, err error) error {
	return fsat.Error(what+" of output "+strconv.Quote(j.spec.Path), j.spec.Dest, err)
}

func (j *job) refuse(class error, format string, args ...any) error {
	return fmt.Errorf("output %q to %q: %s: %w", j.spec.Path, j.spec.Dest, fmt.Sprintf(format, args...), class)
}

func (c *collector) close() {
	for _, j := range c.jobs {
		if j.from != nil {
			_ = j.from.Close() // O_PATH: nothing can be lost
		}
		if j.parent != nil {
			fsat.Close(j.parent.Fd())
		}
	}
}

// find opens all outputs in the workspace.
func (c *collector) find(tree string, outs []Spec) error {
	root, err := os.Open(tree)
	if err != nil {
		return fsat.Error("open workspace", tree, err)
	}
	defer root.Close()
	var missing []string
	for _, spec := range outs {
		if err := spec.check(); err != nil {
			return err
		}
		j := &job{spec: spec}
		c.jobs = append(c.jobs, j)
		j.from, err = pathrs.OpenatInRoot(root, spec.Path)
		if fsat.Absent(err) {
			missing = append(missing, spec.Path)
			continue
		}
		if err != nil {
			return fsat.Error("open output", spec.Path, err)
		}
		if err := unix.Fstat(int(j.from.Fd()), &j.st); err != nil {
			return fsat.Error("stat output", spec.Path, err)
		}
		switch j.st.Mode & unix.S_IFMT {
		case unix.S_IFREG, unix.S_IFDIR:
		default:
			return j.refuse(errdefs.ErrInvalidArgument, "it is neither a regular file nor a directory")
		}
		if !j.isDir() && strings.HasSuffix(spec.Dest, "/") {
			return j.refuse(errdefs.ErrInvalidArgument, "the output is a file; name the file that it becomes")
		}
	}
	if len(missing) > 0 {
		return &MissingError{Paths: missing}
	}
	return nil
}

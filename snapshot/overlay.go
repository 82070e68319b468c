package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot/overlayfs"
)

// maxOptions is how long the options of one mount may get, in bytes, before
// short links replace the paths of layers: mount(2) takes one page, and
// containerd's mount.All starts to rewrite options at 3,584 bytes.
const maxOptions = 3000

// overlay keeps in fs the difference to the parent, and stacks.
type overlay struct {
	*tree
	userXattr bool
	volatile  bool
	maxDepth  int
}

var _ backend = (*overlay)(nil)

func (o *overlay) check(parent string) error {
	chain, err := o.chain(parent, o.maxDepth+1)
	if err != nil {
		return err
	}
	if len(chain) > o.maxDepth {
		return fmt.Errorf("parent %q: %w", parent, &DepthError{Layers: len(chain), Max: o.maxDepth})
	}
	return nil
}

func (o *overlay) rebase() error { return nil }

// examine looks for marks by which a layer makes sense over its own parent
// only: they are not known from the kernel's options alone, as its defaults may
// have been others when the layer was written.
func (o *overlay) examine(path string, s *state) (err error) {
	if s.Bound == "" {
		s.Bound, err = findBound(path, marksOf(o.info.Attributes))
	}
	return err
}

// describe looks for an opaque root, which an applied layer may have. The
// kernel does not know such a thing.
func (o *overlay) describe(path string, s *state) error {
	root, err := openPlace(unix.AT_FDCWD, below(path, "fs"), unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer root.Close()
	opaque, _, err := marksOf(o.info.Attributes).get(root, "opaque")
	s.Opaque = opaque == "y"
	return err
}

func (o *overlay) fill(_ context.Context, path, from string, view bool) error {
	if view && from != "" {
		return nil // the parent's layers are all of it
	}
	upper := below(path, "fs")
	if err := os.Mkdir(upper, 0o700); err != nil {
		return err
	}
	if err := likeRoot(upper, from); err != nil {
		return err
	}
	if view {
		return nil
	}
	return os.Mkdir(below(path, "work"), 0o700)
}

// likeRoot gives a new layer's root what the parent's root shows, as the
// topmost layer decides it for the whole stack. Without a parent it is 0755,
// whatever the umask or a set-group-id directory above say.
func likeRoot(upper, from string) error {
	if from == "" {
		// In a user namespace that does not map our group the kernel calls a
		// group invalid that the directory has already.
		if err := os.Lchown(upper, os.Geteuid(), os.Getegid()); err != nil && !errors.Is(err, unix.EINVAL) {
			return err
		}
		return os.Chmod(upper, 0o755)
	}
	return copyRoot(upper, from)
}

// layers are the fs directories of a chain, topmost first.
func (o *overlay) layers(chain []string) []string {
	paths := make([]string, 0, len(chain)+2)
	for _, name := range chain {
		paths = append(paths, o.path(dirCommitted, encodeKey(name), "fs"))
	}
	return paths
}

// shown are the names of the layers that show below an entry's own one, if it
// has one: a stack and a view of a parent have none.
func (o *overlay) shown(s state) (chain []string, own bool, err error) {
	own = !s.stack() && (!s.View || s.Parent == "")
	switch {
	case s.stack():
		chain = s.layer().stack
	case !s.Opaque:
		chain, err = o.chain(string(s.Parent), o.maxDepth+1)
	}
	return chain, own, err
}

// onEmpty puts the empty layer below the others. It lets a single layer be
// mounted as an overlay, so that whiteouts in it never show. Where the stack
// is as high as it can be it is not needed.
func (o *overlay) onEmpty(lower []string, empty string) []string {
	if len(lower) < o.maxDepth {
		lower = append(lower, empty)
	}
	return lower
}

func (o *overlay) mount(e entry, s state, target string, readOnly bool) error {
	chain, hasOwn, err := o.shown(s)
	if err != nil {
		return err
	}
	own := below(o.at(e), "fs")
	lower := o.layers(chain)
	if readOnly && hasOwn {
		lower = append([]string{own}, lower...)
	}
	if len(lower) > o.maxDepth {
		return &DepthError{Layers: len(lower), Max: o.maxDepth}
	}
	m := overlayfs.Mount{
		Lower:     o.onEmpty(lower, o.path(dirEmpty)),
		UserXattr: o.userXattr,
		Follow:    s.Bound != "",
		ReadOnly:  readOnly,
	}
	if !readOnly {
		m.Upper, m.Work, m.Volatile = own, below(o.at(e), "work"), o.volatile
		if err := o.clear(m.Upper, m.Work); err != nil {
			return err
		}
	}
	return m.Mount(target)
}

// clear makes a work directory ready for a writable mount. The probe comes
// first: with index=off the kernel would let a second mount have the upper
// directory. A work directory in which there is nothing was never mounted.
func (o *overlay) clear(upper, work string) error {
	if ok, err := exists(below(work, "work")); err != nil || !ok {
		return err
	}
	busy, err := overlayfs.InUse(upper)
	if err != nil {
		return err
	}
	if busy {
		return fmt.Errorf("%q is still the writable layer of a mount: %w", upper, errdefs.ErrFailedPrecondition)
	}
	return overlayfs.RemoveVolatileMark(work)
}

func (o *overlay) mounts(e entry, s state, at string) ([]mount.Mount, error) {
	own := below(o.at(e), "fs")
	if s.Parent == "" {
		return bindMount(own, s.View), nil
	}
	chain, err := o.chain(string(s.Parent), o.maxDepth+1)
	if err != nil {
		return nil, err
	}
	work := below(o.at(e), "work")
	if !s.View && at == o.at(e) { // what is being made has none
		if err := o.clearMarked(below(at, "fs"), below(at, "work")); err != nil {
			return nil, err
		}
	}
	lower, empty := o.layers(chain), o.path(dirEmpty)
	options := o.options(o.onEmpty(lower, empty), own, work, s)
	if length(options) > maxOptions {
		if lower, empty, own, work, err = o.short(chain, e, at, s.View); err != nil {
			return nil, err
		}
		options = o.options(o.onEmpty(lower, empty), own, work, s)
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}, nil
}

// clearMarked is clear for a mount by others, who do not mount volatile.
func (o *overlay) clearMarked(upper, work string) error {
	ok, err := exists(below(work, "work", "incompat", "volatile"))
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	if err == nil && !ok {
		return nil
	}
	if err := o.clear(upper, work); !errdefs.IsFailedPrecondition(err) {
		return err
	}
	return nil // mounted just now: describing the mount is no harm
}

// short are the paths of a mount as short links.
func (o *overlay) short(chain []string, e entry, at string, view bool) (lower []string, empty, own, work string, err error) {
	for _, name := range chain {
		link, err := o.layerLink(name)
		if err != nil {
			return nil, "", "", "", err
		}
		lower = append(lower, link)
	}
	if empty, err = o.shortLink(o.path(dirEmpty), entry{dirEmpty, ""}, ""); err != nil || view {
		return lower, empty, "", "", err
	}
	if own, err = o.shortLink(below(at, "fs"), e, "fs"); err != nil {
		return nil, "", "", "", err
	}
	work, err = o.shortLink(below(at, "work"), e, "work")
	return lower, empty, own, work, err
}

func (o *overlay) options(lower []string, upper, work string, s state) []string {
	var options []string
	if !s.View {
		options = append(options, "workdir="+escapeOption(work), "upperdir="+escapeOption(upper))
	}
	escaped := make([]string, len(lower))
	for i, dir := range lower {
		escaped[i] = strings.ReplaceAll(escapeOption(dir), ":", `\:`)
	}
	options = append(options, "lowerdir="+strings.Join(escaped, ":"))
	options = append(options, overlayfs.Mount{UserXattr: o.userXattr, Follow: s.Bound != ""}.Settings()...)
	if o.userXattr {
		options = append(options, "userxattr")
	}
	return options
}

// escapeOption escapes what separates options. Nearly no path has that, and a
// Replacer is dear to make.
func escapeOption(path string) string {
	if !strings.ContainsAny(path, `\,`) {
		return path
	}
	return strings.NewReplacer(`\`, `\\`, ",", `\,`).Replace(path)
}

func length(options []string) (n int) {
	for _, o := range options {
		n += len(o) + 1
	}
	return n
}

func bindMount(source string, readOnly bool) []mount.Mount {
	access := "rw"
	if readOnly {
		access = "ro"
	}
	return []mount.Mount{{Type: "bind", Source: source, Options: []string{"rbind", access}}}
}

func (o *overlay) whole(entry, state) (string, bool) { return "", false }

func (o *overlay) inUse(e entry, s state) (bool, error) {
	if s.View || s.stack() {
		return false, nil
	}
	return overlayfs.InUse(below(o.at(e), "fs"))
}

// tidy removes the work directory. A mount that is still there needs it:
// removing a file of a lower layer would fail in it. One that was never
// mounted is empty; for the others the probe decides, which takes longer
// than the commit and so waits for a patient caller.
func (o *overlay) tidy(path string, patient bool) (again bool, err error) {
	work := below(path, "work")
	var st unix.Stat_t
	if err := unix.Lstat(work, &st); errors.Is(err, unix.ENOENT) {
		return false, nil
	} else if err != nil {
		return false, &os.PathError{Op: "lstat", Path: work, Err: err}
	}
	err = unix.Rmdir(work)
	switch {
	case err == nil:
		return false, o.dropLink(&st)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return false, nil // gone, or adopted: a link into a directory of its own
	case !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST):
		return false, &os.PathError{Op: "rmdir", Path: work, Err: err}
	}
	if !patient {
		return true, nil
	}
	busy, err := overlayfs.InUse(below(path, "fs"))
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if errdefs.IsPermissionDenied(err) {
		return true, nil // outside the user namespace that mounts
	}
	if err != nil || busy {
		return busy, err
	}
	if err := o.step("tidy.work"); err != nil {
		return false, err
	}
	if err := removeTree(work); err != nil {
		return false, err
	}
	return false, o.dropLink(&st)
}

package layer

import (
	"archive/tar"
	"context"
	"errors"
	"hash/maphash"
	"io"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// Apply reads an uncompressed layer tar from r to its end and applies it to
// the directory root, as the package's doc says. Nobody else may change that
// meanwhile.
//
// r is read ahead by another goroutine, and small files are written by others;
// Apply returns when all of them have ended.
// When Apply fails, the layer is half applied and root is to be thrown away.
// The caller compares DiffID: a layer that was cut between two entries, or in
// the extended header before one, looks like one that ends there.
//
// Errors: *EntryError for what an entry is or meets; InvalidArgument for a
// stream that is no tar archive; ResourceExhausted for a limit and for a full
// disk, with the errno in the chain; errors of r and of ctx as they are.
func Apply(ctx context.Context, root string, r io.Reader, o ApplyOptions) (Applied, error) {
	limits, err := o.Limits.withDefaults()
	if err != nil {
		return Applied{}, err
	}
	if err := o.Form.check(); err != nil {
		return Applied{}, err
	}
	o.Limits = limits
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Applied{}, failed("open directory", root, err)
	}
	a := &applier{
		ctx: ctx, o: o,
		root: os.Geteuid() == 0, euid: uint32(os.Geteuid()), egid: uint32(os.Getegid()),
		dirs: dirs{open: map[string]*dir{}},
		buf:  make([]byte, chunkSize),
	}
	if !a.root {
		a.atLeast = 0o700
	}
	a.lower = lowerStack{paths: o.Parents, marks: o.Form.marks()}
	s := startStream(ctx, r, limits.Bytes)
	defer s.close()
	a.stream = s
	var out Applied
	ownUmask(func(exact bool) {
		a.exactModes = exact
		out, err = a.run(fd)
	})
	return out, err
}

// ownUmask calls do on a thread that has a umask of its own, which is zero, so
// that files get their mode when they are made. Where that is not allowed do
// is told so.
func ownUmask(do func(exact bool)) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		exact := unix.Unshare(unix.CLONE_FS) == nil
		if exact {
			// The thread ends with this goroutine, as it stays locked.
			unix.Umask(0)
		} else {
			runtime.UnlockOSThread()
		}
		do(exact)
	}()
	<-done
}

// applier applies one layer.
type applier struct {
	ctx    context.Context //nolint:containedctx // of the one call that the applier lives for
	o      ApplyOptions
	stream *stream
	tar    *tar.Reader
	dirs   dirs
	lower  lowerStack
	out    Applied
	buf    []byte

	root       bool
	euid, egid uint32
	atLeast    uint32 // rights that a directory has while it is worked in
	exactModes bool   // no umask

	// mine holds hashes of the paths that the layer has something at, where
	// that cannot be told from the directory itself: in a tree that was not
	// empty.
	mine map[uint64]struct{}
	seed maphash.Seed

	later  []pendingLink
	behind *behind
	copier fsat.Copier
}

func (a *applier) overlay() bool { return a.o.Form != Plain }

// mark notes that the layer has something at p.
func (a *applier) mark(p string) {
	if a.mine != nil {
		a.mine[maphash.String(a.seed, p)] = struct{}{}
	}
}

func (a *applier) markIn(at *dir, name string) {
	if a.mine != nil {
		a.mark(join(at.path, name))
	}
}

// markAll marks a path and the directories above it.
func (a *applier) markAll(p string) {
	for a.mine != nil && p != "" {
		a.mark(p)
		p, _ = split(p)
	}
}

// own says whether what is at p is of this layer.
func (a *applier) own(p string) bool {
	if a.mine == nil {
		return true
	}
	_, ok := a.mine[maphash.String(a.seed, p)]
	return ok
}

// count counts one entry against the limit.
func (a *applier) count() error {
	if a.out.Entries++; a.out.Entries > a.o.Limits.Entries {
		return exhausted("the layer has more than %d entries", a.o.Limits.Entries)
	}
	return nil
}

func (a *applier) run(fd int) (_ Applied, err error) {
	top := &dir{fd: fd}
	if err := a.adopt(top, noMode); err != nil {
		fsat.Close(fd)
		return Applied{}, err
	}
	a.dirs.open[""] = top
	a.dirs.front(top)
	a.behind = a.startBehind()
	defer func() {
		if berr := a.behind.end(); err == nil {
			err = berr
		}
		err = errors.Join(err, a.dirs.closeAll(err == nil))
		a.lower.close()
	}()
	if !a.overlay() {
		names, err := fsat.Names(fd, make([]byte, 4<<10), nil)
		if err != nil {
			return Applied{}, failed("read directory", "", err)
		}
		if len(names) > 0 {
			a.mine, a.seed = map[uint64]struct{}{}, maphash.MakeSeed()
		}
	}
	if err := a.entries(); err != nil {
		return Applied{}, err
	}
	if err := a.linkLater(); err != nil {
		return Applied{}, err
	}
	a.out.DiffID, a.out.Size, err = a.stream.finish()
	return a.out, err
}

func (a *applier) entries() error {
	a.tar = tar.NewReader(a.stream)
	for {
		if a.ctx.Err() != nil {
			return context.Cause(a.ctx)
		}
		if err := a.behind.err(); err != nil {
			return err
		}
		h, err := a.tar.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return badArchive(a.stream, err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue // nothing in it is about files
		}
		if err := a.entry(h); err != nil {
			return entryError(h.Name, err)
		}
	}
}

const (
	whiteoutPrefix = ".wh."
	metaPrefix     = ".wh..wh."
	opaqueName     = ".wh..wh..opq"
)

// entry applies one entry.
func (a *applier) entry(h *tar.Header) error {
	if err := a.count(); err != nil {
		return err
	}
	if len(h.Name) > a.o.Limits.NameBytes {
		return invalid("the name is longer than %d bytes", a.o.Limits.NameBytes)
	}
	name := clean(h.Name)
	if name == "" {
		return nil // the root is no part of a layer
	}
	up, base := split(name)
	if strings.Contains(name, whiteoutPrefix) {
		done, err := a.special(up, base)
		if done || err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		return a.file(up, base, h)
	case tar.TypeDir:
		return a.directory(up, base, h)
	case tar.TypeSymlink:
		return a.symlink(up, base, h)
	case tar.TypeLink:
		return a.link(up, base, h)
	case tar.TypeFifo, tar.TypeChar, tar.TypeBlock:
		return a.node(up, base, h)
	}
	return invalid("entries of type %q are no part of a layer", string(h.Typeflag))
}

// directory makes a directory, or gives one that is there the entry's
// attributes.
func (a *applier) directory(up, base string, h *tar.Header) error {
	want, err := a.attributes(h)
	if err != nil {
		return err
	}
	at, err := a.parent(up)
	if err != nil {
		return err
	}
	p := join(at.path, base)
	if d := a.dirs.get(p); d != nil {
		a.mark(p)
		return a.setDirAttributes(d, want)
	}
	d, err := a.makeDir(at, base, want.mode)
	if !errors.Is(err, unix.EEXIST) {
		if err != nil {
			return failed("make directory", p, err)
		}
		return a.setDirAttributes(d, want)
	}
	d, err = a.openDir(at, base)
	switch {
	case err == nil:
		a.mark(p)
		return a.setDirAttributes(d, want)
	case !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP):
		return failed("open directory", p, err)
	}
	if err := a.clear(at, base); err != nil {
		return err
	}
	if d, err = a.makeDir(at, base, want.mode); err != nil {
		return failed("make directory", p, err)
	}
	// What was there hid the directory below, and that is still hidden.
	if a.overlay() {
		if err := a.setOpaque(d); err != nil {
			return err
		}
	}
	return a.setDirAttributes(d, want)
}

// clear removes what is at name with all below it.
func (a *applier) clear(at *dir, name string) error {
	p := join(at.path, name)
	a.dirs.forget(p)
	at.changed = true
	if err := fsat.RemoveAll(at.fd, name); err != nil {
		return failed("replace", p, err)
	}
	return nil
}

// make calls do, which makes name, again if something had to be removed first.
func (a *applier) make(at *dir, name string, do func() error) error {
	err := do()
	if errors.Is(err, unix.EEXIST) {
		if err := a.clear(at, name); err != nil {
			return err
		}
		err = do()
	}
	if err != nil {
		return failed("make", join(at.path, name), err)
	}
	at.changed = true
	a.markIn(at, name)
	return nil
}

func (a *applier) symlink(up, base string, h *tar.Header) error {
	want, err := a.attributes(h)
	if err != nil {
		return err
	}
	if h.Linkname == "" {
		return invalid("a symbolic link without a target")
	}
	at, err := a.parent(up)
	if err != nil {
		return err
	}
	err = a.make(at, base, func() error { return unix.Symlinkat(h.Linkname, at.fd, base) })
	if err != nil {
		return err
	}
	return a.setNodeAttributes(at, base, want, true)
}

// node makes a FIFO or a device.
func (a *applier) node(up, base string, h *tar.Header) error {
	want, err := a.attributes(h)
	if err != nil {
		return err
	}
	kind, dev := uint32(unix.S_IFIFO), 0
	if h.Typeflag != tar.TypeFifo {
		switch a.o.Devices {
		case DevicesSkipped:
			a.out.Skipped.Devices++
			return nil
		case DevicesMade:
		default:
			return refused("device nodes are not allowed here")
		}
		// What the kernel's numbers have room for (MINORBITS).
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return invalid("there is no device %d:%d", h.Devmajor, h.Devminor)
		}
		kind = unix.S_IFBLK
		if h.Typeflag == tar.TypeChar {
			kind = unix.S_IFCHR
			if h.Devmajor == 0 && h.Devminor == 0 {
				return invalid("the device 0:0 is how overlayfs writes a whiteout")
			}
		}
		dev = int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))
	}
	at, err := a.parent(up)
	if err != nil {
		return err
	}
	err = a.make(at, base, func() error { return unix.Mknodat(at.fd, base, kind|want.mode&0o777, dev) })
	if err != nil {
		return err
	}
	return a.setNodeAttributes(at, base, want, false)
}

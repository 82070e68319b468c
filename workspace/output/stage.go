package output

import (
	"context"
	"errors"
	"io"
	"os"
	"path"

	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
	"github.com/lamina-build/lamina/workspace/source"
)

// stage copies every output that is not at its destination yet to a name
// beside it.
func (c *collector) stage(ctx context.Context) error {
	for _, j := range c.jobs {
		if err := c.openParent(j); err != nil {
			return err
		}
		flags := unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC
		if j.isDir() {
			flags |= unix.O_DIRECTORY
		}
		in, err := pathrs.Reopen(j.from, flags)
		if err != nil {
			return fsat.Error("open output", j.spec.Path, err)
		}
		if j.isDir() {
			err = c.stageDir(ctx, j, in)
		} else {
			err = c.stageFile(ctx, j, in)
		}
		if cerr := in.Close(); err == nil && cerr != nil {
			err = fsat.Error("close output", j.spec.Path, cerr)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *collector) stageFile(ctx context.Context, j *job, in *os.File) error {
	var err error
	if j.same, err = c.sameFile(ctx, j, in); j.same || err != nil {
		return err
	}
	temp := fsat.TempName()
	out, err := fsat.OpenAt(j.parent.Fd(), temp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return j.fail("make destination", err)
	}
	j.temp = temp
	err = c.copyFile(ctx, j, out, int(in.Fd()))
	if cerr := unix.Close(out); err == nil && cerr != nil {
		err = j.fail("write destination", cerr)
	}
	return err
}

func (c *collector) copyFile(ctx context.Context, j *job, out, in int) error {
	err := c.copier.Copy(ctx, out, in, j.st.Size, nil)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return &source.ChangedError{Path: j.spec.Path}
	}
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return j.fail("write destination", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(in, &st); err != nil {
		return fsat.Error("stat output", j.spec.Path, err)
	}
	if st.Size != j.st.Size || st.Mtim != j.st.Mtim || st.Ctim != j.st.Ctim {
		return &source.ChangedError{Path: j.spec.Path}
	}
	c.result.Bytes += st.Size
	return c.setAttrs(j, out, in)
}

func (c *collector) stageDir(ctx context.Context, j *job, in *os.File) error {
	tree, err := source.Scan(ctx, fsat.ProcPath(int(in.Fd())), source.Options{}, nil)
	if err != nil {
		return j.fail("read the directory", err)
	}
	if j.same, err = c.sameDir(ctx, j, in, tree); j.same || err != nil {
		return err
	}
	temp := fsat.TempName()
	if err := unix.Mkdirat(j.parent.Fd(), temp, 0o700); err != nil {
		return j.fail("make destination", err)
	}
	j.temp = temp
	out, err := fsat.OpenAt(j.parent.Fd(), temp, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return j.fail("open destination", err)
	}
	defer fsat.Close(out)
	r, err := tree.SyncTo(ctx, fsat.ProcPath(int(in.Fd())), fsat.ProcPath(out), nil, nil)
	if err != nil {
		return j.fail("copy the directory", err)
	}
	c.result.Bytes += r.Bytes
	for _, n := range r.Notes {
		n.Path = path.Join(j.spec.Path, n.Path)
		c.result.Notes = append(c.result.Notes, n)
	}
	return c.setAttrs(j, out, int(in.Fd()))
}

// setAttrs gives the copy the output's own owner, attributes, mode and time.
func (c *collector) setAttrs(j *job, out, in int) error {
	note := func(reason string) {
		c.result.Notes = append(c.result.Notes, source.Note{Path: j.spec.Path, Reason: reason})
	}
	if c.asRoot {
		err := unix.Fchown(out, int(j.st.Uid), int(j.st.Gid))
		switch {
		case errors.Is(err, unix.EPERM), errors.Is(err, unix.EINVAL):
			note("owner not kept: " + err.Error())
		case err != nil:
			return j.fail("set owner at destination", err)
		}
	}
	xattrs, err := fsat.Xattrs(in, false, c.asRoot)
	if err != nil {
		return fsat.Error("read extended attributes of output", j.spec.Path, err)
	}
	refused, err := fsat.SetXattrs(out, false, xattrs, c.asRoot)
	if err != nil {
		return j.fail("set extended attributes at destination", err)
	}
	for _, r := range refused {
		note(r)
	}
	if err := unix.Fchmod(out, j.st.Mode&0o7777); err != nil {
		return j.fail("set mode at destination", err)
	}
	return j.fail("set time at destination", fsat.SetMtime(out, "", j.st.Mtim.Sec, j.st.Mtim.Nsec))
}

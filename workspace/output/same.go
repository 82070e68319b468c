package output

import (
	"bytes"
	"context"
	"iter"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
	"github.com/lamina-build/lamina/workspace/source"
)

// sameFile says whether the destination is already as the output, but for its
// time. What cannot be read is not the same.
func (c *collector) sameFile(ctx context.Context, j *job, in *os.File) (bool, error) {
	fd, ok := c.openSame(j, fsat.ForReading)
	if !ok {
		return false, nil
	}
	defer fsat.Close(fd)
	var a, b [128 << 10]byte
	for pos := int64(0); ; {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		n, err := fsat.Pread(int(in.Fd()), a[:], pos)
		if err != nil {
			return false, fsat.Error("read output", j.spec.Path, err)
		}
		m, err := readFull(fd, b[:n], pos)
		if err != nil || m != n || !bytes.Equal(a[:n], b[:n]) {
			return false, nil
		}
		if n == 0 {
			return c.sameXattrs(j, int(in.Fd()), fd)
		}
		pos += int64(n)
	}
}

// openSame opens the destination if what stat shows of it is as the output.
func (c *collector) openSame(j *job, flags int) (int, bool) {
	fd, err := fsat.OpenAt(j.parent.Fd(), j.base, flags, 0)
	if err != nil {
		return -1, false
	}
	var st unix.Stat_t
	same := unix.Fstat(fd, &st) == nil && st.Mode == j.st.Mode &&
		(j.isDir() || st.Size == j.st.Size) &&
		(!c.asRoot || st.Uid == j.st.Uid && st.Gid == j.st.Gid)
	if !same {
		fsat.Close(fd)
	}
	return fd, same
}

func readFull(fd int, buf []byte, pos int64) (int, error) {
	done := 0
	for done < len(buf) {
		n, err := fsat.Pread(fd, buf[done:], pos+int64(done))
		if n == 0 || err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func (c *collector) sameXattrs(j *job, in, out int) (bool, error) {
	want, err := fsat.Xattrs(in, false, c.asRoot)
	if err != nil {
		return false, fsat.Error("read extended attributes of output", j.spec.Path, err)
	}
	have, err := fsat.Xattrs(out, false, c.asRoot)
	return err == nil && fsat.EqualXattrs(have, want), nil
}

// sameDir is sameFile for a directory with all that is in it.
func (c *collector) sameDir(ctx context.Context, j *job, in *os.File, tree *source.Tree) (bool, error) {
	fd, ok := c.openSame(j, unix.O_RDONLY|unix.O_DIRECTORY)
	if !ok {
		return false, nil
	}
	defer fsat.Close(fd)
	if same, err := c.sameXattrs(j, int(in.Fd()), fd); !same || err != nil {
		return false, err
	}
	there, err := source.Scan(ctx, fsat.ProcPath(fd), source.Options{}, nil)
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	// Something that a tree does not hold is something the output has not.
	if err != nil || len(there.Notes()) > 0 || there.Len() != tree.Len() || there.Digest() != tree.Digest() {
		return false, nil
	}
	next, stop := iter.Pull(there.Entries())
	defer stop()
	for want := range tree.Entries() {
		have, ok := next()
		if !ok || have.Hardlink != want.Hardlink || !slices.EqualFunc(have.Xattrs, want.Xattrs, sameXattr) ||
			c.asRoot && (have.UID != want.UID || have.GID != want.GID) {
			return false, nil
		}
	}
	return true, nil
}

func sameXattr(a, b source.Xattr) bool { return a.Name == b.Name && bytes.Equal(a.Value, b.Value) }

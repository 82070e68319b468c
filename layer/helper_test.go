package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/containerd/continuity/sysx"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/layer"
)

// tb is what the helpers want of a test; rapid's are such, too.
type tb interface {
	require.TestingT
	Helper()
	Cleanup(func())
	Context() context.Context
}

// needRoot skips tests of what an ordinary user may not do.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// ent is an entry of a tar made by a test.
type ent struct {
	name, link string
	typ        byte
	body       string
	mode       int64
	uid, gid   int
	mtime      time.Time
	pax        map[string]string
	major      int64
	minor      int64
}

var someTime = time.Unix(1_600_000_000, 123_456_789)

func file(name, body string) ent { return ent{name: name, typ: tar.TypeReg, body: body, mode: 0o644} }
func directory(name string) ent  { return ent{name: name, typ: tar.TypeDir, mode: 0o755} }
func symlink(name, to string) ent {
	return ent{name: name, typ: tar.TypeSymlink, link: to, mode: 0o777}
}

func hardlink(name, to string) ent { return ent{name: name, typ: tar.TypeLink, link: to, mode: 0o644} }

func whiteout(name string) ent {
	dir, base := filepath.Split(name)
	return ent{name: dir + ".wh." + base, typ: tar.TypeReg}
}
func opaque(dir string) ent { return ent{name: dir + "/.wh..wh..opq", typ: tar.TypeReg} }

// pack makes a tar.
func pack(t tb, entries ...ent) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{
			Format: tar.FormatPAX, Typeflag: e.typ, Name: e.name, Linkname: e.link, Mode: e.mode, Uid: e.uid, Gid: e.gid,
			ModTime: e.mtime, PAXRecords: e.pax, Size: int64(len(e.body)), Devmajor: e.major, Devminor: e.minor,
		}
		if e.mtime.IsZero() {
			h.ModTime = someTime
		}
		require.NoError(t, w.WriteHeader(h), e.name)
		_, err := w.Write([]byte(e.body))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

// apply applies a tar that has to apply.
func apply(t tb, dir string, tarball []byte, o layer.ApplyOptions) layer.Applied {
	t.Helper()
	out, err := layer.Apply(t.Context(), dir, bytes.NewReader(tarball), o)
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("sha256:%x", sha256.Sum256(tarball)), out.DiffID.String())
	require.EqualValues(t, len(tarball), out.Size)
	return out
}

// dumpOptions say what a dump leaves out.
type dumpOptions struct {
	noTimes, noDirTimes, noUser, raw bool
}

// dump lists a tree: a line for each file, with all that a layer can carry.
// Link groups are numbered in the order of their first names.
func dump(t tb, root string, o dumpOptions) []string {
	t.Helper()
	out := []string{}
	groups := map[uint64]int{}
	require.NoError(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil || rel == "." {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%q %06o %d:%d", rel, st.Mode, st.Uid, st.Gid)
		if !o.noTimes && !(o.noDirTimes && d.IsDir()) {
			line += fmt.Sprintf(" t=%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d bytes %.16x", len(b), sha256.Sum256(b))
		case unix.S_IFLNK:
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" -> %q", to)
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if st.Nlink > 1 && !d.IsDir() {
			if _, ok := groups[st.Ino]; !ok {
				groups[st.Ino] = len(groups)
			}
			line += fmt.Sprintf(" group%d", groups[st.Ino])
		}
		names, err := sysx.LListxattr(p)
		if err != nil {
			return err
		}
		sort.Strings(names)
		for _, n := range names {
			if o.noUser && strings.HasPrefix(n, "user.") || !o.raw && (strings.Contains(n, ".overlay.") || n == "security.selinux") {
				continue
			}
			v, err := sysx.LGetxattr(p, n)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s=%q", n, v)
		}
		out = append(out, line)
		return nil
	}))
	return out
}

// names lists a tree by its names.
func names(t tb, root string) []string {
	t.Helper()
	out := []string{}
	require.NoError(t, filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if d.IsDir() {
			rel += "/"
		}
		out = append(out, rel)
		return err
	}))
	return out
}

func content(t tb, elem ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(elem...))
	require.NoError(t, err)
	return string(b)
}

// listing lists the entries of a tar.
func listing(t tb, tarball []byte) []string {
	t.Helper()
	out := []string{}
	r := tar.NewReader(bytes.NewReader(tarball))
	for {
		h, err := r.Next()
		if err != nil {
			require.ErrorContains(t, err, "EOF")
			return out
		}
		line := h.Name
		if h.Linkname != "" {
			line += " -> " + h.Linkname
		}
		out = append(out, line)
	}
}

// write writes a layer that can be written.
func write(t tb, src layer.Source, o layer.WriteOptions) []byte {
	t.Helper()
	var b bytes.Buffer
	out, err := layer.Write(t.Context(), &b, src, o)
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("sha256:%x", sha256.Sum256(b.Bytes())), out.DiffID.String())
	require.EqualValues(t, b.Len(), out.Size)
	return b.Bytes()
}

package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/layer"
)

// mine is for tests that anybody can run.
func mine() layer.ApplyOptions {
	o := layer.ApplyOptions{Devices: layer.DevicesSkipped}
	if os.Geteuid() != 0 {
		o.Owners = layer.OwnersCaller
	}
	return o
}

func TestApplyMakesWhatTheEntriesSay(t *testing.T) {
	needRoot(t)
	dir := mkdir(t)
	b := pack(t,
		directory("d/"), file("d/a", "hello"), symlink("d/l", "a"), hardlink("h", "d/a"), file("x/y/z", "deep"),
		ent{name: "suid", typ: tar.TypeReg, mode: 0o4755, uid: 7, gid: 8, pax: map[string]string{
			"SCHILY.xattr.user.k": "v", "SCHILY.xattr.trusted.k": "no", "SCHILY.xattr.security.selinux": "no",
			"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.overlay.opaque": "y",
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		}},
		ent{name: "fifo", typ: tar.TypeFifo, mode: 0o622, pax: map[string]string{"SCHILY.xattr.user.k": "v"}},
		ent{name: "sticky", typ: tar.TypeDir, mode: 0o3777, uid: 3, gid: 4, mtime: time.Unix(-7, 5)},
		ent{name: "dev", typ: tar.TypeChar, mode: 0o600, major: 1, minor: 3},
		ent{name: "big", typ: tar.TypeReg, mode: 0o600, uid: 3_000_000_000, mtime: time.Unix(5_000_000_000, 1)},
	)
	out := apply(t, dir, b, layer.ApplyOptions{Devices: layer.DevicesMade})
	require.EqualValues(t, 12, out.Entries)
	require.EqualValues(t, 9, out.Bytes)
	require.Equal(t, layer.Skipped{Xattrs: 5}, out.Skipped)
	const at = "t=1600000000.123456789"
	require.Equal(t, []string{
		`"big" 100600 3000000000:0 t=5000000000.000000001 0 bytes e3b0c44298fc1c149afbf4c8996fb924`,
		`"d" 040755 0:0 ` + at,
		`"d/a" 100644 0:0 ` + at + ` 5 bytes 2cf24dba5fb0a30e26e83b2ac5b9e29e group0`,
		`"d/l" 120777 0:0 ` + at + ` -> "a"`,
		`"dev" 020600 0:0 ` + at + ` 1:3`,
		`"fifo" 010622 0:0 ` + at,
		`"h" 100644 0:0 ` + at + ` 5 bytes 2cf24dba5fb0a30e26e83b2ac5b9e29e group0`,
		`"sticky" 043777 3:4 t=-7.000000005`,
		`"suid" 104755 7:8 ` + at + ` 0 bytes e3b0c44298fc1c149afbf4c8996fb924` +
			` security.capability="\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" user.k="v"`,
		`"x" 040755 0:0 t=0.000000000`,
		`"x/y" 040755 0:0 t=0.000000000`,
		`"x/y/z" 100644 0:0 ` + at + ` 4 bytes 74611c1d6455b534323a21f8133a6f43`,
	}, dump(t, dir, dumpOptions{}))
}

// TestRightsOfTheCaller sees that neither the umask nor what a directory hands
// down gets into a file, and that the umask is as it was.
func TestRightsOfTheCaller(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	dir := mkdir(t)
	require.NoError(t, os.Chmod(dir, 0o2755))
	inherited := []byte("\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x02\x00\x07\x00\x01\x00\x00\x00\x04\x00\x07\x00\xff\xff\xff\xff\x10\x00\x07\x00\xff\xff\xff\xff\x20\x00\x07\x00\xff\xff\xff\xff")
	if err := unix.Setxattr(dir, "system.posix_acl_default", inherited, 0); err != nil {
		t.Log("without default ACLs:", err)
	}
	apply(t, dir, pack(t, file("f", "1"), directory("d"), file("d/g", "2"), file("i/j", "3"), ent{name: "p", typ: tar.TypeFifo, mode: 0o666}), mine())
	for _, line := range dump(t, dir, dumpOptions{noTimes: true}) {
		require.NotContains(t, line, "posix_acl", line)
		require.NotContains(t, line, "042", line)
	}
	for name, mode := range map[string]uint32{"f": 0o644, "d": 0o755, "d/g": 0o644, "i": 0o755, "p": 0o666} {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(dir, name), &st))
		require.Equal(t, mode, st.Mode&0o7777, name)
	}
	require.Equal(t, 0o077, unix.Umask(0o077))
}

func TestHiding(t *testing.T) {
	base := pack(t, directory("d"), file("d/a", "1"), file("d/b", "2"), file("d/s/x", "3"), file("d/s/y", "4"), file("e/x", "5"), file("f", "6"))
	for _, tt := range []struct {
		name    string
		entries []ent
		want    []string
	}{
		{"whiteout of a file", []ent{whiteout("f")}, []string{"d/", "d/a", "d/b", "d/s/", "d/s/x", "d/s/y", "e/", "e/x"}},
		{"whiteout of a directory", []ent{whiteout("d")}, []string{"e/", "e/x", "f"}},
		{"whiteout of nothing", []ent{whiteout("none"), whiteout("n/o/ne"), whiteout("d")}, []string{"e/", "e/x", "f", "n/", "n/o/"}},
		{"opaque first", []ent{opaque("d"), file("d/new", "")}, []string{"d/", "d/new", "e/", "e/x", "f"}},
		{"opaque last", []ent{file("d/new", ""), file("d/s/new", ""), opaque("d")}, []string{"d/", "d/new", "d/s/", "d/s/new", "e/", "e/x", "f"}},
		{"opaque twice", []ent{opaque("d"), file("d/s/new", ""), opaque("d"), opaque("d/s")}, []string{"d/", "d/s/", "d/s/new", "e/", "e/x", "f"}},
		{"opaque root", []ent{file("d/a", ""), {name: ".wh..wh..opq", typ: tar.TypeReg}}, []string{"d/", "d/a"}},
		{"opaque of nothing", []ent{opaque("new")}, []string{"d/", "d/a", "d/b", "d/s/", "d/s/x", "d/s/y", "e/", "e/x", "f", "new/"}},
		{"whiteout, then the same name", []ent{whiteout("d"), file("d/new", ""), whiteout("f"), file("f", "")}, []string{"d/", "d/new", "e/", "e/x", "f"}},
		{"the same name, then its whiteout", []ent{file("d/new", ""), whiteout("d"), file("f", ""), whiteout("f")}, []string{"d/", "d/new", "e/", "e/x", "f"}},
		{"whiteout, then the directory", []ent{whiteout("d"), directory("d"), whiteout("e"), whiteout("f")}, []string{"d/"}},
		{"file, then the directory", []ent{file("d", ""), directory("d"), whiteout("e"), whiteout("f")}, []string{"d/"}},
		{"aufs's own", []ent{{name: ".wh..wh.plnk/1.2", typ: tar.TypeReg}, {name: ".wh..wh.aufs", typ: tar.TypeReg}, whiteout("d"), whiteout("e")}, []string{"f"}},
		{"file for a directory, and back", []ent{file("d", ""), directory("e"), file("f/x", "")}, []string{"d", "e/", "e/x", "f/", "f/x"}},
		{"not in front", []ent{file("f.wh.x", ""), whiteout("d"), whiteout("e"), whiteout("f")}, []string{"f.wh.x"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := mkdir(t)
			apply(t, dir, base, mine())
			apply(t, dir, pack(t, tt.entries...), mine())
			require.Equal(t, tt.want, names(t, dir))
			if os.Getenv(envPrivate) == "" {
				return // cannot mount
			}
			for _, form := range []layer.Form{layer.OverlayTrusted, layer.OverlayUser} {
				lower, upper := mkdir(t), mkdir(t)
				apply(t, lower, base, layer.ApplyOptions{Form: form})
				apply(t, upper, pack(t, tt.entries...), layer.ApplyOptions{Form: form, Parents: []string{lower}})
				overlay(t, form, []string{upper, lower}, "", func(root string) {
					require.Equal(t, tt.want, names(t, root))
				})
			}
		})
	}
}

// TestOddNamesAndLinks has what engines agree on about names.
func TestOddNamesAndLinks(t *testing.T) {
	for _, tt := range []struct {
		name    string
		entries []ent
		want    []string
		read    [2]string
	}{
		{"absolute and dotted", []ent{file("/a", ""), file("./b", ""), file("x/../c", ""), file("../../d", ""), file("e//f", "")}, []string{"a", "b", "c", "d", "e/", "e/f"}, [2]string{}},
		{"the root itself", []ent{directory("./"), directory("/"), symlink("..", "/etc"), file("", ""), file("a", "")}, []string{"a"}, [2]string{}},
		{"last wins", []ent{file("a", "1"), file("a", "2"), directory("b"), file("b/c", "3"), symlink("b", "a")}, []string{"a", "b"}, [2]string{"b", "2"}},
		{"bytes", []ent{file("\xff\n\x01", "")}, []string{"\xff\n\x01"}, [2]string{}},
		{"through a link of the layer", []ent{directory("usr/bin"), symlink("bin", "usr/bin"), file("bin/sh", "x")}, []string{"bin", "usr/", "usr/bin/", "usr/bin/sh"}, [2]string{"usr/bin/sh", "x"}},
		{"through an absolute link", []ent{symlink("l", "/x/../y"), file("l/f", "x")}, []string{"l", "x/", "y/", "y/f"}, [2]string{"y/f", "x"}},
		{"through a link upwards", []ent{directory("a/b"), symlink("a/b/l", "../../../../.."), file("a/b/l/f", "x")}, []string{"a/", "a/b/", "a/b/l", "f"}, [2]string{"f", "x"}},
		{"hard link to a link", []ent{symlink("l", "/etc/passwd"), hardlink("h", "l")}, []string{"h", "l"}, [2]string{}},
		{"hard link before its file", []ent{hardlink("h", "d/f"), hardlink("h2", "h"), file("d/f", "x")}, []string{"d/", "d/f", "h", "h2"}, [2]string{"h2", "x"}},
		{"name of a pending link is taken", []ent{hardlink("h", "f"), file("h", "1"), file("f", "2")}, []string{"f", "h"}, [2]string{"h", "1"}},
		{"hard link to itself", []ent{file("f", "x"), hardlink("f", "f"), hardlink("g", "../f"), hardlink("g", "f")}, []string{"f", "g"}, [2]string{"g", "x"}},
		{"link over a directory", []ent{file("d/f", "x"), file("f", "y"), hardlink("d", "f")}, []string{"d", "f"}, [2]string{"d", "y"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := mkdir(t)
			apply(t, dir, pack(t, tt.entries...), mine())
			require.Equal(t, tt.want, names(t, dir))
			if tt.read[0] != "" {
				require.Equal(t, tt.read[1], content(t, dir, tt.read[0]))
			}
		})
	}
}

// TestLinksBelowAreNotFollowed: what a lower layer has as a link, the layer
// has as a directory.
func TestLinksBelowAreNotFollowed(t *testing.T) {
	outside := mkdir(t)
	require.NoError(t, os.WriteFile(filepath.Join(outside, "keep"), nil, 0o600))
	dir := mkdir(t)
	apply(t, dir, pack(t, symlink("l", outside), symlink("m", outside), symlink("w", outside), file("f", "")), mine())
	apply(t, dir, pack(t, file("l/new", ""), opaque("m"), whiteout("w/keep"), file("f/g", "")), mine())
	require.Equal(t, []string{"f/", "f/g", "l/", "l/new", "m/", "w/"}, names(t, dir))
	require.Equal(t, []string{"keep"}, names(t, outside))
}

func TestLayersThatAreRefused(t *testing.T) {
	long := strings.Repeat("n", 256)
	for _, tt := range []struct {
		name    string
		entries []ent
		class   func(error) bool
		entry   string
	}{
		{"whiteout of the parent", []ent{{name: "d/.wh...", typ: tar.TypeReg}}, errdefs.IsInvalidArgument, "d/.wh..."},
		{"whiteout of the directory", []ent{{name: "d/.wh..", typ: tar.TypeReg}}, errdefs.IsInvalidArgument, "d/.wh.."},
		{"whiteout of nothing", []ent{{name: ".wh.", typ: tar.TypeReg}}, errdefs.IsInvalidArgument, ".wh."},
		{"directory with a whiteout's name", []ent{file(".wh.d/f", "")}, errdefs.IsInvalidArgument, ".wh.d/f"},
		{"device", []ent{{name: "sda", typ: tar.TypeBlock, major: 8}}, errdefs.IsPermissionDenied, "sda"},
		{"below a file of its own", []ent{file("f", ""), file("f/g", "")}, errdefs.IsInvalidArgument, "f/g"},
		{"links in a circle", []ent{symlink("a", "b"), symlink("b", "a"), file("a/f", "")}, errdefs.IsInvalidArgument, "a/f"},
		{"hard link to nothing", []ent{hardlink("h", "none")}, errdefs.IsInvalidArgument, "h"},
		{"hard link to a directory", []ent{directory("d"), hardlink("h", "d")}, errdefs.IsInvalidArgument, "h"},
		{"hard link to the root", []ent{hardlink("h", "/")}, errdefs.IsInvalidArgument, "h"},
		{"hard link in the place of its target", []ent{file("d/f", ""), hardlink("d", "d/f")}, errdefs.IsInvalidArgument, "d"},
		{"link to nothing", []ent{symlink("s", "")}, errdefs.IsInvalidArgument, "s"},
		{"long name", []ent{file(long, "")}, errdefs.IsInvalidArgument, long},
		{"long path", []ent{file(strings.Repeat("d/", 2047)+"ff", "")}, errdefs.IsInvalidArgument, strings.Repeat("d/", 2047) + "ff"},
		{"long target", []ent{symlink("s", strings.Repeat("d/", 2048))}, errdefs.IsInvalidArgument, "s"},
		{"unknown type", []ent{{name: "v", typ: 'V'}}, errdefs.IsInvalidArgument, "v"},
		{"too large a file", []ent{file("f", strings.Repeat("x", 5001))}, errdefs.IsResourceExhausted, "f"},
		{"too much", []ent{file("f", strings.Repeat("x", 5000)), file("g", strings.Repeat("x", 5000)), file("h", "xx")}, errdefs.IsResourceExhausted, "h"},
		{"too many", []ent{file("1", ""), file("2", ""), file("3", ""), file("4/4/4", ""), file("5/5/5", "")}, errdefs.IsResourceExhausted, "5/5/5"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := layer.ApplyOptions{
				Owners: layer.OwnersCaller,
				Limits: layer.Limits{Entries: 8, EntryBytes: 5000, Bytes: 10_001, NameBytes: 4095},
			}
			if tt.name != "too much" {
				o.Limits.Bytes = 1 << 20
			}
			parent := mkdir(t)
			dir := filepath.Join(parent, "root")
			require.NoError(t, os.Mkdir(dir, 0o755))
			var b bytes.Buffer
			b.Write(pack(t, tt.entries...))
			if tt.name == "too much" {
				o.Limits.Bytes = int64(b.Len()) // not the stream, but one byte of files
				o.Limits.Bytes = 10_001
				_, err := layer.Apply(t.Context(), dir, io.LimitReader(&b, 9<<10), o)
				require.Error(t, err)
				return
			}
			_, err := layer.Apply(t.Context(), dir, &b, o)
			require.Error(t, err)
			require.True(t, tt.class(err), "%v", err)
			var e *layer.EntryError
			require.ErrorAs(t, err, &e)
			require.Equal(t, tt.entry, e.Name)
			require.Equal(t, []string{"root/"}, names(t, parent)[:1])
		})
	}
}

func TestOwnersThatDoNotExist(t *testing.T) {
	needRoot(t)
	for _, uid := range []int{-1, 1<<32 - 1, 1 << 40} {
		b := pack(t, ent{name: "f", typ: tar.TypeReg, uid: uid})
		_, err := layer.Apply(t.Context(), mkdir(t), bytes.NewReader(b), layer.ApplyOptions{})
		require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
	for _, e := range []ent{
		{name: "d", typ: tar.TypeChar},
		{name: "d", typ: tar.TypeBlock, major: 4096},
		{name: "d", typ: tar.TypeBlock, major: 1, minor: 1 << 20},
	} {
		_, err := layer.Apply(t.Context(), mkdir(t), bytes.NewReader(pack(t, e)), layer.ApplyOptions{Devices: layer.DevicesMade})
		require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	}
}

func TestLimitOfTheStream(t *testing.T) {
	b := append(pack(t, file("f", "x")), make([]byte, 1<<20)...)
	_, err := layer.Apply(t.Context(), mkdir(t), bytes.NewReader(b), layer.ApplyOptions{Owners: layer.OwnersCaller, Limits: layer.Limits{Bytes: 1 << 19}})
	require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
	out := apply(t, mkdir(t), b, mine()) // what follows the end counts for the DiffID
	require.EqualValues(t, len(b), out.Size)
}

// TestSparse: a file of 1 GiB with a byte in it stays small.
func TestSparse(t *testing.T) {
	dir := mkdir(t)
	for name, b := range map[string][]byte{"gnu": gnuSparse(), "pax": paxSparse(t)} {
		apply(t, dir, b, mine())
		var st unix.Stat_t
		require.NoError(t, unix.Stat(filepath.Join(dir, name), &st))
		require.EqualValues(t, 1<<20+3, st.Size, name)
		require.LessOrEqual(t, st.Blocks*512, int64(64<<10), name)
		got := content(t, dir, name)
		require.Equal(t, "abc", got[1<<20:], name)
		require.Equal(t, strings.Repeat("\x00", 1<<20), got[:1<<20], name)
	}
}

// gnuSparse is an archive with a file in GNU's old sparse format.
func gnuSparse() []byte {
	block := make([]byte, 512)
	copy(block, "gnu")
	copy(block[100:], "0000644\x000000000\x000000000\x0000000000003\x0000000000001\x00        S")
	copy(block[257:], "ustar  \x00")
	copy(block[386:], "00004000000\x0000000000003\x00") // offset 1 MiB, three bytes
	copy(block[483:], "00004000003\x00")
	sum := 0
	for _, c := range block {
		sum += int(c)
	}
	copy(block[148:], []byte{byte('0' + sum>>12&7), byte('0' + sum>>9&7), byte('0' + sum>>6&7), byte('0' + sum>>3&7), byte('0' + sum&7), 0, ' '})
	data := make([]byte, 512*3)
	copy(data, "abc")
	return bytes.Join([][]byte{block, data}, nil)
}

// paxSparse is one in the PAX format 1.0, where the map is before the data.
func paxSparse(t *testing.T) []byte {
	body := "1\n1048576\n3\n"
	body += strings.Repeat("\x00", 512-len(body)) + "abc"
	b := pack(t, ent{name: "GNUSparseFile.0/pax", typ: tar.TypeReg, mode: 0o644, body: body, pax: map[string]string{
		"GNU.sparsX.major": "1", "GNU.sparsX.minor": "0", "GNU.sparsX.name": "pax", "GNU.sparsX.realsize": "1048579",
	}})
	return bytes.ReplaceAll(b, []byte("GNU.sparsX."), []byte("GNU.sparse."))
}

// TestTrouble: what the reader, the disk and the caller do comes through.
func TestTrouble(t *testing.T) {
	full := pack(t, file("a", strings.Repeat("x", 100_000)), file("b", "y"))
	t.Run("reader fails", func(t *testing.T) {
		broken := errors.New("broken")
		for _, n := range []int{0, 100, 600, 5000, len(full) - 1} {
			r := io.MultiReader(bytes.NewReader(full[:n]), errReader{broken})
			_, err := layer.Apply(t.Context(), mkdir(t), r, mine())
			require.ErrorIs(t, err, broken)
		}
	})
	t.Run("stream is cut", func(t *testing.T) {
		for _, n := range []int{100, 5000, 50_000} {
			_, err := layer.Apply(t.Context(), mkdir(t), bytes.NewReader(full[:n]), mine())
			require.True(t, errdefs.IsInvalidArgument(err), "%d: %v", n, err)
		}
	})
	t.Run("no tar", func(t *testing.T) {
		_, err := layer.Apply(t.Context(), mkdir(t), strings.NewReader(strings.Repeat("no tar ", 1000)), mine())
		require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("why")
		r := io.MultiReader(bytes.NewReader(full[:5000]), readerFunc(func([]byte) (int, error) {
			cancel(why)
			return 0, io.EOF
		}))
		_, err := layer.Apply(ctx, mkdir(t), r, mine())
		require.Error(t, err)
		_, err = layer.Apply(ctx, mkdir(t), bytes.NewReader(full), mine())
		require.ErrorIs(t, err, why)
	})
	t.Run("no directory", func(t *testing.T) {
		_, err := layer.Apply(t.Context(), filepath.Join(mkdir(t), "none"), bytes.NewReader(full), mine())
		require.True(t, errdefs.IsNotFound(err), "%v", err)
	})
	t.Run("empty", func(t *testing.T) {
		require.EqualValues(t, 0, apply(t, mkdir(t), nil, mine()).Entries)
	})
}

func TestFullDisk(t *testing.T) {
	needMounts(t)
	dir := mkdir(t)
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,mode=755"))
	defer func() { require.NoError(t, unix.Unmount(dir, 0)) }()
	b := pack(t, file("small", "x"), file("d/large", strings.Repeat("x", 4<<20)))
	_, err := layer.Apply(t.Context(), dir, bytes.NewReader(b), mine())
	require.ErrorIs(t, err, unix.ENOSPC)
	require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
	var e *layer.EntryError
	require.ErrorAs(t, err, &e)
	require.Equal(t, "d/large", e.Name)

	// The same of files that are written behind, even if it is the last one.
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "d")))
	var small []ent
	for i := range 20 {
		small = append(small, file(fmt.Sprintf("some/%d", i), strings.Repeat("x", 60<<10)))
	}
	for _, n := range []int{18, 20} {
		_, err = layer.Apply(t.Context(), dir, bytes.NewReader(pack(t, small[:n]...)), mine())
		require.ErrorIs(t, err, unix.ENOSPC, "%d files", n)
		require.ErrorAs(t, err, &e)
		require.Regexp(t, "^some/", e.Name)
		require.NoError(t, os.RemoveAll(filepath.Join(dir, "some")))
	}
	apply(t, dir, pack(t, small[:16]...), mine())
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

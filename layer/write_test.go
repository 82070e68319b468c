package layer_test

import (
	"archive/tar"
	"bytes"
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

// TestWhatIsWritten looks at each header.
func TestWhatIsWritten(t *testing.T) {
	needRoot(t)
	dir := mkdir(t)
	apply(t, dir, pack(t,
		file("b/x", "text"), hardlink("a", "b/x"), symlink("c", "b"), directory("b-c"),
		ent{name: "d", typ: tar.TypeReg, uid: 5, gid: 6, mode: 0o4755, mtime: time.Unix(10, 5), pax: map[string]string{"SCHILY.xattr.user.k": "v"}},
	), layer.ApplyOptions{})
	require.NoError(t, unix.Setxattr(filepath.Join(dir, "b"), "trusted.secret", []byte("x"), 0))
	require.NoError(t, unix.Mknod(filepath.Join(dir, "socket"), unix.S_IFSOCK, 0))
	epoch := time.Unix(1_000, 7)
	b := write(t, layer.Trees{Upper: dir}, layer.WriteOptions{SourceDateEpoch: &epoch})
	var got []string
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		require.Empty(t, h.Uname+h.Gname)
		got = append(got, fmt.Sprintf("%s %c %04o %d:%d %d.%d %d %s %v", h.Name, h.Typeflag, h.Mode, h.Uid, h.Gid, h.ModTime.Unix(), h.ModTime.Nanosecond(), h.Size, h.Linkname, h.PAXRecords))
	}
	require.Equal(t, []string{
		"a 0 0644 0:0 1000.0 4  map[]",
		"b/ 5 0755 0:0 0.0 0  map[]",
		"b/x 1 0644 0:0 1000.0 0 a map[]",
		"b-c/ 5 0755 0:0 1000.0 0  map[]",
		"c 2 0777 0:0 1000.0 0 b map[]",
		"d 0 4755 5:6 10.0 0  map[SCHILY.xattr.user.k:v]",
	}, got)
	// Six headers, one block of content, two of an attribute, two at the end.
	require.Len(t, b, (6+1+2+2)*512)
}

// TestMarksOfAnUpperDirectory has the marks that no mount here makes.
func TestMarksOfAnUpperDirectory(t *testing.T) {
	needRoot(t)
	set := func(name, value string, elem ...string) {
		t.Helper()
		require.NoError(t, unix.Lsetxattr(filepath.Join(elem...), name, []byte(value), 0))
	}
	upper, lower := mkdir(t), mkdir(t)
	apply(t, lower, pack(t, directory("d"), directory("e"), directory("f"), directory("g/h"), file("i", "")), layer.ApplyOptions{})
	apply(t, upper, pack(t, file("d/gone", ""), file("d/full", "x"), file("d/none", ""), directory("e"), directory("g/h"), directory("new"), file("i/j", "")), layer.ApplyOptions{})
	set("trusted.overlay.opaque", "x", upper, "d") // holds whiteouts that are attributes
	for _, n := range []string{"gone", "full"} {
		set("trusted.overlay.whiteout", "", upper, "d", n)
	}
	set("trusted.overlay.opaque", "y", upper, "e")
	set("trusted.overlay.opaque", "y", upper, "new")
	set("trusted.overlay.opaque", "y", upper, "i")
	set("trusted.overlay.origin", "", upper, "g")
	require.NoError(t, unix.Mknod(filepath.Join(upper, "e", "w"), unix.S_IFCHR, 0))
	require.NoError(t, unix.Mknod(filepath.Join(upper, "z"), unix.S_IFCHR, 0))
	require.NoError(t, unix.Mknod(filepath.Join(upper, "i", "socket"), unix.S_IFSOCK, 0))
	src := layer.Upper{Dir: upper, Form: layer.OverlayTrusted, Parents: []string{lower}}
	b := write(t, src, layer.WriteOptions{})
	require.Equal(t, []string{".wh.z", "d/", "d/.wh.gone", "d/full", "d/none", "e/", "e/.wh..wh..opq", "i/", "i/j", "new/"}, listing(t, b))
	require.NotContains(t, string(b), "overlay")
	// Without the layers below all marks are written, and all directories.
	src.Parents = nil
	require.Equal(t, []string{
		".wh.z", "d/", "d/.wh.gone", "d/full", "d/none", "e/", "e/.wh..wh..opq", "g/", "g/h/",
		"i/", "i/.wh..wh..opq", "i/j", "new/", "new/.wh..wh..opq",
	}, listing(t, write(t, src, layer.WriteOptions{})))
	for _, mark := range []string{"redirect", "metacopy"} {
		set("trusted.overlay."+mark, "/x", upper, "d", "full")
		_, err := layer.Write(t.Context(), io.Discard, src, layer.WriteOptions{})
		require.True(t, errdefs.IsFailedPrecondition(err), "%v", err)
		require.NoError(t, unix.Removexattr(filepath.Join(upper, "d", "full"), "trusted.overlay."+mark))
	}
	set("trusted.overlay.opaque", "y", upper)
	require.Equal(t, ".wh..wh..opq", listing(t, write(t, src, layer.WriteOptions{}))[0])
}

func TestTreesThatNoLayerHolds(t *testing.T) {
	for _, name := range []string{".wh.f", ".wh..wh..opq", "d/.wh.x"} {
		dir := mkdir(t)
		p := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, nil, 0o600))
		for _, src := range []layer.Source{layer.Trees{Upper: dir}, layer.Trees{Lower: dir, Upper: mkdir(t)}, layer.Upper{Dir: dir, Form: layer.OverlayUser}} {
			_, err := layer.Write(t.Context(), io.Discard, src, layer.WriteOptions{})
			if tr, ok := src.(layer.Trees); ok && tr.Lower != "" && strings.HasPrefix(name, "d/") {
				require.NoError(t, err) // the directory goes as a whole
				continue
			}
			require.True(t, errdefs.IsFailedPrecondition(err), "%v: %v", src, err)
			var e *layer.EntryError
			require.ErrorAs(t, err, &e)
			require.Equal(t, name, e.Name)
		}
	}
}

func TestWriteErrors(t *testing.T) {
	dir := mkdir(t)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), make([]byte, 10<<20), 0o600))
	_, err := layer.Write(t.Context(), io.Discard, layer.Trees{Upper: filepath.Join(dir, "none")}, layer.WriteOptions{})
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	_, err = layer.Write(t.Context(), io.Discard, layer.Upper{Dir: dir}, layer.WriteOptions{})
	require.True(t, errdefs.IsInvalidArgument(err), "a plain tree is no upper directory: %v", err)
	full := errors.New("full")
	wrote := 0
	_, err = layer.Write(t.Context(), writerFunc(func(p []byte) (int, error) {
		if wrote += len(p); wrote > 1<<20 {
			return 0, full
		}
		return len(p), nil
	}), layer.Trees{Upper: dir}, layer.WriteOptions{})
	require.ErrorIs(t, err, full)
	// A file that is cut off or grows while it is written.
	for _, size := range []int64{5 << 20, 20 << 20} {
		require.NoError(t, os.Truncate(filepath.Join(dir, "f"), 10<<20))
		first := true
		_, err = layer.Write(t.Context(), writerFunc(func(p []byte) (int, error) {
			if first {
				first = false
				if err := os.Truncate(filepath.Join(dir, "f"), size); err != nil {
					return 0, err
				}
			}
			return len(p), nil
		}), layer.Trees{Upper: dir}, layer.WriteOptions{})
		require.True(t, errdefs.IsAborted(err), "%v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestEqualTimesAreNoProof: a file of the same size and time with another
// content is a change.
func TestEqualTimesAreNoProof(t *testing.T) {
	lower, upper := mkdir(t), mkdir(t)
	apply(t, lower, pack(t, file("f", "one"), file("g", "same")), mine())
	apply(t, upper, pack(t, file("f", "two"), file("g", "same")), mine())
	require.Equal(t, []string{"f"}, listing(t, write(t, layer.Trees{Lower: lower, Upper: upper}, layer.WriteOptions{})))
}

// TestLinkGroups: which names are one file is part of a tree.
func TestLinkGroups(t *testing.T) {
	for _, tt := range []struct {
		name         string
		lower, upper []ent
		want         []string
	}{
		{"the same", []ent{file("a", "x"), hardlink("b", "a")}, []ent{file("a", "x"), hardlink("b", "a")}, []string{}},
		{"joined", []ent{file("a", "x"), file("b", "x")}, []ent{file("a", "x"), hardlink("b", "a")}, []string{"a", "b -> a"}},
		{"parted", []ent{file("a", "x"), hardlink("b", "a"), hardlink("c", "a")}, []ent{file("a", "x"), file("b", "x"), hardlink("c", "b")}, []string{"b", "c -> b"}},
		{"one more", []ent{file("a", "x")}, []ent{file("a", "x"), hardlink("b", "a")}, []string{"a", "b -> a"}},
		{"one less", []ent{file("a", "x"), hardlink("b", "a"), hardlink("c", "a")}, []ent{file("a", "x"), hardlink("c", "a")}, []string{".wh.b"}},
		{"all changed", []ent{file("a", "x"), hardlink("b", "a")}, []ent{file("a", "y"), hardlink("b", "a")}, []string{"a", "b -> a"}},
		{"crossed", []ent{file("a", "x"), hardlink("b", "a"), file("c", "x"), hardlink("d", "c")}, []ent{file("a", "x"), hardlink("c", "a"), file("b", "x"), hardlink("d", "b")}, []string{"a", "b", "c -> a", "d -> b"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lower, upper := mkdir(t), mkdir(t)
			apply(t, lower, pack(t, tt.lower...), mine())
			apply(t, upper, pack(t, tt.upper...), mine())
			b := write(t, layer.Trees{Lower: lower, Upper: upper}, layer.WriteOptions{})
			require.Equal(t, tt.want, listing(t, b))
			apply(t, lower, write(t, layer.Trees{Lower: lower, Upper: upper}, layer.WriteOptions{Nanoseconds: true}), mine())
			require.Equal(t, dump(t, upper, dumpOptions{}), dump(t, lower, dumpOptions{}))
		})
	}
}

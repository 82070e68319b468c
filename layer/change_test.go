package layer_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/layer"
)

// change does something to a tree that a build might do. What cannot be done
// is left.
func change(t *rapid.T, root string, count *int) {
	*count++
	// Links in the tree may lead out of it, and nothing may be changed there.
	in, err := os.OpenRoot(root)
	require.NoError(t, err)
	defer in.Close()
	p, q := drawName(t), drawName(t)
	mode := rapid.SampledFrom([]os.FileMode{0o600, 0o644, 0o755, 0o755 | os.ModeSetuid}).Draw(t, "mode")
	switch rapid.IntRange(0, 14).Draw(t, "change") {
	case 0, 1:
		_ = in.MkdirAll(filepath.Dir(p), 0o755)
		_ = in.WriteFile(p, []byte(fmt.Sprint(*count)), 0o600)
		_ = in.Chmod(p, mode)
	case 2:
		_ = in.WriteFile(p, []byte(rapid.SampledFrom([]string{"", "1", "12"}).Draw(t, "body")), 0o600)
		_ = in.Chmod(p, mode)
	case 3, 4:
		_ = in.MkdirAll(p, 0o755)
	case 5:
		_ = in.RemoveAll(p)
	case 6:
		_ = in.Remove(p)
	case 7, 8:
		_ = in.Rename(p, q)
		if rapid.IntRange(0, 2).Draw(t, "and back") == 0 {
			_ = in.Rename(q, p)
		}
	case 9:
		_ = in.Chmod(p, mode)
	case 10:
		_ = in.Lchown(p, rapid.IntRange(0, 1).Draw(t, "uid"), -1)
	case 11:
		_ = in.Symlink(rapid.SampledFrom([]string{"a", "/b"}).Draw(t, "target"), p)
	case 12:
		_ = in.Link(p, q)
	case 13:
		value := []byte(rapid.SampledFrom([]string{"", "1"}).Draw(t, "value"))
		beside(in, p, func(p string) { _ = unix.Lsetxattr(p, "user.x", value, 0) })
	case 14:
		kind := rapid.SampledFrom([]uint32{unix.S_IFCHR, unix.S_IFSOCK}).Draw(t, "node")
		beside(in, p, func(p string) { _ = unix.Mknod(p, kind|0o600, int(unix.Mkdev(1, 3))) })
	}
}

// beside calls fn with a path to name whose directory is one inside of in.
func beside(in *os.Root, name string, fn func(path string)) {
	dir, err := in.Open(filepath.Dir(name))
	if err != nil {
		return
	}
	defer dir.Close()
	fn(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(name)))
}

// TestWrittenChanges makes random changes in a mounted overlay and writes them
// in both ways. Each layer, applied to what was mounted before, makes what is
// mounted now; and unless a directory was made anew the two are the same.
func TestWrittenChanges(t *testing.T) {
	needMounts(t)
	equal, rounds := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		form := drawForm(t)
		base, upper, before := mkdir(t), mkdir(t), mkdir(t)
		var entries []ent
		for range rapid.IntRange(0, 10).Draw(t, "entries below") {
			e := drawEntry(t, false)
			if e.typ == tar.TypeFifo {
				e.typ = tar.TypeReg // changes would wait for its other end
			}
			entries = append(entries, e)
		}
		b := pack(t, entries...)
		if _, err := layer.Apply(t.Context(), base, bytes.NewReader(b), layer.ApplyOptions{Form: form}); err != nil {
			t.Skip(err)
		}
		overlay(t, form, []string{base}, "", func(root string) { copyTree(t, before, root) })

		var fromUpper, fromTrees []byte
		var want []string
		overlay(t, form, []string{base}, upper, func(root string) {
			count := 0
			for range rapid.IntRange(1, 12).Draw(t, "changes") {
				change(t, root, &count)
			}
			want = dump(t, root, dumpOptions{noDirTimes: true})
			o := layer.WriteOptions{Nanoseconds: true}
			overlay(t, form, []string{base}, "", func(old string) {
				fromTrees = write(t, layer.Trees{Lower: old, Upper: root}, o)
			})
			fromUpper = write(t, layer.Upper{Dir: upper, Form: form, Parents: []string{base}}, o)
		})
		want = slices.DeleteFunc(want, func(l string) bool { return strings.Contains(l, " 14") }) // sockets
		for how, b := range map[string][]byte{"upper": fromUpper, "trees": fromTrees} {
			after := mkdir(t)
			copyTree(t, after, before)
			apply(t, after, b, layer.ApplyOptions{Devices: layer.DevicesMade})
			require.Equal(t, want, dump(t, after, dumpOptions{noDirTimes: true}), "%s: %q", how, listing(t, b))
			// Other engines make the same of it.
			theirs := mkdir(t)
			copyTree(t, theirs, before)
			_, err := archive.Apply(t.Context(), theirs, bytes.NewReader(b))
			require.NoError(t, err)
			o := dumpOptions{noDirTimes: true, noUser: true} // see TestLayersOfContainerd
			require.Equal(t, dump(t, after, o), dump(t, theirs, o), "containerd, %s: %q", how, listing(t, b))
		}
		rounds++
		raw := strings.Join(dump(t, upper, dumpOptions{raw: true}), "\n")
		if !strings.Contains(raw, `.overlay.opaque="y"`) {
			equal++
			require.Equal(t, listing(t, fromTrees), listing(t, fromUpper))
			require.Equal(t, fromTrees, fromUpper)
		}
	})
	t.Logf("%d of %d were without an opaque directory", equal, rounds)
	require.Greater(t, equal, rounds/4)
}

package layer_test

import (
	"archive/tar"
	"bytes"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/layer"
)

// drawName is a path that others are likely to draw, too.
func drawName(t *rapid.T) string {
	parts := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c"}), 1, 3).Draw(t, "name")
	return strings.Join(parts, "/")
}

var drawTime = rapid.Custom(func(t *rapid.T) time.Time {
	return time.Unix(rapid.Int64Range(1, 5).Draw(t, "sec"), rapid.SampledFrom([]int64{0, 1, 999_999_999}).Draw(t, "nsec"))
})

func drawForm(t *rapid.T) layer.Form {
	return rapid.SampledFrom([]layer.Form{layer.OverlayTrusted, layer.OverlayUser}).Draw(t, "form")
}

// drawEntry is one entry of a layer, sensible or not. Hard links only where
// they are wanted.
func drawEntry(t *rapid.T, links bool) ent {
	e := ent{
		name: drawName(t), mtime: drawTime.Draw(t, "mtime"),
		mode: rapid.SampledFrom([]int64{0o644, 0o755, 0o4711, 0o2755, 0o1777, 0o400}).Draw(t, "mode"),
		uid:  rapid.IntRange(0, 1).Draw(t, "uid"), gid: rapid.IntRange(0, 1).Draw(t, "gid"),
	}
	if rapid.IntRange(0, 5).Draw(t, "xattr") == 0 {
		e.pax = map[string]string{"SCHILY.xattr.user.x": rapid.SampledFrom([]string{"", "1"}).Draw(t, "value")}
	}
	switch kind := rapid.IntRange(0, 13).Draw(t, "kind"); {
	case kind <= 3:
		e.typ, e.body = tar.TypeReg, rapid.SampledFrom([]string{"", "1", "12"}).Draw(t, "body")
	case kind <= 7:
		e.typ = tar.TypeDir
	case kind == 8:
		e.typ, e.link = tar.TypeSymlink, rapid.SampledFrom([]string{"a", "../b", "/c", "/", "..", "a/../b", "../../../etc"}).Draw(t, "target")
	case kind == 9:
		e.typ = tar.TypeFifo
	case kind == 10:
		dir, base := filepath.Split(e.name)
		e.typ, e.name = tar.TypeReg, dir+".wh."+base
	case kind == 11:
		dir, _ := filepath.Split(e.name)
		e.typ, e.name = tar.TypeReg, dir+".wh..wh..opq"
	default:
		e.typ, e.link = tar.TypeLink, drawName(t)
		if !links {
			e.typ, e.link = tar.TypeDir, ""
		}
	}
	return e
}

// TestFormsShowTheSame applies random layers to a tree, one after the other,
// and each to an upper directory over the others, and compares the tree with
// the mount of the stack.
func TestFormsShowTheSame(t *testing.T) {
	needMounts(t)
	rapid.Check(t, func(t *rapid.T) {
		form := drawForm(t)
		tree := mkdir(t)
		var stack []string
		count := rapid.IntRange(1, 3).Draw(t, "layers")
		for i := range count {
			// A link group of a lower layer comes apart when one of its names is
			// copied up; so only the last layer has links.
			var entries []ent
			for range rapid.IntRange(0, 8).Draw(t, "entries") {
				entries = append(entries, drawEntry(t, i == count-1))
			}
			b := pack(t, entries...)
			upper := mkdir(t)
			_, terr := layer.Apply(t.Context(), tree, bytes.NewReader(b), layer.ApplyOptions{})
			_, uerr := layer.Apply(t.Context(), upper, bytes.NewReader(b), layer.ApplyOptions{Form: form, Parents: stack})
			require.Equal(t, terr == nil, uerr == nil, "tree: %v, upper: %v", terr, uerr)
			if terr != nil {
				require.True(t, errdefs.IsInvalidArgument(terr) && errdefs.IsInvalidArgument(uerr), "tree: %v, upper: %v", terr, uerr)
				return
			}
			stack = append([]string{upper}, stack...)
		}
		want := dump(t, tree, dumpOptions{})
		overlay(t, form, stack, "", func(root string) {
			require.Equal(t, want, dump(t, root, dumpOptions{}))
		})
		// What is written of the topmost layer makes the same of those below.
		below := mkdir(t)
		overlay(t, form, stack[1:], "", func(root string) {
			b := write(t, layer.Trees{Upper: root}, layer.WriteOptions{Nanoseconds: true})
			apply(t, below, b, layer.ApplyOptions{})
		})
		for _, parents := range [][]string{nil, stack[1:]} {
			src := layer.Upper{Dir: stack[0], Form: form, Parents: parents}
			b := write(t, src, layer.WriteOptions{Nanoseconds: true})
			require.Equal(t, b, write(t, src, layer.WriteOptions{Nanoseconds: true}))
			again := mkdir(t)
			copyTree(t, again, below)
			apply(t, again, b, layer.ApplyOptions{})
			require.Equal(t, noDirTimes(want), noDirTimes(dump(t, again, dumpOptions{})))
		}
	})
}

// copyTree copies by way of a tar, which other tests hold to be right.
func copyTree(t tb, to, from string) {
	t.Helper()
	apply(t, to, write(t, layer.Trees{Upper: from}, layer.WriteOptions{Nanoseconds: true}), layer.ApplyOptions{Devices: layer.DevicesMade})
}

// noDirTimes cuts the times of directories from a dump: a layer does not carry
// a change of that alone.
func noDirTimes(lines []string) []string {
	out := make([]string, len(lines))
	for i, l := range lines {
		if f := strings.Fields(l); strings.HasPrefix(f[1], "04") {
			f[3] = "t"
			l = strings.Join(f, " ")
		}
		out[i] = l
	}
	return out
}

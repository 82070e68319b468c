package layer_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/layer"
)

// TestLinksOutInEveryPosition has every kind of entry come through every kind of
// link that leads out of the tree, at the end of its name and in the middle,
// whether the layer made the link or it lies below. Nothing outside is made,
// changed or read, and what is refused is refused as what it is.
func TestLinksOutInEveryPosition(t *testing.T) {
	links := map[string][]ent{
		"absolute":      {symlink("l", "OUTSIDE")},
		"relative":      {symlink("l", "../outside")},
		"far up":        {symlink("l", strings.Repeat("../", 30)+"OUTSIDE")},
		"through a dir": {directory("deep"), symlink("l", "deep/../../outside")},
		"two":           {symlink("m", "../outside"), symlink("l", "m")},
		"proc":          {symlink("l", "/proc/self/rootOUTSIDE")},
		"the root":      {symlink("l", "/")},
		"dots":          {symlink("l", "..")},
	}
	positions := []string{"l", "l/f", "l/d/g", "l/outside/f", "x/..//l/./new", "l/../outside/f"}
	kinds := map[string]func(name string) ent{
		"file":      func(name string) ent { return file(name, "evil") },
		"directory": directory,
		"symlink":   func(name string) ent { return symlink(name, "evil") },
		"hard link": func(name string) ent { return hardlink(name, "own") },
		"target":    func(name string) ent { return hardlink("h", name) },
		"fifo":      func(name string) ent { return ent{name: name, typ: tar.TypeFifo, mode: 0o644} },
		"device":    func(name string) ent { return ent{name: name, typ: tar.TypeChar, mode: 0o644, major: 1, minor: 3} },
		"whiteout":  whiteout,
		"opaque":    opaque,
	}
	top := mkdir(t)
	outside := filepath.Join(top, "outside")
	require.NoError(t, os.MkdirAll(filepath.Join(outside, "d"), 0o755))
	for _, f := range []string{"f", "d/g"} {
		require.NoError(t, os.WriteFile(filepath.Join(outside, f), []byte("sentinel"), 0o600))
	}
	before := dump(t, outside, dumpOptions{})
	for linkName, link := range links {
		for i := range link {
			link[i].link = strings.ReplaceAll(link[i].link, "OUTSIDE", outside)
		}
		for kindName, kind := range kinds {
			for _, position := range positions {
				for _, below := range []bool{false, true} {
					for _, form := range []layer.Form{layer.Plain, layer.OverlayUser} {
						throughALink(t, top, link, kind(position), below, form)
						if diff := cmp.Diff(before, dump(t, outside, dumpOptions{})); t.Failed() || diff != "" {
							t.Fatalf("%s through the link %q at %s, which is below %t, form %d: %s", kindName, linkName, position, below, form, diff)
						}
					}
				}
			}
		}
	}
}

// throughALink applies e after a link, or over a layer that has the link.
func throughALink(t *testing.T, top string, link []ent, e ent, below bool, form layer.Form) {
	t.Helper()
	root, into := filepath.Join(top, "root"), filepath.Join(top, "root")
	require.NoError(t, os.Mkdir(root, 0o755))
	o := mine()
	o.Form = form
	entries := append([]ent{file("own", "mine"), directory("x")}, link...)
	if below {
		apply(t, root, pack(t, link...), o)
		entries = entries[:2]
	}
	if form != layer.Plain {
		into = filepath.Join(top, "upper")
		require.NoError(t, os.Mkdir(into, 0o755))
		o.Parents = []string{root}
	}
	_, err := layer.Apply(t.Context(), into, bytes.NewReader(pack(t, append(entries, e)...)), o)
	var at *layer.EntryError
	if err != nil && (!errdefs.IsInvalidArgument(err) || !errors.As(err, &at)) {
		t.Errorf("is refused as something else: %v", err)
	}
	require.NoError(t, filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && d.Name() == "outside" && filepath.Dir(p) == top:
			return fs.SkipDir
		case filepath.Dir(p) == top && p != root && p != into:
			t.Errorf("%s was made beside the tree", d.Name())
		case d.Type().IsRegular():
			if b, err := os.ReadFile(p); err != nil || bytes.Contains(b, []byte("sentinel")) {
				t.Errorf("%s is what lies outside, or %v", p, err)
			}
		}
		return nil
	}))
	require.NoError(t, errors.Join(os.RemoveAll(root), os.RemoveAll(into)))
}

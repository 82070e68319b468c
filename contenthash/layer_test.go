package contenthash_test

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/contenthash"
)

// stack is a stack of overlay layers, each written through a mount of those
// below.
type stack struct {
	t    *testing.T
	dir  string
	n    int
	done []string // upper directories, lowest first
}

func newStack(t *testing.T) *stack {
	needRoot(t, "it mounts overlays")
	return &stack{t: t, dir: scratch(t)}
}

// layer makes the next layer by change, on a mount of the layers below.
func (s *stack) layer(change func(dir string)) {
	s.t.Helper()
	s.n++
	upper, work := s.path("upper"), s.path("work")
	for _, dir := range []string{upper, work} {
		require.NoError(s.t, os.Mkdir(dir, 0o755))
	}
	if len(s.done) == 0 {
		change(upper)
	} else {
		s.mounted(s.done, fmt.Sprintf(",upperdir=%s,workdir=%s", upper, work), change)
	}
	s.done = append(s.done, upper)
}

func (s *stack) path(what string) string { return filepath.Join(s.dir, fmt.Sprintf("%s%d", what, s.n)) }

// show mounts layers, the lowest first, read-only.
func (s *stack) show(layers []string, look func(dir string)) {
	s.t.Helper()
	empty := filepath.Join(s.dir, "empty")
	require.NoError(s.t, os.MkdirAll(empty, 0o755))
	s.mounted(append([]string{empty}, layers...), "", look)
}

func (s *stack) mounted(layers []string, options string, use func(dir string)) {
	s.t.Helper()
	at := filepath.Join(s.dir, "mnt")
	require.NoError(s.t, os.MkdirAll(at, 0o755))
	var lower []string
	for i := len(layers) - 1; i >= 0; i-- {
		lower = append(lower, layers[i])
	}
	data := "index=off,metacopy=off,redirect_dir=nofollow,xino=off,lowerdir=" + strings.Join(lower, ":") + options
	require.NoError(s.t, unix.Mount("overlay", at, "overlay", 0, data))
	defer func() { require.NoError(s.t, unix.Unmount(at, 0)) }()
	use(at)
}

func upperLayer(dir string) contenthash.Layer {
	return contenthash.Layer{Open: contenthash.Dir(dir), Marks: "trusted.overlay."}
}

// One changed file costs one read.
func TestChildReadsWhatChanged(t *testing.T) {
	s := newStack(t)
	s.layer(func(dir string) { manyFiles(t, dir, 30, 20) })
	var parent *contenthash.Tree
	s.show(s.done, func(dir string) {
		parent = contenthash.New()
		sum(t, parent, dir, "/", contenthash.Options{})
	})
	require.Equal(t, uint64(600), parent.Stats().FilesRead)
	s.layer(func(dir string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "dir03/sub0003/file05"), []byte("new"), 0o644))
	})
	child := parent.Clone()
	require.NoError(t, child.ApplyLayer(t.Context(), upperLayer(s.done[1])))
	s.show(s.done, func(dir string) {
		require.Equal(t, fresh(t, dir, "/"), sum(t, child, dir, "/", contenthash.Options{}))
	})
	stats := child.Stats()
	require.Equal(t, uint64(1), stats.FilesRead)
	require.LessOrEqual(t, stats.DirsListed, uint64(3))
	// The parent's tree is its own.
	s.show(s.done[:1], func(dir string) {
		require.Equal(t, fresh(t, dir, "/"), sum(t, parent, "/nowhere", "/", contenthash.Options{}))
	})
}

// The kernel pays no heed to an opaque mark on the top directory of a layer: a
// mount shows what is below, and so must what a child inherits.
func TestOpaqueTopOfALayer(t *testing.T) {
	s := newStack(t)
	s.layer(func(dir string) { manyFiles(t, dir, 3, 5) })
	parent := contenthash.New()
	s.show(s.done, func(dir string) { sum(t, parent, dir, "/", contenthash.Options{}) })
	s.layer(func(dir string) { write(t, dir, "dir01/sub0001/file02", "new") })
	require.NoError(t, unix.Setxattr(s.done[1], "trusted.overlay.opaque", []byte("y"), 0))
	child := parent.Clone()
	require.NoError(t, child.ApplyLayer(t.Context(), upperLayer(s.done[1])))
	s.show(s.done, func(dir string) {
		require.FileExists(t, dir+"/dir00/sub0000/file00")
		require.Equal(t, fresh(t, dir, "/"), sum(t, child, dir, "/", contenthash.Options{}))
	})
	require.Equal(t, uint64(1), child.Stats().FilesRead)
}

// TestLayers puts random layers on top of each other, and in other orders, as
// merges do; the inherited digests are those of a fresh scan.
func TestLayers(t *testing.T) {
	s := newStack(t)
	rounds := 300
	if raceEnabled {
		rounds = 30
	}
	for seed := range rounds {
		r := rand.New(rand.NewPCG(uint64(seed), 3))
		s := &stack{t: t, dir: filepath.Join(s.dir, fmt.Sprint(seed))}
		require.NoError(t, os.Mkdir(s.dir, 0o755))
		for range 2 + r.IntN(4) {
			s.layer(func(dir string) {
				for range 1 + r.IntN(8) {
					scribble(t, r, dir)
				}
			})
		}
		order := s.done
		if r.IntN(2) == 0 {
			order = nil
			for _, i := range r.Perm(len(s.done)) {
				order = append(order, s.done[i])
			}
		}
		checkStack(s, r, order, seed)
		require.NoError(t, os.RemoveAll(s.dir))
	}
}

func checkStack(s *stack, r *rand.Rand, order []string, seed int) {
	s.t.Helper()
	tree := contenthash.New()
	asked := 0
	for i := range order {
		if i > 0 {
			tree = tree.Clone()
			require.NoError(s.t, tree.ApplyLayer(s.t.Context(), upperLayer(order[i])))
		}
		if i+1 < len(order) && r.IntN(3) == 0 {
			continue // the tree in between is not asked
		}
		asked++
		s.show(order[:i+1], func(dir string) {
			for range r.IntN(7) {
				p := scribbled(r)
				got, err := tree.Checksum(s.t.Context(), contenthash.Dir(dir), p, contenthash.Options{FollowLinks: true})
				want, wantErr := contenthash.New().Checksum(s.t.Context(), contenthash.Dir(dir), p, contenthash.Options{FollowLinks: true})
				require.Equal(s.t, want, got, "seed %d, layers %v, %s: %v, %v", seed, order[:i+1], p, err, wantErr)
			}
			require.Equal(s.t, fresh(s.t, dir, "/"), sum(s.t, tree, dir, "/", contenthash.Options{}), "seed %d, layers %v", seed, order[:i+1])
		})
	}
	require.Positive(s.t, asked)
}

func scribbled(r *rand.Rand) string {
	parts := make([]string, 1+r.IntN(3))
	for i := range parts {
		parts[i] = string("abc"[r.IntN(3)])
	}
	return strings.Join(parts, "/")
}

// scribble changes one thing, as builds do.
func scribble(t *testing.T, r *rand.Rand, dir string) {
	p := filepath.Join(dir, scribbled(r))
	fi, err := os.Lstat(p)
	exists := err == nil
	remove := func(p string) {
		if _, err := os.Lstat(p); err == nil {
			require.NoError(t, os.RemoveAll(p))
		}
	}
	switch r.IntN(9) {
	case 0:
		remove(p)
	case 1:
		remove(p)
		_ = os.Symlink("../a", p)
	case 2, 3:
		if exists && !fi.IsDir() {
			require.NoError(t, os.Remove(p))
		}
		_ = os.MkdirAll(p, fs.FileMode(0o700|r.IntN(64)))
	case 4:
		if exists && fi.Mode()&fs.ModeSymlink == 0 {
			require.NoError(t, os.Chmod(p, fs.FileMode(0o700|r.IntN(64))))
		}
	case 5:
		to := filepath.Join(dir, scribbled(r))
		if exists && p != to && !strings.HasPrefix(to, p+"/") && !strings.HasPrefix(p, to+"/") {
			remove(to)
			_ = os.Rename(p, to) // a directory from below cannot be renamed
		}
	case 6:
		// Made aside and renamed: the layer gets an opaque directory.
		tmp := filepath.Join(dir, "tmp")
		require.NoError(t, os.Mkdir(tmp, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(tmp, "a"), []byte{byte(r.IntN(3))}, 0o644))
		remove(p)
		if os.Rename(tmp, p) != nil {
			remove(tmp)
		}
	default:
		if !exists || fi.Mode().IsRegular() {
			_ = os.WriteFile(p, []byte{byte(r.IntN(3))}, 0o644)
		}
	}
}

// A layer that cannot be read leaves a tree that knows nothing.
func TestLayerThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	manyFiles(t, dir, 2, 2)
	tree := contenthash.New()
	want := sum(t, tree, dir, "/", contenthash.Options{})
	require.Error(t, tree.ApplyLayer(t.Context(), upperLayer("/nowhere")))
	require.Equal(t, want, sum(t, tree, dir, "/", contenthash.Options{}))
	require.Equal(t, uint64(8), tree.Stats().FilesRead, "all was read again")
}

package snapshot_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/continuity/sysx"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot"
)

// upper is the layer directory of a snapshot.
func upper(t *testing.T, d snapshot.Driver, key string) string {
	t.Helper()
	layers, err := stacker(t, d).Layers(t.Context(), key)
	require.NoError(t, err)
	return layers[len(layers)-1].Dir
}

func move(t *testing.T, dir, from, to string) {
	t.Helper()
	require.NoError(t, os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)))
}

// copyDir is what mv does with a directory that overlayfs will not rename.
func copyDir(t *testing.T, dir, from, to string) {
	t.Helper()
	require.NoError(t, snapshot.CopyTree(t.Context(), filepath.Join(dir, to), filepath.Join(dir, from)))
	require.NoError(t, os.RemoveAll(filepath.Join(dir, from)))
}

// Copies that say nothing go: a file renamed and back, touched modes set back,
// a whole directory copied away and back.
func TestCleanDropsWhatIsTheParents(t *testing.T) {
	d, _ := stage(t)
	for name, do := range map[string]func(dir string){
		"file": func(dir string) {
			move(t, dir, "a", "t")
			move(t, dir, "t", "a")
		},
		"file in a directory": func(dir string) {
			move(t, dir, "d/e", "d/t")
			move(t, dir, "d/t", "d/e")
		},
		"directory": func(dir string) {
			copyDir(t, dir, "d", "t")
			copyDir(t, dir, "t", "d")
		},
		"mode": func(dir string) {
			require.NoError(t, os.Chmod(filepath.Join(dir, "d"), 0o700))
			require.NoError(t, os.Chmod(filepath.Join(dir, "d"), 0o755))
		},
		"made and removed": func(dir string) {
			file(t, filepath.Join(dir, "d", "x"), "x")
			require.NoError(t, os.Remove(filepath.Join(dir, "d", "x")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := d.Prepare(t.Context(), "k", "base")
			require.NoError(t, err)
			mounted(t, d, "k", false, do)
			require.NotEmpty(t, names(t, upper(t, d, "k")), "there is something to drop")
			_, err = stacker(t, d).Clean(t.Context(), "k")
			require.NoError(t, err)
			require.Empty(t, names(t, upper(t, d, "k")))
			mounted(t, d, "k", true, func(dir string) {
				require.Equal(t, []string{"a", "b", "d"}, names(t, dir))
				require.Equal(t, []string{"e"}, names(t, filepath.Join(dir, "d")))
			})
			require.NoError(t, d.Remove(t.Context(), "k"))
		})
	}
}

// A layer that is empty or hides things only is clean whatever lies below it,
// which need not be opened: there may be hundreds of layers.
func TestCleanOpensParentsWhenItHasTo(t *testing.T) {
	d, root := stage(t)
	below := filepath.Join(root, "snapshots", "committed", "base", "fs")
	away := below + "-away"
	for name, c := range map[string]struct {
		do   func(dir string)
		need bool
	}{
		"nothing":   {do: func(string) {}},
		"whiteouts": {do: func(dir string) { require.NoError(t, os.Remove(filepath.Join(dir, "a"))) }},
		"a file":    {do: func(dir string) { file(t, filepath.Join(dir, "new"), "x") }, need: true},
		"directory": {do: func(dir string) { require.NoError(t, os.Mkdir(filepath.Join(dir, "new"), 0o755)) }, need: true},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := d.Prepare(t.Context(), "k", "base")
			require.NoError(t, err)
			mounted(t, d, "k", false, c.do)
			require.NoError(t, os.Rename(below, away))
			_, err = stacker(t, d).Clean(t.Context(), "k")
			require.NoError(t, os.Rename(away, below))
			if c.need {
				require.ErrorIs(t, err, os.ErrNotExist)
			} else {
				require.NoError(t, err)
			}
			require.NoError(t, d.Remove(t.Context(), "k"))
		})
	}
}

// What differs in anything stays, with the times of the directories.
func TestCleanKeepsWhatDiffers(t *testing.T) {
	d, _ := stage(t)
	for name, do := range map[string]func(dir string){
		"content": func(dir string) {
			path := filepath.Join(dir, "d", "e")
			fi, err := os.Stat(path)
			require.NoError(t, err)
			file(t, path, "D/E") // of the same length, and the time set back
			require.NoError(t, os.Chtimes(path, fi.ModTime(), fi.ModTime()))
		},
		"mode": func(dir string) { require.NoError(t, os.Chmod(filepath.Join(dir, "d", "e"), 0o600)) },
		"attribute": func(dir string) {
			require.NoError(t, unix.Setxattr(filepath.Join(dir, "d", "e"), "user.x", []byte("1"), 0))
		},
		"owner":   func(dir string) { require.NoError(t, os.Chown(filepath.Join(dir, "d", "e"), 1, 1)) },
		"deleted": func(dir string) { require.NoError(t, os.Remove(filepath.Join(dir, "d", "e"))) },
		"link": func(dir string) {
			require.NoError(t, os.Link(filepath.Join(dir, "d", "e"), filepath.Join(dir, "d", "f")))
		},
		"directory's mode": func(dir string) {
			require.NoError(t, os.Chmod(filepath.Join(dir, "d"), 0o700))
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := d.Prepare(t.Context(), "k", "base")
			require.NoError(t, err)
			mounted(t, d, "k", false, func(dir string) {
				do(dir)
				move(t, dir, "a", "t")
				move(t, dir, "t", "a") // something to drop beside
			})
			before := snapshotOf(t, d, "k")
			links := linksOf(t, d, "k")
			want, err := os.Stat(upper(t, d, "k"))
			require.NoError(t, err)
			_, err = stacker(t, d).Clean(t.Context(), "k")
			require.NoError(t, err)
			require.Equal(t, []string{"d"}, names(t, upper(t, d, "k")))
			require.Equal(t, before, snapshotOf(t, d, "k"))
			require.Equal(t, links, linksOf(t, d, "k"))
			got, err := os.Stat(upper(t, d, "k"))
			require.NoError(t, err)
			require.Equal(t, want.ModTime(), got.ModTime())
			require.NoError(t, d.Remove(t.Context(), "k"))
		})
	}
}

// A directory that was renamed into place is opaque, for no reason. In a
// merge it must not hide what others have there.
func TestRenamedDirectoryHidesNothing(t *testing.T) {
	d, _ := stage(t)
	s := stacker(t, d)
	mark := "trusted.overlay.opaque"
	_, err := d.Prepare(t.Context(), "k", "")
	require.NoError(t, err)
	mounted(t, d, "k", false, func(dir string) {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, ".tmp"), 0o755))
		file(t, filepath.Join(dir, ".tmp", "f"), "f")
		move(t, dir, ".tmp", "d")
	})
	at := filepath.Join(upper(t, d, "k"), "d")
	_, err = sysx.Getxattr(at, mark)
	require.NoError(t, err, "a kernel that does not mark it would let this test pass for nothing")
	_, err = s.Clean(t.Context(), "k")
	require.NoError(t, err)
	_, err = sysx.Getxattr(at, mark)
	require.ErrorIs(t, err, unix.ENODATA)
	require.NoError(t, d.Commit(t.Context(), "new", "k"))
	require.NoError(t, s.CleanCopy(t.Context(), "base-c", "base"))
	require.NoError(t, s.Stack(t.Context(), "m", []string{"base-c", "new"}))
	mounted(t, d, "m", true, func(dir string) { require.Equal(t, []string{"e", "f"}, names(t, filepath.Join(dir, "d"))) })

	// Over a directory that the parent does show it says that this is gone.
	finalized(t, d, "over", "base", func(dir string) {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, ".tmp"), 0o755))
		file(t, filepath.Join(dir, ".tmp", "g"), "g")
		require.NoError(t, os.RemoveAll(filepath.Join(dir, "d")))
		move(t, dir, ".tmp", "d")
	})
	value, err := sysx.Getxattr(filepath.Join(upper(t, d, "over"), "d"), mark)
	require.NoError(t, err)
	require.Equal(t, "y", string(value))
	require.NoError(t, s.Stack(t.Context(), "m2", []string{"base-c", "new", "over"}))
	mounted(t, d, "m2", true, func(dir string) { require.Equal(t, []string{"g"}, names(t, filepath.Join(dir, "d"))) })
}

// snapshotOf lists what a mount of key shows, with what stat tells.
func snapshotOf(t *testing.T, d snapshot.Driver, key string) (out []string) {
	t.Helper()
	mounted(t, d, key, true, func(dir string) {
		require.NoError(t, filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
			if err != nil {
				return err
			}
			content := ""
			if fi.Mode().IsRegular() {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				content = string(data)
			}
			rel, err := filepath.Rel(dir, path)
			out = append(out, rel+" "+fi.Mode().String()+" "+fi.ModTime().String()+" "+content)
			return err
		}))
	})
	return out
}

// linksOf says how many links d/e has.
func linksOf(t *testing.T, d snapshot.Driver, key string) (n uint64) {
	t.Helper()
	mounted(t, d, key, true, func(dir string) {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, "d", "e"), &st); err == nil {
			n = st.Nlink
		}
	})
	return n
}

// A layer committed while it was mounted, or adopted, is raw: it cannot be
// stacked, but a clean copy of it can.
func TestRawLayerAndItsCleanCopy(t *testing.T) {
	d, root := stage(t)
	s := stacker(t, d)
	var raw *snapshot.LayerError
	require.ErrorAs(t, s.Stack(t.Context(), "m", []string{"base"}), &raw)
	require.False(t, raw.Bound)
	require.NoError(t, s.CleanCopy(t.Context(), "base-c", "base"))

	_, err := d.Prepare(t.Context(), "k", "base")
	require.NoError(t, err)
	mounted(t, d, "k", false, func(dir string) {
		require.NoError(t, os.Mkdir(filepath.Join(dir, ".tmp"), 0o755))
		file(t, filepath.Join(dir, ".tmp", "f"), "f")
		move(t, dir, ".tmp", "x")
		move(t, dir, "a", "t")
		move(t, dir, "t", "a")
		require.NoError(t, os.Remove(filepath.Join(dir, "b")))
		file(t, filepath.Join(dir, "d", "h1"), "h")
		require.NoError(t, os.Link(filepath.Join(dir, "d", "h1"), filepath.Join(dir, "d", "h2")))
	})
	require.NoError(t, d.Commit(t.Context(), "raw", "k"))
	before := snapshotOf(t, d, "raw")
	require.NoError(t, s.CleanCopy(t.Context(), "raw-c", "raw"))
	require.Equal(t, before, snapshotOf(t, d, "raw"))
	require.Equal(t, []string{"a", "b", "d", "x"}, names(t, upper(t, d, "raw")))
	require.Equal(t, []string{"b", "d", "x"}, names(t, upper(t, d, "raw-c")))
	for _, name := range []string{"x/f", "d/h1", "d/h2"} {
		one, err := os.Stat(filepath.Join(upper(t, d, "raw"), name))
		require.NoError(t, err)
		two, err := os.Stat(filepath.Join(upper(t, d, "raw-c"), name))
		require.NoError(t, err)
		require.True(t, os.SameFile(one, two), "a hard link")
	}
	used, err := d.Usage(t.Context(), "raw-c")
	require.NoError(t, err)
	require.EqualValues(t, 3, used.Inodes, "its directories are all that is new")
	require.NoError(t, s.Stack(t.Context(), "m", []string{"base-c", "raw-c"}))
	require.Equal(t, before, snapshotOf(t, d, "m"))

	// The copy stands alone: the original and its parent may go.
	require.NoError(t, d.Remove(t.Context(), "raw"))
	require.NoError(t, d.Remove(t.Context(), "base"))
	require.NoError(t, d.Cleanup(t.Context()))
	require.Equal(t, before, snapshotOf(t, d, "m"))
	require.DirExists(t, filepath.Join(root, "snapshots", "committed", "raw-c", "fs", "x"))
}

// Base has d/f; the second layer deletes d, the third makes it anew: merged d
// is empty, and of the two alone, too, over any base that has d.
func TestDeletedAndMadeAnew(t *testing.T) {
	d, _ := stage(t)
	s := stacker(t, d)
	require.NoError(t, s.CleanCopy(t.Context(), "base-c", "base"))
	finalized(t, d, "deleted", "base", func(dir string) { require.NoError(t, os.RemoveAll(filepath.Join(dir, "d"))) })
	finalized(t, d, "anew", "deleted", func(dir string) { require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755)) })
	require.NoError(t, s.Stack(t.Context(), "m", []string{"base-c", "deleted", "anew"}))
	mounted(t, d, "m", true, func(dir string) { require.Empty(t, names(t, filepath.Join(dir, "d"))) })
	// In one layer it is the opaque mark that says so, and it stays.
	finalized(t, d, "both", "base", func(dir string) {
		require.NoError(t, os.RemoveAll(filepath.Join(dir, "d")))
		require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
	})
	finalized(t, d, "other", "", func(dir string) {
		require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
		file(t, filepath.Join(dir, "d", "z"), "z")
	})
	require.NoError(t, s.Stack(t.Context(), "m2", []string{"other", "both"}))
	mounted(t, d, "m2", true, func(dir string) { require.Empty(t, names(t, filepath.Join(dir, "d"))) })
	require.NoError(t, s.Stack(t.Context(), "m3", []string{"other", "anew"}))
	mounted(t, d, "m3", true, func(dir string) { require.Equal(t, []string{"z"}, names(t, filepath.Join(dir, "d"))) })
}

// Diff of unrelated trees turns one into the other, wherever it is stacked.
func TestDiffOfUnrelatedTrees(t *testing.T) {
	d, _ := stage(t)
	s := stacker(t, d)
	require.NoError(t, s.CleanCopy(t.Context(), "base-c", "base"))
	finalized(t, d, "other", "", func(dir string) {
		file(t, filepath.Join(dir, "a"), "other")
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "d", "e", "f"), 0o755))
	})
	require.NoError(t, s.Diff(t.Context(), "diff", "base", "other"))
	require.NoError(t, s.Stack(t.Context(), "m", []string{"base-c", "diff"}))
	require.Equal(t, snapshotOf(t, d, "other"), snapshotOf(t, d, "m"))
	require.NoError(t, s.Diff(t.Context(), "none", "m", "other"))
	require.Empty(t, names(t, upper(t, d, "none")))

	_, err := d.Prepare(t.Context(), "flat-w", "")
	require.NoError(t, err)
	require.NoError(t, snapshot.Apply(t.Context(), d, "flat-w", []snapshot.Change{{Upper: "base"}, {Lower: "base", Upper: "other"}}))
	require.NoError(t, d.Commit(t.Context(), "flat", "flat-w", snapshot.WithExactLayer))
	require.Equal(t, snapshotOf(t, d, "other"), snapshotOf(t, d, "flat"))
}

// A file that differs keeps its hard links into directories that both trees
// have from the same layer, although these are otherwise not looked into.
func TestDiffKeepsLinksIntoSharedDirectories(t *testing.T) {
	needRoot(t)
	d := openWith(t, snapshot.Overlay, t.TempDir(), &steps{})
	finalized(t, d, "base", "", func(dir string) {
		for _, name := range []string{"shared", "other"} {
			require.NoError(t, os.Mkdir(filepath.Join(dir, name), 0o755))
		}
		file(t, filepath.Join(dir, "shared", "f"), "one file")
		require.NoError(t, os.Link(filepath.Join(dir, "shared", "f"), filepath.Join(dir, "other", "g")))
	})
	finalized(t, d, "child", "base", func(dir string) {
		file(t, filepath.Join(dir, "other", "g"), "a file of its own")
	})
	require.NoError(t, stacker(t, d).Diff(t.Context(), "back", "child", "base"))
	mounted(t, d, "back", true, func(dir string) {
		f, err := os.Stat(filepath.Join(dir, "shared", "f"))
		require.NoError(t, err)
		g, err := os.Stat(filepath.Join(dir, "other", "g"))
		require.NoError(t, err)
		require.True(t, os.SameFile(f, g))
	})
}

// TestWhiteoutsOfAnApplier: who unpacks a layer into an upper directory makes the
// whiteouts, but not the mark by which the kernel finds them where no other layer
// has their directory. A layer that was cleaned has it, in place or as a copy.
func TestWhiteoutsOfAnApplier(t *testing.T) {
	d, _ := stage(t)
	s := stacker(t, d)
	finalized(t, d, "other", "", func(dir string) { file(t, filepath.Join(dir, "other"), "") })
	for _, name := range []string{"cleaned", "raw"} {
		_, err := d.Prepare(t.Context(), name+"-w", "base")
		require.NoError(t, err)
		dir := upper(t, d, name+"-w")
		require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
		require.NoError(t, unix.Mknod(filepath.Join(dir, "d", "gone"), unix.S_IFCHR, 0))
		file(t, filepath.Join(dir, "d", "new"), "")
	}
	_, err := s.Clean(t.Context(), "cleaned-w")
	require.NoError(t, err)
	for _, name := range []string{"cleaned", "raw"} {
		require.NoError(t, d.Commit(t.Context(), name, name+"-w"))
	}
	require.NoError(t, s.CleanCopy(t.Context(), "copy", "raw"))
	for _, name := range []string{"cleaned", "copy"} {
		require.Equal(t, []string{"gone", "new"}, names(t, filepath.Join(upper(t, d, name), "d")))
		require.NoError(t, s.Stack(t.Context(), "over-"+name, []string{"other", name}))
		mounted(t, d, "over-"+name, true, func(dir string) {
			require.Equal(t, []string{"new"}, names(t, filepath.Join(dir, "d")), name)
		})
	}
}

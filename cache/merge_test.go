package cache_test

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

// merge is Merge without options.
func (w *world) merge(refs ...*cache.ImmutableRef) *cache.ImmutableRef {
	w.Helper()
	ref, err := w.Merge(w.ctx, refs, cache.MergeOptions{})
	require.NoError(w, err)
	return ref
}

func (w *world) diff(lower, upper *cache.ImmutableRef) *cache.ImmutableRef {
	w.Helper()
	ref, err := w.Diff(w.ctx, lower, upper, cache.MergeOptions{})
	require.NoError(w, err)
	return ref
}

// change makes a committed child of parent, by fn in its mount.
func (w *world) change(parent *cache.ImmutableRef, fn func(dir string)) *cache.ImmutableRef {
	w.Helper()
	mut, err := w.New(w.ctx, parent, cache.NewOptions{})
	require.NoError(w, err)
	mnt, err := mut.Mount(w.ctx, cache.MountOptions{})
	require.NoError(w, err)
	fn(mnt.Path())
	require.NoError(w, mnt.Unmount())
	return w.commit(mut)
}

// sh makes a committed child of parent by a script of a few words: "mkdir d",
// "write d/f text", "rm d/f", "mv a b".
func (w *world) sh(parent *cache.ImmutableRef, script ...string) *cache.ImmutableRef {
	w.Helper()
	return w.change(parent, func(dir string) {
		for _, line := range script {
			words := strings.Fields(line)
			at := func(i int) string { return filepath.Join(dir, words[i]) }
			switch words[0] {
			case "mkdir":
				require.NoError(w, os.MkdirAll(at(1), 0o755))
			case "write":
				require.NoError(w, os.WriteFile(at(1), []byte(strings.Join(words[2:], " ")), 0o644))
			case "rm":
				require.NoError(w, os.RemoveAll(at(1)))
			case "mv":
				require.NoError(w, os.Rename(at(1), at(2)))
			case "link":
				require.NoError(w, os.Symlink(words[2], at(1)))
			default:
				w.Fatalf("what is %q?", line)
			}
		}
	})
}

// paths reads the whole tree of a record: "d/ d/f=text", sorted.
func (w *world) paths(ref *cache.ImmutableRef) string {
	w.Helper()
	mnt, err := ref.Mount(w.ctx)
	require.NoError(w, err)
	defer func() { require.NoError(w, mnt.Unmount()) }()
	return pathsIn(w, mnt.Path())
}

func pathsIn(t testing.TB, dir string) string {
	var out []string
	require.NoError(t, filepath.Walk(dir, func(path string, st os.FileInfo, err error) error {
		if err != nil || path == dir {
			return err
		}
		name := strings.TrimPrefix(path, dir+"/")
		switch {
		case st.IsDir():
			out = append(out, name+"/")
		case st.Mode()&os.ModeSymlink != 0:
			to, err := os.Readlink(path)
			out = append(out, name+"->"+to)
			return err
		default:
			text, err := os.ReadFile(path)
			out = append(out, name+"="+string(text))
			return err
		}
		return nil
	}))
	sort.Strings(out)
	return strings.Join(out, " ")
}

func TestMergeShowsItsInputsBottomFirst(t *testing.T) {
	forKinds(t, func(w *world) {
		a := w.sh(nil, "mkdir d", "write d/a 1", "write both a")
		b := w.sh(nil, "mkdir d", "write d/b 2", "write both b")
		ref := w.merge(a, b)
		rec := ref.Record()
		require.Equal(w, cache.Lazy, rec.State)
		require.Equal(w, []cache.ID{a.ID(), b.ID()}, rec.Parents)
		require.Equal(w, cache.Finalized, a.Record().State)
		require.Equal(w, "both=b d/ d/a=1 d/b=2", w.paths(ref))
		other := w.merge(b, a)
		require.NotEqual(w, ref.ID(), other.ID())
		require.Equal(w, "both=a d/ d/a=1 d/b=2", w.paths(other))
		w.release(a, b, ref, other)
	})
}

func TestMergeOnOverlayTakesNothingPerFile(t *testing.T) {
	w := newWorld(t, overlayKind)
	var inputs []*cache.ImmutableRef
	for i := range 5 {
		inputs = append(inputs, w.change(nil, func(dir string) {
			for k := range 100 {
				require.NoError(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%d-%d", i, k)), nil, 0o644))
			}
		}))
		require.NoError(t, inputs[i].Finalize(w.ctx))
	}
	before := inodes(t, w.root)
	ref := w.merge(inputs...)
	require.NoError(t, ref.Extract(w.ctx))
	// The entry with its description; each input gets its id file at most.
	require.LessOrEqual(t, inodes(t, w.root)-before, 2+len(inputs))
	mnt, err := ref.Mount(w.ctx)
	require.NoError(t, err)
	names, err := os.ReadDir(mnt.Path())
	require.NoError(t, err)
	require.Len(t, names, 500)
	require.NoError(t, mnt.Unmount())
	w.release(ref)
	for _, in := range inputs {
		w.release(in)
	}
}

// inodes counts the distinct inodes below the snapshots of a store.
func inodes(t testing.TB, root string) int {
	seen := map[uint64]bool{}
	require.NoError(t, filepath.Walk(filepath.Join(root, "snapshots"), func(path string, _ os.FileInfo, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		seen[st.Ino] = true
		return err
	}))
	return len(seen)
}

func TestEqualMergesAreFoundAgain(t *testing.T) {
	w := newWorld(t, overlayKind)
	a, b, c := w.sh(nil, "write a 1"), w.sh(nil, "write b 1"), w.sh(nil, "write c 1")
	ref := w.merge(a, b, c)
	require.Zero(t, w.transactions(func() {
		again := w.merge(a, b, c)
		require.Equal(t, ref.ID(), again.ID())
		w.release(again)
	}))
	ab := w.merge(a, b)
	require.NotEqual(t, ref.ID(), ab.ID())
	same := w.merge(ab, c)
	require.Equal(t, ref.ID(), same.ID(), "the same layers by way of another merge")
	alone := w.merge(a)
	require.Equal(t, a.ID(), alone.ID())
	id := ref.ID()
	w.release(ref, ab, same, alone)
	w.reopenStore()
	ref = w.merge(w.get(a.ID()), w.get(b.ID()), w.get(c.ID()))
	require.Equal(t, id, ref.ID())
}

// TestALayerCountsAtItsTopmostPlace: A,B,A is B,A.
func TestALayerCountsAtItsTopmostPlace(t *testing.T) {
	forKinds(t, func(w *world) {
		a, b := w.sh(nil, "write f a"), w.sh(nil, "write f b")
		ref := w.merge(a, b, a)
		require.Equal(w, []cache.ID{a.ID(), b.ID(), a.ID()}, ref.Record().Parents)
		list, err := ref.LayerChain(w.ctx)
		require.NoError(w, err)
		require.Len(w, list, 2)
		require.Equal(w, b.ID(), list[0].ID())
		require.Equal(w, "f=a", w.paths(ref))
		ba := w.merge(b, a)
		require.Equal(w, ref.ID(), ba.ID())
		w.release(a, b, ref, ba, list[0], list[1])
	})
}

// TestMergeOfADirectoryDeletedAndMadeAgain: its old content must not come back
// (an old mistake of hard link merges).
func TestMergeOfADirectoryDeletedAndMadeAgain(t *testing.T) {
	for name, was := range map[string][]string{
		"directory": {"mkdir d", "write d/f 1"},
		"file":      {"write d file"},
		"symlink":   {"link d /nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			forKinds(t, func(w *world) {
				base := w.sh(nil, was...)
				gone := w.sh(base, "rm d")
				again := w.sh(gone, "mkdir d", "write d/g 2")
				other := w.sh(nil, "write x 3")
				top := w.diff(base, again)
				ref := w.merge(base, other, top)
				require.Equal(w, "d/ d/g=2 x=3", w.paths(ref))
				w.release(base, gone, again, other, top, ref)
			})
		})
	}
}

// TestDirectoryRenamedIntoPlace: npm and git do it. Over others its content
// merges.
func TestDirectoryRenamedIntoPlace(t *testing.T) {
	forKinds(t, func(w *world) {
		a := w.sh(nil, "mkdir node_modules", "write node_modules/a 1")
		b := w.sh(nil, "mkdir .tmp", "write .tmp/b 2", "mv .tmp node_modules")
		ref := w.merge(a, b)
		require.Equal(w, "node_modules/ node_modules/a=1 node_modules/b=2", w.paths(ref))
		w.release(a, b, ref)
	})
}

// TestCapabilitiesSurviveAMerge, and owners: chown comes before xattrs.
func TestCapabilitiesSurviveAMerge(t *testing.T) {
	forKinds(t, func(w *world) {
		capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
		a := w.change(nil, func(dir string) {
			path := filepath.Join(dir, "ping")
			require.NoError(w, os.WriteFile(path, []byte("1"), 0o755))
			require.NoError(w, os.Chown(path, 12, 34))
			require.NoError(w, unix.Setxattr(path, "security.capability", []byte(capability), 0))
		})
		b := w.sh(nil, "write x 1")
		ref := w.merge(b, a)
		mnt, err := ref.Mount(w.ctx)
		require.NoError(w, err)
		var st unix.Stat_t
		require.NoError(w, unix.Stat(filepath.Join(mnt.Path(), "ping"), &st))
		require.Equal(w, [2]uint32{12, 34}, [2]uint32{st.Uid, st.Gid})
		got := make([]byte, 64)
		n, err := unix.Getxattr(filepath.Join(mnt.Path(), "ping"), "security.capability", got)
		require.NoError(w, err)
		require.Equal(w, capability, string(got[:n]))
		require.NoError(w, mnt.Unmount())
		w.release(a, b, ref)
	})
}

// TestRenameAndBackIsNoDifference.
func TestRenameAndBackIsNoDifference(t *testing.T) {
	forKinds(t, func(w *world) {
		base := w.sh(nil, "write foo 1")
		same := w.sh(base, "mv foo t", "mv t foo")
		d := w.diff(base, same)
		require.Empty(w, w.paths(d))
		w.release(base, same, d)
	})
}

func TestDiffBetweenAncestorsIsTheLayersBetween(t *testing.T) {
	forKinds(t, func(w *world) {
		base := w.sh(nil, "write a 1", "write b 1")
		one := w.sh(base, "write c 2")
		two := w.sh(one, "rm a")
		d := w.diff(base, two)
		list, err := d.LayerChain(w.ctx)
		require.NoError(w, err)
		require.Equal(w, []cache.ID{one.ID(), two.ID()}, []cache.ID{list[0].ID(), list[1].ID()})
		require.Equal(w, "c=2", w.paths(d))
		other := w.sh(nil, "write a 9", "write z 9")
		ref := w.merge(other, d)
		require.Equal(w, "c=2 z=9", w.paths(ref))
		again := w.diff(base, two)
		require.Equal(w, d.ID(), again.ID())
		none := w.diff(two, two)
		require.Empty(w, w.paths(none))
		all := w.diff(nil, two)
		require.Equal(w, two.ID(), all.ID())
		w.release(base, one, two, d, other, ref, again, none, all, list[0], list[1])
	})
}

func TestDiffOfStrangersCompares(t *testing.T) {
	forKinds(t, func(w *world) {
		lower := w.sh(nil, "write same 1", "write gone 1", "write other 1")
		upper := w.sh(nil, "write same 1", "write other 2", "write new 2")
		d := w.diff(lower, upper)
		ref := w.merge(lower, d)
		require.Equal(w, "new=2 other=2 same=1", w.paths(ref))
		over := w.merge(w.sh(nil, "write gone 5", "write mine 5"), d)
		require.Contains(w, w.paths(over), "mine=5")
		require.NotContains(w, w.paths(over), "gone")
		w.release(lower, upper, d, ref, over)
	})
}

// TestDiffSurvivesItsInputs: both are released and everything is pruned that
// can be.
func TestDiffSurvivesItsInputs(t *testing.T) {
	forKinds(t, func(w *world) {
		lower, upper := w.sh(nil, "write a 1"), w.sh(nil, "write b 2")
		d := w.diff(lower, upper)
		w.release(lower, upper)
		out, err := w.Remove(w.ctx, lower.ID(), upper.ID())
		require.NoError(w, err)
		for _, o := range out {
			require.ErrorIs(w, o.Err, errdefs.ErrFailedPrecondition)
		}
		require.Equal(w, "b=2", w.paths(d))
		w.release(d)
	})
}

func TestMergesCanBeUsedLikeAnyRecord(t *testing.T) {
	forKinds(t, func(w *world) {
		a, b := w.sh(nil, "mkdir d", "write d/a 1", "write f a"), w.sh(nil, "mkdir d", "write d/b 2")
		ab := w.merge(a, b)
		child := w.sh(ab, "write d/c 3", "rm d/a", "write f child")
		require.Equal(w, "d/ d/b=2 d/c=3 f=child", w.paths(child))
		require.Equal(w, "d/ d/a=1 d/b=2 f=a", w.paths(ab), "writing into a child changes no source")
		require.Equal(w, "d/ d/a=1 f=a", w.paths(a))
		d := w.diff(ab, child)
		require.Equal(w, "d/ d/c=3 f=child", w.paths(d))
		x := w.sh(nil, "write x 1")
		top := w.merge(x, child)
		require.Equal(w, "d/ d/b=2 d/c=3 f=child x=1", w.paths(top))
		w.release(a, b, ab, child, d, x, top)
		w.reopenStore()
		ref := w.get(top.ID())
		require.Equal(w, "d/ d/b=2 d/c=3 f=child x=1", w.paths(ref))
		w.release(ref)
	})
}

// TestMergeAppliesLayersAsTheirBlobsSay: a layer deletes what its own parent
// does not have.
func TestMergeAppliesLayersAsTheirBlobsSay(t *testing.T) {
	forKinds(t, func(w *world) {
		del := pack(w, layer.Gzip, layerTar(w, file{name: ".wh.x"}, file{name: "d", typ: tar.TypeDir}, file{name: "d/.wh..wh..opq"}, file{name: "d/new", text: "1"}))
		r := newRegistry(del)
		base := w.sh(nil, "write x 1", "write y 1", "mkdir d", "write d/old 1")
		over := w.byBlob(del, nil, r)
		ref := w.merge(base, over)
		require.Equal(w, "d/ d/new=1 y=1", w.paths(ref))
		w.release(base, over, ref)
	})
}

// TestMergeDoesNotAnswerForALayer: a blob over A is not Merge(A, B).
func TestMergeDoesNotAnswerForALayer(t *testing.T) {
	w := newWorld(t, overlayKind)
	first, second := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"})), pack(t, layer.Gzip, layerTar(t, file{name: "b", text: "1"}))
	r := newRegistry(first, second)
	a, b := w.byBlob(first, nil, r), w.byBlob(second, nil, r)
	m := w.merge(a, b)
	over := w.byBlob(second, a, r)
	require.NotEqual(t, m.ID(), over.ID())
	require.Equal(t, []cache.ID{a.ID()}, over.Record().Parents)
	w.release(a, b, m, over)
}

func TestTooManyLayersAreRefusedBeforeTheMount(t *testing.T) {
	w := newWorld(t, overlayKind)
	r := newRegistry()
	most := w.Driver().MaxDepth
	ref, _ := w.chainOf(most, r)
	b := pack(t, layer.Gzip, layerTar(t, file{name: "more"}))
	_, err := w.GetByBlob(w.ctx, b.desc, ref, cache.BlobOptions{})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	_, err = w.New(w.ctx, ref, cache.NewOptions{})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	other := w.byBlob(b, nil, nil)
	_, err = w.Merge(w.ctx, []*cache.ImmutableRef{other, ref}, cache.MergeOptions{})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	w.release(ref, other)
}

// Who holds a record can be asked while somebody else gets a handle on it; the
// race detector sees whether a handle is whole before it is there.
func TestHoldersWhileHandlesAreMade(t *testing.T) {
	w := newWorld(t, overlayKind)
	a, b := w.sh(nil, "write a 1"), w.sh(nil, "write b 1")
	blob := pack(t, layer.Gzip, layerTar(t, file{name: "a", text: "1"}))
	held := []*cache.ImmutableRef{w.merge(a, b), w.diff(a, b), w.byBlob(blob, nil, nil), w.get(a.ID())}
	stop := make(chan struct{})
	var asking sync.WaitGroup
	asking.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, ref := range held {
				for _, h := range w.Refs(ref.ID()) {
					if !strings.Contains(h.Site, "_test.go") {
						t.Errorf("%s is held from %q", ref.ID(), h.Site)
					}
				}
			}
		}
	})
	for range 30 {
		w.release(w.merge(a, b), w.diff(a, b), w.byBlob(blob, nil, nil), w.get(a.ID()))
	}
	close(stop)
	asking.Wait()
	for _, ref := range append(held, a, b) {
		w.release(ref)
	}
}

func TestBadMerges(t *testing.T) {
	w, other := newWorld(t, overlayKind), newWorld(t, nativeKind)
	a, foreign := w.sh(nil, "write a 1"), other.sh(nil, "write a 1")
	for _, inputs := range [][]*cache.ImmutableRef{nil, {nil}, {foreign}, {a, nil}, {a, foreign}} {
		_, err := w.Merge(w.ctx, inputs, cache.MergeOptions{})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
	_, err := w.Diff(w.ctx, a, nil, cache.MergeOptions{})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	for _, lower := range []*cache.ImmutableRef{a, nil} {
		_, err = w.Diff(w.ctx, lower, foreign, cache.MergeOptions{})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
	require.Len(t, idsOf(w), 1)
	w.release(a)
	other.release(foreign)
}

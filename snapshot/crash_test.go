package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/snapshot"
)

// Killed at each step, and killed again at each step of settling: the names
// are as before or as after the operation.
func TestKilledAtEachStep(t *testing.T) {
	eachOperation(t, func(t *testing.T, driver string, op operation) {
		root, s := scratch(t), &steps{}
		d := openWith(t, driver, root, s)
		scene(t, d, root)
		before := look(t, d)
		var crashes []string
		s.at = func(int, string) error {
			crashes = append(crashes, clone(t, root))
			return nil
		}
		require.NoError(t, op.do(t.Context(), d))
		crashes = append(crashes, clone(t, root))
		s.at = nil
		after := look(t, d)
		require.GreaterOrEqual(t, len(crashes), 2, "the operation has steps")
		for i, crash := range crashes {
			at := fmt.Sprintf("killed at step %d of %v", i+1, s.names)
			for _, root := range append(settleKilled(t, driver, crash), crash) {
				settled(t, driver, root, at, op.possible(before, after)...)
			}
		}
	})
}

// settleKilled settles a copy of root and returns how it looked at each step.
func settleKilled(t *testing.T, driver, root string) (crashes []string) {
	s := &steps{}
	settling := clone(t, root)
	d := openWith(t, driver, settling, s)
	s.at = func(int, string) error {
		crashes = append(crashes, clone(t, settling))
		return nil
	}
	require.NoError(t, d.Settle(t.Context()))
	s.at = nil
	return crashes
}

// settled opens root, settles it, and wants one of the worlds and that all
// of it can be taken down: a link too many or too few would show there.
func settled(t *testing.T, driver, root, at string, worlds ...world) {
	t.Helper()
	d := openWith(t, driver, root, &steps{})
	require.NoError(t, d.Settle(t.Context()), at)
	making, err := os.ReadDir(filepath.Join(root, "snapshots", "new"))
	require.NoError(t, err)
	require.Empty(t, making, at)
	got := look(t, d)
	if !among(got, worlds) {
		t.Fatalf("%s: neither before nor after; difference to before:\n%s", at, cmp.Diff(worlds[0], got))
	}
	takeDown(t, d, root, got)
}

func among(got world, worlds []world) bool {
	for _, w := range worlds {
		if cmp.Equal(got, w) {
			return true
		}
	}
	return false
}

// takeDown removes everything, children first, and wants parents refused
// until then.
func takeDown(t *testing.T, d snapshot.Driver, root string, w world) {
	t.Helper()
	left := map[string][]string{}
	for name, is := range w {
		left[name] = []string{is.Parent}
		if is.Parent == "" {
			for _, layer := range strings.Fields(is.Layers) {
				layer, _, _ = strings.Cut(layer, "/true")
				layer, _, _ = strings.Cut(layer, "/false")
				if layer != name {
					left[name] = append(left[name], layer)
				}
			}
		}
	}
	for len(left) > 0 {
		parents := map[string]bool{}
		for _, needs := range left {
			for _, name := range needs {
				parents[name] = true
			}
		}
		var leaves []string
		for name := range left {
			if !parents[name] {
				leaves = append(leaves, name)
				continue
			}
			require.Error(t, d.Remove(t.Context(), name), "%q has children", name)
		}
		for _, name := range leaves {
			require.NoError(t, d.Remove(t.Context(), name))
			delete(left, name)
		}
	}
	require.NoError(t, d.Cleanup(t.Context()))
	pending, err := d.Pending(t.Context())
	require.NoError(t, err)
	require.Empty(t, pending)
	for _, dir := range []string{"new", "active", "committed", "trash", "l"} {
		names, err := os.ReadDir(filepath.Join(root, "snapshots", dir))
		require.NoError(t, err)
		require.Empty(t, names, dir)
	}
}

// Each step fails once with a full disk: the call fails and nothing has
// changed, or it does not matter; then the same call works.
func TestFullDiskAtEachStep(t *testing.T) {
	eachOperation(t, func(t *testing.T, driver string, op operation) {
		for n := 1; ; n++ {
			root, s := scratch(t), &steps{}
			d := openWith(t, driver, root, s)
			scene(t, d, root)
			before := look(t, d)
			s.at = func(i int, _ string) error {
				if i == n {
					return unix.ENOSPC
				}
				return nil
			}
			err := op.do(t.Context(), d)
			reached := len(s.names) >= n
			s.at = nil
			if !reached {
				require.NoError(t, err)
				require.Greater(t, n, 1)
				return
			}
			require.ErrorIs(t, err, unix.ENOSPC, "step %d: %s", n, s.names[n-1])
			if op.detaches != "" && !strings.HasPrefix(s.names[n-1], "remove.") {
				// Detach was done; the removal is pending, and can be finished.
				require.Equal(t, op.between(before), look(t, d))
				require.NoError(t, d.Cleanup(t.Context()))
				takeDown(t, d, root, look(t, d))
				continue
			}
			if diff := cmp.Diff(before, look(t, d)); diff != "" {
				t.Fatalf("step %d, %s, left:\n%s", n, s.names[n-1], diff)
			}
			pending, pendErr := d.Pending(t.Context())
			require.NoError(t, pendErr)
			for _, p := range pending {
				require.Equal(t, snapshot.PendingActive, p.Kind)
			}
			making, err := os.ReadDir(filepath.Join(root, "snapshots", "new"))
			require.NoError(t, err)
			require.Empty(t, making)
			require.NoError(t, op.do(t.Context(), d), "the same call again")
			takeDown(t, d, root, look(t, d))
		}
	})
}

// From some step on everything fails, as on a dead disk: what could not be
// taken back any more is settled by the next open.
func TestDeadDiskFromEachStep(t *testing.T) {
	eachOperation(t, func(t *testing.T, driver string, op operation) {
		after := world(nil)
		for n := 1; ; n++ {
			root, s := scratch(t), &steps{}
			d := openWith(t, driver, root, s)
			scene(t, d, root)
			before := look(t, d)
			if after == nil {
				other := clone(t, root)
				d := openWith(t, driver, other, &steps{})
				require.NoError(t, op.do(t.Context(), d))
				after = look(t, d)
			}
			s.at = func(i int, _ string) error {
				if i >= n {
					return unix.EIO
				}
				return nil
			}
			err := op.do(t.Context(), d)
			reached := len(s.names) >= n
			s.at = nil
			if !reached {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, unix.EIO)
			settled(t, driver, clone(t, root), fmt.Sprintf("dead from %s", s.names[n-1]), op.possible(before, after)...)
		}
	})
}

// A child that comes between the count and the rename, as from another
// process: the removal is refused, and when it is killed before it has gone
// back, settling goes back.
func TestChildDuringRemoval(t *testing.T) {
	root, s := scratch(t), &steps{}
	d := openWith(t, snapshot.Native, root, s)
	scene(t, d, root)
	require.NoError(t, d.Remove(t.Context(), "v"))
	require.NoError(t, d.Remove(t.Context(), "k"))
	require.NoError(t, d.Cleanup(t.Context()))
	at := func(elem ...string) string { return filepath.Join(append([]string{root, "snapshots"}, elem...)...) }
	before := look(t, d)
	before["late"] = thing{Kind: snapshots.KindActive, Parent: "n", Content: before["n"].Content}
	var crashes []string
	s.at = func(_ int, name string) error {
		if name == "remove.rename" {
			other := openWith(t, snapshot.Native, root, &steps{})
			_, err := other.Prepare(context.Background(), "late", "n")
			require.NoError(t, err)
			return nil
		}
		crashes = append(crashes, clone(t, root))
		return nil
	}
	err := d.Remove(t.Context(), "n")
	s.at = nil
	require.ErrorContains(t, err, "parent of 1")
	require.Equal(t, []string{"remove.rename", "remove.undo"}, s.names)
	require.Equal(t, before, look(t, d))
	require.Len(t, crashes, 1)
	names, err := os.ReadDir(filepath.Join(crashes[0], "snapshots", "trash"))
	require.NoError(t, err)
	require.Len(t, names, 1, "killed while it lay in trash")
	require.NoFileExists(t, at("trash", names[0].Name()))

	killed := openWith(t, snapshot.Native, crashes[0], &steps{})
	require.NoError(t, killed.Cleanup(t.Context()), "too early, and harmless")
	settled(t, snapshot.Native, crashes[0], "before going back", before)
}

// A first Open that is cut at any step is made good by the next.
func TestOpenKilledAtEachStep(t *testing.T) {
	root, s := scratch(t), &steps{}
	var crashes []string
	s.at = func(int, string) error {
		crashes = append(crashes, clone(t, root))
		return nil
	}
	openWith(t, snapshot.Native, root, s)
	require.Greater(t, len(crashes), 5)
	for _, crash := range crashes {
		settled(t, snapshot.Native, crash, "open", world{})
	}
	errFull := errors.New("no more")
	for n := range s.names {
		_, err := snapshot.Open(t.Context(), scratch(t), snapshot.Options{
			Driver: snapshot.Native,
			Step: func(string) error {
				if n--; n < 0 {
					return errFull
				}
				return nil
			},
		})
		require.ErrorIs(t, err, errFull)
	}
}

// What several kills in a row leave: a chain of removed names that still are
// each other's children. The last one frees the others.
func TestSettleChainInTrash(t *testing.T) {
	root := scratch(t)
	d := openWith(t, snapshot.Native, root, &steps{})
	chain(t, d, root, 4)
	_, err := d.Prepare(t.Context(), "k", "l1")
	require.NoError(t, err)
	want := world{}
	for _, name := range []string{"l1", "k"} {
		want[name] = look(t, d)[name]
	}
	at := func(elem ...string) string { return filepath.Join(append([]string{root, "snapshots"}, elem...)...) }
	// Sorted, a parent comes before its child: one round is not enough.
	for _, name := range []string{"l2", "l3", "l4"} {
		require.NoError(t, os.Rename(at("committed", name), at("trash", name+"~cKILLED")))
	}
	// This one was about to be refused: k is its child.
	require.NoError(t, os.Rename(at("committed", "l1"), at("trash", "l1~cKILLED")))

	cut := settleKilled(t, snapshot.Native, root)
	require.Greater(t, len(cut), 3)
	for _, crash := range cut {
		d := openWith(t, snapshot.Native, crash, &steps{})
		require.NoError(t, d.Settle(t.Context()))
		require.Equal(t, want, look(t, d), "killed while it settled")
	}
	again := openWith(t, snapshot.Native, root, &steps{})
	require.NoError(t, again.Settle(t.Context()))
	require.Equal(t, want, look(t, again))
	pending, err := again.Pending(t.Context())
	require.NoError(t, err)
	var removed []string
	for _, p := range pending {
		if p.Kind == snapshot.PendingRemoval {
			removed = append(removed, p.Key)
		}
	}
	require.Equal(t, []string{"l2", "l3", "l4"}, removed)
	for _, p := range pending {
		if p.Key == "l2" {
			require.NoError(t, again.Restore(t.Context(), p))
		}
	}
	takeDown(t, again, root, look(t, again))
}

// Settle leaves alone what other calls are in the middle of.
func TestSettleBesideOthers(t *testing.T) {
	for name, op := range operations() {
		t.Run(name, func(t *testing.T) {
			root, s := scratch(t), &steps{}
			d := openWith(t, snapshot.Native, root, s)
			if name == "commit and rebase" || op.stacks {
				return // this driver refuses it
			}
			scene(t, d, root)
			other := openWith(t, snapshot.Native, clone(t, root), &steps{})
			require.NoError(t, op.do(t.Context(), other))
			settling := false
			s.at = func(_ int, step string) error {
				// Settling's own steps are not the operation's, and it would
				// wait for an active key's lock, which these steps hold.
				locked := slices.Contains([]string{"commit", "remove", "update"}, strings.Split(step, ".")[0])
				if settling || locked {
					return nil
				}
				settling = true
				defer func() { settling = false }()
				return d.Settle(context.Background())
			}
			require.NoError(t, op.do(t.Context(), d))
			s.at = nil
			require.Equal(t, look(t, other), look(t, d))
			takeDown(t, d, root, look(t, d))
		})
	}
}

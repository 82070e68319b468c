package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

// world is what callers can see of a driver: each snapshot with its content.
type world map[string]thing

type thing struct {
	Kind    snapshots.Kind
	Parent  string
	Labels  map[string]string
	Content string
	Layers  string
}

func look(t *testing.T, d snapshot.Driver) world {
	t.Helper()
	w := world{}
	require.NoError(t, d.Walk(t.Context(), func(ctx context.Context, info snapshots.Info) error {
		w[info.Name] = thing{info.Kind, info.Parent, info.Labels, content(t, d, info.Name), layers(t, d, info.Name)}
		stat, err := d.Stat(ctx, info.Name)
		require.NoError(t, err)
		require.Equal(t, info, stat)
		return nil
	}))
	return w
}

// layers are the layers of a name, by their names.
func layers(t *testing.T, d snapshot.Driver, key string) string {
	t.Helper()
	s, ok := d.Stacker()
	if !ok {
		return ""
	}
	list, err := s.Layers(t.Context(), key)
	require.NoError(t, err)
	var names []string
	for _, l := range list {
		names = append(names, fmt.Sprintf("%s/%v", l.Name, l.Clean))
	}
	return strings.Join(names, " ")
}

// content lists the files that key shows.
func content(t *testing.T, d snapshot.Driver, key string) string {
	t.Helper()
	dir, ok, err := d.Dir(t.Context(), key)
	require.NoError(t, err)
	if !ok {
		dir = t.TempDir()
		require.NoError(t, d.Mount(t.Context(), key, dir, true))
		defer func() { require.NoError(t, unix.Unmount(dir, 0)) }()
	}
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	var out []string
	for _, n := range names {
		data, err := os.ReadFile(filepath.Join(dir, n.Name()))
		require.NoError(t, err)
		out = append(out, n.Name()+"="+string(data))
	}
	return strings.Join(out, " ")
}

// steps is a hook for Options.Step that a test turns on and off.
type steps struct {
	names []string
	at    func(n int, name string) error
}

func (s *steps) step(name string) error {
	if s.at == nil {
		return nil
	}
	s.names = append(s.names, name)
	return s.at(len(s.names), name)
}

func openWith(t *testing.T, driver, root string, s *steps) snapshot.Driver {
	t.Helper()
	d, err := snapshot.Open(t.Context(), root, snapshot.Options{Driver: driver, Step: s.step})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	return d
}

// put writes a file into an active snapshot, without a mount: as long as
// nothing is mounted its fs directory may be written.
func put(t *testing.T, root, key, file string) {
	t.Helper()
	path := filepath.Join(root, "snapshots", "active", key, "fs", file)
	require.NoError(t, os.WriteFile(path, []byte(file), 0o644))
}

// scene sets the stage for every operation: base with the child n, whose
// child k is active and holds a copy of a file of n; free, which is active
// without a parent; a view; where the driver can, a stack with a child. All
// layers but base are clean.
func scene(t *testing.T, d snapshot.Driver, root string) {
	ctx := t.Context()
	exact := snapshots.Opt(snapshot.WithExactLayer)
	prepare := func(key, parent string) {
		_, err := d.Prepare(ctx, key, parent, snapshots.WithLabels(map[string]string{"of": key}))
		require.NoError(t, err)
		put(t, root, key, "by-"+key)
	}
	prepare("w1", "")
	require.NoError(t, d.Commit(ctx, "base", "w1", snapshots.WithLabels(map[string]string{"of": "base"})))
	prepare("w2", "base")
	require.NoError(t, d.Commit(ctx, "n", "w2", exact))
	for _, leaf := range []string{"leaf", "low", "high"} {
		prepare("w-"+leaf, "")
		require.NoError(t, d.Commit(ctx, leaf, "w-"+leaf, exact))
	}
	prepare("k", "n")
	if d.Info().Name == snapshot.Overlay {
		n := filepath.Join(root, "snapshots", "committed", "n", "fs", "by-w2")
		put(t, root, "k", "by-w2")
		fi, err := os.Stat(n)
		require.NoError(t, err)
		require.NoError(t, os.Chtimes(filepath.Join(root, "snapshots", "active", "k", "fs", "by-w2"), fi.ModTime(), fi.ModTime()))
	}
	prepare("free", "")
	_, err := d.View(ctx, "v", "n")
	require.NoError(t, err)
	if s, ok := d.Stacker(); ok {
		require.NoError(t, s.Stack(ctx, "m", []string{"low", "high"}))
		require.NoError(t, s.Stack(ctx, "m2", []string{"m", "n"}))
		prepare("on-m", "m")
	}
}

// operation is a call that is cut at each of its steps. It runs on the scene
// and holds no reference to a driver but the one it gets.
type operation struct {
	do func(ctx context.Context, d snapshot.Driver) error
	// detaches is the name that is gone between the halves of the call, if it
	// has two.
	detaches string
	// stacks says that the driver must have a Stacker.
	stacks bool
}

func operations() map[string]operation {
	long := strings.Repeat("long/", 100)
	label := snapshots.WithLabels(map[string]string{"new": "1"})
	prepare := func(key, parent string) operation {
		return operation{do: func(ctx context.Context, d snapshot.Driver) error {
			_, err := d.Prepare(ctx, key, parent, label)
			return err
		}}
	}
	commit := func(name, key string, opts ...snapshots.Opt) operation {
		return operation{do: func(ctx context.Context, d snapshot.Driver) error {
			return d.Commit(ctx, name, key, opts...)
		}}
	}
	remove := func(key string) operation {
		return operation{do: func(ctx context.Context, d snapshot.Driver) error { return d.Remove(ctx, key) }}
	}
	detach := func(key string, then func(context.Context, snapshot.Driver, snapshot.Pending) error) operation {
		return operation{detaches: key, do: func(ctx context.Context, d snapshot.Driver) error {
			p, err := d.Detach(ctx, key)
			if err != nil {
				return err
			}
			return then(ctx, d, p)
		}}
	}
	restore := func(ctx context.Context, d snapshot.Driver, p snapshot.Pending) error { return d.Restore(ctx, p) }
	stack := func(do func(ctx context.Context, d snapshot.Driver, s snapshot.Stacker) error) operation {
		return operation{stacks: true, do: func(ctx context.Context, d snapshot.Driver) error {
			s, _ := d.Stacker()
			return do(ctx, d, s)
		}}
	}
	stacked := func(op operation) operation {
		op.stacks = true
		return op
	}
	all := map[string]operation{
		"prepare":               prepare("new", ""),
		"prepare first child":   prepare("new", "leaf"),
		"prepare another child": prepare("new", "n"),
		"prepare, long key":     prepare(long, "n"),
		"view": {do: func(ctx context.Context, d snapshot.Driver) error {
			_, err := d.View(ctx, "new", "leaf")
			return err
		}},
		"commit":            commit("new", "k", label),
		"commit, long name": commit(long, "k", label),
		"commit and rebase": commit("new", "free", func(i *snapshots.Info) error { i.Parent = "leaf"; return nil }),
		"update": {do: func(ctx context.Context, d snapshot.Driver) error {
			_, err := d.Update(ctx, snapshots.Info{Name: "k", Labels: map[string]string{"new": "1"}})
			return err
		}},
		"remove active":      remove("k"),
		"remove view":        remove("v"),
		"remove committed":   remove("leaf"),
		"detach and restore": detach("k", restore),
		"detach and discard": detach("k", func(ctx context.Context, d snapshot.Driver, p snapshot.Pending) error {
			return d.Discard(ctx, p)
		}),
	}
	maps.Copy(all, map[string]operation{
		"stack": stack(func(ctx context.Context, _ snapshot.Driver, s snapshot.Stacker) error {
			return s.Stack(ctx, "new", []string{"leaf", "m", "n", "low"}, label)
		}),
		"stack, long name": stack(func(ctx context.Context, _ snapshot.Driver, s snapshot.Stacker) error {
			return s.Stack(ctx, long, []string{"leaf", "n"})
		}),
		"stack of nothing": stack(func(ctx context.Context, _ snapshot.Driver, s snapshot.Stacker) error {
			return s.Stack(ctx, "new", nil)
		}),
		"clean copy": stack(func(ctx context.Context, _ snapshot.Driver, s snapshot.Stacker) error {
			return s.CleanCopy(ctx, "new", "base", label)
		}),
		"diff": stack(func(ctx context.Context, _ snapshot.Driver, s snapshot.Stacker) error {
			return s.Diff(ctx, "new", "m2", "leaf", label)
		}),
		"clean": stack(func(ctx context.Context, _ snapshot.Driver, s snapshot.Stacker) error {
			_, err := s.Clean(ctx, "k")
			return err
		}),
		"prepare on a stack":       stacked(prepare("new", "m2")),
		"remove stack":             stacked(remove("m2")),
		"detach and restore stack": stacked(detach("m2", restore)),
	})
	return all
}

func eachOperation(t *testing.T, test func(t *testing.T, driver string, op operation)) {
	for _, driver := range []string{snapshot.Overlay, snapshot.Native} {
		if driver == snapshot.Overlay && os.Geteuid() != 0 {
			t.Log("overlay is left out: mounting needs root")
			continue
		}
		for name, op := range operations() {
			if driver == snapshot.Native && (name == "commit and rebase" || op.stacks) {
				continue // refused before anything is done
			}
			t.Run(driver+"/"+name, func(t *testing.T) { test(t, driver, op) })
		}
	}
}

// possible are the worlds in which a cut operation may leave the names.
func (op operation) possible(before, after world) []world {
	worlds := []world{before, after}
	if op.detaches != "" {
		worlds = append(worlds, op.between(before))
	}
	return worlds
}

// between is the world between the halves of a removal.
func (op operation) between(before world) world {
	w := maps.Clone(before)
	delete(w, op.detaches)
	return w
}

// scratch is a directory in memory where there is one: these tests make and
// remove inodes by the thousand, which ext4 gets slow at for minutes.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "lamina-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { require.NoError(t, snapshot.RemoveTree(dir)) })
	return dir
}

// clone copies a root as a killed process would leave it.
func clone(t *testing.T, root string) string {
	t.Helper()
	to := filepath.Join(scratch(t), "root")
	require.NoError(t, snapshot.CopyTree(context.Background(), to, root))
	return to
}

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

package snapshot_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
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

package cachemount_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/workspace/cachemount"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSpecs(t *testing.T) {
	for text, want := range map[string]cachemount.Spec{
		"type=cache,id=go,target=a/b":              {ID: "go", Target: "a/b", Sharing: cachemount.Shared},
		"target=./a//b/,sharing=locked,type=cache": {ID: "a/b", Target: "a/b", Sharing: cachemount.Locked},
		"type=cache,id=a=b,dst=x,sharing=private":  {ID: "a=b", Target: "x", Sharing: cachemount.Private},
		"type=cache,destination=..x":               {ID: "..x", Target: "..x", Sharing: cachemount.Shared},
	} {
		got, err := cachemount.ParseSpec(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
		again, err := cachemount.ParseSpec(got.String())
		require.NoError(t, err)
		require.Equal(t, got, again)
	}
	for text, at := range map[string]int{
		"type=bind,target=a": 5, "type=cache": 10, "type=cache,target=/a": 18, "type=cache,target=..": 18, "type=cache,target=a/../..": 18,
		"type=cache,target=.": 18, "type=cache,target=": 17, "type=cache,target=a,sharing=all": 28, "type=cache,targt=a": 11,
		"type=cache,target=a,id=": 22, "type=cache,target=a,target=b": 20, "type=cache,target=a,dst=b": 20, "type=cache,target=a,ro": 22, "target=a": 8, "type=cache,,": 11,
	} {
		_, err := cachemount.ParseSpec(text)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, text)
		var se *policy.SyntaxError
		require.ErrorAs(t, err, &se, text)
		require.Equal(t, at, se.At, "%v", err)
		_, err = cachemount.ParseSpec(se.Example)
		require.NoError(t, err)
	}
	for _, specs := range [][]cachemount.Spec{
		{{ID: "a", Target: "x"}, {ID: "b", Target: "x/y"}},
		{{ID: "a", Target: "x/y/z"}, {ID: "b", Target: "x/y"}},
		{{ID: "a", Target: "x"}, {ID: "b", Target: "./x"}},
		{{ID: "a", Target: "x"}, {ID: "a", Target: "y", Sharing: cachemount.Locked}},
		{{Target: ""}},
		{{ID: "a", Target: "../x"}},
	} {
		_, err := cachemount.Check(specs)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%v", specs)
	}
	got, err := cachemount.Check([]cachemount.Spec{{ID: "a", Target: "x/"}, {Target: "xy"}})
	require.NoError(t, err)
	require.Equal(t, []cachemount.Spec{{ID: "a", Target: "x", Sharing: cachemount.Shared}, {ID: "xy", Target: "xy", Sharing: cachemount.Shared}}, got)
}

// place is a store whose directories builds of a test acquire.
type place struct {
	testing.TB
	ctx  context.Context
	root string
}

func newPlace(t *testing.T, fn func(p *place)) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	for _, driver := range []string{"overlay", "native"} {
		t.Run(driver, func(t *testing.T) {
			p := &place{TB: t, ctx: context.Background(), root: filepath.Join(t.TempDir(), "store")}
			m, err := cache.Open(p.ctx, cache.Options{Root: p.root, DriverName: driver, SyncInterval: -1})
			require.NoError(t, err)
			require.NoError(t, m.Close())
			fn(p)
			p.look(func(m *cache.Manager) {
				for f, err := range m.Check(p.ctx) {
					require.NoError(t, err)
					require.Fail(t, "finding", "%+v", f)
				}
			})
			require.FileExists(t, filepath.Join(p.root, "clean"))
			for _, dir := range []string{"holds", "queues"} {
				left, err := os.ReadDir(filepath.Join(p.root, dir))
				if !errors.Is(err, os.ErrNotExist) {
					require.NoError(t, err)
				}
				require.Empty(t, left, dir)
			}
		})
	}
}

func (p *place) open(ctx context.Context) (*cache.Manager, error) {
	return cache.Open(ctx, cache.Options{Root: p.root, LockTimeout: time.Minute, SyncInterval: -1})
}

func (p *place) look(fn func(m *cache.Manager)) {
	p.Helper()
	m, err := p.open(p.ctx)
	require.NoError(p, err)
	defer func() { require.NoError(p, m.Close()) }()
	fn(m)
}

func (p *place) options() cachemount.Options {
	return cachemount.Options{Root: p.root, Open: p.open}
}

// set is what a build got, with the path of its one directory.
type set struct {
	*cachemount.Set
	dir string
}

func (p *place) try(ctx context.Context, o cachemount.Options, sharing cachemount.Sharing) (set, error) {
	specs, err := cachemount.Check([]cachemount.Spec{{ID: "go", Target: "a", Sharing: sharing}})
	require.NoError(p, err)
	s, err := cachemount.Acquire(ctx, o, specs)
	if err != nil {
		return set{}, err
	}
	return set{s, s.Mounts("/")[0].Source}, nil
}

func (p *place) get(sharing cachemount.Sharing) set {
	p.Helper()
	o := p.options()
	o.NoWait = true
	s, err := p.try(p.ctx, o, sharing)
	require.NoError(p, err)
	return s
}

func (p *place) busy(sharing cachemount.Sharing) {
	p.Helper()
	o := p.options()
	o.NoWait = true
	_, err := p.try(p.ctx, o, sharing)
	require.ErrorIs(p, err, cache.ErrLocked)
}

func (s set) put(t testing.TB, name string) {
	require.NoError(t, os.WriteFile(filepath.Join(s.dir, name), []byte(name), 0o600))
}

func (s set) names(t testing.TB) (names []string) {
	entries, err := os.ReadDir(s.dir)
	require.NoError(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// later acquires in the background. waits is closed when it began to wait.
func (p *place) later(ctx context.Context, sharing cachemount.Sharing) (waits chan struct{}, got chan error, s *set) {
	waits, got, s = make(chan struct{}), make(chan error, 1), &set{}
	o := p.options()
	o.OnWait = func(cachemount.Spec, cache.Holder) { close(waits) }
	go func() {
		var err error
		*s, err = p.try(ctx, o, sharing)
		got <- err
	}()
	return waits, got, s
}

func (p *place) records() (ids []cache.ID) {
	p.look(func(m *cache.Manager) {
		for rec, err := range m.Records(p.ctx) {
			require.NoError(p, err)
			require.Equal(p, cache.TypeCacheMount, rec.Type)
			ids = append(ids, rec.ID)
		}
	})
	return ids
}

func TestSharedIsOneDirectoryForAll(t *testing.T) {
	newPlace(t, func(p *place) {
		a, b := p.get(cachemount.Shared), p.get(cachemount.Shared)
		a.put(t, "from a")
		b.put(t, "from b")
		require.Equal(t, []string{"from a", "from b"}, a.names(t))
		p.busy(cachemount.Locked)
		require.NoError(t, a.Release())
		require.NoError(t, a.Release(), "twice is harmless")
		p.busy(cachemount.Locked)
		require.NoError(t, b.Release())
		c := p.get(cachemount.Locked)
		require.Equal(t, []string{"from a", "from b"}, c.names(t))
		p.busy(cachemount.Shared) // and no empty one instead
		require.NoError(t, c.Release())
		require.Len(t, p.records(), 1)
	})
}

func TestPrivateGetsItsOwn(t *testing.T) {
	newPlace(t, func(p *place) {
		a := p.get(cachemount.Private)
		a.put(t, "a")
		b := p.get(cachemount.Private)
		require.Empty(t, b.names(t))
		b.put(t, "b")
		p.busy(cachemount.Shared) // the oldest is the one, and it is in use
		require.NoError(t, a.Release())
		c := p.get(cachemount.Private)
		require.Equal(t, []string{"a"}, c.names(t), "an idle one first")
		require.NoError(t, b.Release())
		require.NoError(t, c.Release())
		d := p.get(cachemount.Shared)
		require.Equal(t, []string{"a"}, d.names(t))
		require.NoError(t, d.Release())
		require.Len(t, p.records(), 2)
	})
}

// TestWaitersAreServedInOrder: whatever they want it for, those who came first
// have it first; who gives up or dies is passed over.
func TestWaitersAreServedInOrder(t *testing.T) {
	newPlace(t, func(p *place) {
		first := p.get(cachemount.Locked)
		giveUp := errors.New("enough")
		impatient, cancel := context.WithCancelCause(p.ctx)
		type waiter struct {
			got chan error
			set *set
		}
		var all []waiter
		for i := range 5 {
			ctx, sharing := p.ctx, cachemount.Locked
			if i == 1 {
				ctx = impatient
			}
			if i == 3 {
				sharing = cachemount.Shared
			}
			waits, got, s := p.later(ctx, sharing)
			<-waits
			all = append(all, waiter{got, s})
		}
		p.busy(cachemount.Shared) // nobody overtakes
		own := p.get(cachemount.Private)
		require.NoError(t, own.Release())

		cancel(giveUp)
		require.ErrorIs(t, <-all[1].got, giveUp)
		require.NoError(t, first.Release())
		for _, i := range []int{0, 2, 3, 4} {
			require.NoError(t, <-all[i].got)
			for _, later := range all[i+1:] {
				require.Empty(t, later.got, "nobody else has it")
			}
			all[i].set.put(t, string(rune('a'+i)))
			require.NoError(t, all[i].set.Release())
		}
		last := p.get(cachemount.Locked)
		require.Equal(t, []string{"a", "c", "d", "e"}, last.names(t))
		require.NoError(t, last.Release())
		require.Len(t, p.records(), 2)
	})
}

// TestMigratedDirectoriesAreFound: they come as committed records, with
// BuildKit's index.
func TestMigratedDirectoriesAreFound(t *testing.T) {
	newPlace(t, func(p *place) {
		p.look(func(m *cache.Manager) {
			mut, err := m.New(p.ctx, nil, cache.NewOptions{
				Type: cache.TypeCacheMount, Retain: true,
				Values: []cache.Value{{Name: "cache-dir", Data: []byte(`{"value":"go"}`), Index: "cache-dir:go"}},
			})
			require.NoError(t, err)
			mnt, err := mut.Mount(p.ctx, cache.MountOptions{})
			require.NoError(t, err)
			set{dir: mnt.Path()}.put(t, "old")
			require.NoError(t, mnt.Unmount())
			imm, err := mut.Commit(p.ctx)
			require.NoError(t, err)
			require.NoError(t, imm.Release(p.ctx))
		})
		for range 2 {
			a := p.get(cachemount.Shared)
			require.Equal(t, []string{"old"}, a.names(t))
			require.NoError(t, a.Release())
		}
		require.Len(t, p.records(), 1)
	})
}

// TestPrunedWhileInUse: who has the directory keeps it until the end, nobody
// else finds it, and then it goes.
func TestPrunedWhileInUse(t *testing.T) {
	newPlace(t, func(p *place) {
		a, b := p.get(cachemount.Shared), p.get(cachemount.Shared)
		a.put(t, "old")
		prune := policy.Policy{Filters: []string{"cache==go"}}
		p.look(func(m *cache.Manager) {
			got, err := m.Prune(p.ctx, policy.Policy{})
			require.NoError(t, err)
			require.Equal(t, cache.Pruned{Kept: 1}, got)
			plan, err := m.Plan(p.ctx, prune)
			require.NoError(t, err)
			require.Equal(t, policy.OnRelease, plan.Kept()[0].Reason)
			got, err = m.Prune(p.ctx, prune)
			require.NoError(t, err)
			require.Equal(t, cache.Pruned{Kept: 1}, got)
		})
		require.Equal(t, []string{"old"}, b.names(t))
		fresh := p.get(cachemount.Locked)
		require.Empty(t, fresh.names(t))
		require.NoError(t, fresh.Release())
		require.Len(t, p.records(), 2)
		require.NoError(t, a.Release())
		p.look(func(m *cache.Manager) {
			out, err := m.RemoveReleased(p.ctx)
			require.NoError(t, err)
			require.Empty(t, out, "b has it")
		})
		require.NoError(t, b.Release())
		p.look(func(m *cache.Manager) {
			out, err := m.RemoveReleased(p.ctx)
			require.NoError(t, err)
			require.Len(t, out, 1)
			require.NoError(t, out[0].Err)
		})
		require.Len(t, p.records(), 1)
		p.look(func(m *cache.Manager) {
			got, err := m.Prune(p.ctx, prune)
			require.NoError(t, err)
			require.Equal(t, 1, got.Removed, "unused ones go at once")
		})
	})
}

func TestTargets(t *testing.T) {
	tree := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(tree, "src", "empty"), 0o755))
	require.NoError(t, os.MkdirAll(filepath.Join(tree, "left"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(tree, "file"), nil, 0o600))
	require.NoError(t, os.Symlink("/tmp", filepath.Join(tree, "out")))
	make := func(targets ...string) (func() error, error) {
		var specs []cachemount.Spec
		for _, target := range targets {
			specs = append(specs, cachemount.Spec{ID: target, Target: target})
		}
		return cachemount.MakeTargets(tree, specs, func(p string) bool { return p == "src/empty" })
	}
	undo, err := make("a/b/c", "a/d", "left", "src/empty", "x")
	require.NoError(t, err)
	require.DirExists(t, filepath.Join(tree, "a/b/c"))
	require.NoError(t, os.WriteFile(filepath.Join(tree, "a/b/product"), nil, 0o600))
	require.NoError(t, os.Remove(filepath.Join(tree, "x")))
	require.NoError(t, undo())
	require.NoDirExists(t, filepath.Join(tree, "a/b/c"))
	require.NoDirExists(t, filepath.Join(tree, "a/d"))
	require.FileExists(t, filepath.Join(tree, "a/b/product"))
	require.NoDirExists(t, filepath.Join(tree, "left"), "what a killed build left")
	require.DirExists(t, filepath.Join(tree, "src/empty"))
	for _, target := range []string{"file", "file/x", "out", "out/x"} {
		_, err := make("new/one", target)
		require.Error(t, err, target)
		require.NoDirExists(t, filepath.Join(tree, "new"), "what was made is undone")
	}
	require.NoDirExists(t, "/tmp/x")
}

// TestReleasedAfterThePlan: what a plan leaves to its user, who is gone when it
// is executed, goes at once.
func TestReleasedAfterThePlan(t *testing.T) {
	newPlace(t, func(p *place) {
		a := p.get(cachemount.Shared)
		p.look(func(m *cache.Manager) {
			plan, err := m.Plan(p.ctx, policy.Policy{Filters: []string{"cache==go"}})
			require.NoError(t, err)
			require.Zero(t, plan.Removed)
			require.NoError(t, a.Release())
			var removed []cache.ID
			for r, err := range m.Execute(p.ctx, plan) {
				require.NoError(t, err)
				require.NoError(t, r.Err)
				removed = append(removed, r.ID)
			}
			require.Equal(t, []cache.ID{cache.ID(plan.Kept()[0].Record.ID)}, removed)
		})
		require.Empty(t, p.records())
	})
}

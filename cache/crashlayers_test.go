package cache_test

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"hash/maphash"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/snapshot"
)

// The crash test of layers. Before each durable step of an extraction, a merge,
// a diff or the making of a blob the store is copied, as a kill there would
// leave it. Each copy is opened in the same boot and in another one, with its
// settling cut off at each step in turn. Whatever the step, every record must
// show what it stands for, no blob or snapshot is left that nobody answers for,
// and no blob is half there.

// layerStore is the store of one scenario.
type layerStore struct {
	*world
	r *registry
	// want has the tree of each record that may be there; sure are those that
	// must be.
	want map[cache.ID]string
	sure []cache.ID
	refs map[string]*cache.ImmutableRef
	// blobs of each record, bottom first, to hand in providers again.
	chains [][]blob
	// c knows which stores were looked at, cut at which steps.
	c   *crashTest
	cut map[string]bool
}

// know notes a record and what it shows.
func (s *layerStore) know(name string, ref *cache.ImmutableRef, paths string) *cache.ImmutableRef {
	s.refs[name], s.want[ref.ID()] = ref, paths
	return ref
}

var layerScenarios = []struct {
	name    string
	prepare func(s *layerStore)
	do      func(s *layerStore) error
}{
	{"extract", func(s *layerStore) {
		s.lazyChain()
	}, func(s *layerStore) error {
		return s.refs["top"].Extract(s.ctx)
	}},
	{"get by a blob that is here", func(s *layerStore) {
		b := pack(s, layer.Gzip, layerTar(s, file{name: "here", text: "1"}))
		s.store(b)
		s.r.blobs[b.desc.Digest] = b.data
		s.chains = append(s.chains, []blob{b})
	}, func(s *layerStore) error {
		b := s.chains[0][0]
		ref, err := s.GetByBlob(s.ctx, b.desc, nil, cache.BlobOptions{})
		if err == nil {
			s.know("here", ref, "here=1")
		}
		return err
	}},
	{"merge", func(s *layerStore) {
		s.lazyChain()
		s.know("mine", s.sh(nil, "write mine 1", "mkdir .t", "write .t/x 1", "mv .t d"), "d/ d/x=1 mine=1")
		// Somebody looks while it is finalized, so its layer is cleaned later.
		s.know("raw", s.sh(s.refs["mine"], "mv mine t", "mv t mine", "write raw 1"), "d/ d/x=1 mine=1 raw=1")
		mnt, err := s.refs["raw"].Mount(s.ctx)
		require.NoError(s, err)
		require.NoError(s, s.refs["raw"].Finalize(s.ctx))
		require.NoError(s, mnt.Unmount())
	}, func(s *layerStore) error {
		ref, err := s.Merge(s.ctx, []*cache.ImmutableRef{s.refs["raw"], s.refs["base"]}, cache.MergeOptions{})
		if err != nil {
			return err
		}
		s.know("merge", ref, "a=1 d/ d/x=1 mine=1 raw=1")
		return ref.Extract(s.ctx)
	}},
	{"diff", func(s *layerStore) {
		s.know("lower", s.sh(nil, "write a 1", "write gone 1"), "a=1 gone=1")
		base := s.know("base", s.sh(nil, "write a 1"), "a=1")
		s.know("upper", s.sh(base, "mv a t", "mv t a", "mkdir .t", "write .t/x 1", "mv .t d"), "a=1 d/ d/x=1")
	}, func(s *layerStore) error {
		ref, err := s.Diff(s.ctx, s.refs["lower"], s.refs["upper"], cache.MergeOptions{})
		if err != nil {
			return err
		}
		s.know("diff", ref, "") // what it shows depends on times
		return ref.Extract(s.ctx)
	}},
	{"make blobs", func(s *layerStore) {
		base := s.know("base", s.sh(nil, "write a 1"), "a=1")
		s.know("child", s.sh(base, "write b 2"), "a=1 b=2")
	}, func(s *layerStore) error {
		r, err := s.refs["child"].GetRemotes(s.ctx, gzipped)
		if err != nil {
			return err
		}
		return r.Release(s.ctx)
	}},
	{"remove", func(s *layerStore) {
		s.lazyChain()
		require.NoError(s, s.refs["top"].Extract(s.ctx))
		s.release(s.refs["top"], s.refs["base"])
	}, func(s *layerStore) error {
		out, err := s.Remove(s.ctx, s.refs["top"].ID(), s.refs["base"].ID())
		for _, o := range out {
			err = errors.Join(err, o.Err)
		}
		s.sure = nil
		return err
	}},
}

// lazyChain makes two lazy layers.
func (s *layerStore) lazyChain() {
	b1 := pack(s, layer.Gzip, layerTar(s, file{name: "a", text: "1"}))
	b2 := pack(s, layer.Zstd, layerTar(s, file{name: "b", text: "2"}))
	for _, b := range []blob{b1, b2} {
		s.r.blobs[b.desc.Digest] = b.data
	}
	s.chains = append(s.chains, []blob{b1, b2})
	base := s.know("base", s.byBlob(b1, nil, s.r), "a=1")
	s.know("top", s.byBlob(b2, base, s.r), "a=1 b=2")
}

func TestLayersCrashAtEveryStep(t *testing.T) {
	needRoot(t)
	if underRace {
		t.Skip("one goroutine has no races, and takes five times as long: hack/test runs it without")
	}
	cut, all := map[string]bool{}, true
	for _, k := range []kind{overlayKind, nativeKind} {
		for _, sc := range layerScenarios {
			ran := false
			t.Run(k.name+"/"+sc.name, func(t *testing.T) {
				ran = true
				dir := fastDir(t)
				rec := &recorder{dir: dir}
				w := newWorldIn(t, k, filepath.Join(dir, "store"), rec.step)
				rec.root = w.root
				s := &layerStore{
					world: w, r: newRegistry(), want: map[cache.ID]string{}, refs: map[string]*cache.ImmutableRef{},
					c: &crashTest{T: t, seed: maphash.MakeSeed(), seen: map[uint64]bool{}},
				}
				sc.prepare(s)
				_, err := w.Sync(w.ctx)
				require.NoError(t, err)
				s.sure = slices.Collect(maps.Keys(s.want))
				rec.on = true
				require.NoError(t, sc.do(s))
				rec.on = false
				require.NoError(t, rec.copy("acknowledged"))
				require.Greater(t, len(rec.copies), 2)
				s.cut = cut
				s.note(rec)
				settled := 0
				for _, at := range rec.copies {
					twin := at.dir + "-twin"
					require.NoError(t, cloneTree(at.dir, twin))
					settled += s.survives(at.step+" same boot", at.dir, "this boot", true)
					settled += s.survives(at.step+" other boot", twin, "another boot", true)
				}
				t.Logf("rig: cut at %d steps: %d stores settled", len(rec.copies), settled)
			})
			all = all && ran
		}
	}
	if all {
		everyStepIsCut(t, cut)
	}
}

// cutElsewhere are the steps of this package and of the drivers that no scenario
// of layers comes to, with the tests that cut them, or why none has to.
var cutElsewhere = map[string]string{
	"mark clean": "TestCrashAtEveryStep",
	"tidy.work":  "TestCrashAtEveryStep",
	// Marks and lists for the daemon that had the snapshots before.
	"adopt.discard": "snapshot.TestAdoptedStoppedAtEachStep",
	"adopt.done":    "snapshot.TestAdoptedStoppedAtEachStep",
	"adopt.info":    "snapshot.TestAdoptedStoppedAtEachStep",
	"adopt.list":    "snapshot.TestAdoptedStoppedAtEachStep",
	"adopt.mark":    "snapshot.TestAdoptedStoppedAtEachStep",
	"adopt.mkdir":   "snapshot.TestAdoptedStoppedAtEachStep",
	"adopt.named":   "snapshot.TestAdoptedStoppedAtEachStep",
	"adopt.rename":  "snapshot.TestAdoptedStoppedAtEachStep",
	"discard.going": "snapshot.TestAdoptedStoppedAtEachStep",
	"disown.list":   "snapshot.TestAdoptedStoppedAtEachStep",
	"remove.move":   "snapshot.TestAdoptedStoppedAtEachStep",
	"restore.move":  "snapshot.TestAdoptedStoppedAtEachStep",
	"disown.entry":  "migrate.TestKilledAtEachStep, of a rollback",
	"open.driver":   "snapshot.TestOpenKilledAtEachStep",
	"open.mkdir":    "snapshot.TestOpenKilledAtEachStep",
	"update.info":   "snapshot.TestKilledAtEachStep",
	"settle.rebase": "snapshot.TestKilledAtEachStep",
	"settle.back":   "snapshot.TestSettleChainInTrash",
	// What is taken back after an error: snapshot.TestFullDiskAtEachStep.
	"commit.undo":   "snapshot.TestFullDiskAtEachStep",
	"discard.leave": "snapshot.TestFullDiskAtEachStep",
	"make.undo":     "snapshot.TestFullDiskAtEachStep",
	"remove.undo":   "snapshot.TestFullDiskAtEachStep",
	"restore.undo":  "snapshot.TestFullDiskAtEachStep",
	// One call each, of which a kill leaves nothing in between.
	"links.make":  "a short name for mounts by others, which may be there or not",
	"settle.lost": "the rename of what nothing can name any more",
	"sync":        "changes nothing",
}

// everyStepIsCut asserts that no step of the source is missing in the scenarios,
// so that a new one is not forgotten.
func everyStepIsCut(t *testing.T, cut map[string]bool) {
	named := map[string]bool{}
	stepsNamed(t, ".", named, "step", "Step")
	stepsNamed(t, "../snapshot", named, "step", "rename", "leave")
	require.Greater(t, len(named), 40)
	var uncut, twice, gone []string
	for step := range named {
		switch where := cutElsewhere[step]; {
		case where == "" && !cut[step]:
			uncut = append(uncut, step)
		case where != "" && cut[step]:
			twice = append(twice, step)
		}
	}
	for step := range cutElsewhere {
		if !named[step] {
			gone = append(gone, step)
		}
	}
	slices.Sort(uncut)
	require.Empty(t, uncut, "no scenario cuts these; is there one that comes to them?")
	require.Empty(t, twice, "are cut here, too")
	require.Empty(t, gone, "there are no such steps")
}

// stepsNamed collects the names of the durable steps in a package: they are the
// first argument of the methods that announce them.
func stepsNamed(t *testing.T, dir string, named map[string]bool, announce ...string) {
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	require.NoError(t, err)
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		require.NoError(t, err)
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			fun, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !slices.Contains(announce, fun.Sel.Name) {
				return true
			}
			if text, ok := call.Args[0].(*ast.BasicLit); ok && text.Kind == token.STRING {
				step, err := strconv.Unquote(text.Value)
				require.NoError(t, err)
				named[step] = true
			}
			return true
		})
	}
}

// note notes the steps at which copies were made.
func (s *layerStore) note(rec *recorder) {
	for _, at := range rec.copies {
		s.cut[at.step] = true
	}
}

// newWorldIn is newWorld in a directory of the caller's, with steps.
func newWorldIn(t testing.TB, k kind, root string, step func(string) error) *world {
	w := &world{TB: t, ctx: context.Background(), kind: kind{k.name, openStepped(k.name, step)}, root: root, boot: "this boot"}
	w.opts = func(o *cache.Options) { o.Step, o.FlushInterval = step, -1 }
	require.NoError(t, os.Mkdir(w.root, 0o700))
	w.reopenStore()
	t.Cleanup(w.finish)
	return w
}

// survives opens what a kill left and looks at all of it. It says how many
// stores it settled.
func (s *layerStore) survives(what, root, boot string, deep bool) (settled int) {
	defer func() { require.NoError(s, os.RemoveAll(root)) }()
	if s.c.settledBefore(root, boot, 0) {
		return 0
	}
	rec := &recorder{root: root, dir: filepath.Dir(filepath.Dir(root)), on: deep}
	m, err := cache.Open(s.ctx, cache.Options{Root: root, DriverName: s.kind.name, BootID: boot, Step: rec.step, FlushInterval: -1, SyncInterval: -1})
	require.NoError(s, err, what)
	rec.on = false
	s.note(rec)
	s.examine(what, m)
	require.NoError(s, m.Close(), what)
	for _, at := range rec.copies {
		settled += s.survives(fmt.Sprintf("%s, settling [at %s]", what, at.step), at.dir, boot, false)
	}
	return settled + 1
}

func (s *layerStore) examine(what string, m *cache.Manager) {
	s.sound(what, m)
	there := map[cache.ID]bool{}
	for rec, err := range m.Records(s.ctx) {
		require.NoError(s, err, what)
		there[rec.ID] = true
		require.Contains(s, s.want, rec.ID, "%s: a record of nothing", what)
	}
	for _, id := range s.sure {
		require.True(s, there[id], "%s: record %s is gone", what, id)
	}
	// Providers come with each process again.
	for _, chain := range s.chains {
		var parent *cache.ImmutableRef
		for _, b := range chain {
			ref, err := m.GetByBlob(s.ctx, b.desc, parent, cache.BlobOptions{Provider: s.r})
			require.NoError(s, err, what)
			if parent != nil {
				require.NoError(s, parent.Release(s.ctx))
			}
			parent = ref
		}
		require.NoError(s, parent.Release(s.ctx))
	}
	for id := range there {
		ref, err := m.Get(s.ctx, id, cache.GetOptions{})
		require.NoError(s, err, what)
		require.NoError(s, ref.Extract(s.ctx), what)
		mnt, err := ref.Mount(s.ctx)
		require.NoError(s, err, what)
		if want := s.want[id]; want != "" {
			require.Equal(s, want, pathsIn(s, mnt.Path()), what)
		}
		require.NoError(s, mnt.Unmount(), what)
		require.NoError(s, ref.Release(s.ctx))
	}
	s.sound(what, m)
	var ids []cache.ID
	for rec, err := range m.Records(s.ctx) {
		require.NoError(s, err, what)
		ids = append(ids, rec.ID)
	}
	out, err := m.Remove(s.ctx, ids...)
	require.NoError(s, err, what)
	for _, o := range out {
		require.NoError(s, o.Err, what)
	}
	blobs, err := filepath.Glob(filepath.Join(m.Root(), "content", "blobs", "*", "*"))
	require.NoError(s, err)
	require.Empty(s, blobs, "%s: blobs are left without a record", what)
}

// sound asserts that nothing is found, and that nothing half-made is there.
func (s *layerStore) sound(what string, m *cache.Manager) {
	for f, err := range m.Check(s.ctx) {
		require.NoError(s, err, what)
		require.Fail(s, "finding", "%s: %+v", what, f)
	}
	for _, dir := range []string{"blobs", "content/ingest", "snapshots/new", "snapshots/trash", "snapshots/active"} {
		names, err := os.ReadDir(filepath.Join(m.Root(), dir))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		require.NoError(s, err, what)
		for _, n := range names {
			// Of committed records the snapshots are active.
			if dir != "snapshots/active" || !strings.HasSuffix(n.Name(), "-w") {
				require.Fail(s, "left", "%s: %s/%s", what, dir, n.Name())
			}
		}
	}
	blobs, err := filepath.Glob(filepath.Join(m.Root(), "content", "blobs", "*", "*"))
	require.NoError(s, err)
	for _, path := range blobs {
		data, err := os.ReadFile(path)
		require.NoError(s, err)
		require.Equal(s, filepath.Base(path), digest.FromBytes(data).Encoded(), what)
	}
}

// openStepped is openDriver with steps.
func openStepped(name string, step func(string) error) func(root string) (snapshot.Driver, error) {
	return func(root string) (snapshot.Driver, error) {
		return snapshot.Open(context.Background(), root, snapshot.Options{Driver: name, Step: step})
	}
}

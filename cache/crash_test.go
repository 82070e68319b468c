package cache_test

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
)

// The crash test. A history of operations runs once; before each durable step
// of its last operation the whole store is copied aside, as a kill there would
// leave it. Each copy is opened, in the same boot and in another one, and must
// hold what a model of a few lines says: all that was acknowledged, and the
// operation under way wholly or not at all. The settling of the copies is cut
// off at each of its own steps in turn.

// fact is what the model knows of one record.
type fact struct {
	State   cache.State
	Content string
	Parents []cache.ID
	// unrecorded mutables are gone after any crash.
	unrecorded bool
	// durable data survives another boot; kept says that the record may
	// survive without.
	durable, kept bool
}

type model map[cache.ID]fact

// survives is what is left of the model after a crash: of each record what
// can be compared.
func (m model) survives(sameBoot bool) model {
	out := model{}
	for id, f := range m {
		if m.alive(f, sameBoot) {
			out[id] = fact{State: f.State, Content: f.Content, Parents: f.Parents}
		}
	}
	return out
}

func (m model) alive(f fact, sameBoot bool) bool {
	switch {
	case f.unrecorded:
		return false
	case sameBoot:
		return true
	case f.State == cache.Mutable && !f.kept, f.State != cache.Mutable && !f.durable:
		return false
	}
	for _, p := range f.Parents {
		if !m.alive(m[p], sameBoot) {
			return false
		}
	}
	return true
}

// history is one store with one line of records.
type history struct {
	t     testing.TB
	ctx   context.Context
	root  string
	open  func() (*cache.Manager, error)
	m     *cache.Manager
	model model
	mut   *cache.MutableRef
	imm   *cache.ImmutableRef
	id    cache.ID // the record that the next operation is about
	// between are states of the model that an operation passes through.
	between []model
	files   int
}

// operation is one step of a history: when it makes sense, and what it does.
type operation struct {
	name string
	can  func(h *history) bool
	do   func(h *history) error
}

func (h *history) is(states ...cache.State) bool {
	return h.id != "" && slices.Contains(states, h.model[h.id].State)
}

func (h *history) set(change func(*fact)) {
	f := h.model[h.id]
	change(&f)
	h.model[h.id] = f
}

// held makes sure that there is an immutable handle.
func (h *history) held() (err error) {
	if h.imm == nil {
		h.imm, err = h.m.Get(h.ctx, h.id, cache.GetOptions{})
	}
	return err
}

// let makes sure that there is no handle.
func (h *history) let() error {
	var errs []error
	if h.mut != nil {
		errs = append(errs, h.mut.Release(h.ctx))
	}
	if h.imm != nil {
		errs = append(errs, h.imm.Release(h.ctx))
	}
	h.mut, h.imm = nil, nil
	return errors.Join(errs...)
}

func (h *history) create(o cache.NewOptions) error {
	return h.under(nil, o)
}

func (h *history) under(parent *cache.ImmutableRef, o cache.NewOptions) (err error) {
	h.mut, err = h.m.New(h.ctx, parent, o)
	if err != nil {
		return err
	}
	f := fact{State: cache.Mutable, unrecorded: !o.Retain, kept: o.KeepOnPowerCut}
	if parent != nil {
		f.Parents = []cache.ID{parent.ID()}
		f.Content = h.model[parent.ID()].Content
	}
	h.id, h.imm = h.mut.ID(), nil
	h.model[h.id] = f
	return nil
}

// write puts a file into the mutable record. It is no durable step.
func (h *history) write() error {
	if h.mut == nil {
		return nil
	}
	mnt, err := h.mut.Mount(h.ctx, cache.MountOptions{})
	if err != nil {
		return err
	}
	h.files++
	name := fmt.Sprintf("f%d", h.files)
	err = os.WriteFile(filepath.Join(mnt.Path(), name), []byte(h.id), 0o644)
	h.set(func(f *fact) { f.Content = strings.TrimSpace(f.Content + " " + name + "=" + string(h.id)) })
	return errors.Join(err, mnt.Unmount())
}

func (h *history) remove(ids ...cache.ID) error {
	err := h.let()
	out, rerr := h.m.Remove(h.ctx, ids...)
	err = errors.Join(err, rerr)
	parents := h.model[h.id].Parents
	h.id = ""
	for _, r := range out {
		err = errors.Join(err, r.Err)
		delete(h.model, r.ID)
	}
	if len(parents) == 1 && len(ids) == 1 {
		h.id = parents[0]
	}
	return err
}

var operations = []operation{
	{"New", func(h *history) bool { return h.id == "" }, func(h *history) error {
		return h.create(cache.NewOptions{})
	}},
	{"NewRetained", func(h *history) bool { return h.id == "" }, func(h *history) error {
		return h.create(cache.NewOptions{Retain: true})
	}},
	{"NewKept", func(h *history) bool { return h.id == "" }, func(h *history) error {
		return h.create(cache.NewOptions{Retain: true, KeepOnPowerCut: true})
	}},
	{"Child", func(h *history) bool { return h.is(cache.Committed, cache.Finalized) }, func(h *history) error {
		if err := h.held(); err != nil {
			return err
		}
		parent := h.imm
		finalized := maps.Clone(h.model)
		f := finalized[h.id]
		f.State = cache.Finalized
		finalized[h.id] = f
		h.between = append(h.between, finalized)
		err := h.under(parent, cache.NewOptions{Retain: true})
		h.model[parent.ID()] = f
		return errors.Join(err, parent.Release(h.ctx))
	}},
	{"Retain", func(h *history) bool { return h.is(cache.Mutable) && h.model[h.id].unrecorded }, func(h *history) error {
		err := h.mut.Edit(h.ctx, func(e *cache.Edit) error { e.SetRetain(true); return nil })
		h.set(func(f *fact) { f.unrecorded = false })
		return err
	}},
	{"Release", func(h *history) bool { return h.mut != nil }, func(h *history) error {
		if h.model[h.id].unrecorded {
			delete(h.model, h.id)
			h.id = ""
		}
		return h.let()
	}},
	{"Commit", func(h *history) bool { return h.mut != nil }, func(h *history) (err error) {
		h.imm, err = h.mut.Commit(h.ctx)
		h.mut = nil
		h.set(func(f *fact) { f.State, f.unrecorded, f.durable = cache.Committed, false, false })
		return err
	}},
	{"Finalize", func(h *history) bool { return h.is(cache.Committed) }, func(h *history) error {
		if err := h.held(); err != nil {
			return err
		}
		h.set(func(f *fact) { f.State = cache.Finalized })
		return h.imm.Finalize(h.ctx)
	}},
	{"Reopen", func(h *history) bool { return h.is(cache.Committed) || h.is(cache.Mutable) && h.mut == nil }, func(h *history) error {
		err := h.let()
		old := h.id
		mut, rerr := h.m.GetMutable(h.ctx, old)
		if err := errors.Join(err, rerr); err != nil {
			return err
		}
		f := h.model[old]
		delete(h.model, old)
		f.State, f.durable = cache.Mutable, false
		h.mut, h.id = mut, mut.ID()
		h.model[h.id] = f
		return nil
	}},
	{"Remove", func(h *history) bool { return h.id != "" && !h.model[h.id].unrecorded }, func(h *history) error {
		return h.remove(h.id)
	}},
	{"RemoveLine", func(h *history) bool { return h.id != "" && len(h.model[h.id].Parents) == 1 }, func(h *history) error {
		// Each record is a removal of its own, the child's first.
		childless := maps.Clone(h.model)
		delete(childless, h.id)
		h.between = append(h.between, childless)
		return h.remove(h.model[h.id].Parents[0], h.id)
	}},
	{"Sync", func(h *history) bool { return h.is(cache.Committed, cache.Finalized) }, func(h *history) error {
		_, err := h.m.Sync(h.ctx)
		for id, f := range h.model {
			f.durable = f.durable || f.State != cache.Mutable
			h.model[id] = f
		}
		return err
	}},
	{"Again", func(*history) bool { return false }, func(h *history) (err error) {
		if err := errors.Join(h.let(), h.m.Close()); err != nil {
			return err
		}
		h.m, err = h.open()
		return err
	}},
	{"Close", func(*history) bool { return true }, func(h *history) error {
		h.mut, h.imm = nil, nil
		return h.m.Close()
	}},
}

func operationNamed(name string) operation {
	i := slices.IndexFunc(operations, func(o operation) bool { return o.name == name })
	return operations[i]
}

// starts are what histories begin with, so that short ones get far, and how
// many operations follow.
var starts = []struct {
	history string
	length  int
}{
	{"", 3},
	{"New Commit", 2},
	{"New Commit Sync", 1},
	{"New Commit Child Commit", 1},
	{"New Commit Child Commit Sync Finalize", 1},
	// The store was closed cleanly before: it must become dirty in time.
	{"New Commit Again", 1},
	{"New Commit Child Commit Again", 1},
}

// crashTest is one driver's run.
type crashTest struct {
	*testing.T
	dir    string
	fresh  string // a store in which nothing was done yet
	driver string
	// deep says up to which length of a history the settling is cut, too.
	deep            int
	copies, settled int
	histories       int
	// seen are the copies of the present history that were settled already:
	// many steps leave the same bytes.
	seed maphash.Seed
	seen map[uint64]bool
}

func TestCrashAtEveryStep(t *testing.T) {
	needRoot(t)
	if underRace {
		t.Skip("one goroutine has no races, and takes five times as long: hack/test runs it without")
	}
	more, deep := 0, 3
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		more = 1
	}
	for _, driver := range []string{"overlay", "native"} {
		t.Run(driver, func(t *testing.T) {
			t.Parallel()
			c := &crashTest{T: t, dir: fastDir(t), driver: driver, deep: deep, seed: maphash.MakeSeed(), seen: map[uint64]bool{}}
			c.making()
			for _, s := range starts {
				c.extend(strings.Fields(s.history), nil, s.length+more)
			}
			require.Positive(t, c.copies)
			require.Positive(t, c.settled)
			t.Logf("rig: %d histories cut at %d steps: %d different stores settled", c.histories, c.copies, c.settled)
		})
	}
}

// making cuts off the making of a store at each step, and leaves a fresh one.
func (c *crashTest) making() {
	c.fresh = filepath.Join(c.dir, "fresh")
	r := &recorder{root: c.fresh, dir: c.dir, on: true}
	m, err := cache.Open(context.Background(), c.options(c.fresh, "this boot", r.step))
	require.NoError(c, err)
	require.NoError(c, m.Close())
	require.NotEmpty(c, r.copies)
	for _, at := range r.copies {
		c.settle("making a store [at "+at.step+"]", at.dir, "this boot", []model{{}}, false)
	}
}

// extend tries every operation that can follow, and what can follow that.
func (c *crashTest) extend(start, done []string, length int) {
	for _, op := range operations {
		if c.crash(start, done, op) && length > 1 && op.name != "Close" {
			c.extend(start, append(slices.Clone(done), op.name), length-1)
		}
	}
}

// crash runs the history that start and done name, and op with copies taken at
// each step. It says whether op was possible.
func (c *crashTest) crash(start, done []string, op operation) bool {
	h, r := c.open()
	defer func() { require.NoError(c, os.RemoveAll(filepath.Dir(h.root))) }()
	prefix := append(slices.Clone(start), done...)
	for _, name := range prefix {
		require.NoError(c, operationNamed(name).do(h), "%v", prefix)
		require.NoError(c, h.write(), "%v", prefix)
	}
	if !op.can(h) {
		require.NoError(c, h.m.Close())
		return false
	}
	history := strings.Join(append(prefix, op.name), " ")
	before := maps.Clone(h.model)
	h.between = nil
	r.on = true
	require.NoError(c, op.do(h), history)
	r.on = false
	after := maps.Clone(h.model)
	require.NoError(c, r.copy("acknowledged"))
	if op.name != "Close" {
		require.NoError(c, h.m.Close())
	}

	c.histories++
	c.copies += len(r.copies)
	clear(c.seen)
	deep := len(done) < c.deep
	for i, at := range r.copies {
		allowed := append([]model{before, after}, h.between...)
		if i == len(r.copies)-1 {
			allowed = []model{after}
		}
		what := fmt.Sprintf("%s [at %s]", history, at.step)
		twin := at.dir + "-twin"
		require.NoError(c, cloneTree(at.dir, twin))
		c.settle(what+" same boot", at.dir, "this boot", allowed, deep)
		c.settle(what+" other boot", twin, "another boot", allowed, deep)
	}
	return true
}

// open makes a store in which copies can be taken.
func (c *crashTest) open() (*history, *recorder) {
	dir, err := os.MkdirTemp(c.dir, "history-")
	require.NoError(c, err)
	root := filepath.Join(dir, "store")
	require.NoError(c, cloneTree(c.fresh, root))
	r := &recorder{root: root, dir: c.dir}
	h := &history{t: c, ctx: context.Background(), root: root, model: model{}}
	h.open = func() (*cache.Manager, error) {
		return cache.Open(h.ctx, c.options(root, "this boot", r.step))
	}
	h.m, err = h.open()
	require.NoError(c, err)
	return h, r
}

func (c *crashTest) options(root, boot string, step func(string) error) cache.Options {
	return cache.Options{Root: root, DriverName: c.driver, BootID: boot, Step: step, FlushInterval: -1, SyncInterval: -1}
}

// recorder copies the store before each durable step.
type recorder struct {
	root, dir string
	on        bool
	copies    []stopped
}

// stopped is a store as a kill before a step would leave it.
type stopped struct{ step, dir string }

func (r *recorder) step(name string) error {
	if !r.on {
		return nil
	}
	return r.copy(name)
}

func (r *recorder) copy(step string) error {
	dir, err := os.MkdirTemp(r.dir, "copy-")
	if err != nil {
		return err
	}
	dir = filepath.Join(dir, "store")
	r.copies = append(r.copies, stopped{step, dir})
	if _, err := os.Lstat(r.root); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return cloneTree(r.root, dir)
}

// settle opens what a kill left and compares it with the models that are
// allowed. With deep the settling itself is cut at each step.
func (c *crashTest) settle(what, root, boot string, allowed []model, deep bool) {
	defer func() { require.NoError(c, os.RemoveAll(root)) }()
	if c.settledBefore(root, boot, len(allowed)) {
		return
	}
	r := &recorder{root: root, dir: c.dir, on: deep}
	m, err := cache.Open(context.Background(), c.options(root, boot, r.step))
	require.NoError(c, err, what)
	r.on = false
	c.compare(what, m, boot == "this boot", allowed)
	c.settled++
	for _, at := range r.copies {
		c.settle(fmt.Sprintf("%s, settling [at %s]", what, at.step), at.dir, boot, allowed, false)
	}
}

// settledBefore says whether the same bytes were settled in that boot and
// compared with as many models.
func (c *crashTest) settledBefore(root, boot string, models int) bool {
	var h maphash.Hash
	h.SetSeed(c.seed)
	fmt.Fprintln(&h, boot, models)
	require.NoError(c, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() == cache.StoreFile+".holder" {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(&h, strings.TrimPrefix(path, root), info.Mode(), info.Sys().(*syscall.Stat_t).Nlink)
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			_, _ = h.Write(data)
			return err
		}
		return nil
	}))
	sum := h.Sum64()
	was := c.seen[sum]
	c.seen[sum] = true
	return was
}

// compare looks at all that there is in a settled store, and closes it.
func (c *crashTest) compare(what string, m *cache.Manager, sameBoot bool, allowed []model) {
	ctx := context.Background()
	for f, err := range m.Check(ctx) {
		require.NoError(c, err, what)
		require.Fail(c, "finding", "%s: %+v", what, f)
	}
	got := model{}
	for rec, err := range m.Records(ctx) {
		require.NoError(c, err, what)
		got[rec.ID] = fact{State: rec.State, Content: c.read(what, m, rec), Parents: rec.Parents}
	}
	var differs []string
	match := slices.ContainsFunc(allowed, func(want model) bool {
		d := cmp.Diff(want.survives(sameBoot), got, cmp.AllowUnexported(fact{}))
		differs = append(differs, d)
		return d == ""
	})
	require.True(c, match, "%s: neither before nor after\n%s", what, strings.Join(differs, "\n"))
	for _, was := range allowed {
		for id := range was {
			if _, there := got[id]; !there {
				_, err := m.Get(ctx, id, cache.GetOptions{})
				require.ErrorIs(c, err, errdefs.ErrNotFound, "%s: %s", what, id)
			}
		}
	}
	require.NoError(c, m.Close(), what)
	for _, dir := range []string{"new", "trash"} {
		names, err := os.ReadDir(filepath.Join(m.Root(), "snapshots", dir))
		require.NoError(c, err, what)
		require.Empty(c, names, "%s: %s", what, dir)
	}
	_, err := os.Lstat(filepath.Join(m.Root(), "clean"))
	require.NoError(c, err, what)
}

// read is the content of a record.
func (c *crashTest) read(what string, m *cache.Manager, rec *cache.Record) string {
	ctx := context.Background()
	var mnt *cache.Mount
	var err error
	if rec.State == cache.Mutable {
		var mut *cache.MutableRef
		mut, err = m.GetMutable(ctx, rec.ID)
		require.NoError(c, err, what)
		defer func() { require.NoError(c, mut.Release(ctx), what) }()
		mnt, err = mut.Mount(ctx, cache.MountOptions{ReadOnly: true})
	} else {
		var imm *cache.ImmutableRef
		imm, err = m.Get(ctx, rec.ID, cache.GetOptions{NoUpdate: true})
		require.NoError(c, err, what)
		defer func() { require.NoError(c, imm.Release(ctx), what) }()
		mnt, err = imm.Mount(ctx)
	}
	require.NoError(c, err, what)
	defer func() { require.NoError(c, mnt.Unmount(), what) }()
	return readTree(c, mnt.Path())
}

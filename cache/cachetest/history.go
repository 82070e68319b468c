package cachetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

// Trees is what a driver has beside whose snapshots are no directories: then
// what a Mount calls its path is a name for these methods.
type Trees interface {
	WriteFile(dir, name, text string) error
	ReadTree(dir string) (map[string]string, error)
}

// history is one store, what the model says of it, and the handles that are
// out.
type history struct {
	open Opener
	root string
	boot int

	m      *cache.Manager
	driver *snapshottest.Faulty
	trees  Trees
	model  *model
	faults

	// ids of the names that records have in the model, and back. A name
	// without an id is one that a crash cut off.
	ids   map[string]cache.ID
	names map[cache.ID]string
	next  int

	writers, readers []*handle
	mounts           []*mounted
	holds            []*held
	// ended are handles that were given back, or that a restart ended.
	ended []*handle

	// faulted says that an injected failure may have left something for the
	// next open.
	faulted bool
	opens   int
	trace   []string
}

type handle struct {
	name  string
	mut   *cache.MutableRef
	imm   *cache.ImmutableRef
	touch bool
}

type mounted struct {
	name    string
	writing bool
	mnt     *cache.Mount
}

type held struct {
	name string
	hold *cache.Hold
}

// failure is what a history ends with that shows a bug.
type failure struct{ text string }

func (h *history) fail(format string, args ...any) {
	panic(failure{fmt.Sprintf(format, args...)})
}

func (h *history) must(err error, what string) {
	if err != nil {
		h.fail("%s: %v", what, err)
	}
}

func (h *history) note(format string, args ...any) {
	h.trace = append(h.trace, fmt.Sprintf(format, args...))
}

func newHistory(open Opener, root string) *history {
	return &history{
		open: open, root: root, model: newModel(),
		ids: map[string]cache.ID{}, names: map[cache.ID]string{},
	}
}

// openStore opens the store with a driver that fails when it is told to.
func (h *history) openStore() error {
	d, err := h.open(h.root)
	if err != nil {
		return err
	}
	h.opens++
	h.driver = snapshottest.NewFaulty(d)
	h.driver.Hook(
		func(c snapshottest.Call) error { return h.event(c.Op) },
		func(c snapshottest.Call) error { return h.reply(c.Op) },
	)
	h.trees, _ = d.(Trees)
	h.m, err = cache.Open(context.Background(), cache.Options{
		Root: h.root, Driver: h.driver, BootID: fmt.Sprint("boot ", h.boot), Step: h.event,
		NoMounts: h.trees != nil, SyncInterval: -1, FlushInterval: -1,
	})
	if err != nil {
		err = errors.Join(err, d.Close())
	}
	return err
}

// closeStore ends the manager and the driver. Handles stay, of no use.
func (h *history) closeStore() error {
	err := h.m.Close()
	return errors.Join(err, h.driver.Driver().Close())
}

// mint is a name for a record that is about to be.
func (h *history) mint() string {
	h.next++
	return fmt.Sprint("r", h.next)
}

// bind says which id the record of that name has.
func (h *history) bind(name string, id cache.ID) {
	h.ids[name], h.names[id] = id, name
}

// id of a name; one that a crash cut off has none that anybody could know.
func (h *history) id(name string) cache.ID {
	if id, ok := h.ids[name]; ok {
		return id
	}
	return cache.ID("never " + name)
}

// call runs one operation: model says how it must end, do does it. With a fault
// armed it may fail, and must then succeed when it is called again; if the
// process dies meanwhile, the store must hold what one of the models says that
// between gives for before and after.
func (h *history) call(op Op, expect func(*model) outcome, do func(context.Context) error) bool {
	var before *model
	if op.Fault.crash() {
		before = h.model.clone()
	}
	want := expect(h.model)
	ctx := h.arm(op.Fault, op.At)
	err := do(ctx)
	hit := h.disarm()
	if op.Fault.crash() {
		if !hit {
			h.agree(want, err)
			before = h.model.clone()
		}
		h.crash(op.Fault == crashOtherBoot, before)
		return false
	}
	if hit {
		h.faulted = true
		h.note(noteOfFault+"%s at %d", faultNames[op.Fault], op.At)
		if errors.Is(err, errInjected) || errors.Is(err, context.Canceled) {
			err = do(context.Background())
		}
	}
	h.expect(want, err)
	return err == nil
}

// noteOfFault begins what the trace says of a failure that was met. Which call
// it meets may depend on the driver, its visible result must not.
const noteOfFault = "  ! "

func (h *history) expect(want outcome, err error) {
	h.agree(want, err)
	h.note("  %s", want)
}

// agree fails unless a call ended as the model says.
func (h *history) agree(want outcome, err error) {
	if got := outcomeOf(err); got != want {
		h.fail("it ended with %q (%v), and the model says %q", got, err, want)
	}
}

func outcomeOf(err error) outcome {
	switch {
	case err == nil:
		return ok
	case errors.Is(err, cache.ErrLocked):
		return locked
	case errdefs.IsNotFound(err):
		return notFound
	case errdefs.IsFailedPrecondition(err):
		return refused
	case errdefs.IsInvalidArgument(err):
		return invalid
	}
	return outcome("error " + err.Error())
}

// forget makes all handles and mounts those of a process that has ended.
func (h *history) forget() {
	h.ended = append(h.writers, h.readers...)
	h.writers, h.readers, h.mounts = nil, nil, nil
	h.faulted = false
}

// restart closes the store and opens it again. What goes wrong does so while it
// is opened, and must not matter to the next who opens it.
func (h *history) restart(op Op, sameBoot bool) {
	h.must(h.closeStore(), "close")
	h.expectClean()
	if !sameBoot {
		h.boot++
		h.releaseHolds()
	}
	h.forget()
	h.arm(op.Fault, op.At)
	err := h.openStore()
	if h.disarm() {
		h.note(noteOfFault+"%s at %d", faultNames[op.Fault], op.At)
		if err == nil {
			_ = h.closeStore()
		}
		h.live(true)
		err = h.openStore()
	}
	h.must(err, "open again")
	h.model.reopen(sameBoot)
	h.compare()
}

// expectClean says that a Close which left nothing behind says so, so that the
// next open has nothing to settle.
func (h *history) expectClean() {
	for _, r := range h.model.records {
		if r.unrecorded {
			return
		}
	}
	if h.faulted || len(h.holds) > 0 {
		return
	}
	if _, err := os.Lstat(filepath.Join(h.root, "clean")); err != nil {
		h.fail("the store is closed, with nothing left to settle, and not marked clean: %v", err)
	}
}

// crash ends the process without a word, opens the store again and goes on
// with the model that fits.
func (h *history) crash(otherBoot bool, before *model) {
	h.live(false)
	_ = h.closeStore() // nothing of it reaches the disk
	h.live(true)
	if otherBoot {
		h.boot++
		h.releaseHolds()
	}
	h.forget()
	h.ended = nil // what they say depends on how their manager died
	h.must(h.openStore(), "open after a crash")
	var misfits []string
	for _, m := range h.candidates(before, h.model) {
		m.reopen(!otherBoot)
		h.model = m
		misfit := h.differs(true)
		if misfit == "" {
			h.check()
			h.note("  the process died, other boot %t: %d records are left", otherBoot, len(m.records))
			return
		}
		misfits = append(misfits, misfit)
	}
	h.fail("after a crash the store is in no state that is allowed:\n  %s", strings.Join(misfits, "\n  "))
}

// candidates are the states in which a crash can leave a store: as before the
// operation or as after it; with the parent of what was to be made finalized
// or the record itself; and a removal of several may have ended for some.
func (h *history) candidates(before, after *model) []*model {
	out := []*model{after, before}
	for name, r := range before.records {
		if a := after.records[name]; a != nil && a.state == cache.Finalized && r.state == cache.Committed {
			m := before.clone()
			m.records[name].state = cache.Finalized
			out = append(out, m)
		}
	}
	some := before.clone()
	for name := range before.records {
		if id, known := h.ids[name]; known && after.records[name] == nil {
			if _, err := h.m.Lookup(context.Background(), id); errdefs.IsNotFound(err) {
				delete(some.records, name)
			}
		}
	}
	for _, r := range some.records {
		if r.parent != "" && some.records[r.parent] == nil {
			return out // a child without its parent is never right
		}
	}
	return append(out, some)
}

// releaseHolds ends the other processes, of which the model must be told.
func (h *history) releaseHolds() {
	for _, x := range h.holds {
		h.must(x.hold.Release(), "release a hold")
	}
	h.holds = nil
}

// compare fails unless the store shows what the model says.
func (h *history) compare() {
	if misfit := h.differs(false); misfit != "" {
		h.fail("%s", misfit)
	}
}

// differs compares all that can be seen of the records. After a crash one that
// the model does not know by its id is the one that has none, and counts of
// uses that were in memory only are taken as they are.
func (h *history) differs(crashed bool) string {
	ctx := context.Background()
	seen := map[string]bool{}
	for rec, err := range h.m.Records(ctx) {
		h.must(err, "records")
		name, known := h.names[rec.ID]
		if !known && crashed {
			name = h.unbound()
			known = name != ""
		}
		if !known {
			return fmt.Sprintf("record %s is there that nobody made", rec.ID)
		}
		r := h.model.stored(name)
		if r == nil {
			return fmt.Sprintf("%s is %s, and should not be there", name, rec.State)
		}
		if crashed && rec.UsageCount <= r.uses {
			r.uses = rec.UsageCount
		}
		if got, want := h.describe(rec), h.described(r); got != want {
			return fmt.Sprintf("%s is\n    %s\n  and should be\n    %s", name, got, want)
		}
		if rec.State != cache.Mutable {
			if got := h.contentOf(rec.ID); !maps.Equal(got, r.files) {
				return fmt.Sprintf("%s has the files %v and should have %v", name, got, r.files)
			}
		}
		h.bind(name, rec.ID)
		seen[name] = true
	}
	for _, name := range h.model.names() {
		if !h.model.records[name].unrecorded && !seen[name] {
			return fmt.Sprintf("%s is not there", name)
		}
	}
	return ""
}

// unbound is the name that has no id yet, if there is one.
func (h *history) unbound() string {
	for name := range h.model.records {
		if _, has := h.ids[name]; !has {
			return name
		}
	}
	return ""
}

func (h *history) describe(rec *cache.Record) string {
	values := map[string]string{}
	for _, v := range rec.Values {
		values[v.Name] = v.Index
	}
	var parents []string
	for _, p := range rec.Parents {
		parents = append(parents, h.names[p])
	}
	attached := map[string]string{}
	for _, name := range attachmentNames {
		data, err := h.m.Attachment(context.Background(), rec.ID, name)
		if err == nil {
			attached[name] = string(data)
		} else if !errdefs.IsNotFound(err) {
			h.must(err, "read an attachment")
		}
	}
	return fmt.Sprintf("%s on %q, type %s, text %q, values %v, labels %v, attached %v, retain %t %t, interrupted %t, durable %t, used %d",
		rec.State, strings.Join(parents, " "), rec.Type, rec.Description, values, rec.Labels, attached,
		rec.Retain, rec.RetainAfter, rec.Interrupted, rec.Durable, rec.UsageCount)
}

func (h *history) described(r *record) string {
	return fmt.Sprintf("%s on %q, type %s, text %q, values %v, labels %v, attached %v, retain %t %t, interrupted %t, durable %t, used %d",
		r.state, r.parent, r.kind, r.text, r.values, r.labels, r.attached, r.retain, r.after, r.interrupted, r.durable, r.uses)
}

// contentOf reads a record without being counted as a use.
func (h *history) contentOf(id cache.ID) map[string]string {
	ctx := context.Background()
	imm, err := h.m.Get(ctx, id, cache.GetOptions{NoUpdate: true})
	h.must(err, "get")
	mnt, err := imm.Mount(ctx)
	h.must(err, "mount")
	files := h.read(mnt)
	h.must(errors.Join(mnt.Unmount(), imm.Release(ctx)), "unmount and release")
	return files
}

func (h *history) read(mnt *cache.Mount) map[string]string {
	if h.trees != nil {
		files, err := h.trees.ReadTree(mnt.Path())
		h.must(err, "read a tree")
		return files
	}
	entries, err := os.ReadDir(mnt.Path())
	h.must(err, "read a tree")
	files := map[string]string{}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(mnt.Path(), e.Name()))
		h.must(err, "read a file")
		files[e.Name()] = string(data)
	}
	return files
}

func (h *history) write(mnt *cache.Mount, name, text string) error {
	if h.trees != nil {
		return h.trees.WriteFile(mnt.Path(), name, text)
	}
	return os.WriteFile(filepath.Join(mnt.Path(), name), []byte(text), 0o644)
}

func (h *history) check() {
	for f, err := range h.m.Check(context.Background()) {
		h.must(err, "check")
		h.fail("check found %s of %s %s: %s", f.Code, f.ID, f.Key, f.Message)
	}
}

// finish gives everything back, and expects that nothing is left but what the
// records name.
func (h *history) finish() {
	ctx := context.Background()
	for _, x := range h.mounts {
		h.must(x.mnt.Unmount(), "unmount")
	}
	for _, x := range slices.Concat(h.readers, h.writers) {
		h.must(x.release(ctx), "release")
		h.model.release(x.name, x.mut != nil, x.touch)
	}
	h.writers, h.readers, h.mounts = nil, nil, nil
	h.releaseHolds()
	for _, r := range h.model.records {
		r.shared, r.exclusive = 0, 0
	}
	h.restart(Op{}, true)
	h.check()
	keys := map[string]bool{}
	for name, r := range h.model.records {
		if refs := h.m.Refs(h.id(name)); len(refs) > 0 {
			h.fail("%s is still held: %v", name, refs)
		}
		rec, err := h.m.Lookup(ctx, h.id(name))
		h.must(err, "look up")
		keys[rec.Key] = true
		if r.state == cache.Mutable {
			mut, err := h.m.GetMutable(ctx, rec.ID)
			h.must(err, "continue")
			mnt, err := mut.Mount(ctx, cache.MountOptions{ReadOnly: true})
			h.must(err, "mount")
			if got := h.read(mnt); !maps.Equal(got, r.files) {
				h.fail("%s has the files %v and should have %v", name, got, r.files)
			}
			h.must(errors.Join(mnt.Unmount(), mut.Release(ctx)), "unmount and release")
		}
	}
	pending, err := h.driver.Pending(ctx)
	h.must(err, "pending names")
	for _, p := range pending {
		if !keys[p.Key] {
			h.fail("the driver has the pending name %s, which no record names", p.Key)
		}
	}
	h.must(h.driver.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if !keys[info.Name] {
			h.fail("the driver has the name %s, which no record names", info.Name)
		}
		return nil
	}), "walk")
	h.must(h.closeStore(), "close")
}

func (x *handle) release(ctx context.Context) error {
	if x.mut != nil {
		return x.mut.Release(ctx)
	}
	return x.imm.Release(ctx)
}

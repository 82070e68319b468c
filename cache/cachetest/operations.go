package cachetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
)

// operation is one thing that a history can do. do picks what it is about by
// the numbers of the Op, calls the model and the cache, and compares; where
// there is nothing to pick it does nothing. A new operation is a line here, and
// a method of the model.
type operation struct {
	name   string
	weight int
	do     func(h *history, op Op)
}

func operations() []operation {
	return []operation{
		{"New", 14, doNew},
		{"Write", 14, doWrite},
		{"Commit", 14, doCommit},
		{"Finalize", 5, doFinalize},
		{"Get", 8, doGet},
		{"GetMutable", 9, doGetMutable},
		{"Clone", 3, doClone},
		{"Release", 14, doRelease},
		{"Edit", 8, doEdit},
		{"Search", 2, doSearch},
		{"Read", 4, doRead},
		{"Mount", 3, doMount},
		{"Unmount", 4, doUnmount},
		{"Remove", 5, doRemove},
		{"Plan", 1, doPlan},
		{"Prune", 1, doPrune},
		{"Usage", 1, doUsage},
		{"Sync", 2, doSync},
		{"Detach", 3, doDetach},
		{"Attach", 2, doAttach},
		{"Unhold", 3, doUnhold},
		{"Ended", 2, doEnded},
		{"Restart", 1, doRestart},
		{"Check", 1, doCheck},
	}
}

// attachmentNames are those that histories use; the second describes one
// content.
var attachmentNames = []string{"log", cache.FileList}

// pick is the n-th of a list, in a circle.
func pick[T any](list []T, n byte) (out T, there bool) {
	if len(list) == 0 {
		return out, false
	}
	return list[int(n)%len(list)], true
}

// anyName is a record that is there, or, now and then, one that was.
func (h *history) anyName(n byte) (string, bool) {
	if n >= 240 && h.next > 0 {
		return fmt.Sprint("r", int(n-240)%h.next+1), true
	}
	return pick(h.model.names(), n)
}

// start is the writer's or the reader's handle on what an operation gave.
func (h *history) start(x *handle) {
	if x.mut != nil {
		h.writers = append(h.writers, x)
	} else {
		h.readers = append(h.readers, x)
	}
}

func (h *history) end(x *handle) {
	h.writers = slices.DeleteFunc(h.writers, func(y *handle) bool { return x == y })
	h.readers = slices.DeleteFunc(h.readers, func(y *handle) bool { return x == y })
	h.ended = append(h.ended, x)
}

func doNew(h *history, op Op) {
	var parent *cache.ImmutableRef
	r := record{
		retain: op.B%3 == 0, keep: op.B%6 == 0, kind: []string{cache.TypeRegular, "source"}[op.C%2],
		text: fmt.Sprint("text ", op.C%5), values: map[string]string{},
	}
	o := cache.NewOptions{Retain: r.retain, KeepOnPowerCut: r.keep, Type: r.kind, Description: r.text}
	if op.C%4 == 0 {
		index := fmt.Sprint("i", op.C/4%3)
		r.values = with(nil, "v", index)
		o.Values = []cache.Value{{Name: "v", Index: index}}
	}
	on := ""
	if x, there := pick(h.readers, op.A); there && op.A%4 != 0 {
		on, parent = x.name, x.imm
	}
	name := h.mint()
	h.note("%s = New(on %q, retain %t)", name, on, r.retain)
	var mut *cache.MutableRef
	if h.call(op, func(m *model) outcome { return m.create(name, on, r) }, func(ctx context.Context) (err error) {
		mut, err = h.m.New(ctx, parent, o)
		return err
	}) {
		h.bind(name, mut.ID())
		h.start(&handle{name: name, mut: mut}) // to be made is no use
	}
}

// doWrite mounts, writes and unmounts. What reached the files before a crash
// need not be known: unrecorded writers are gone then, and others are written
// by a step of their own.
func doWrite(h *history, op Op) {
	x, there := pick(h.writers, op.A)
	if !there {
		return
	}
	name, text := fmt.Sprint("f", op.B%4), fmt.Sprint("text ", op.C)
	h.note("Write(%s, %s=%s)", x.name, name, text)
	op.Fault = op.Fault.harmless()
	var mnt *cache.Mount
	if !h.call(op, func(*model) outcome { return ok }, func(ctx context.Context) (err error) {
		mnt, err = x.mut.Mount(ctx, cache.MountOptions{})
		return err
	}) {
		return
	}
	h.must(h.write(mnt, name, text), "write")
	h.must(mnt.Unmount(), "unmount")
	r := h.model.records[x.name]
	r.files = with(r.files, name, text)
}

// harmless is a fault that leaves the process alive.
func (f fault) harmless() fault {
	if f.crash() {
		return none
	}
	return f
}

func doCommit(h *history, op Op) {
	x, there := pick(h.writers, op.A)
	if !there {
		return
	}
	take := ""
	if op.C%3 == 0 {
		take = "v"
	}
	h.note("Commit(%s, take %q)", x.name, take)
	var imm *cache.ImmutableRef
	if h.call(op, func(m *model) outcome { return m.commit(x.name, take) }, func(ctx context.Context) (err error) {
		imm, err = x.mut.CommitWith(ctx, cache.CommitOptions{Take: strings.Fields(take)})
		return err
	}) {
		h.end(x)
		h.start(&handle{name: x.name, imm: imm, touch: true})
	}
}

func doFinalize(h *history, op Op) {
	x, there := pick(h.readers, op.A)
	if !there {
		return
	}
	h.note("Finalize(%s)", x.name)
	h.call(op, func(m *model) outcome { return m.finalize(x.name) }, x.imm.Finalize)
}

func doGet(h *history, op Op) {
	name, there := h.anyName(op.A)
	if !there {
		return
	}
	touch := op.B%3 != 0
	h.note("Get(%s, touch %t)", name, touch)
	var imm *cache.ImmutableRef
	if h.call(op, func(m *model) outcome { return m.get(name) }, func(ctx context.Context) (err error) {
		imm, err = h.m.Get(ctx, h.id(name), cache.GetOptions{NoUpdate: !touch})
		return err
	}) {
		h.start(&handle{name: name, imm: imm, touch: touch})
	}
}

func doGetMutable(h *history, op Op) {
	name, there := h.anyName(op.A)
	if free := slices.DeleteFunc(h.model.names(), h.model.pinned); op.B%2 == 0 && len(free) > 0 {
		name, there = pick(free, op.A)
	}
	if !there {
		return
	}
	next := name
	if r := h.model.records[name]; r != nil && r.state == cache.Committed {
		next = h.mint()
	}
	h.note("GetMutable(%s) gives %s", name, next)
	var mut *cache.MutableRef
	if h.call(op, func(m *model) outcome { return m.getMutable(name, next) }, func(ctx context.Context) (err error) {
		mut, err = h.m.GetMutable(ctx, h.id(name))
		return err
	}) {
		if next != name && mut.ID() == h.id(name) {
			h.fail("%s was reopened under its own id", name)
		}
		h.bind(next, mut.ID())
		h.start(&handle{name: next, mut: mut, touch: true})
	}
}

func doClone(h *history, op Op) {
	x, there := pick(h.readers, op.A)
	if !there {
		return
	}
	h.note("Clone(%s)", x.name)
	op.Fault = op.Fault.harmless()
	var imm *cache.ImmutableRef
	if h.call(op, func(m *model) outcome { return m.get(x.name) }, func(context.Context) (err error) {
		imm, err = x.imm.Clone()
		return err
	}) {
		h.start(&handle{name: x.name, imm: imm, touch: x.touch})
	}
}

func doRelease(h *history, op Op) {
	list := h.readers
	if op.B%3 == 0 {
		list = h.writers
	}
	x, there := pick(list, op.A)
	if !there {
		return
	}
	h.note("Release(%s, writer %t)", x.name, x.mut != nil)
	if h.call(op, func(m *model) outcome { return m.release(x.name, x.mut != nil, x.touch) }, x.release) {
		h.end(x)
	}
}

func doEdit(h *history, op Op) {
	list := h.readers
	if op.B%2 == 0 {
		list = h.writers
	}
	x, there := pick(list, op.A)
	if !there {
		return
	}
	change, edit, what := editOf(op.B/2, op.C)
	h.note("Edit(%s, %s)", x.name, what)
	h.call(op, func(m *model) outcome { return m.edit(x.name, change) }, func(ctx context.Context) error {
		if x.mut != nil {
			return x.mut.Edit(ctx, edit)
		}
		return x.imm.Edit(ctx, edit)
	})
}

// editOf is one change, to the model and to a record.
func editOf(kind, n byte) (change func(*record), edit func(*cache.Edit) error, what string) {
	name, value := []string{"v", "w"}[n%2], fmt.Sprint("i", n/2%4)
	switch kind % 6 {
	case 0:
		return func(r *record) { r.values = with(r.values, name, value) },
			func(e *cache.Edit) error { return e.SetValue(cache.Value{Name: name, Index: value}) },
			"value " + name + "=" + value
	case 1:
		return func(r *record) { r.values = without(r.values, name) },
			func(e *cache.Edit) error { e.ClearValue(name); return nil }, "no value " + name
	case 2:
		return func(r *record) { r.labels = with(r.labels, name, value) },
			func(e *cache.Edit) error { e.SetLabel(name, value); return nil }, "label " + name + "=" + value
	case 3:
		return func(r *record) { r.text = value },
			func(e *cache.Edit) error { e.SetDescription(value); return nil }, "text " + value
	case 4:
		name := attachmentNames[n%2]
		return func(r *record) { r.attached = with(r.attached, name, value) },
			func(e *cache.Edit) error { return e.Attach(name, []byte(value)) }, "attach " + name
	}
	return func(r *record) {
			if r.interrupted {
				r.after = true
			} else {
				r.retain = true
			}
		},
		func(e *cache.Edit) error { e.SetRetain(true); return nil }, "retain"
}

func doSearch(h *history, op Op) {
	prefix := []string{"", "i", "i1", "i2"}[op.A%4]
	want := h.model.search(prefix)
	h.note("Search(%q) = %v", prefix, want)
	op.Fault = op.Fault.harmless()
	var got []string
	h.call(op, func(*model) outcome { return ok }, func(ctx context.Context) error {
		found, err := h.m.SearchPrefix(ctx, prefix)
		got = nil
		for _, f := range found {
			got = append(got, f.Key+" "+h.names[f.ID])
		}
		return err
	})
	slices.Sort(got)
	if !slices.Equal(got, want) {
		h.fail("the search found %v and should have found %v", got, want)
	}
}

func doRead(h *history, op Op) {
	x, there := pick(h.readers, op.A)
	if !there {
		return
	}
	want := h.model.records[x.name].files
	h.note("Read(%s) = %v", x.name, want)
	op.Fault = op.Fault.harmless()
	var mnt *cache.Mount
	if h.call(op, func(*model) outcome { return ok }, func(ctx context.Context) (err error) {
		mnt, err = x.imm.Mount(ctx)
		return err
	}) {
		got := h.read(mnt)
		h.must(mnt.Unmount(), "unmount")
		if !maps.Equal(got, want) {
			h.fail("%s has the files %v and should have %v", x.name, got, want)
		}
	}
}

// doMount leaves a mount behind: a writer's for writing, a reader's for
// reading.
func doMount(h *history, op Op) {
	list := h.readers
	if op.B%2 == 0 {
		list = h.writers
	}
	x, there := pick(list, op.A)
	if !there {
		return
	}
	h.note("Mount(%s, writing %t)", x.name, x.mut != nil)
	op.Fault = op.Fault.harmless()
	t := &mounted{name: x.name, writing: x.mut != nil}
	if h.call(op, func(m *model) outcome {
		r := m.records[x.name]
		r.mounts++
		if t.writing {
			r.writing++
		}
		return ok
	}, func(ctx context.Context) (err error) {
		if x.mut != nil {
			t.mnt, err = x.mut.Mount(ctx, cache.MountOptions{})
		} else {
			t.mnt, err = x.imm.Mount(ctx)
		}
		return err
	}) {
		h.mounts = append(h.mounts, t)
	}
}

func doUnmount(h *history, op Op) {
	t, there := pick(h.mounts, op.A)
	if !there {
		return
	}
	h.note("Unmount(%s, writing %t)", t.name, t.writing)
	h.must(errors.Join(t.mnt.Unmount(), t.mnt.Unmount()), "unmount")
	h.mounts = slices.DeleteFunc(h.mounts, func(y *mounted) bool { return t == y })
	r := h.model.records[t.name]
	r.mounts--
	if t.writing {
		r.writing--
	}
}

func doRemove(h *history, op Op) {
	var names []string
	for _, n := range []byte{op.A, op.B, op.C}[:1+op.C%3] {
		if name, there := h.anyName(n); there && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return
	}
	want := h.model.clone().remove(names...)
	h.note("Remove(%s) = %v", strings.Join(names, ", "), want)
	got := map[string]outcome{}
	h.call(op, func(m *model) outcome { m.remove(names...); return ok }, func(ctx context.Context) (err error) {
		return h.remove(ctx, names, got)
	})
	if !op.Fault.crash() && !maps.Equal(got, want) {
		h.fail("the removal ended with %v, and should have with %v", got, want)
	}
}

// remove removes, and notes for each name how that ended. Names that went in an
// earlier attempt stay so.
func (h *history) remove(ctx context.Context, names []string, got map[string]outcome) error {
	var ids []cache.ID
	for _, name := range names {
		ids = append(ids, h.id(name))
	}
	out, err := h.m.Remove(ctx, ids...)
	for i, r := range out {
		if got[names[i]] != ok {
			got[names[i]] = outcomeOf(r.Err)
		}
		if errors.Is(r.Err, errInjected) || errors.Is(r.Err, context.Canceled) {
			err = errors.Join(err, r.Err)
		}
	}
	return err
}

func prunePolicy(op Op) (kind string, p policy.Policy) {
	kind = []string{"", cache.TypeRegular, "source"}[op.A%3]
	p.All = true
	if kind != "" {
		p.Types = []string{kind}
	}
	return kind, p
}

func doPlan(h *history, op Op) {
	kind, p := prunePolicy(op)
	want := h.model.clone().prune(kind)
	h.note("Plan(%q) = %v", kind, want)
	op.Fault = op.Fault.harmless()
	var got []string
	h.call(op, func(*model) outcome { return ok }, func(ctx context.Context) error {
		plan, err := h.m.Plan(ctx, p)
		got = nil
		if err == nil {
			for _, v := range plan.Victims() {
				got = append(got, h.names[cache.ID(v.Record.ID)])
			}
			err = h.m.Verify(ctx, plan)
		}
		return err
	})
	slices.Sort(got)
	if !slices.Equal(got, want) {
		h.fail("the plan removes %v, and should remove %v", got, want)
	}
}

func doPrune(h *history, op Op) {
	kind, p := prunePolicy(op)
	var want []string
	h.note("Prune(%q) = %v", kind, h.model.clone().prune(kind))
	h.call(op, func(m *model) outcome { want = m.prune(kind); return ok }, func(ctx context.Context) error {
		out, err := h.m.Prune(ctx, p)
		for _, r := range out.Failed {
			err = errors.Join(err, r.Err)
		}
		return err
	})
	for _, name := range want {
		if op.Fault.crash() {
			break
		}
		if _, err := h.m.Lookup(context.Background(), h.id(name)); !errdefs.IsNotFound(err) {
			h.fail("%s was pruned and is still there: %v", name, err)
		}
	}
}

// doUsage compares who is in use, and counts by state.
func doUsage(h *history, op Op) {
	u, err := h.m.DiskUsage(context.Background(), nil)
	h.must(err, "usage")
	used := map[string]bool{}
	for _, name := range h.model.names() {
		if h.model.pinned(name) {
			for n := name; n != ""; n = h.model.records[n].parent {
				used[n] = true
			}
		}
	}
	records := 0
	for _, name := range h.model.names() {
		if h.model.stored(name) != nil {
			records++
		}
	}
	if int(u.Records) != records || len(u.Entries) != records {
		h.fail("the usage has %d records and should have %d", u.Records, records)
	}
	for _, e := range u.Entries {
		name := h.names[e.Record.ID]
		children := slices.DeleteFunc(h.model.children(name), func(c string) bool { return h.model.stored(c) == nil })
		if e.InUse != used[name] || e.Children != len(children) {
			h.fail("%s is in use: %t, should be %t; has %d children, should have %d", name, e.InUse, used[name], e.Children, len(children))
		}
	}
	h.note("Usage of %d", records)
}

func doSync(h *history, op Op) {
	h.note("Sync")
	if op.Fault == fail || op.Fault == lost {
		op.Fault = none // the store would refuse all changes from then on
	}
	h.call(op, func(m *model) outcome { m.sync(); return ok }, func(ctx context.Context) error {
		_, err := h.m.Sync(ctx)
		return err
	})
}

// doDetach makes another process of a handle, unless a mount would have to
// outlive the manager.
func doDetach(h *history, op Op) {
	list := h.readers
	if op.B%2 == 0 {
		list = h.writers
	}
	x, there := pick(list, op.A)
	if !there || h.model.records[x.name].mounts > 0 {
		return
	}
	h.note("Detach(%s, writer %t)", x.name, x.mut != nil)
	op.Fault = op.Fault.harmless()
	var hold *cache.Hold
	if h.call(op, func(m *model) outcome { return m.detach(x.name, x.mut != nil, x.touch) }, func(ctx context.Context) (err error) {
		if x.mut != nil {
			hold, err = x.mut.Detach(ctx)
		} else {
			hold, err = x.imm.Detach(ctx)
		}
		return err
	}) {
		h.end(x)
		h.holds = append(h.holds, &held{x.name, hold})
	}
}

func doAttach(h *history, op Op) {
	x, there := pick(h.holds, op.A)
	if !there || !x.hold.Exclusive() {
		return
	}
	h.note("Attach(%s)", x.name)
	op.Fault = op.Fault.harmless()
	var mut *cache.MutableRef
	if h.call(op, func(m *model) outcome { return m.attach(x.name) }, func(ctx context.Context) (err error) {
		mut, err = h.m.Attach(ctx, x.hold)
		return err
	}) {
		h.start(&handle{name: x.name, mut: mut, touch: true})
	}
}

func doUnhold(h *history, op Op) {
	x, there := pick(h.holds, op.A)
	if !there {
		return
	}
	h.note("Unhold(%s, writer %t)", x.name, x.hold.Exclusive())
	h.must(errors.Join(x.hold.Release(), x.hold.Release()), "release a hold")
	h.holds = slices.DeleteFunc(h.holds, func(y *held) bool { return x == y })
	r := h.model.records[x.name]
	switch {
	case r == nil:
		h.fail("%s was held by a process and is gone", x.name)
	case x.hold.Exclusive():
		r.exclusive--
	default:
		r.shared--
	}
}

// doEnded uses a handle that was given back: releasing it once more takes
// nothing from others, and anything else is refused.
func doEnded(h *history, op Op) {
	x, there := pick(h.ended, op.A)
	if !there {
		return
	}
	ctx := context.Background()
	h.note("Ended(%s)", x.name)
	h.must(x.release(ctx), "release again")
	var err error
	if x.mut != nil {
		_, err = x.mut.Commit(ctx)
	} else {
		_, err = x.imm.Clone()
	}
	h.expect(refused, err)
}

func doRestart(h *history, op Op) {
	h.note("Restart(same boot %t)", op.A%4 != 0)
	h.restart(op, op.A%4 != 0)
}

func doCheck(h *history, _ Op) {
	h.note("Check")
	if !h.faulted {
		h.check()
	}
	h.compare()
}

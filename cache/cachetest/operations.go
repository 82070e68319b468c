package cachetest

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/lamina-build/lamina/cache"
)

// operations are what the histories of Run are made of. A new one is a line
// here, and a method of the model.
func operations() []operation[*history] {
	return []operation[*history]{
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

// play implements player.
func (h *history) play(ops []Op) (why string) {
	return h.guarded(func() {
		for _, op := range ops {
			perform(h, operations(), op)
		}
		h.finish()
	})
}

// told implements player.
func (h *history) told() *history { return h }

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

// pick is the writer or reader that an operation means, if there is one.
func (h *history) pick(op Op, writer bool) (x *handle, there bool) {
	if writer {
		return pick(h.writers, op.A)
	}
	return pick(h.readers, op.A)
}

func doRelease(h *history, op Op) {
	x, there := h.pick(op, op.B%3 == 0)
	if !there {
		return
	}
	h.note("Release(%s, writer %t)", x.name, x.mut != nil)
	if h.call(op, func(m *model) outcome { return m.release(x.name, x.mut != nil, x.touch) }, x.release) {
		h.end(x)
	}
}

func doEdit(h *history, op Op) {
	x, there := h.pick(op, op.B%2 == 0)
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

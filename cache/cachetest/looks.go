package cachetest

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/lamina-build/lamina/cache"
)

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
	x, there := h.pick(op, op.B%2 == 0)
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

func doCheck(h *history, _ Op) {
	h.note("Check")
	if !h.faulted {
		h.check()
	}
	h.compare()
}

package cachetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

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

package cachetest

import (
	"context"
	"errors"
	"slices"

	"github.com/lamina-build/lamina/cache"
)

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
	x, there := h.pick(op, op.B%2 == 0)
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

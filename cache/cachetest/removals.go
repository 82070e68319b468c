package cachetest

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
)

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

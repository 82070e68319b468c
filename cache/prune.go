package cache

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache/policy"
)

// pruneBatch is how many victims share one transaction. A hundred or so make
// its two syncs cheap for each of them; the transaction still takes only some
// milliseconds, and that is how long a Commit may have to wait for it.
const pruneBatch = 128

// Plan computes what a prune by these policies, in their order, would do now;
// policy.Defaults if there are none. It changes nothing but sizes: those that
// are not known yet are measured, and written if the store is open for
// changes.
//
// Errors: InvalidArgument for policies that are not well formed or cannot be
// kept.
func (m *Manager) Plan(ctx context.Context, policies ...policy.Policy) (*policy.Plan, error) {
	if len(policies) == 0 {
		policies = policy.Defaults()
	}
	disk, err := m.disk()
	if err != nil {
		return nil, err
	}
	if err := policy.Validate(policies, disk); err != nil {
		return nil, err
	}
	if !m.readOnly {
		if _, err := m.Measure(ctx); err != nil {
			return nil, err
		}
	}
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	s, err := m.survey(ctx)
	if err != nil {
		return nil, err
	}
	u := policy.Usage{Records: make([]policy.Record, 0, len(s.entries))}
	for i := range s.entries {
		e := &s.entries[i]
		r := PolicyRecord(e.Record)
		r.Size, r.Held = e.Size, e.Held
		u.Records = append(u.Records, r)
	}
	return policy.Compute(u, disk, policies, m.now())
}

// keyValue is the value that holds what people call a record by.
const keyValue = "workspace.key"

// PolicyRecord is what filters and policies see of a record.
func PolicyRecord(rec *Record) policy.Record {
	r := policy.Record{
		ID: string(rec.ID), Revision: rec.Revision,
		State: rec.State.String(), Op: rec.Op.String(), Type: rec.Type,
		Description: rec.Description, Labels: rec.Labels, Retained: rec.Retain,
		Image: len(rec.ImageRefs) > 0, Size: rec.Size,
		Created: rec.Created, LastUsed: rec.LastUsed, Uses: rec.UsageCount, Cost: rec.Cost,
	}
	for _, p := range rec.Parents {
		r.Parents = append(r.Parents, string(p))
	}
	for _, v := range rec.Values {
		if v.Name == keyValue {
			r.Key = string(v.Data)
		}
	}
	r.Cache = directoryOf(rec)
	return r
}

// Execute removes the victims of a plan, in its order, and yields what became
// of each: removed with its bytes, or still there with the reason why, as Remove
// says it. A victim that has changed since the plan was made, that somebody
// holds, or that has a child which stays, is left alone. The last pair may have
// an error instead: the context ended or the manager was closed, and the
// victims that were not yielded are untouched.
//
// Cache directories that are in use, and that the plan has go all the same, are
// left to their users: see RemoveWhenReleased.
//
// Several victims share one transaction. While the loop's body runs nothing is
// locked and nobody waits for it; leaving the loop ends the work. The space of
// what was yielded is free.
func (m *Manager) Execute(ctx context.Context, plan *policy.Plan) iter.Seq2[Removed, error] {
	return executionOf(plan).run(ctx, m)
}

// execution is what a plan has done. It knows no more of the records than that
// takes: while it runs, and New and Get beside it, all that is in memory is gone
// through by the garbage collector again and again.
type execution struct {
	victims, onRelease []doomed
}

// doomed is a record that goes.
type doomed struct {
	id ID
	planned
}

func executionOf(plan *policy.Plan) *execution {
	x := &execution{victims: make([]doomed, 0, plan.Removed)}
	of := func(r *policy.Record) doomed {
		return doomed{ID(r.ID), planned{revision: r.Revision, size: max(r.Size, 0)}}
	}
	for _, s := range plan.Victims() {
		x.victims = append(x.victims, of(s.Record))
	}
	for _, s := range plan.Kept() {
		if s.Reason == policy.OnRelease {
			x.onRelease = append(x.onRelease, of(s.Record))
		}
	}
	return x
}

func (x *execution) run(ctx context.Context, m *Manager) iter.Seq2[Removed, error] {
	return func(yield func(Removed, error) bool) {
		for victims := range slices.Chunk(x.victims, pruneBatch) {
			out, err := m.executeBatch(ctx, victims)
			if err != nil {
				yield(Removed{}, fmt.Errorf("execute a plan: %w", err))
				return
			}
			for _, r := range out {
				if !yield(r, nil) {
					return
				}
			}
		}
		for _, d := range x.onRelease {
			gone, err := m.RemoveWhenReleased(ctx, d.id)
			if err != nil && !is(err, errdefs.ErrNotFound) {
				yield(Removed{}, fmt.Errorf("execute a plan: %w", err))
				return
			}
			if gone && !yield(Removed{ID: d.id, Freed: d.size}, nil) {
				return
			}
		}
	}
}

// executeBatch removes some victims, in one transaction.
func (m *Manager) executeBatch(ctx context.Context, victims []doomed) ([]Removed, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	end, err := m.beginChange()
	if err != nil {
		return nil, err
	}
	defer end()
	ids := make([]ID, len(victims))
	plan := make(map[ID]planned, len(victims))
	for i, d := range victims {
		ids[i] = d.id
		plan[d.id] = d.planned
	}
	out := m.remove(ctx, ids, plan)
	if m.info.Lingers {
		m.tidy(ctx)
	}
	return out, nil
}

// Verify says whether a plan could be executed whole: every victim is there,
// has the plan's revision, is held by nobody, and has no child that is no
// victim. All that is wrong is FailedPrecondition; nothing is changed.
func (m *Manager) Verify(ctx context.Context, plan *policy.Plan) error {
	end, err := m.begin()
	if err != nil {
		return err
	}
	defer end()
	s, err := m.survey(ctx)
	if err != nil {
		return err
	}
	victims := make(map[ID]policy.Step, plan.Removed)
	for _, v := range plan.Victims() {
		victims[ID(v.Record.ID)] = v
	}
	var errs []error
	wrong := func(id ID, format string, args ...any) {
		if len(errs) < 10 {
			errs = append(errs, fmt.Errorf("record %s %s: %w", short(id), fmt.Sprintf(format, args...), errdefs.ErrFailedPrecondition))
		}
	}
	there := map[ID]bool{}
	for i := range s.entries {
		e := &s.entries[i]
		v, victim := victims[e.Record.ID]
		there[e.Record.ID] = true
		switch {
		case !victim:
			for _, p := range e.Record.Parents {
				if _, gone := victims[p]; gone {
					wrong(p, "has the child %s, which the plan keeps", short(e.Record.ID))
				}
			}
		case e.Held != "":
			wrong(e.Record.ID, "is held by %s", e.Held)
		case e.Record.Revision != v.Record.Revision:
			wrong(e.Record.ID, "has revision %d, not %d as in the plan", e.Record.Revision, v.Record.Revision)
		}
	}
	for _, v := range plan.Victims() {
		if id := ID(v.Record.ID); !there[id] {
			wrong(id, "is gone")
		}
	}
	return errors.Join(errs...)
}

// Pruned sums up a prune.
type Pruned struct {
	// Removed and Freed count what went, and its bytes.
	Removed int
	Freed   int64
	// Kept counts what the plan spared.
	Kept int
	// Failed are victims of the plan that are still there, with the reason.
	Failed []Removed
}

// Prune makes a plan by the policies and executes it. An error means that it
// was cut off; what it did until then is in the sums. Victims that somebody
// took meanwhile are no error.
func (m *Manager) Prune(ctx context.Context, policies ...policy.Policy) (Pruned, error) {
	end, err := m.beginChange()
	if err != nil {
		return Pruned{}, err
	}
	end() // each step counts itself
	plan, err := m.Plan(ctx, policies...)
	if err != nil {
		return Pruned{}, err
	}
	p, x := Pruned{Kept: len(plan.Kept())}, executionOf(plan)
	for r, err := range x.run(ctx, m) {
		if err != nil {
			return p, err
		}
		p.add(r)
	}
	return p, nil
}

func (p *Pruned) add(r Removed) {
	if r.Err != nil {
		p.Failed = append(p.Failed, r)
		return
	}
	p.Removed++
	p.Freed += r.Freed
}

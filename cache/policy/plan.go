package policy

import (
	"container/heap"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Action is what a plan says about a record.
type Action string

// The actions of a plan.
const (
	Remove Action = "remove"
	Keep   Action = "keep"
)

// Reason is why a record goes or stays. The codes are stable: programs go by
// them.
type Reason string

// Reasons why a record goes.
const (
	// Unused: it was not used for longer than a policy keeps records.
	Unused Reason = "unused"
	// OverLimit: the store is above a limit, and it was next in the order.
	OverLimit Reason = "over-limit"
	// Matched: a policy without limits selects it.
	Matched Reason = "matched"
)

// Reasons why a record stays.
const (
	// Held: somebody uses it now.
	Held Reason = "held"
	// HasChildren: a record that stays was made on top of it.
	HasChildren Reason = "has-children"
	// NotSelected: no policy's filters and types match.
	NotSelected Reason = "not-selected"
	// ProtectedType: its type goes only where a policy says so.
	ProtectedType Reason = "protected-type"
	// NamedByImage: an image names it, and no policy says that these go.
	NamedByImage Reason = "named-by-image"
	// Recent: it was used within the keep duration.
	Recent Reason = "recent"
	// WithinLimits: the store is within the limits, or is once those went
	// that were before it.
	WithinLimits Reason = "within-limits"
	// ReservedSpace: its removal would take the store, or the records of its
	// label's value, below what is reserved.
	ReservedSpace Reason = "reserved-space"
	// OnRelease: it is a cache directory that a policy without limits picks
	// by a filter, and somebody uses it now. Execute lets nobody else find it
	// from then on, and it goes when it is released.
	OnRelease Reason = "on-release"
)

// Step is what a plan says about one record.
type Step struct {
	Record *Record
	Action Action
	Reason Reason
	// Message says the reason in one line for people.
	Message string
	// Policy is the number of the policy, from 1, that decided; 0 if none did.
	Policy int
}

// Plan is what a prune would do. It is data: nothing happens until somebody
// executes it.
type Plan struct {
	// Time is the clock that the plan was made by.
	Time time.Time
	// Steps has each record once: first those that go, in this order, each
	// parent behind its children; then those that stay, sorted by id.
	Steps []Step
	// Removed is how many go, and Freed the bytes that they occupy.
	Removed int
	Freed   int64
	// Used is what all records occupied before.
	Used int64
}

// Victims are the steps that remove something.
func (p *Plan) Victims() []Step { return p.Steps[:p.Removed] }

// Kept are the steps of what stays.
func (p *Plan) Kept() []Step { return p.Steps[p.Removed:] }

// Compute makes the plan for a store by the policies, in their order. Errors
// are InvalidArgument: a policy that is not well formed or that no store can
// satisfy, or a usage that has an id twice.
func Compute(u Usage, d Disk, policies []Policy, now time.Time) (*Plan, error) {
	ps, err := compileAll(policies, d)
	if err != nil {
		return nil, err
	}
	s, err := newState(u, d, now)
	if err != nil {
		return nil, err
	}
	for i := range ps {
		s.reserve(&ps[i])
	}
	for i := range ps {
		s.apply(&ps[i], i+1)
	}
	return s.plan(), nil
}

// state is a plan that is being made.
type state struct {
	disk    Disk
	now     time.Time
	records []Record
	parents [][]int
	// kids counts the children that are still there.
	kids []int
	gone []bool
	// steps are what was decided last of each record.
	steps   []Step
	victims []int
	before  int64
	freed   int64
	// whole has all records in one group; labels has the groups of each label
	// that a policy groups by.
	whole  *grouping
	labels map[string]*grouping
}

func newState(u Usage, d Disk, now time.Time) (*state, error) {
	n := len(u.Records)
	s := &state{
		disk: d, now: now, records: u.Records, parents: make([][]int, n),
		kids: make([]int, n), gone: make([]bool, n), steps: make([]Step, n),
		whole: newGrouping(u.Records, ""), labels: map[string]*grouping{},
	}
	at := make(map[string]int, n)
	for i := range s.records {
		r := &s.records[i]
		if _, twice := at[r.ID]; twice {
			return nil, fmt.Errorf("record %q is in the usage twice: %w", r.ID, errdefs.ErrInvalidArgument)
		}
		at[r.ID] = i
		s.before += r.bytes()
		s.steps[i] = Step{Record: r, Action: Keep, Reason: NotSelected, Message: "no policy selects it"}
	}
	for i := range s.records {
		for _, id := range s.records[i].Parents {
			if p, ok := at[id]; ok {
				s.parents[i] = append(s.parents[i], p)
				s.kids[p]++
			}
		}
	}
	for i := range s.records {
		if r := &s.records[i]; r.Held != "" {
			s.steps[i].Reason, s.steps[i].Message = Held, r.Held
		}
	}
	return s, nil
}

// groupingOf is the groups that a policy's limits hold for.
func (s *state) groupingOf(c *compiled) *grouping {
	if c.ByLabel == "" {
		return s.whole
	}
	g := s.labels[c.ByLabel]
	if g == nil {
		g = newGrouping(s.records, c.ByLabel)
		s.labels[c.ByLabel] = g
	}
	return g
}

// reserve notes what a policy reserves for the values of a label: it holds for
// all policies.
func (s *state) reserve(c *compiled) {
	if c.ByLabel == "" {
		return
	}
	g := s.groupingOf(c)
	for k := range g.groups {
		if gr := &g.groups[k]; c.reserved != nil && c.concerns(gr.value, gr.set) && *c.reserved > gr.reserved {
			gr.reserved, gr.reservedBy = *c.reserved, c
		}
	}
}

// apply lets one policy take what it takes.
func (s *state) apply(c *compiled, number int) {
	if c.ByLabel != "" && !c.limited() {
		return // it reserves, and takes nothing
	}
	groups := s.groupingOf(c)
	aims := groups.aims(c, s.disk, s.freed)
	t := &texts{policy: c, groups: groups, aims: aims, made: map[textKey]string{}}
	eligible := make([]bool, len(s.records))
	queue := &queue{records: s.records}
	for i := range s.records {
		r := &s.records[i]
		aim := &aims[groups.of[i]]
		if s.gone[i] || !aim.concerned || !c.selects(r, s.now) {
			continue
		}
		if r.Held != "" {
			if s.goesOnRelease(c, r) {
				s.decide(i, Keep, OnRelease, number, t)
			}
			continue
		}
		why := s.spared(c, r)
		if why == "" && aim.within() {
			why = WithinLimits
		}
		if why == "" && s.kids[i] > 0 {
			why = HasChildren // until they go
		}
		eligible[i] = why == "" || why == HasChildren
		if why == "" {
			queue.at = append(queue.at, i)
			why = WithinLimits // until it is taken
		}
		s.decide(i, Keep, why, number, t)
	}
	heap.Init(queue)
	for queue.Len() > 0 {
		i, _ := heap.Pop(queue).(int)
		k := groups.of[i]
		if goal := aims[k].goal; goal != nil && groups.groups[k].used <= *goal {
			continue // it is within the limits, by those that went before
		}
		if s.isReserved(c, i) {
			s.decide(i, Keep, ReservedSpace, number, t)
			continue
		}
		s.take(i)
		s.decide(i, Remove, t.taken(k), number, t)
		for _, p := range s.parents[i] {
			if s.kids[p]--; s.kids[p] == 0 && eligible[p] {
				s.decide(p, Keep, WithinLimits, number, t)
				heap.Push(queue, p)
			}
		}
	}
}

// goesOnRelease says whether a policy that may not take r now wants it all the
// same. Builds hold cache directories for as long as they run, so whoever names
// one would else have to wait for a moment without a build.
func (s *state) goesOnRelease(c *compiled, r *Record) bool {
	return r.Cache != "" && len(c.Filters) > 0 && c.ByLabel == "" && !c.limited() && s.spared(c, r) == ""
}

// isReserved says whether the removal of a record would take the store below
// what this policy reserves, or a group below what any policy does.
func (s *state) isReserved(c *compiled, i int) bool {
	size := s.records[i].bytes()
	if c.ByLabel == "" && c.reserved != nil && s.whole.groups[0].used-size < *c.reserved {
		return true
	}
	for _, g := range s.labels {
		if gr := &g.groups[g.of[i]]; gr.reservedBy != nil && gr.used-size < gr.reserved {
			return true
		}
	}
	return false
}

// spared says why a policy does not take a record that it selects.
func (s *state) spared(c *compiled, r *Record) Reason {
	switch {
	case !c.All && slices.Contains(Protected(), r.Type):
		return ProtectedType
	case !c.All && r.Image:
		return NamedByImage
	case c.recent(r, s.now):
		return Recent
	}
	return ""
}

func (s *state) decide(i int, a Action, why Reason, number int, t *texts) {
	st := &s.steps[i]
	st.Action, st.Reason, st.Policy, st.Message = a, why, number, t.text(s, i, why)
}

func (s *state) take(i int) {
	s.gone[i] = true
	s.victims = append(s.victims, i)
	size := s.records[i].bytes()
	s.freed += size
	s.whole.groups[0].used -= size
	for _, g := range s.labels {
		g.groups[g.of[i]].used -= size
	}
}

func (s *state) plan() *Plan {
	p := &Plan{Time: s.now, Removed: len(s.victims), Freed: s.freed, Used: s.before, Steps: make([]Step, 0, len(s.steps))}
	for _, i := range s.victims {
		p.Steps = append(p.Steps, s.steps[i])
	}
	for i := range s.steps {
		if !s.gone[i] {
			p.Steps = append(p.Steps, s.steps[i])
		}
	}
	slices.SortFunc(p.Kept(), func(a, b Step) int { return strings.Compare(a.Record.ID, b.Record.ID) })
	return p
}

// queue is a heap of records that may go, the first to go at its root.
type queue struct {
	records []Record
	at      []int
}

func (q *queue) Len() int           { return len(q.at) }
func (q *queue) Less(i, j int) bool { return Before(&q.records[q.at[i]], &q.records[q.at[j]]) }
func (q *queue) Swap(i, j int)      { q.at[i], q.at[j] = q.at[j], q.at[i] }
func (q *queue) Push(x any)         { q.at = append(q.at, x.(int)) }
func (q *queue) Pop() any {
	last := q.at[len(q.at)-1]
	q.at = q.at[:len(q.at)-1]
	return last
}

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
	// ReservedSpace: its removal would take the store below what is reserved.
	ReservedSpace Reason = "reserved-space"
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
	used    int64
	freed   int64
}

func newState(u Usage, d Disk, now time.Time) (*state, error) {
	n := len(u.Records)
	s := &state{
		disk: d, now: now, records: u.Records, parents: make([][]int, n),
		kids: make([]int, n), gone: make([]bool, n), steps: make([]Step, n),
	}
	at := make(map[string]int, n)
	for i := range s.records {
		r := &s.records[i]
		if _, twice := at[r.ID]; twice {
			return nil, fmt.Errorf("record %q is in the usage twice: %w", r.ID, errdefs.ErrInvalidArgument)
		}
		at[r.ID] = i
		s.used += r.bytes()
		s.steps[i] = Step{Record: r, Action: Keep, Reason: NotSelected, Message: "no policy selects it"}
	}
	s.before = s.used
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

// apply lets one policy take what it takes.
func (s *state) apply(c *compiled, number int) {
	goal, tight := c.goal(s.used, s.disk, s.freed)
	texts := newTexts(c, goal)
	eligible := make([]bool, len(s.records))
	queue := &queue{records: s.records}
	for i := range s.records {
		r := &s.records[i]
		if s.gone[i] || r.Held != "" || !c.selects(r, s.now) {
			continue
		}
		why := s.spared(c, r)
		if why == "" && goal != nil && !tight {
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
		s.decide(i, Keep, why, number, texts)
	}
	heap.Init(queue)
	for queue.Len() > 0 && (goal == nil || s.used > *goal) {
		i, _ := heap.Pop(queue).(int)
		size := s.records[i].bytes()
		if c.reserved != nil && s.used-size < *c.reserved {
			s.decide(i, Keep, ReservedSpace, number, texts)
			continue
		}
		s.take(i)
		s.decide(i, Remove, texts.taken, number, texts)
		for _, p := range s.parents[i] {
			if s.kids[p]--; s.kids[p] == 0 && eligible[p] {
				s.decide(p, Keep, WithinLimits, number, texts)
				heap.Push(queue, p)
			}
		}
	}
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
	st.Action, st.Reason, st.Policy, st.Message = a, why, number, t.text[why]
}

func (s *state) take(i int) {
	s.gone[i] = true
	s.victims = append(s.victims, i)
	s.used -= s.records[i].bytes()
	s.freed += s.records[i].bytes()
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

// texts are the reasons of one policy in words, which all its records share.
type texts struct {
	taken Reason
	text  map[Reason]string
}

func newTexts(c *compiled, goal *int64) *texts {
	t := &texts{taken: Matched, text: map[Reason]string{
		HasChildren:   "records that stay were made on top of it",
		ProtectedType: "its type (" + typesText(Protected()) + ") goes only with all",
		NamedByImage:  "an image names it, so it goes only with all",
		Matched:       "selected by " + c.name,
	}}
	if c.KeepDuration != nil {
		t.taken = Unused
		t.text[Unused] = fmt.Sprintf("not used for %s (%s)", *c.KeepDuration, c.name)
		t.text[Recent] = fmt.Sprintf("used within %s (%s)", *c.KeepDuration, c.name)
	}
	if goal != nil {
		t.taken = OverLimit
		t.text[OverLimit] = fmt.Sprintf("the store is above %s (%s)", bytesText(*goal), c.name)
		t.text[WithinLimits] = fmt.Sprintf("without it the store is within %s already (%s)", bytesText(*goal), c.name)
	} else {
		t.text[WithinLimits] = "nothing asks for its space"
	}
	if c.reserved != nil {
		t.text[ReservedSpace] = fmt.Sprintf("the store would go below %s, which are reserved (%s)", bytesText(*c.reserved), c.name)
	}
	return t
}

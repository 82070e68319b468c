package policy

import (
	"fmt"
	"maps"
	"slices"
)

// grouping divides all records into groups: by their value of a label, or into
// a single one.
type grouping struct {
	label  string
	of     []int // the group of each record
	groups []group
}

// group is the records of one value of a label, or those without the label.
type group struct {
	value string
	set   bool
	used  int64
	// reserved is the most that a policy reserves for the group, and
	// reservedBy that policy; nil if none does.
	reserved   int64
	reservedBy *compiled
}

// newGrouping groups by a label, or not at all if that is empty.
func newGrouping(records []Record, label string) *grouping {
	g := &grouping{label: label, of: make([]int, len(records))}
	if label == "" {
		g.groups = []group{{}}
		for i := range records {
			g.groups[0].used += records[i].bytes()
		}
		return g
	}
	type key struct {
		value string
		set   bool
	}
	at := map[key]int{}
	for i := range records {
		value, set := records[i].Labels[label]
		k, ok := at[key{value, set}]
		if !ok {
			k = len(g.groups)
			at[key{value, set}] = k
			g.groups = append(g.groups, group{value: value, set: set})
		}
		g.of[i] = k
		g.groups[k].used += records[i].bytes()
	}
	return g
}

// aim is what a policy wants of one group.
type aim struct {
	// concerned says that the policy holds for the group at all.
	concerned bool
	// goal is what the group may use afterwards, nil if there is no limit;
	// tight says that it uses more, so that something has to go.
	goal  *int64
	tight bool
}

// within says that nothing of the group has to go.
func (a *aim) within() bool { return a.goal != nil && !a.tight }

func (g *grouping) aims(c *compiled, d Disk, freed int64) []aim {
	aims := make([]aim, len(g.groups))
	for k := range g.groups {
		gr := &g.groups[k]
		aims[k] = aim{concerned: c.concerns(gr.value, gr.set)}
		aims[k].goal, aims[k].tight = c.goal(gr.used, d, freed)
	}
	return aims
}

// name is a group for people.
func (g *grouping) name(k int) string {
	if g.label == "" {
		return "the store"
	}
	return groupName(g.label, g.groups[k].value, g.groups[k].set)
}

// groupName is a group of a label for people.
func groupName(label, value string, set bool) string {
	if !set {
		return "what has no label " + label
	}
	return fmt.Sprintf("%s=%q", label, value)
}

// texts are the reasons of one policy in words, which its records share.
type texts struct {
	policy *compiled
	groups *grouping
	aims   []aim
	made   map[textKey]string
}

// textKey is what a text depends on: for a reservation the group that it is for,
// else that of the policy.
type textKey struct {
	why   Reason
	label string
	group int
}

// taken is the reason of what goes from a group.
func (t *texts) taken(group int) Reason {
	switch {
	case t.aims[group].goal != nil:
		return OverLimit
	case t.policy.KeepDuration != nil:
		return Unused
	}
	return Matched
}

// text says in one line why a record goes or stays.
func (t *texts) text(s *state, record int, why Reason) string {
	key := textKey{why, t.groups.label, t.groups.of[record]}
	by, of := t.policy, t.groups
	if why == ReservedSpace {
		for _, label := range slices.Sorted(maps.Keys(s.labels)) {
			g := s.labels[label]
			gr := &g.groups[g.of[record]]
			if gr.reservedBy != nil && gr.used-s.records[record].bytes() < gr.reserved {
				key, by, of = textKey{why, label, g.of[record]}, gr.reservedBy, g
			}
		}
	}
	text, ok := t.made[key]
	if !ok {
		text = t.make(why, by, of, key.group)
		t.made[key] = text
	}
	return text
}

func (t *texts) make(why Reason, by *compiled, of *grouping, k int) string {
	switch why {
	case HasChildren:
		return "records that stay were made on top of it"
	case ProtectedType:
		return "its type (" + typesText(Protected()) + ") goes only with all"
	case NamedByImage:
		return "an image names it, so it goes only with all"
	case Matched:
		return "selected by " + by.name
	case OnRelease:
		return "in use; it goes when it is released (" + by.name + ")"
	case Unused:
		return fmt.Sprintf("not used for %s (%s)", *by.KeepDuration, by.name)
	case Recent:
		return fmt.Sprintf("used within %s (%s)", *by.KeepDuration, by.name)
	case OverLimit:
		return fmt.Sprintf("%s is above %s (%s)", of.name(k), bytesText(*t.aims[k].goal), by.name)
	case WithinLimits:
		if goal := t.aims[k].goal; goal != nil {
			return fmt.Sprintf("without it %s is within %s already (%s)", of.name(k), bytesText(*goal), by.name)
		}
		return "nothing asks for its space"
	case ReservedSpace:
		return fmt.Sprintf("%s would go below %s, which are reserved (%s)", of.name(k), bytesText(*by.reserved), by.name)
	}
	return string(why)
}

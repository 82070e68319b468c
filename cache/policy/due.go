package policy

import "fmt"

// Sum is what the records of one value of a label use.
type Sum struct {
	Value string
	// Set is false for the records without the label.
	Set  bool
	Used int64
}

// Excess is a limit of a policy that is not kept.
type Excess struct {
	// Policy is the number of the policy, from 1.
	Policy int
	// Label and Sum are the group that the limit is for, if it is for one.
	Label string
	Sum
	// Message says it in one line for people. Used, of the group or else of the
	// store, is above Limit.
	Message string
	Limit   int64
}

// Exceeded lists the limits that a store does not keep which uses so many
// bytes. sums gives the groups of a label; it is asked once for each label that
// a policy groups by, and may be nil if there are none. Whether anything may go
// for a limit is not looked at. Errors are InvalidArgument, or those of sums.
func Exceeded(policies []Policy, d Disk, used int64, sums func(label string) ([]Sum, error)) (out []Excess, err error) {
	ps, err := compileAll(policies, d)
	if err != nil {
		return nil, err
	}
	known := map[string][]Sum{}
	for i := range ps {
		c := &ps[i]
		if c.ByLabel == "" {
			if limit, tight := c.high(used, d); tight {
				out = append(out, excess(i+1, c, "the store", limit, Sum{Used: used}))
			}
			continue
		}
		groups, ok := known[c.ByLabel]
		if !ok {
			if groups, err = sums(c.ByLabel); err != nil {
				return nil, err
			}
			known[c.ByLabel] = groups
		}
		for _, g := range groups {
			limit, tight := c.high(g.Used, d)
			if tight && c.concerns(g.Value, g.Set) {
				out = append(out, excess(i+1, c, groupName(c.ByLabel, g.Value, g.Set), limit, g))
			}
		}
	}
	return out, nil
}

// high is the limit that what is used is above, if it is: the target is not one
// as long as there are others.
func (c *compiled) high(used int64, d Disk) (limit int64, tight bool) {
	alone := *c
	if c.maxUsed != nil || c.minFree != nil {
		alone.target = nil
	}
	goal, tight := alone.goal(used, d, 0)
	if !tight {
		return 0, false
	}
	return *goal, true
}

func excess(number int, c *compiled, what string, goal int64, s Sum) Excess {
	return Excess{
		Policy: number, Label: c.ByLabel, Sum: s, Limit: goal,
		Message: fmt.Sprintf("%s uses %s, which is above %s (%s)", what, bytesText(s.Used), bytesText(goal), c.name),
	}
}

// Unlimited says whether a policy has nothing but what it selects and how long
// it keeps it, so that only time makes it due.
func (p *Policy) Unlimited() bool {
	return p.ByLabel == "" && p.MaxUsed == nil && p.MinFree == nil && p.Target == nil
}

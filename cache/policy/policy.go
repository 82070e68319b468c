package policy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Policy is one rule. The zero value selects every record and has no limits:
// what is not held or protected goes.
type Policy struct {
	// Name is for people; policies without one are called by their number.
	Name string `json:"name,omitempty"`

	// Filters select records; one of them has to match. See ParseFilters for
	// the language. None select all.
	Filters []string `json:"filters,omitempty"`
	// Types select records of these types. None select all.
	Types []string `json:"types,omitempty"`
	// All takes records of protected types and those of images, too.
	All bool `json:"all,omitempty"`

	// ByLabel makes the rule one of quotas: the records are grouped by their
	// value of this label, those without it being a group of their own, and
	// Reserved, MaxUsed and Target hold for each group. A record counts in its
	// own group only, whatever lies below it. Such a rule removes nothing but
	// what is above a group's MaxUsed or, without one, its Target; and what it
	// reserves holds for all rules of the list.
	ByLabel string `json:"by_label,omitempty"`
	// LabelValues restricts a rule of quotas to the groups of these values, and
	// Unlabelled to the records without the label; both, to all of them.
	// Neither means every group.
	LabelValues []string `json:"label_values,omitempty"`
	Unlabelled  bool     `json:"unlabelled,omitempty"`

	// KeepDuration spares what was used, or made, within this time.
	KeepDuration *Duration `json:"keep_duration,omitempty"`
	// Reserved is what the store may always use: nothing goes that would
	// take it below.
	Reserved *Amount `json:"reserved_space,omitempty"`
	// MaxUsed is what the store may use at most.
	MaxUsed *Amount `json:"max_used_space,omitempty"`
	// MinFree is what has to be free on the disk, whoever uses it.
	MinFree *Amount `json:"min_free_space,omitempty"`
	// Target is how far the store shrinks once MaxUsed or MinFree is not
	// kept, so that it is not at the limit again at once. Without the two it
	// is a limit itself.
	Target *Amount `json:"target_space,omitempty"`
}

// Protected are the types that go only where a policy says All: a frontend, or
// what a builder keeps for itself, costs the next build more than its size says.
func Protected() []string { return []string{"internal", "frontend"} }

// compiled is a policy whose texts are parsed and whose amounts are bytes.
type compiled struct {
	*Policy
	name   string
	filter Filter
	// A nil limit is none.
	reserved, maxUsed, minFree, target *int64
}

// compile checks p, the number-th policy, for a disk.
func (p *Policy) compile(number int, d Disk) (c compiled, err error) {
	c = compiled{Policy: p, name: p.Name}
	if c.name == "" {
		c.name = fmt.Sprintf("policy %d", number)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", c.name, err)
		}
	}()
	if c.filter, err = ParseFilters(p.Filters...); err != nil {
		return c, err
	}
	if p.KeepDuration != nil && *p.KeepDuration < 0 {
		return c, fmt.Errorf("keep duration %s is negative: %w", *p.KeepDuration, errdefs.ErrInvalidArgument)
	}
	for _, limit := range []struct {
		name   string
		amount *Amount
		to     **int64
	}{
		{"reserved space", p.Reserved, &c.reserved},
		{"max used space", p.MaxUsed, &c.maxUsed},
		{"min free space", p.MinFree, &c.minFree},
		{"target space", p.Target, &c.target},
	} {
		if limit.amount == nil {
			continue
		}
		if err := limit.amount.validate(); err != nil {
			return c, fmt.Errorf("%s: %w", limit.name, err)
		}
		n := limit.amount.Of(d)
		*limit.to = &n
	}
	if err := c.grouped(); err != nil {
		return c, err
	}
	return c, c.possible(d)
}

// grouped refuses a rule of quotas that says nothing, or what only a rule for
// the whole store can say.
func (c *compiled) grouped() error {
	switch {
	case c.ByLabel == "" && (len(c.LabelValues) > 0 || c.Unlabelled):
		return fmt.Errorf(`label_values and unlabelled need by_label, for example "by_label": "team": %w`, errdefs.ErrInvalidArgument)
	case c.ByLabel == "":
		return nil
	case c.minFree != nil:
		return fmt.Errorf("min free space is of the disk, not of a label's value: %w", errdefs.ErrInvalidArgument)
	case c.maxUsed == nil && c.reserved == nil && c.target == nil:
		return fmt.Errorf(`a rule by label needs a limit, for example "max_used_space": "10GB": %w`, errdefs.ErrInvalidArgument)
	}
	return nil
}

// concerns says whether the rule holds for the records that have this value of
// its label, or for those that have none.
func (c *compiled) concerns(value string, set bool) bool {
	if c.ByLabel == "" || len(c.LabelValues) == 0 && !c.Unlabelled {
		return true
	}
	if !set {
		return c.Unlabelled
	}
	return slices.Contains(c.LabelValues, value)
}

// possible refuses limits that contradict each other, whatever the records.
func (c *compiled) possible(d Disk) error {
	above := func(a *int64, an string, b *int64, bn string) error {
		if a == nil || b == nil || *a <= *b {
			return nil
		}
		return fmt.Errorf("%s (%s) is above %s (%s), so it cannot be kept: %w", an, bytesText(*a), bn, bytesText(*b), errdefs.ErrInvalidArgument)
	}
	if err := above(c.reserved, "reserved space", c.maxUsed, "max used space"); err != nil {
		return err
	}
	if err := above(c.reserved, "reserved space", c.target, "target space"); err != nil {
		return err
	}
	if err := above(c.target, "target space", c.maxUsed, "max used space"); err != nil {
		return err
	}
	return above(c.minFree, "min free space", &d.Total, "the size of the disk")
}

// limited says whether the policy has a limit that the store can be above.
func (c *compiled) limited() bool { return c.maxUsed != nil || c.minFree != nil || c.target != nil }

// goal is what the store may use after this policy, nil if the policy has no
// limit. tight says that used is above it, so that something has to go.
func (c *compiled) goal(used int64, d Disk, freed int64) (goal *int64, tight bool) {
	low := func(n int64) {
		if goal == nil || n < *goal {
			goal = &n
		}
	}
	if c.maxUsed != nil {
		low(*c.maxUsed)
	}
	if c.minFree != nil {
		// What earlier policies free counts as free.
		low(used - (*c.minFree - (d.Free + freed)))
	}
	if goal == nil && c.target != nil {
		low(*c.target)
	}
	if goal == nil || used <= *goal {
		return goal, false
	}
	if c.target != nil {
		low(*c.target)
	}
	return goal, true
}

// recent says whether the policy's keep duration spares r.
func (c *compiled) recent(r *Record, now time.Time) bool {
	return c.KeepDuration != nil && r.used().Add(time.Duration(*c.KeepDuration)).After(now)
}

func (c *compiled) selects(r *Record, now time.Time) bool {
	return (len(c.Types) == 0 || slices.Contains(c.Types, r.Type)) && c.filter.Match(r, now)
}

// Validate says whether the policies can be applied on a disk at all. Errors
// are InvalidArgument and name the policy.
func Validate(policies []Policy, d Disk) error {
	_, err := compileAll(policies, d)
	return err
}

func compileAll(policies []Policy, d Disk) ([]compiled, error) {
	out := make([]compiled, 0, len(policies))
	for i := range policies {
		c, err := policies[i].compile(i+1, d)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, together(out)
}

// together refuses reservations by label that the limits of other rules do not
// leave room for, as far as that can be said without looking at the records.
func together(ps []compiled) error {
	for _, r := range ps {
		if r.ByLabel == "" || r.reserved == nil {
			continue
		}
		for _, l := range ps {
			if l.ByLabel != r.ByLabel && l.ByLabel != "" || l.ByLabel != "" && !overlap(&r, &l) {
				continue
			}
			need := *r.reserved
			if l.ByLabel == "" {
				need *= int64(max(len(r.LabelValues), 1))
			}
			for _, limit := range []struct {
				name string
				of   *int64
			}{{"max used space", l.maxUsed}, {"target space", l.target}} {
				if limit.of != nil && need > *limit.of {
					return fmt.Errorf("%s: reserved space by label (%s) is above %s of %s (%s), so it cannot be kept: %w",
						r.name, bytesText(need), limit.name, l.name, bytesText(*limit.of), errdefs.ErrInvalidArgument)
				}
			}
		}
	}
	return nil
}

// overlap says whether two rules by one label have a group in common.
func overlap(a, b *compiled) bool {
	all := func(c *compiled) bool { return len(c.LabelValues) == 0 && !c.Unlabelled }
	return all(a) || all(b) || a.Unlabelled && b.Unlabelled ||
		slices.ContainsFunc(a.LabelValues, func(v string) bool { return slices.Contains(b.LabelValues, v) })
}

// Defaults are the policies of a store whose owner has none: what is easily made
// again goes after two days once the store is larger than 512 MB, what nobody
// used for sixty days goes, and then what was used longest ago, until the store
// is within 80 % of its disk and 20 % of the disk are free. Protected records go
// last. A tenth of the disk is the store's in any case.
func Defaults() []Policy {
	days := func(n int) *Duration {
		d := Duration(n) * Duration(24*time.Hour)
		return &d
	}
	reserved := func(p Policy) Policy {
		p.Reserved = Percent(10)
		return p
	}
	limited := func(p Policy) Policy {
		p.MaxUsed, p.MinFree = Percent(80), Percent(20)
		return reserved(p)
	}
	return []Policy{
		{
			Name:  "easily made again",
			Types: []string{"source.local", "source.git.checkout", "exec.cachemount"}, KeepDuration: days(2), MaxUsed: Bytes(512e6),
		},
		reserved(Policy{Name: "not used for long", KeepDuration: days(60)}),
		limited(Policy{Name: "limits of the disk"}),
		limited(Policy{Name: "limits of the disk, all types", All: true}),
	}
}

// typesText is a list of types for people.
func typesText(types []string) string { return strings.Join(types, ", ") }

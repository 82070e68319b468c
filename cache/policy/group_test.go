package policy_test

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/cache/policy"
)

// drawLabelled is drawUsage with labels; a value that is empty is not the same
// as none.
func drawLabelled(t *rapid.T) policy.Usage {
	u := drawUsage(t)
	for i := range u.Records {
		r := &u.Records[i]
		r.Labels = map[string]string{}
		for _, label := range []string{"team", "stage"} {
			if v := rapid.SampledFrom([]string{"", "a", "b", "none"}).Draw(t, label); v != "none" {
				r.Labels[label] = v
			}
		}
	}
	return u
}

// drawQuota makes a rule by label that can be kept.
func drawQuota(t *rapid.T, label string) policy.Policy {
	p := policy.Policy{
		ByLabel: label, All: rapid.Bool().Draw(t, "all"),
		Reserved: drawAmount(t, "reserved", 20_000),
		MaxUsed:  drawAmount(t, "max used", 40_000),
		Target:   drawAmount(t, "target", 40_000),
	}
	if p.Reserved == nil && p.MaxUsed == nil && p.Target == nil {
		p.MaxUsed = policy.Bytes(10_000)
	}
	switch rapid.IntRange(0, 3).Draw(t, "groups") {
	case 0:
		p.LabelValues = []string{"a", ""}
	case 1:
		p.Unlabelled = true
	}
	if rapid.IntRange(0, 3).Draw(t, "typed") == 0 {
		p.Types = []string{"regular", "source.local"}
	}
	if rapid.IntRange(0, 3).Draw(t, "keep") == 0 {
		d := policy.Duration(2 * time.Hour)
		p.KeepDuration = &d
	}
	p.Target = lowerOf(p.Target, p.MaxUsed)
	p.Reserved = lowerOf(lowerOf(p.Reserved, p.MaxUsed), p.Target)
	return p
}

func lowerOf(a, b *policy.Amount) *policy.Amount {
	if a != nil && b != nil && a.Of(disk) > b.Of(disk) {
		return b
	}
	return a
}

// groupOf names a record's group in a way that the code does not.
func groupOf(r *policy.Record, label string) string {
	if v, ok := r.Labels[label]; ok {
		return "=" + v
	}
	return "unlabelled"
}

func groupSums(rs []policy.Record, label string) map[string]int64 {
	out := map[string]int64{"=": 0, "=a": 0, "=b": 0, "unlabelled": 0}
	for i := range rs {
		out[groupOf(&rs[i], label)] += max(rs[i].Size, 0)
	}
	return out
}

// concerns says whether a rule by label holds for a group.
func concerns(p *policy.Policy, group string) bool {
	if len(p.LabelValues) == 0 && !p.Unlabelled {
		return true
	}
	if group == "unlabelled" {
		return p.Unlabelled
	}
	return slices.Contains(p.LabelValues, group[1:])
}

// TestQuotasOfRandomStores holds rules by label to what they promise, on 10,000
// states.
func TestQuotasOfRandomStores(t *testing.T) {
	checkMany(t, func(t *rapid.T) {
		u := drawLabelled(t)
		p := drawQuota(t, "team")
		plan := compute(t, u, p)
		left := executed(t, u, plan)
		before, after := groupSums(u.Records, "team"), groupSums(left, "team")

		// The groups are all there is.
		var total int64
		for _, n := range after {
			total += n
		}
		require.Equal(t, sum(left), total)
		require.Equal(t, plan.Freed, sum(u.Records)-total)

		why := map[string][]policy.Reason{}
		removed := map[string]int{}
		for _, s := range plan.Steps {
			require.NotEmpty(t, s.Message)
			g := groupOf(s.Record, "team")
			if s.Action == policy.Remove {
				removed[g]++
			} else {
				why[g] = append(why[g], s.Reason)
			}
		}
		limit := p.MaxUsed
		if limit == nil {
			limit = p.Target
		}
		for g := range before {
			if !concerns(&p, g) || limit == nil || before[g] <= limit.Of(disk) {
				require.Zero(t, removed[g], "group %s is within its quota", g)
				continue
			}
			if p.Reserved != nil && removed[g] > 0 {
				require.GreaterOrEqual(t, after[g], p.Reserved.Of(disk))
			}
			target := limit.Of(disk)
			if p.Target != nil {
				target = min(target, p.Target.Of(disk))
			}
			if after[g] > target {
				require.NotContains(t, why[g], policy.WithinLimits, "group %s is above its quota", g)
			}
		}
		require.Zero(t, compute(t, policy.Usage{Records: left}, p).Removed, "a second run has nothing to do")

		shuffled := policy.Usage{Records: slices.Clone(u.Records)}
		slices.Reverse(shuffled.Records)
		require.Equal(t, ids(plan), ids(compute(t, shuffled, p)))
	})
}

// TestReservationsByLabelHoldForAllRules: whatever the other rules of the list
// want, and wherever in it they stand.
func TestReservationsByLabelHoldForAllRules(t *testing.T) {
	checkMany(t, func(t *rapid.T) {
		u := drawLabelled(t)
		reserve := policy.Policy{ByLabel: "team", Reserved: policy.Bytes(8_000)}
		ps := rapid.Permutation([]policy.Policy{reserve, {All: true}, drawQuota(t, "stage")}).Draw(t, "rules")
		plan := compute(t, u, ps...)
		left := executed(t, u, plan)
		before, after := groupSums(u.Records, "team"), groupSums(left, "team")
		for g := range before {
			require.GreaterOrEqual(t, after[g], min(before[g], 8_000), g)
		}
		require.Zero(t, compute(t, u, reserve).Removed, "a reservation takes nothing")
	})
}

// TestTighterQuotasNeverKeepMore of the group that they are for.
func TestTighterQuotasNeverKeepMore(t *testing.T) {
	checkMany(t, func(t *rapid.T) {
		u := drawLabelled(t)
		loose := policy.Policy{ByLabel: "team", LabelValues: []string{"a"}, MaxUsed: policy.Bytes(rapid.Int64Range(0, 60_000).Draw(t, "quota"))}
		tight := loose
		tight.MaxUsed = policy.Bytes(rapid.Int64Range(0, loose.MaxUsed.Of(disk)).Draw(t, "tighter"))
		rest := policy.Policy{ByLabel: "team", LabelValues: []string{"", "b"}, Unlabelled: true, MaxUsed: policy.Bytes(20_000)}
		a := executed(t, u, compute(t, u, loose, rest))
		b := executed(t, u, compute(t, u, tight, rest))
		require.LessOrEqual(t, groupSums(b, "team")["=a"], groupSums(a, "team")["=a"])
	})
}

func TestQuotas(t *testing.T) {
	old := now.Add(-100 * time.Hour)
	record := func(id, team string, size int64, parents ...string) policy.Record {
		r := policy.Record{ID: id, Size: size, Created: old, Parents: parents}
		if team != "" {
			r.Labels = map[string]string{"team": team}
		}
		return r
	}
	u := policy.Usage{Records: []policy.Record{
		record("a1", "a", 10), record("a2", "a", 20, "none"), record("a3", "a", 30),
		record("b1", "b", 40), record("b2", "b", 5, "none"),
		record("none", "", 50),
	}}
	plan := compute(t, u, policy.Policy{ByLabel: "team", MaxUsed: policy.Bytes(40)})
	require.Equal(t, map[string]policy.Reason{
		"a3": policy.OverLimit, "a2": policy.WithinLimits, "a1": policy.WithinLimits,
		"b1": policy.OverLimit, "b2": policy.WithinLimits, "none": policy.HasChildren,
	}, reasons(plan))
	message := func(p *policy.Plan, id string) string {
		return p.Steps[slices.IndexFunc(p.Steps, func(s policy.Step) bool { return s.Record.ID == id })].Message
	}
	require.Equal(t, `team="a" is above 40 B (policy 1)`, message(plan, "a3"))
	require.Equal(t, `without it team="b" is within 40 B already (policy 1)`, message(plan, "b2"))

	// Unlabelled alone, once its children went by another rule.
	plan = compute(t, u,
		policy.Policy{ByLabel: "team", LabelValues: []string{"a", "b"}, MaxUsed: policy.Bytes(0)},
		policy.Policy{ByLabel: "team", Unlabelled: true, MaxUsed: policy.Bytes(49)})
	require.Equal(t, 6, plan.Removed)
	require.Equal(t, `what has no label team is above 49 B (policy 2)`, message(plan, "none"))

	plan = compute(t, u, policy.Policy{}, policy.Policy{Name: "ours", ByLabel: "team", LabelValues: []string{"b"}, Reserved: policy.Bytes(5)})
	require.Equal(t, 4, plan.Removed)
	require.Equal(t, policy.ReservedSpace, reasons(plan)["b2"])
	require.Equal(t, `team="b" would go below 5 B, which are reserved (ours)`, message(plan, "b2"))

	for want, ps := range map[string][]policy.Policy{
		"need by_label":          {{LabelValues: []string{"a"}}},
		"policy 1: label_values": {{Unlabelled: true}},
		"of the disk":            {{ByLabel: "team", MinFree: policy.Bytes(1)}},
		"needs a limit":          {{ByLabel: "team"}},
		"reserved space (2 B) is above max used space (1 B)": {{ByLabel: "team", Reserved: policy.Bytes(2), MaxUsed: policy.Bytes(1)}},
		"(4 B) is above max used space of all (3 B)": {
			{Name: "all", MaxUsed: policy.Bytes(3)}, {ByLabel: "team", LabelValues: []string{"a", "b"}, Reserved: policy.Bytes(2)},
		},
		"policy 1: reserved space by label (2 B) is above target space of policy 2 (1 B)": {
			{ByLabel: "team", Reserved: policy.Bytes(2)}, {ByLabel: "team", LabelValues: []string{"a"}, Target: policy.Bytes(1)},
		},
	} {
		_, err := policy.Compute(policy.Usage{}, disk, ps, now)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, want)
		require.ErrorContains(t, err, want)
	}
	compute(t, u,
		policy.Policy{ByLabel: "team", LabelValues: []string{"a"}, Reserved: policy.Bytes(2)},
		policy.Policy{ByLabel: "team", LabelValues: []string{"b"}, MaxUsed: policy.Bytes(1)},
		policy.Policy{ByLabel: "stage", MaxUsed: policy.Bytes(1)})
}

// TestCacheDirectoriesInUse go when they are released, if somebody named them.
func TestCacheDirectoriesInUse(t *testing.T) {
	u := policy.Usage{Records: []policy.Record{
		{ID: "busy", Cache: "go", Held: "a run"}, {ID: "idle", Cache: "go"}, {ID: "other", Held: "a run"}, {ID: "npm", Cache: "npm", Held: "a run"},
	}}
	named := policy.Policy{Filters: []string{"cache==go"}}
	require.Equal(t, map[string]policy.Reason{
		"busy": policy.OnRelease, "idle": policy.Matched, "other": policy.Held, "npm": policy.Held,
	}, reasons(compute(t, u, named)))
	limited := named
	limited.MaxUsed = policy.Bytes(0)
	require.Equal(t, policy.Held, reasons(compute(t, u, limited))["busy"])
	require.Equal(t, policy.Held, reasons(compute(t, u, policy.Policy{}))["busy"], "nobody named it")
	hour := policy.Duration(time.Hour)
	spared := named
	spared.KeepDuration = &hour
	require.Equal(t, policy.OnRelease, reasons(compute(t, u, spared))["busy"])
	for i := range u.Records {
		u.Records[i].LastUsed = now
	}
	require.Equal(t, policy.Held, reasons(compute(t, u, spared))["busy"], "it was used just now")
}

// TestExceeded: the limit that is named is the one that was not kept, not the
// target that a plan would go to.
func TestExceeded(t *testing.T) {
	rules := []policy.Policy{{MaxUsed: policy.Bytes(100), Target: policy.Bytes(50)}, {Target: policy.Bytes(110)}}
	exceeded := func(used int64) (out []int64) {
		over, err := policy.Exceeded(rules, disk, used, nil)
		require.NoError(t, err)
		for _, x := range over {
			require.Equal(t, used, x.Used)
			out = append(out, x.Limit)
		}
		return out
	}
	require.Empty(t, exceeded(100))
	require.Equal(t, []int64{100}, exceeded(101))
	require.Equal(t, []int64{100, 110}, exceeded(111))
}

// TestManyGroups: as many groups as records, in one plan.
func TestManyGroups(t *testing.T) {
	const n = 50_000
	var u policy.Usage
	for i := range n {
		u.Records = append(u.Records, policy.Record{ID: fmt.Sprint(i), Size: 2, Labels: map[string]string{"run": fmt.Sprint(i)}})
	}
	plan := compute(t, u, policy.Policy{ByLabel: "run", MaxUsed: policy.Bytes(1)})
	require.Equal(t, n, plan.Removed)
	require.Len(t, slices.Collect(maps.Keys(reasons(plan))), n)
}

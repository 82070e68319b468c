package policy_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/cache/policy"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// drawUsage makes a random store. Sizes and times are few, so that the later
// keys of the order matter.
func drawUsage(t *rapid.T) policy.Usage {
	n := rapid.IntRange(0, 24).Draw(t, "records")
	types := []string{"regular", "regular", "internal", "frontend", "source.local", "exec.cachemount", ""}
	var u policy.Usage
	for i := range n {
		r := policy.Record{
			ID: fmt.Sprintf("r%02d", i), Revision: uint64(i + 1), State: "finalized",
			Type:    rapid.SampledFrom(types).Draw(t, "type"),
			Size:    rapid.Int64Range(-1, 12).Draw(t, "size") * 1000,
			Created: now.Add(-time.Duration(rapid.IntRange(24, 30).Draw(t, "age")) * time.Hour),
			Uses:    uint64(rapid.IntRange(0, 2).Draw(t, "uses")),
			Cost:    time.Duration(rapid.IntRange(0, 2).Draw(t, "cost")) * time.Second,
			Image:   rapid.IntRange(0, 9).Draw(t, "image") == 0,
		}
		if rapid.Bool().Draw(t, "was used") {
			r.LastUsed = now.Add(-time.Duration(rapid.IntRange(0, 5).Draw(t, "last used")) * time.Hour)
		}
		if rapid.IntRange(0, 7).Draw(t, "held") == 0 {
			r.Held = "a handle"
		}
		for range min(i, rapid.SampledFrom([]int{0, 0, 1, 1, 1, 2}).Draw(t, "parents")) {
			r.Parents = append(r.Parents, fmt.Sprintf("r%02d", rapid.IntRange(0, i-1).Draw(t, "parent")))
		}
		u.Records = append(u.Records, r)
	}
	u.Records = rapid.Permutation(u.Records).Draw(t, "order")
	return u
}

var disk = policy.Disk{Total: 200_000, Free: 40_000}

func drawAmount(t *rapid.T, name string, most int64) *policy.Amount {
	switch rapid.IntRange(0, 3).Draw(t, name) {
	case 0:
		return nil
	case 1:
		return policy.Bytes(0)
	}
	return policy.Bytes(rapid.Int64Range(0, most/1000).Draw(t, name) * 1000)
}

// drawPolicy makes a policy that can be kept.
func drawPolicy(t *rapid.T) policy.Policy {
	p := policy.Policy{
		All:      rapid.Bool().Draw(t, "all"),
		Reserved: drawAmount(t, "reserved", 60_000),
		MaxUsed:  drawAmount(t, "max used", 120_000),
		MinFree:  drawAmount(t, "min free", 200_000),
		Target:   drawAmount(t, "target", 120_000),
	}
	if rapid.Bool().Draw(t, "keep") {
		d := policy.Duration(time.Duration(rapid.IntRange(0, 5).Draw(t, "hours")) * time.Hour)
		p.KeepDuration = &d
	}
	if rapid.IntRange(0, 3).Draw(t, "typed") == 0 {
		p.Types = []string{"regular", "source.local"}
	}
	if rapid.IntRange(0, 3).Draw(t, "filtered") == 0 {
		p.Filters = []string{"size>=3kB,uses<2", "type==internal"}
	}
	lower := func(a, b *policy.Amount) *policy.Amount {
		if a != nil && b != nil && a.Of(disk) > b.Of(disk) {
			return b
		}
		return a
	}
	p.Target = lower(p.Target, p.MaxUsed)
	p.Reserved = lower(lower(p.Reserved, p.MaxUsed), p.Target)
	return p
}

func compute(t require.TestingT, u policy.Usage, ps ...policy.Policy) *policy.Plan {
	p, err := policy.Compute(u, disk, ps, now)
	require.NoError(t, err)
	return p
}

// checkMany tries a property on 10,000 random states: a hundred times what
// rapid does in one check.
func checkMany(t *testing.T, fn func(t *rapid.T)) {
	for range 100 {
		if rapid.Check(t, fn); t.Failed() {
			return
		}
	}
}

// TestPlansOfRandomStores holds plans to what they promise, on 10,000 states.
func TestPlansOfRandomStores(t *testing.T) {
	checkMany(t, func(t *rapid.T) {
		u := drawUsage(t)
		p := drawPolicy(t)
		plan := compute(t, u, p)

		// Every record is in it once, with a reason.
		seen := map[string]bool{}
		for i, s := range plan.Steps {
			require.False(t, seen[s.Record.ID])
			seen[s.Record.ID] = true
			require.NotEmpty(t, s.Reason)
			require.NotEmpty(t, s.Message, s.Reason)
			require.Equal(t, i < plan.Removed, s.Action == policy.Remove)
		}
		require.Len(t, seen, len(u.Records))

		// Executing frees what the plan says, in an order that can be done:
		// no child is left behind, nobody's record goes, and at no moment is
		// the store below what is reserved.
		left := executed(t, u, plan)
		used := sum(u.Records)
		require.Equal(t, used, plan.Used)
		require.Equal(t, plan.Freed, used-sum(left))
		if p.Reserved != nil && plan.Removed > 0 {
			require.GreaterOrEqual(t, sum(left), p.Reserved.Of(disk))
		}

		// What stays is within the limits, unless everything that is left has
		// another reason to stay.
		if goal := goalOf(p, used); goal != nil {
			if used <= *goal.limit {
				require.Zero(t, plan.Removed, "the limits were kept already")
			} else if sum(left) > *goal.target {
				for _, s := range plan.Kept() {
					require.NotEqual(t, policy.WithinLimits, s.Reason, s.Record.ID)
				}
			} else if plan.Removed > 0 {
				// Not one more than it takes.
				last := plan.Victims()[plan.Removed-1].Record
				require.Greater(t, sum(left)+max(last.Size, 0), *goal.target)
			}
		}

		// The same state in another order gives the same plan.
		shuffled := policy.Usage{Records: slices.Clone(u.Records)}
		slices.Reverse(shuffled.Records)
		require.Equal(t, ids(plan), ids(compute(t, shuffled, p)))

		// A second run has nothing to do, unless space was asked of the disk.
		if p.MinFree == nil {
			require.Zero(t, compute(t, policy.Usage{Records: left}, p).Removed)
		}
	})
}

// TestTighterLimitsNeverKeepMore tightens one limit of a policy.
func TestTighterLimitsNeverKeepMore(t *testing.T) {
	checkMany(t, func(t *rapid.T) {
		u := drawUsage(t)
		loose := drawPolicy(t)
		tight := loose
		less := func(a *policy.Amount, low int64) *policy.Amount {
			have := int64(200_000)
			if a != nil {
				have = a.Of(disk)
			}
			return policy.Bytes(rapid.Int64Range(min(low, have), have).Draw(t, "tighter"))
		}
		floor := int64(0)
		if loose.Reserved != nil {
			floor = loose.Reserved.Of(disk)
		}
		switch rapid.IntRange(0, 4).Draw(t, "which") {
		case 0:
			if loose.MaxUsed == nil {
				return // without limits all goes: a limit is no tighter
			}
			if loose.Target != nil {
				floor = loose.Target.Of(disk)
			}
			tight.MaxUsed = less(loose.MaxUsed, floor)
		case 1:
			if loose.MinFree == nil {
				return
			}
			tight.MinFree = policy.Bytes(rapid.Int64Range(loose.MinFree.Of(disk), disk.Total).Draw(t, "tighter"))
		case 2:
			if loose.Target == nil {
				return
			}
			tight.Target = less(loose.Target, floor)
		case 3:
			if loose.Reserved == nil {
				return
			}
			tight.Reserved = less(loose.Reserved, 0)
		case 4:
			if loose.KeepDuration == nil {
				return
			}
			d := policy.Duration(rapid.Int64Range(0, int64(*loose.KeepDuration)).Draw(t, "tighter"))
			tight.KeepDuration = &d
		}
		a, b := compute(t, u, loose), compute(t, u, tight)
		require.GreaterOrEqual(t, b.Freed, a.Freed)
	})
}

// TestManyPolicies: what one policy alone takes, it takes as the first of
// several, and no record goes twice.
func TestManyPolicies(t *testing.T) {
	checkMany(t, func(t *rapid.T) {
		u := drawUsage(t)
		ps := []policy.Policy{drawPolicy(t), drawPolicy(t), drawPolicy(t)}
		plan := compute(t, u, ps...)
		executed(t, u, plan)
		first := compute(t, u, ps[0])
		require.Equal(t, ids(first)[:first.Removed], ids(plan)[:first.Removed])
		for i, s := range plan.Victims() {
			require.Equal(t, i < first.Removed, s.Policy == 1)
		}
	})
}

func TestTheOrderIsTotal(t *testing.T) {
	checkMany(t, func(t *rapid.T) {
		rs := drawUsage(t).Records
		for i := range rs {
			for j := range rs {
				before, after := policy.Before(&rs[i], &rs[j]), policy.Before(&rs[j], &rs[i])
				require.Equal(t, i != j, before != after)
				require.False(t, before && after)
				for k := range rs {
					if before && policy.Before(&rs[j], &rs[k]) {
						require.True(t, policy.Before(&rs[i], &rs[k]))
					}
				}
			}
		}
	})
}

// TestTheOrder walks the keys of the order from the first to the last.
func TestTheOrder(t *testing.T) {
	hour := func(n int) time.Time { return now.Add(time.Duration(n) * time.Hour) }
	sorted := []policy.Record{
		{ID: "z", LastUsed: hour(-9), Uses: 9},
		{ID: "y", Created: hour(-8), Uses: 8, Size: 1}, // never used counts from its creation
		{ID: "x", LastUsed: hour(-7), Created: hour(-9), Uses: 1, Size: 1},
		{ID: "w", LastUsed: hour(-7), Uses: 2, Size: 9, Cost: 9},
		{ID: "v", LastUsed: hour(-7), Uses: 2, Size: 8, Cost: 1},
		{ID: "a", LastUsed: hour(-7), Uses: 2, Size: 8, Cost: 2},
		{ID: "b", LastUsed: hour(-7), Uses: 2, Size: 8, Cost: 2},
	}
	for i := range sorted {
		for j := range sorted {
			require.Equal(t, i < j, policy.Before(&sorted[i], &sorted[j]), "%d %d", i, j)
		}
	}
}

// executed plays a plan on the records and gives what is left.
func executed(t require.TestingT, u policy.Usage, plan *policy.Plan) []policy.Record {
	left := map[string]policy.Record{}
	kids := map[string]int{}
	for _, r := range u.Records {
		left[r.ID] = r
		for _, p := range r.Parents {
			kids[p]++
		}
	}
	for _, s := range plan.Victims() {
		r, there := left[s.Record.ID]
		require.True(t, there)
		require.Empty(t, r.Held)
		require.Zero(t, kids[r.ID], "%s goes before its children", r.ID)
		delete(left, r.ID)
		for _, p := range r.Parents {
			kids[p]--
		}
	}
	var out []policy.Record
	for _, r := range u.Records {
		if _, there := left[r.ID]; there {
			out = append(out, r)
		}
	}
	return out
}

type goal struct{ limit, target *int64 }

// goalOf says it another way than the code: the strictest of the limits.
func goalOf(p policy.Policy, used int64) *goal {
	var limits []int64
	if p.MaxUsed != nil {
		limits = append(limits, p.MaxUsed.Of(disk))
	}
	if p.MinFree != nil {
		limits = append(limits, used+disk.Free-p.MinFree.Of(disk))
	}
	if len(limits) == 0 && p.Target != nil {
		limits = append(limits, p.Target.Of(disk))
	}
	if len(limits) == 0 {
		return nil
	}
	limit := slices.Min(limits)
	target := limit
	if p.Target != nil {
		target = min(target, p.Target.Of(disk))
	}
	return &goal{&limit, &target}
}

func sum(rs []policy.Record) (n int64) {
	for _, r := range rs {
		n += max(r.Size, 0)
	}
	return n
}

func ids(p *policy.Plan) (out []string) {
	for _, s := range p.Steps {
		out = append(out, s.Record.ID+" "+string(s.Reason))
	}
	return out
}

func reasons(p *policy.Plan) map[string]policy.Reason {
	out := map[string]policy.Reason{}
	for _, s := range p.Steps {
		out[s.Record.ID] = s.Reason
	}
	return out
}

// TestReasons has a record for each.
func TestReasons(t *testing.T) {
	old, late := now.Add(-100*time.Hour), now.Add(-time.Hour)
	u := policy.Usage{Records: []policy.Record{
		{ID: "held", Created: old, Size: 10, Held: "somebody"},
		{ID: "parent of held", Created: old, Size: 10},
		{ID: "internal", Type: "internal", Created: old, Size: 10},
		{ID: "image", Image: true, Created: old, Size: 10},
		{ID: "recent", Created: old, LastUsed: late, Size: 10},
		{ID: "other type", Type: "other", Created: old, Size: 10},
		{ID: "large", Created: old, Size: 1000},
		{ID: "old 1", Created: old, Size: 90, Uses: 1},
		{ID: "old 2", Created: old, Size: 80, Uses: 2},
	}}
	u.Records[0].Parents = []string{"parent of held"}
	day := policy.Duration(24 * time.Hour)
	p := policy.Policy{Filters: []string{"type!=other"}, KeepDuration: &day, MaxUsed: policy.Bytes(1150), Reserved: policy.Bytes(500)}
	require.Equal(t, map[string]policy.Reason{
		"held": policy.Held, "parent of held": policy.HasChildren, "internal": policy.ProtectedType,
		"image": policy.NamedByImage, "recent": policy.Recent, "other type": policy.NotSelected,
		"large": policy.ReservedSpace, "old 1": policy.OverLimit, "old 2": policy.WithinLimits,
	}, reasons(compute(t, u, p)))

	p.All, p.Reserved, p.MaxUsed = true, nil, nil
	got := reasons(compute(t, u, p))
	require.Equal(t, policy.Unused, got["old 1"])
	p.KeepDuration = nil
	plan := compute(t, u, p)
	got = reasons(plan)
	require.Equal(t, policy.Matched, got["internal"])
	require.Equal(t, policy.Matched, got["image"])
	require.Equal(t, policy.Matched, got["recent"])
	require.Equal(t, policy.NotSelected, got["other type"])
	require.Equal(t, policy.Held, got["held"])
}

// TestLimitsAlone: such limits alone once took everything.
func TestLimitsAlone(t *testing.T) {
	u := policy.Usage{Records: []policy.Record{{ID: "a", Size: 10_000}, {ID: "b", Size: 5_000}}}
	require.Zero(t, compute(t, u, policy.Policy{MinFree: policy.Bytes(disk.Free)}).Removed)
	require.Equal(t, 1, compute(t, u, policy.Policy{MinFree: policy.Bytes(disk.Free + 1)}).Removed)
	require.Equal(t, 2, compute(t, u, policy.Policy{MinFree: policy.Bytes(disk.Free + 10_001)}).Removed)
	require.Equal(t, 1, compute(t, u, policy.Policy{Reserved: policy.Bytes(3_000)}).Removed)
	require.Equal(t, 2, compute(t, u, policy.Policy{MaxUsed: policy.Bytes(0)}).Removed)
	require.Zero(t, compute(t, u, policy.Policy{MaxUsed: policy.Bytes(15_000), Target: policy.Bytes(0)}).Removed)
	require.Equal(t, 2, compute(t, u, policy.Policy{MaxUsed: policy.Bytes(14_999), Target: policy.Bytes(0)}).Removed)
	require.Equal(t, 1, compute(t, u, policy.Policy{Target: policy.Percent(5)}).Removed)
	zero := policy.Duration(0)
	require.Equal(t, 2, compute(t, u, policy.Policy{KeepDuration: &zero}).Removed)
}

// TestEarlierRulesMakeRoom: what one rule frees is free for those after it.
func TestEarlierRulesMakeRoom(t *testing.T) {
	u := policy.Usage{Records: []policy.Record{{ID: "a", Type: "cheap", Size: 10_000}, {ID: "b", Size: 5_000}, {ID: "c", Size: 5_000}}}
	cheap := policy.Policy{Types: []string{"cheap"}}
	free := func(more int64) policy.Policy { return policy.Policy{MinFree: policy.Bytes(disk.Free + more)} }
	require.Equal(t, 1, compute(t, u, cheap, free(10_000)).Removed)
	require.Equal(t, 2, compute(t, u, cheap, free(10_001)).Removed)
	require.Equal(t, 2, compute(t, u, cheap, free(15_000)).Removed)
	require.Equal(t, 3, compute(t, u, cheap, free(15_001)).Removed)
}

func TestImpossiblePoliciesAreRefused(t *testing.T) {
	neg := policy.Duration(-1)
	for _, tt := range []struct {
		p    policy.Policy
		want string
	}{
		{policy.Policy{Reserved: policy.Bytes(2000), MaxUsed: policy.Bytes(1000)}, "reserved space (2.0 KiB) is above max used space (1000 B)"},
		{policy.Policy{Reserved: policy.Percent(50), MaxUsed: policy.Percent(40)}, "reserved space"},
		{policy.Policy{Reserved: policy.Bytes(2), Target: policy.Bytes(1)}, "above target space"},
		{policy.Policy{Target: policy.Bytes(2), MaxUsed: policy.Bytes(1)}, "target space"},
		{policy.Policy{MinFree: policy.Bytes(disk.Total + 1)}, "size of the disk"},
		{policy.Policy{MaxUsed: policy.Bytes(-1)}, "negative"},
		{policy.Policy{MaxUsed: policy.Percent(101)}, "100%"},
		{policy.Policy{KeepDuration: &neg}, "negative"},
		{policy.Policy{Filters: []string{"colour==red"}}, `no field "colour"`},
	} {
		_, err := policy.Compute(policy.Usage{}, disk, []policy.Policy{{}, tt.p}, now)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, "policy 2: ")
		require.ErrorContains(t, err, tt.want)
	}
	_, err := policy.Compute(policy.Usage{Records: []policy.Record{{ID: "a"}, {ID: "a"}}}, disk, nil, now)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// TestLongChain: 200,000 generations in one plan, leaf first, soon.
func TestLongChain(t *testing.T) {
	const n = 200_000
	var u policy.Usage
	for i := range n {
		r := policy.Record{ID: fmt.Sprint(i), Size: 1}
		if i > 0 {
			r.Parents = []string{fmt.Sprint(i - 1)}
		}
		u.Records = append(u.Records, r)
	}
	plan := compute(t, u, policy.Policy{})
	require.Equal(t, n, plan.Removed)
	require.Equal(t, fmt.Sprint(n-1), plan.Steps[0].Record.ID)
	require.Equal(t, "0", plan.Steps[n-1].Record.ID)
}

func TestDefaults(t *testing.T) {
	gb := int64(1e9)
	d := policy.Disk{Total: 100 * gb, Free: 50 * gb}
	old := now.Add(-61 * 24 * time.Hour)
	u := policy.Usage{Records: []policy.Record{
		{ID: "old", Size: gb, Created: old},
		{ID: "base", Size: 20 * gb, Created: now},
		{ID: "sources", Type: "source.local", Size: gb, Created: now.Add(-72 * time.Hour)},
		{ID: "sources of today", Type: "source.local", Size: gb, Created: now},
	}}
	plan, err := policy.Compute(u, d, policy.Defaults(), now)
	require.NoError(t, err)
	require.Equal(t, 2, plan.Removed)
	got := reasons(plan)
	require.Equal(t, policy.Unused, got["old"])
	require.Equal(t, policy.OverLimit, got["sources"])
	// On a small or a large disk: they can always be kept.
	require.NoError(t, policy.Validate(policy.Defaults(), policy.Disk{Total: 1, Free: 1}))
}

package cache

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/metadata"
)

const (
	// DefaultCollectEvery is how often policies without limits are applied:
	// they go by hours and days, so minutes are soon enough.
	DefaultCollectEvery = 10 * time.Minute
	// DefaultCollectPause is the least time between two collections. Each
	// looks at all records, which for 100,000 of them takes a part of a second.
	DefaultCollectPause = 5 * time.Second
	// collectGrowth is the part by which a store has to grow before a limit
	// that the last collection could not keep is tried again at once.
	collectGrowth = 100
)

// CollectOptions have a manager prune by itself, beside what else it does.
//
// New, Commit, Extract and whatever keeps a blob say that something has changed; whether a limit of a
// policy is exceeded is then looked at in the background: MaxUsedSpace and
// MinFreeSpace are the high watermarks, TargetSpace is the low one. Nobody
// waits for a collection, there is one at a time, and what somebody holds stays:
// a host that wants to keep a record takes a handle on it.
//
// The callbacks are called from the collector, one after the other and without
// any lock. They may call the manager, but for Close, which waits for them.
type CollectOptions struct {
	// Policies say what goes, policy.Defaults if there are none.
	Policies []policy.Policy
	// Every is how often policies without limits are applied, and limits tried
	// again that could not be kept; DefaultCollectEvery if zero.
	Every time.Duration
	// Pause is the least time between two collections, DefaultCollectPause if
	// zero, none if negative.
	Pause time.Duration

	// OnPlan is told why a collection begins, and what it is going to do.
	OnPlan func(why string, plan *policy.Plan)
	// OnRemoved is told of each record what became of it, with the step of the
	// plan that says why.
	OnRemoved func(policy.Step, Removed)
	// OnCollected is told how a collection ended.
	OnCollected func(why string, sum Pruned, err error)
}

// collector prunes in the background.
type collector struct {
	m     *Manager
	o     CollectOptions
	kick  chan struct{} // has room for one: something has changed
	stop  context.CancelFunc
	once  sync.Once
	ended chan struct{}

	// Of the goroutine alone.

	// last is when all records were looked at last, swept when the policies
	// without limits were applied; zero for never.
	last, swept time.Time
	// stuck has the limits that the last collection could not keep, with what
	// was used then.
	stuck map[limitKey]int64
}

// limitKey names a limit: of a policy, and in it of a group.
type limitKey struct {
	policy int
	value  string
	set    bool
}

// startCollector begins to prune in the background if that is asked for.
func (m *Manager) startCollector(o *CollectOptions) error {
	if o == nil || m.readOnly {
		return nil
	}
	c := &collector{m: m, o: *o, kick: make(chan struct{}, 1), ended: make(chan struct{}), stuck: map[limitKey]int64{}}
	c.o.Policies = slices.Clone(o.Policies)
	if len(c.o.Policies) == 0 {
		c.o.Policies = policy.Defaults()
	}
	if c.o.Every <= 0 {
		c.o.Every = DefaultCollectEvery
	}
	if c.o.Pause == 0 {
		c.o.Pause = DefaultCollectPause
	}
	disk, err := m.disk()
	if err == nil {
		err = policy.Validate(c.o.Policies, disk)
	}
	if err != nil {
		return fmt.Errorf("collect: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	c.stop = stop
	m.collector = c
	go c.loop(ctx)
	c.poke()
	return nil
}

// poke says that something has changed. It costs nothing and waits for nobody.
func (c *collector) poke() {
	if c == nil {
		return
	}
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// end stops the collector. A collection that is under way leaves off.
func (c *collector) end() {
	if c == nil {
		return
	}
	c.once.Do(func() {
		c.stop()
		<-c.ended
	})
}

func (c *collector) loop(ctx context.Context) {
	defer close(c.ended)
	timer := time.NewTimer(c.o.Every)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.kick:
		case <-timer.C:
		}
		timer.Reset(c.round(ctx))
	}
}

// round collects if that is due, and says when to look again at the latest.
func (c *collector) round(ctx context.Context) time.Duration {
	now := c.m.now()
	if wait := c.o.Pause - now.Sub(c.last); !c.last.IsZero() && wait > 0 {
		return min(wait, c.o.Every)
	}
	over, err := c.exceeded(ctx)
	why := ""
	if err == nil {
		// Whoever made room: a limit that is kept is no longer stuck.
		maps.DeleteFunc(c.stuck, func(k limitKey, _ int64) bool {
			return !slices.ContainsFunc(over, func(x policy.Excess) bool { return keyOf(x) == k })
		})
		why = c.due(over, now)
	}
	if why != "" {
		c.collect(ctx, why)
		c.last = c.m.now()
	} else if err != nil && ctx.Err() == nil {
		c.m.log.Warn("whether something has to be pruned could not be found out; it is tried again", "error", err)
	}
	return c.o.Every
}

// due says why a collection has to be made, empty if none.
func (c *collector) due(over []policy.Excess, now time.Time) string {
	again := c.swept.IsZero() || now.Sub(c.swept) >= c.o.Every
	for _, x := range over {
		was, stuck := c.stuck[keyOf(x)]
		if !stuck || again || x.Used > was+was/collectGrowth {
			return x.Message
		}
	}
	if again && slices.ContainsFunc(c.o.Policies, func(p policy.Policy) bool { return p.Unlimited() }) {
		return "it is time for what is not used any more"
	}
	return ""
}

func keyOf(x policy.Excess) limitKey { return limitKey{x.Policy, x.Value, x.Set} }

// exceeded lists the limits that are not kept now. Without policies by label it
// costs the same whatever the number of records.
func (c *collector) exceeded(ctx context.Context) ([]policy.Excess, error) {
	disk, err := c.m.disk()
	if err != nil {
		return nil, err
	}
	used, err := c.m.Used(ctx)
	if err != nil {
		return nil, err
	}
	return policy.Exceeded(c.o.Policies, disk, used, func(label string) ([]policy.Sum, error) {
		c.last = c.m.now()
		return c.m.usedByLabel(ctx, label)
	})
}

// collect makes one collection and tells the host.
func (c *collector) collect(ctx context.Context, why string) {
	sum, err := c.prune(ctx, why)
	if ctx.Err() == nil {
		if err != nil {
			c.m.log.Warn("collection failed; it is tried again", "why", why, "error", err)
		}
		c.swept = c.m.now()
		over, oerr := c.exceeded(ctx)
		if oerr != nil {
			c.m.log.Warn("what is left to prune could not be found out", "error", oerr)
		}
		for _, x := range over {
			c.stuck[keyOf(x)] = x.Used
		}
	}
	if c.o.OnCollected != nil {
		c.o.OnCollected(why, sum, err)
	}
}

func (c *collector) prune(ctx context.Context, why string) (sum Pruned, err error) {
	plan, err := c.m.Plan(ctx, c.o.Policies...)
	if err != nil {
		return sum, err
	}
	if c.o.OnPlan != nil {
		c.o.OnPlan(why, plan)
	}
	steps := make(map[ID]policy.Step, len(plan.Steps))
	for _, s := range plan.Steps {
		steps[ID(s.Record.ID)] = s
	}
	sum.Kept = len(plan.Kept())
	for r, err := range c.m.Execute(ctx, plan) {
		if err != nil {
			return sum, err
		}
		sum.add(r)
		if c.o.OnRemoved != nil {
			c.o.OnRemoved(steps[r.ID], r)
		}
	}
	return sum, nil
}

// usedByLabel sums up what the records of each value of a label use, as far as
// their sizes are known.
func (m *Manager) usedByLabel(ctx context.Context, label string) (sums []policy.Sum, err error) {
	end, err := m.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	at := map[limitKey]int{}
	err = m.store.View(ctx, func(tx *metadata.Tx) error {
		for rec, err := range tx.Records() {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err != nil {
				continue // it is reported where somebody can do something
			}
			value, set := rec.Labels[label]
			k, ok := at[limitKey{value: value, set: set}]
			if !ok {
				k = len(sums)
				at[limitKey{value: value, set: set}] = k
				sums = append(sums, policy.Sum{Value: value, Set: set})
			}
			sums[k].Used += max(rec.Size, 0)
		}
		return nil
	})
	return sums, err
}

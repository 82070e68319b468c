package cachetest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
)

// clients is how many goroutines a concurrent history has, and calls how many
// operations each of them.
const (
	clients = 8
	calls   = 8
)

// RunConcurrent plays histories of several clients at once, and has a checker
// find for each an order of its operations, one after the other, in which they
// end as the model says, and in which nothing moves before an operation that had
// ended when it began: the cache is linearizable. A history whose order is not
// found in ten seconds is void; more than one in a hundred fail the test.
//
// A prune is no single moment: each removal is, between its begin and its end.
func RunConcurrent(t *testing.T, open Opener, o Options) {
	t.Helper()
	if o.Histories == 0 {
		o.Histories = 1000
	}
	r := newRunner(t, o, game{})
	var void, operations int
	for n := range r.Histories {
		seed := r.Seed + uint64(n)
		events := r.concurrently(open, seed)
		operations += len(events)
		switch result, info := porcupine.CheckOperationsVerbose(linear(), events, 10*time.Second); result {
		case porcupine.Unknown:
			void++
		case porcupine.Illegal:
			drawing := filepath.Join(os.TempDir(), fmt.Sprintf("lamina-history-%d.html", seed))
			if err := porcupine.VisualizePath(linear(), info, drawing); err != nil {
				drawing = err.Error()
			}
			t.Fatalf("the history of seed %d has no order (the schedule differs each time; others from it: %s=%d); drawn in %s:\n%s",
				seed, envSeed, seed, drawing, describeEvents(events))
		}
	}
	t.Logf("rig: %d histories of %d clients from seed %d: %d operations, %d void", r.Histories, clients, r.Seed, operations, void)
	if void*100 > r.Histories {
		t.Fatalf("%d of %d histories are void", void, r.Histories)
	}
}

// ask is an operation of a client, answer how it ended.
type ask struct {
	op, name, parent string
	retain, writer   bool
}

type answer struct {
	outcome outcome
	// name is the id of what came to be.
	name string
}

// linear is the model as the checker wants it. A state is never written to.
func linear() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return newModel() },
		Step: func(state, in, out any) (bool, any) {
			m := state.(*model).clone()
			a := out.(answer)
			return m.apply(in.(ask), a.name) == a.outcome, m
		},
		Equal: func(a, b any) bool { return reflect.DeepEqual(a, b) },
		DescribeOperation: func(in, out any) string {
			return fmt.Sprintf("%+v: %+v", in, out)
		},
	}
}

func (m *model) apply(a ask, made string) outcome {
	switch a.op {
	case "New":
		return m.create(made, a.parent, record{retain: a.retain})
	case "Commit":
		return m.commit(a.name, "")
	case "Finalize":
		return m.finalize(a.name)
	case "Get":
		return m.get(a.name)
	case "GetMutable":
		return m.getMutable(a.name, made)
	case "Release":
		return m.release(a.name, a.writer, false)
	}
	return m.remove(a.name)[a.name]
}

// crowd is what the clients of one history share: time, and the ids that they
// have heard of.
type crowd struct {
	m     *cache.Manager
	clock atomic.Int64

	mu     sync.Mutex
	ids    []cache.ID
	events []porcupine.Operation
}

func (c *crowd) heard(id cache.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Contains(c.ids, id) {
		c.ids = append(c.ids, id)
	}
}

func (c *crowd) note(client int, call int64, in ask, out answer) {
	end := c.clock.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = append(c.events, porcupine.Operation{ClientId: client, Input: in, Call: call, Output: out, Return: end})
}

// concurrently plays one history.
func (r *runner) concurrently(open Opener, seed uint64) []porcupine.Operation {
	dir, err := os.MkdirTemp(r.Dir, "history-")
	if err != nil {
		r.t.Fatal(err)
	}
	h := newHistory(open, filepath.Join(dir, "store"))
	if err := os.MkdirAll(h.root, 0o700); err != nil {
		r.t.Fatal(err)
	}
	if err := h.openStore(); err != nil {
		r.t.Fatal(err)
	}
	c := &crowd{m: h.m}
	start := make(chan struct{})
	var group sync.WaitGroup
	for i := range clients {
		group.Go(func() {
			x := &client{crowd: c, number: i, rng: rand.New(rand.NewPCG(seed, uint64(i)))}
			<-start
			for range calls {
				x.act()
				runtime.Gosched()
			}
		})
	}
	close(start)
	group.Wait()
	if err := h.closeStore(); err != nil {
		r.t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		r.t.Fatal(err)
	}
	return c.events
}

type client struct {
	*crowd
	number  int
	rng     *rand.Rand
	handles []*handle
}

// act does one operation and notes it.
func (x *client) act() {
	ctx := context.Background()
	in := ask{op: []string{"New", "New", "Commit", "Commit", "Finalize", "Get", "GetMutable", "GetMutable", "Release", "Release", "Prune", "Remove"}[x.rng.IntN(12)]}
	own := x.one(func(y *handle) bool {
		switch in.op {
		case "Commit":
			return y.mut != nil
		case "New", "Finalize":
			return y.imm != nil
		}
		return true
	})
	switch in.op {
	case "New":
		in.retain = x.rng.IntN(2) == 0
		var parent *cache.ImmutableRef
		if own != nil && x.rng.IntN(2) == 0 {
			in.parent, parent = own.name, own.imm
		}
		call := x.clock.Add(1)
		mut, err := x.m.New(ctx, parent, cache.NewOptions{Retain: in.retain})
		out := answer{outcome: outcomeOf(err)}
		if err == nil {
			out.name = string(mut.ID())
			x.took(&handle{name: out.name, mut: mut})
		}
		x.note(x.number, call, in, out)
	case "Commit", "Finalize", "Release":
		if own != nil {
			x.own(ctx, in, own)
		}
	case "Prune":
		call := x.clock.Add(1)
		plan, err := x.m.Plan(ctx, policy.Policy{All: true})
		if err != nil {
			x.note(x.number, call, in, answer{outcome: outcomeOf(err)})
			return
		}
		for r, err := range x.m.Execute(ctx, plan) {
			if err == nil && r.Err == nil {
				// Removals of one prune overlap: each is a client's of its own.
				x.note(clients+x.number, call, ask{op: "Remove", name: string(r.ID)}, answer{outcome: ok})
			}
		}
	default:
		x.someone(ctx, in)
	}
}

// own does something with a handle of this client.
func (x *client) own(ctx context.Context, in ask, y *handle) {
	in.name, in.writer = y.name, y.mut != nil
	call := x.clock.Add(1)
	var err error
	switch in.op {
	case "Commit":
		var imm *cache.ImmutableRef
		if imm, err = y.mut.Commit(ctx); err == nil {
			y.mut, y.imm = nil, imm
		}
	case "Finalize":
		err = y.imm.Finalize(ctx)
	case "Release":
		if err = y.release(ctx); err == nil {
			x.handles = slices.DeleteFunc(x.handles, func(z *handle) bool { return y == z })
		}
	}
	x.note(x.number, call, in, answer{outcome: outcomeOf(err)})
}

// someone does something with a record that somebody made.
func (x *client) someone(ctx context.Context, in ask) {
	x.mu.Lock()
	id, there := pick(x.ids, byte(x.rng.IntN(256)))
	x.mu.Unlock()
	if !there {
		return
	}
	in.name = string(id)
	out := answer{}
	call := x.clock.Add(1)
	switch in.op {
	case "Get":
		imm, err := x.m.Get(ctx, id, cache.GetOptions{NoUpdate: true})
		if out.outcome = outcomeOf(err); err == nil {
			x.took(&handle{name: in.name, imm: imm})
		}
	case "GetMutable":
		mut, err := x.m.GetMutable(ctx, id)
		if out.outcome = outcomeOf(err); err == nil {
			out.name = string(mut.ID())
			x.took(&handle{name: out.name, mut: mut})
		}
	case "Remove":
		removed, err := x.m.Remove(ctx, id)
		if err == nil {
			err = removed[0].Err
		}
		out.outcome = outcomeOf(err)
	}
	x.note(x.number, call, in, out)
}

func (x *client) took(y *handle) {
	x.handles = append(x.handles, y)
	x.heard(cache.ID(y.name))
}

// one is any of the client's handles that fit.
func (x *client) one(fits func(*handle) bool) *handle {
	list := slices.DeleteFunc(slices.Clone(x.handles), func(y *handle) bool { return !fits(y) })
	y, _ := pick(list, byte(x.rng.IntN(256)))
	return y
}

func describeEvents(events []porcupine.Operation) (out string) {
	slices.SortFunc(events, func(a, b porcupine.Operation) int { return int(a.Call - b.Call) })
	for _, e := range events {
		out += fmt.Sprintf("%3d-%3d client %d %+v: %+v\n", e.Call, e.Return, e.ClientId, e.Input, e.Output)
	}
	return out
}

package cachetest

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// game is a kind of histories: what they are made of, and how one begins.
type game struct {
	// what they are called.
	what string
	// operations are their names, each as often as it is to come, and reach
	// is below which number the events are that go wrong.
	operations []string
	reach      int
	// begin begins a history, whose files are all below dir.
	begin func(dir string) player
}

// player is one history.
type player interface {
	// play does the operations and says what is wrong, if anything is.
	play(ops []Op) (why string)
	// told is what the history was told and did.
	told() *history
}

// runner plays histories of a game, and shortens one that fails.
type runner struct {
	t *testing.T
	game
	Options
	ops, injected, stores atomic.Int64
}

// newRunner fills in what o leaves open.
func newRunner(t *testing.T, o Options, g game) *runner {
	if o.Histories == 0 {
		o.Histories = 250
	}
	if o.Length == 0 {
		o.Length = 200
	}
	if o.Seed == 0 {
		o.Seed = 1
	}
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	if n, err := strconv.ParseUint(os.Getenv(envSeed), 10, 64); err == nil {
		o.Seed = n
	}
	return &runner{t: t, game: g, Options: o}
}

// run plays the one history that the environment spells out, or all.
func (r *runner) run() {
	r.t.Helper()
	text := os.Getenv(envOps)
	if text == "" {
		r.all()
		return
	}
	ops, err := parseOps(text, r.operations)
	if err != nil {
		r.t.Fatal(err)
	}
	trace, why := r.play(ops)
	r.t.Logf("%s", strings.Join(trace, "\n"))
	if why != "" {
		r.t.Fatal(why)
	}
}

// defeat is a history that failed.
type defeat struct {
	seed  uint64
	trace []string
	why   string
}

// all plays the histories, some at a time, until one fails.
func (r *runner) all() {
	r.t.Helper()
	var next atomic.Int64
	var failed atomic.Pointer[defeat]
	var group sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for failed.Load() == nil {
				n := next.Add(1) - 1
				if n >= int64(r.Histories) {
					return
				}
				seed := r.Seed + uint64(n)
				trace, why := r.play(r.history(seed))
				if why != "" {
					failed.CompareAndSwap(nil, &defeat{seed, trace, why})
					return
				}
				if r.Seen != nil {
					r.Seen(seed, slices.DeleteFunc(trace, func(line string) bool { return strings.HasPrefix(line, noteOfFault) }))
				}
			}
		})
	}
	group.Wait()
	if l := failed.Load(); l != nil {
		r.report(l)
	}
	r.t.Logf("rig: %d %s from seed %d: %d operations, %d failures and crashes injected, %d opens",
		r.Histories, r.what, r.Seed, r.ops.Load(), r.injected.Load(), r.stores.Load())
}

func (r *runner) history(seed uint64) []Op {
	return generate(seed, r.Length, r.operations, r.reach)
}

// patience is how long a history may take before it is taken for one that
// hangs: thousands of times what it needs.
const patience = 2 * time.Minute

// play plays one history in a store of its own. It gives what the history saw
// and, if it failed, why.
func (r *runner) play(ops []Op) (trace []string, why string) {
	dir, err := os.MkdirTemp(r.Dir, "history-")
	if err != nil {
		return nil, err.Error()
	}
	p := r.begin(dir)
	done := make(chan string, 1)
	go func() { done <- p.play(ops) }()
	select {
	case why = <-done:
	case <-time.After(patience):
		stacks := make([]byte, 1<<20)
		return nil, fmt.Sprintf("it hangs\n%s", stacks[:runtime.Stack(stacks, true)])
	}
	h := p.told()
	r.ops.Add(int64(len(ops)))
	r.injected.Add(int64(h.injected))
	r.stores.Add(int64(h.opens))
	if err := os.RemoveAll(dir); err != nil && why == "" {
		why = err.Error()
	}
	return h.trace, why
}

// guarded opens the store, lets do do what it does, and says what it failed
// with.
func (h *history) guarded(do func()) (why string) {
	defer func() {
		v := recover()
		if v == nil {
			return
		}
		f, failed := v.(failure)
		if why = f.text; !failed {
			why = fmt.Sprintf("panic: %v\n%s", v, debug.Stack())
		}
		h.abandon()
	}()
	h.must(os.MkdirAll(h.root, 0o700), "make the store")
	h.must(h.openStore(), "open")
	do()
	return ""
}

// abandon leaves nothing mounted after a failure.
func (h *history) abandon() {
	defer func() { _ = recover() }() // it failed already
	for _, x := range h.holds {
		_ = x.hold.Release()
	}
	if h.m != nil {
		_ = h.closeStore()
	}
}

// report shortens a history that failed, and fails the test with what is left.
func (r *runner) report(l *defeat) {
	r.t.Helper()
	fails := func(ops []Op) bool { _, why := r.play(ops); return why != "" }
	ops := r.history(l.seed)
	again := fails(ops)
	if again {
		ops = shrink(ops, time.Now().Add(time.Minute), fails)
		if trace, why := r.play(ops); why != "" {
			l.trace, l.why = trace, why
		} else {
			ops, again = r.history(l.seed), false
		}
	}
	how := fmt.Sprintf("fails; shortened from %d operations to %d", r.Length, len(ops))
	if !again {
		how = "failed, but not each time that it is played"
	}
	r.t.Fatalf("the history of seed %d %s:\n%s\n%s\n\nto repeat it:\n  %s='%s' go test -count=1 -run '^%s$' PACKAGE",
		l.seed, how, strings.Join(l.trace, "\n"), l.why, envOps, formatOps(ops), r.t.Name())
}

// shrink leaves out operations, and failures of the others, as long as the rest
// still fails: first half of them, then ever smaller parts. It gives up at end.
func shrink(ops []Op, end time.Time, fails func([]Op) bool) []Op {
	for size := len(ops) / 2; size > 0 && time.Now().Before(end); {
		shorter := false
		for at := 0; at < len(ops) && time.Now().Before(end); {
			less := slices.Delete(slices.Clone(ops), at, min(at+size, len(ops)))
			if fails(less) {
				ops, shorter = less, true
			} else {
				at += size
			}
		}
		if !shorter || size > 1 {
			size /= 2
		}
	}
	for i := range ops {
		if ops[i].Fault == none || time.Now().After(end) {
			continue
		}
		plain := slices.Clone(ops)
		plain[i].Fault, plain[i].At = none, 0
		if fails(plain) {
			ops = plain
		}
	}
	return ops
}

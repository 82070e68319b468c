// Package cachetest proves that a cache keeps its promises on a driver. Prove is
// what a driver of somebody else calls in its tests. Of that, Run
// plays random histories of all operations, with failures, cancellations, kills
// and power cuts in the middle of them, and compares whatever can be seen with
// a small model, which is the specification of package cache in some 300 lines.
//
// A history that fails is shortened to the few operations that matter, and
// printed with the command that repeats it.
package cachetest

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lamina-build/lamina/snapshot"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

// Opener makes the driver of the store below root, or opens it again after
// Close: what was there is there again. A driver that is Trees needs no
// mounts and no privileges.
type Opener func(root string) (snapshot.Driver, error)

// Options say how much Run does. The zero value is a minute's work on a driver
// that mounts.
type Options struct {
	// Histories is how many histories are played, 250 if zero, and Length
	// how many operations each has, 200 if zero.
	Histories, Length int
	// Seed is that of the first history, 1 if zero; each next one has the
	// next number. The same seed is the same history on every driver.
	Seed uint64
	// Dir is where the stores are made, t.TempDir() if empty. Memory is
	// fastest.
	Dir string
	// Seen, if set, is told what each history did and what came of it, which
	// is the same on every driver. It is called by several goroutines.
	Seen func(seed uint64, trace []string)
}

// The environment overrides Options: the first seed, and one history spelled
// out, as a failure prints it.
const (
	envSeed = "LAMINA_HISTORY_SEED"
	envOps  = "LAMINA_HISTORY_OPS"
)

// Prove has a driver of somebody else prove itself: that it keeps the contract
// of snapshot.Driver (snapshottest.Run, with containerd's own suite in it, for
// which name is), and that a cache keeps its promises on it, whatever fails, and
// to many clients at once. It needs root, and is skipped without.
func Prove(t *testing.T, name string, open Opener, o Options) {
	t.Helper()
	t.Run("Driver", func(t *testing.T) {
		snapshottest.Run(t, name, func(t *testing.T, root string) snapshot.Driver {
			d, err := open(root)
			if err != nil {
				t.Fatal(err)
			}
			return d
		})
	})
	t.Run("Histories", func(t *testing.T) { Run(t, open, o) })
	t.Run("Concurrent", func(t *testing.T) { RunConcurrent(t, open, o) })
}

// Run plays histories on stores of the driver that open gives.
func Run(t *testing.T, open Opener, o Options) {
	t.Helper()
	r := &runner{t: t, open: open, Options: o}
	r.defaults()
	if text := os.Getenv(envOps); text != "" {
		ops, err := parseOps(text)
		if err != nil {
			t.Fatal(err)
		}
		trace, failed := r.play(ops)
		t.Logf("%s", strings.Join(trace, "\n"))
		if failed != "" {
			t.Fatal(failed)
		}
		return
	}
	r.all()
}

type runner struct {
	t    *testing.T
	open Opener
	Options
	ops, injected, stores atomic.Int64
}

func (r *runner) defaults() {
	if r.Histories == 0 {
		r.Histories = 250
	}
	if r.Length == 0 {
		r.Length = 200
	}
	if r.Seed == 0 {
		r.Seed = 1
	}
	if r.Dir == "" {
		r.Dir = r.t.TempDir()
	}
	if n, err := strconv.ParseUint(os.Getenv(envSeed), 10, 64); err == nil {
		r.Seed = n
	}
}

// all plays the histories, some at a time, until one fails.
func (r *runner) all() {
	var next atomic.Int64
	var failed atomic.Pointer[string]
	var seed atomic.Uint64
	var group sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for failed.Load() == nil {
				n := next.Add(1) - 1
				if n >= int64(r.Histories) {
					return
				}
				s := r.Seed + uint64(n)
				trace, why := r.play(generate(s, r.Length))
				if why != "" {
					if failed.CompareAndSwap(nil, &why) {
						seed.Store(s)
					}
					return
				}
				if r.Seen != nil {
					r.Seen(s, slices.DeleteFunc(trace, func(line string) bool { return strings.HasPrefix(line, noteOfFault) }))
				}
			}
		})
	}
	group.Wait()
	if failed.Load() != nil {
		r.report(seed.Load())
	}
	r.t.Logf("rig: %d histories from seed %d: %d operations, %d failures and crashes injected, %d opens",
		r.Histories, r.Seed, r.ops.Load(), r.injected.Load(), r.stores.Load())
}

// patience is how long a history may take before it is taken for one that
// hangs: thousands of times what it needs.
const patience = 2 * time.Minute

// play runs one history in a store of its own. It gives what the history saw
// and, if it failed, why.
func (r *runner) play(ops []Op) (trace []string, why string) {
	dir, err := os.MkdirTemp(r.Dir, "history-")
	if err != nil {
		return nil, err.Error()
	}
	h := newHistory(r.open, filepath.Join(dir, "store"))
	done := make(chan string, 1)
	go func() { done <- h.play(ops) }()
	select {
	case why = <-done:
	case <-time.After(patience):
		stacks := make([]byte, 1<<20)
		return nil, fmt.Sprintf("it hangs\n%s", stacks[:runtime.Stack(stacks, true)])
	}
	r.ops.Add(int64(len(ops)))
	r.injected.Add(int64(h.injected))
	r.stores.Add(int64(h.opens))
	if err := os.RemoveAll(dir); err != nil && why == "" {
		why = err.Error()
	}
	return h.trace, why
}

func (h *history) play(ops []Op) (why string) {
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
	if err := os.MkdirAll(h.root, 0o700); err != nil {
		return err.Error()
	}
	h.must(h.openStore(), "open")
	all := operations()
	for _, op := range ops {
		i := slices.IndexFunc(all, func(o operation) bool { return o.name == op.Name })
		all[i].do(h, op)
	}
	h.finish()
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

// report shortens the history of seed and fails the test with what is left.
func (r *runner) report(seed uint64) {
	r.t.Helper()
	ops := generate(seed, r.Length)
	_, first := r.play(ops)
	if first == "" {
		r.t.Fatalf("the history of seed %d failed once and not again", seed)
	}
	ops = r.shrink(ops)
	trace, why := r.play(ops)
	r.t.Fatalf("the history of seed %d fails; shortened from %d operations to %d:\n%s\n%s\n\nto repeat it:\n  %s='%s' go test -count=1 -run '^%s$' PACKAGE",
		seed, r.Length, len(ops), strings.Join(trace, "\n"), why, envOps, formatOps(ops), r.t.Name())
}

// shrink leaves out operations, and failures of the others, as long as the rest
// still fails: first half of them, then ever smaller parts.
func (r *runner) shrink(ops []Op) []Op {
	fails := func(ops []Op) bool { _, why := r.play(ops); return why != "" }
	end := time.Now().Add(time.Minute)
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
		if plain := slices.Clone(ops); ops[i].Fault != none {
			plain[i].Fault = none
			if fails(plain) {
				ops = plain
			}
		}
	}
	return ops
}

// Memory opens drivers in memory, one for each root as long as its directory is
// there.
func Memory() Opener {
	var mu sync.Mutex
	drivers := map[string]*snapshottest.Memory{}
	return func(root string) (snapshot.Driver, error) {
		mu.Lock()
		defer mu.Unlock()
		if d := drivers[root]; d != nil {
			return d, nil
		}
		for other := range drivers {
			if _, err := os.Lstat(other); err != nil {
				delete(drivers, other)
			}
		}
		drivers[root] = snapshottest.NewMemory()
		return drivers[root], nil
	}
}

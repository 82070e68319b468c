// Package snapshottest helps to test snapshot drivers and what stands on
// them: Run is the conformance suite of snapshot.Driver, Faulty a decorator
// that lets chosen calls fail or wait.
package snapshottest

import (
	"context"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/lamina-build/lamina/snapshot"
)

// Call is one call of a driver method that can return an error.
type Call struct {
	// Op is the method's name: "Stat", "Update", "Usage", "Mounts",
	// "Prepare", "View", "Commit", "Remove", "Walk", "Close", "Cleanup",
	// "Settle", "Pending", "Committed", "Detach", "Discard", "Restore", "Mount", "Dir",
	// "InUse" or "Sync"; of a Stacker "Stack", "Layers", "Clean",
	// "CleanCopy" or "Diff".
	Op string
	// Key is the key that the call is about; empty for calls about the
	// whole driver. Commit's is the active key, CleanCopy's the layer, and
	// Diff's the upper snapshot.
	Key string
	// Name is the name that Commit, CleanCopy or Diff gives; empty for other
	// calls.
	Name string
	// Done says whether the driver below was asked.
	Done bool
	// Err is what the caller got. It is nil, too, while the call runs.
	Err error
}

// Faulty is a driver that passes every call on to another one, keeps a log
// of them, and fails or holds up the calls it was told to. It is safe for
// concurrent use.
//
// A test that wants to see every call fail once runs its scenario with a
// fresh Faulty, reads len(Calls()), and runs it again with FailAt(1) and so
// on up to that number.
type Faulty struct {
	d snapshot.Driver

	mu    sync.Mutex
	calls []*Call
	count int // calls since the start or the last Clear
	rules []*rule
	// Fixed before the first call.
	before, after func(Call) error
}

// rule says what happens to the calls that it matches.
type rule struct {
	at      int // number of the call since the start or Clear, 0: any
	op, key string
	err     error
	after   bool          // ask the driver first, then fail
	once    bool          // forget the rule when it has matched
	reached chan struct{} // closed at the first match of a blocking rule
	gate    chan struct{} // a blocking rule waits for this to be closed
	hit     bool
}

func (r *rule) matches(n int, c *Call) bool {
	if r.at != 0 {
		return r.at == n
	}
	if r.op != "" && r.op != c.Op {
		return false
	}
	return r.key == "" || r.key == c.Key || (c.Name != "" && r.key == c.Name)
}

var _ snapshot.Driver = (*Faulty)(nil)

// NewFaulty returns a driver over d that behaves like d until told otherwise.
func NewFaulty(d snapshot.Driver) *Faulty { return &Faulty{d: d} }

// Driver returns the driver below.
func (f *Faulty) Driver() snapshot.Driver { return f.d }

// FailAt lets the n-th call from now (1 is the next one) fail with err
// without asking the driver. Every method that can return an error counts.
func (f *Faulty) FailAt(n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &rule{at: f.count + n, err: err, once: true})
}

// FailAfterAt is FailAt for a call that does its work first: the driver is
// asked, and then the caller gets err nevertheless. It is a reply that was
// lost.
func (f *Faulty) FailAfterAt(n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &rule{at: f.count + n, err: err, once: true, after: true})
}

// FailOp lets every call of op fail with err, without asking the driver,
// until Clear. An empty op means every method; a key that is not empty limits
// it to calls about that key (for Commit: the key or the name).
func (f *Faulty) FailOp(op, key string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &rule{op: op, key: key, err: err})
}

// FailOpAfter is FailOp for calls that do their work first.
func (f *Faulty) FailOpAfter(op, key string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &rule{op: op, key: key, err: err, after: true})
}

// Block holds up every call of op about key (as in FailOp) before the driver
// is asked, until release is called or the call's context ends, whose error
// the caller then gets. The channel reached is closed when the first call
// waits. Calling release again is harmless.
func (f *Faulty) Block(op, key string) (reached <-chan struct{}, release func()) {
	r := &rule{op: op, key: key, reached: make(chan struct{}), gate: make(chan struct{})}
	f.mu.Lock()
	f.rules = append(f.rules, r)
	f.mu.Unlock()
	return r.reached, sync.OnceFunc(func() {
		f.mu.Lock()
		f.rules = slices.DeleteFunc(f.rules, func(o *rule) bool { return o == r })
		f.mu.Unlock()
		close(r.gate)
	})
}

// Hook has every call pass two functions, one before the driver is asked and
// one after it did its work; either may be nil. An error of theirs is what the
// caller gets. It must be called before the driver is used.
func (f *Faulty) Hook(before, after func(Call) error) { f.before, f.after = before, after }

// hooked is do between the two hooks.
func (f *Faulty) hooked(c Call, do func() error) func() error {
	return func() error {
		if f.before != nil {
			if err := f.before(c); err != nil {
				return err
			}
		}
		if err := do(); err != nil || f.after == nil {
			return err
		}
		return f.after(c)
	}
}

// Calls returns the log so far, oldest first.
func (f *Faulty) Calls() []Call {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]Call, len(f.calls))
	for i, c := range f.calls {
		out[i] = *c
	}
	return out
}

// Count returns how many calls of op about key (as in FailOp) the log has.
func (f *Faulty) Count(op, key string) int {
	r, n := &rule{op: op, key: key}, 0
	for _, c := range f.Calls() {
		if r.matches(0, &c) {
			n++
		}
	}
	return n
}

// Clear forgets the log and every rule of FailAt and FailOp. Calls held up
// by Block stay held up until their own release.
func (f *Faulty) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls, f.count = nil, 0
	f.rules = slices.DeleteFunc(f.rules, func(r *rule) bool { return r.gate == nil })
}

// call runs one call under the rules.
func (f *Faulty) call(ctx context.Context, op, key, name string, do func() error) error {
	c := &Call{Op: op, Key: key, Name: name}
	if f.before != nil || f.after != nil {
		do = f.hooked(*c, do)
	}
	f.mu.Lock()
	f.count++
	f.calls = append(f.calls, c)
	var hits []*rule
	for _, r := range f.rules {
		if !r.matches(f.count, c) {
			continue
		}
		hits = append(hits, r)
		if r.reached != nil && !r.hit {
			close(r.reached)
		}
		r.hit = true
	}
	f.rules = slices.DeleteFunc(f.rules, func(r *rule) bool { return r.once && r.hit })
	f.mu.Unlock()

	done, err := f.obey(ctx, hits, do)
	f.mu.Lock()
	c.Done, c.Err = done, err
	f.mu.Unlock()
	return err
}

// obey applies the rules that matched: waits come first, then the first
// failure decides.
func (f *Faulty) obey(ctx context.Context, hits []*rule, do func() error) (done bool, err error) {
	for _, r := range hits {
		if r.gate == nil {
			continue
		}
		select {
		case <-r.gate:
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
	for _, r := range hits {
		if r.gate != nil {
			continue
		}
		if !r.after {
			return false, r.err
		}
		if err := do(); err != nil {
			return true, err
		}
		return true, r.err
	}
	return true, do()
}

// get runs a call with a result; a call that fails has none.
func get[T any](ctx context.Context, f *Faulty, op, key string, do func() (T, error)) (T, error) {
	var out T
	err := f.call(ctx, op, key, "", func() (err error) {
		out, err = do()
		return err
	})
	if err != nil {
		var zero T
		return zero, err
	}
	return out, nil
}

// Info implements snapshot.Driver; it is not counted.
func (f *Faulty) Info() snapshot.Info { return f.d.Info() }

// Stat implements snapshot.Driver.
func (f *Faulty) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	return get(ctx, f, "Stat", key, func() (snapshots.Info, error) { return f.d.Stat(ctx, key) })
}

// Update implements snapshot.Driver.
func (f *Faulty) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	return get(ctx, f, "Update", info.Name, func() (snapshots.Info, error) {
		return f.d.Update(ctx, info, fieldpaths...)
	})
}

// Usage implements snapshot.Driver.
func (f *Faulty) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	return get(ctx, f, "Usage", key, func() (snapshots.Usage, error) { return f.d.Usage(ctx, key) })
}

// Mounts implements snapshot.Driver.
func (f *Faulty) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	return get(ctx, f, "Mounts", key, func() ([]mount.Mount, error) { return f.d.Mounts(ctx, key) })
}

// Prepare implements snapshot.Driver.
func (f *Faulty) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return get(ctx, f, "Prepare", key, func() ([]mount.Mount, error) {
		return f.d.Prepare(ctx, key, parent, opts...)
	})
}

// View implements snapshot.Driver.
func (f *Faulty) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return get(ctx, f, "View", key, func() ([]mount.Mount, error) {
		return f.d.View(ctx, key, parent, opts...)
	})
}

// Commit implements snapshot.Driver.
func (f *Faulty) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return f.call(ctx, "Commit", key, name, func() error { return f.d.Commit(ctx, name, key, opts...) })
}

// Remove implements snapshot.Driver.
func (f *Faulty) Remove(ctx context.Context, key string) error {
	return f.call(ctx, "Remove", key, "", func() error { return f.d.Remove(ctx, key) })
}

// Walk implements snapshot.Driver.
func (f *Faulty) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return f.call(ctx, "Walk", "", "", func() error { return f.d.Walk(ctx, fn, filters...) })
}

// Close implements snapshot.Driver.
func (f *Faulty) Close() error {
	return f.call(context.Background(), "Close", "", "", f.d.Close)
}

// Cleanup implements snapshot.Driver.
func (f *Faulty) Cleanup(ctx context.Context) error {
	return f.call(ctx, "Cleanup", "", "", func() error { return f.d.Cleanup(ctx) })
}

// Settle implements snapshot.Driver.
func (f *Faulty) Settle(ctx context.Context) error {
	return f.call(ctx, "Settle", "", "", func() error { return f.d.Settle(ctx) })
}

// Committed implements snapshot.Driver.
func (f *Faulty) Committed(ctx context.Context) ([]string, error) {
	return get(ctx, f, "Committed", "", func() ([]string, error) { return f.d.Committed(ctx) })
}

// Pending implements snapshot.Driver.
func (f *Faulty) Pending(ctx context.Context) ([]snapshot.Pending, error) {
	return get(ctx, f, "Pending", "", func() ([]snapshot.Pending, error) { return f.d.Pending(ctx) })
}

// Detach implements snapshot.Driver.
func (f *Faulty) Detach(ctx context.Context, key string) (snapshot.Pending, error) {
	return get(ctx, f, "Detach", key, func() (snapshot.Pending, error) { return f.d.Detach(ctx, key) })
}

// Discard implements snapshot.Driver.
func (f *Faulty) Discard(ctx context.Context, p snapshot.Pending) error {
	return f.call(ctx, "Discard", p.Key, "", func() error { return f.d.Discard(ctx, p) })
}

// Restore implements snapshot.Driver.
func (f *Faulty) Restore(ctx context.Context, p snapshot.Pending) error {
	return f.call(ctx, "Restore", p.Key, "", func() error { return f.d.Restore(ctx, p) })
}

// Mount implements snapshot.Driver.
func (f *Faulty) Mount(ctx context.Context, key, target string, readOnly bool) error {
	return f.call(ctx, "Mount", key, "", func() error { return f.d.Mount(ctx, key, target, readOnly) })
}

// Dir implements snapshot.Driver.
func (f *Faulty) Dir(ctx context.Context, key string) (dir string, ok bool, err error) {
	err = f.call(ctx, "Dir", key, "", func() (err error) {
		dir, ok, err = f.d.Dir(ctx, key)
		return err
	})
	if err != nil {
		return "", false, err
	}
	return dir, ok, nil
}

// InUse implements snapshot.Driver.
func (f *Faulty) InUse(ctx context.Context, key string) (bool, error) {
	return get(ctx, f, "InUse", key, func() (bool, error) { return f.d.InUse(ctx, key) })
}

// Sync implements snapshot.Driver.
func (f *Faulty) Sync(ctx context.Context) error {
	return f.call(ctx, "Sync", "", "", func() error { return f.d.Sync(ctx) })
}

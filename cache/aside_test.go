package cache_test

import (
	"runtime"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

// TestPruneLeavesTheProcessors: the system calls of a prune are less urgent than
// what is beside it. Its transaction is not, for others may be in it, nor is a
// removal that somebody asked for by name, nor whatever runs afterwards.
func TestPruneLeavesTheProcessors(t *testing.T) {
	w := newWorld(t, overlayKind)
	var mu sync.Mutex
	seen := map[string]map[int]bool{}
	note := func(what string) {
		// The kernel gives 20 minus what is called nice.
		urgency, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
		require.NoError(t, err)
		mu.Lock()
		defer mu.Unlock()
		if seen[what] == nil {
			seen[what] = map[int]bool{}
		}
		seen[what][urgency] = true
	}
	w.opts = func(o *cache.Options) {
		o.FlushInterval = -1
		o.Step = func(name string) error { note(name); return nil }
		o.Driver.(*snapshottest.Faulty).Hook(func(c snapshottest.Call) error { note(c.Op); return nil }, nil)
	}
	w.reopenStore()
	ours, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	require.NoError(t, err)

	removal := func(remove func(top, base cache.ID)) {
		base := w.layer(nil, "a", "1")
		top := w.layer(base, "b", "2")
		w.release(base, top)
		mu.Lock()
		clear(seen)
		mu.Unlock()
		remove(top.ID(), base.ID())
		mu.Lock()
		defer mu.Unlock()
		require.Contains(t, seen, "tx commit")
	}
	removal(func(top, base cache.ID) {
		removed, failed := w.execute(w.plan())
		require.Empty(t, failed)
		require.Len(t, removed, 2)
	})
	less := map[int]bool{max(ours-cache.AsideNice, 1): true} // 1 is the least
	same := map[int]bool{ours: true}
	for what, urgencies := range seen {
		if what == "Detach" || what == "Discard" {
			require.Equal(t, less, urgencies, what)
		} else {
			require.Equal(t, same, urgencies, what)
		}
	}
	require.Contains(t, seen, "Detach")
	require.Contains(t, seen, "Discard")

	removal(func(top, base cache.ID) {
		_, err := w.Remove(w.ctx, top, base)
		require.NoError(t, err)
	})
	for what, urgencies := range seen {
		require.Equal(t, same, urgencies, what)
	}
}

// TestAsideEndsAsItsFunction: a panic and the end of the goroutine are the
// caller's, who has waited for all of it.
func TestAsideEndsAsItsFunction(t *testing.T) {
	ran := false
	cache.Aside(func() { ran = true })
	require.True(t, ran)
	require.PanicsWithValue(t, "boom", func() { cache.Aside(func() { panic("boom") }) })
	returned, done := false, make(chan struct{})
	go func() {
		defer close(done)
		cache.Aside(runtime.Goexit)
		returned = true
	}()
	<-done
	require.False(t, returned)
}

package cache

import (
	"context"
	"sync"
)

// shared lets all who ask for the same thing at the same time share one run of
// the work. The run has a context of its own, with the values of the first
// asker's, and ends early when the last asker has left, never because the first
// one did.
type shared[K comparable, V any] struct {
	mu   sync.Mutex
	runs map[K]*run[V]
}

// run is one run of shared work.
type run[V any] struct {
	waiters int // guarded by shared.mu
	cancel  context.CancelFunc
	done    chan struct{} // closed when value and err are set
	value   V
	err     error
}

// do gives the result of fn for key. running counts the goroutine in which fn
// runs, so that somebody waits for it.
func (s *shared[K, V]) do(ctx context.Context, running *sync.WaitGroup, key K, fn func(context.Context) (V, error)) (V, error) {
	var none V
	for {
		if ctx.Err() != nil {
			return none, context.Cause(ctx)
		}
		r, joined := s.join(ctx, running, key, fn)
		if !joined {
			// All who asked for it have left, it is just ending: its result
			// is nobody's.
			select {
			case <-r.done:
				continue
			case <-ctx.Done():
				return none, context.Cause(ctx)
			}
		}
		select {
		case <-r.done:
			s.leave(r)
			return r.value, r.err
		case <-ctx.Done():
			s.leave(r)
			return none, context.Cause(ctx)
		}
	}
}

// join enters the run of key, or begins one. It says no if the run is one that
// everybody has left.
func (s *shared[K, V]) join(ctx context.Context, running *sync.WaitGroup, key K, fn func(context.Context) (V, error)) (*run[V], bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.runs[key]; r != nil {
		if r.waiters == 0 {
			return r, false
		}
		r.waiters++
		return r, true
	}
	if s.runs == nil {
		s.runs = map[K]*run[V]{}
	}
	own, cancel := context.WithCancel(context.WithoutCancel(ctx))
	r := &run[V]{waiters: 1, cancel: cancel, done: make(chan struct{})}
	s.runs[key] = r
	running.Add(1)
	go func() {
		defer running.Done()
		defer cancel()
		defer func() {
			s.mu.Lock()
			delete(s.runs, key)
			s.mu.Unlock()
			close(r.done)
		}()
		r.value, r.err = fn(own)
	}()
	return r, true
}

// leave takes one asker back and ends the run with the last of them.
func (s *shared[K, V]) leave(r *run[V]) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.waiters--; r.waiters == 0 {
		r.cancel()
	}
}

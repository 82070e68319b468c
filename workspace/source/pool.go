package source

import (
	"context"
	"runtime"
	"sync"
)

// runTasks does the tasks, and those that they add, with as many goroutines as
// the process may use processors. Each gets its own worker from newWorker. The
// first error ends it all and is returned once every goroutine has stopped;
// without one, a context that ended early is the error.
func runTasks[T any](ctx context.Context, tasks []T, newWorker func() (func(ctx context.Context, task T, add func(T)) error, error)) error {
	if len(tasks) == 0 {
		return ctx.Err()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := taskStack[T]{tasks: tasks, open: len(tasks)}
	s.more.L = &s.mu
	defer context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.more.Broadcast()
	})()
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			do, err := newWorker()
			for err == nil {
				task, ok := s.pop(ctx)
				if !ok {
					return
				}
				err = do(ctx, task, s.push)
				s.done()
			}
			cancel(err)
		})
	}
	workers.Wait()
	return context.Cause(ctx)
}

// taskStack hands out tasks, the newest first, so that a walk of directories
// keeps few of them waiting.
type taskStack[T any] struct {
	mu    sync.Mutex
	more  sync.Cond
	tasks []T
	open  int // waiting or being done
}

func (s *taskStack[T]) push(t T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tasks = append(s.tasks, t)
	s.open++
	s.more.Signal()
}

// pop waits for a task; false when none will come any more.
func (s *taskStack[T]) pop(ctx context.Context) (task T, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.tasks) == 0 {
		if s.open == 0 || ctx.Err() != nil {
			return task, false
		}
		s.more.Wait()
	}
	if ctx.Err() != nil {
		return task, false
	}
	last := len(s.tasks) - 1
	task = s.tasks[last]
	s.tasks = s.tasks[:last]
	return task, true
}

func (s *taskStack[T]) done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open--; s.open == 0 {
		s.more.Broadcast()
	}
}

// meter adds up progress from many goroutines and tells it one call at a time.
type meter struct {
	tell  Progress
	total int64

	mu   sync.Mutex
	done int64
}

func (m *meter) add(n int64) {
	if m.tell == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done = min(m.done+n, m.total)
	m.tell(m.done, m.total)
}

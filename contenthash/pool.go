package contenthash

import (
	"context"
	"runtime"
	"sync"
)

// defaultWorkers reads with all cores, and with a few more than one or two
// where the disk is what is waited for; more than 32 only wait for each other.
func defaultWorkers() int {
	return min(max(runtime.GOMAXPROCS(0), 4), 32)
}

// pool runs tasks that make further tasks, the latest first, so that few wait
// at a time. It starts another worker whenever a task would wait, up to a
// limit. The first error ends it.
type pool struct {
	// fixed
	limit  int
	borrow func() *reader
	giveUp func(*reader)

	workers sync.WaitGroup

	mu   sync.Mutex
	more *sync.Cond
	// tasks wait; open counts those that wait and those under way.
	tasks []func(*reader) error
	open  int
	// running are the workers, idle those of them that wait for a task.
	running, idle int
	err           error
}

func newPool(limit int, borrow func() *reader, giveUp func(*reader)) *pool {
	p := &pool{limit: limit, borrow: borrow, giveUp: giveUp}
	p.more = sync.NewCond(&p.mu)
	return p
}

// push adds a task. It is called before run, and by tasks.
func (p *pool) push(task func(*reader) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tasks = append(p.tasks, task)
	p.open++
	if p.idle < len(p.tasks) && p.running > 0 {
		p.start()
	}
	p.more.Signal()
}

// start starts a worker, if there may be one more. The caller holds mu.
func (p *pool) start() {
	if p.running < p.limit {
		p.running++
		p.workers.Go(p.work)
	}
}

// look says whether a worker has nothing to do or could be started, and whether
// what is under way is no longer wanted.
func (p *pool) look() (hungry, over bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.idle+p.limit-p.running > len(p.tasks), p.err != nil
}

// run runs the tasks that were pushed, and those that they push, and returns
// when no worker is left.
func (p *pool) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { p.fail(context.Cause(ctx)) })
	p.mu.Lock()
	for range min(len(p.tasks), p.limit) {
		p.start()
	}
	p.mu.Unlock()
	p.workers.Wait()
	stop()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

func (p *pool) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
	}
	p.more.Broadcast()
}

func (p *pool) work() {
	r := p.borrow()
	defer p.giveUp(r)
	for {
		task := p.next()
		if task == nil {
			return
		}
		if err := task(r); err != nil {
			p.fail(err)
			return
		}
		p.done()
	}
}

// next waits for a task; nil means that there will be none.
func (p *pool) next() func(*reader) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if p.err != nil || p.open == 0 {
			return nil
		}
		if n := len(p.tasks); n > 0 {
			task := p.tasks[n-1]
			p.tasks[n-1] = nil
			p.tasks = p.tasks[:n-1]
			return task
		}
		p.idle++
		p.more.Wait()
		p.idle--
	}
}

func (p *pool) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open--; p.open == 0 {
		p.more.Broadcast()
	}
}

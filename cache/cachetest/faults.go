package cachetest

import (
	"context"
	"errors"
	"strings"
	"sync"
)

// fault is what goes wrong while an operation runs.
type fault byte

const (
	none fault = iota
	// fail lets a call of the driver, or a durable step, fail.
	fail
	// lost lets a call of the driver do its work and fail nevertheless.
	lost
	// cancelled ends the caller's context meanwhile.
	cancelled
	// crashSameBoot kills the process; nothing it does from then on reaches
	// the disk. crashOtherBoot is a power cut.
	crashSameBoot
	crashOtherBoot
)

var faultNames = []string{"", "fail", "lost", "cancelled", "crash", "powercut"}

func (f fault) crash() bool { return f == crashSameBoot || f == crashOtherBoot }

var (
	errInjected = errors.New("injected")
	errDead     = errors.New("the process is dead")
)

// faults counts events, which are the driver's calls and the durable steps, and
// lets one of them go wrong.
type faults struct {
	mu sync.Mutex
	// Guarded by mu: a cache measures several snapshots at once.
	armed  fault
	at     int
	events int
	hit    bool
	dead   bool
	cancel context.CancelFunc
	// injected counts over all operations what was met.
	injected int
}

// arm prepares a fault for the at-th event from now, and gives the context of
// the operation.
func (f *faults) arm(kind fault, at byte) context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	f.mu.Lock()
	defer f.mu.Unlock()
	f.armed, f.at, f.events, f.hit, f.cancel = kind, int(at), 0, false, cancel
	if kind == cancelled && at == 0 {
		f.hit = true
		cancel()
	}
	return ctx
}

// disarm says whether the fault was met.
func (f *faults) disarm() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.armed = none
	f.cancel()
	if f.hit {
		f.injected++
	}
	return f.hit
}

// met says how many events there were since arm.
func (f *faults) met() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.events
}

// live makes the process of those who open the store again.
func (f *faults) live(alive bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dead = !alive
}

// event is called before each durable step and each call of the driver. The
// mark that a store is dirty comes at other moments where nothing is mounted:
// it does not count, so that a history is the same on every driver.
func (f *faults) event(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dead {
		return errDead
	}
	if f.armed == none || strings.HasPrefix(name, "mark ") {
		return nil
	}
	f.events++
	if f.events != f.at {
		return nil
	}
	switch f.armed {
	case fail:
		f.hit = true
		return errInjected
	case cancelled:
		f.hit = true
		f.cancel()
	case crashSameBoot, crashOtherBoot:
		f.hit, f.dead = true, true
		return errDead
	}
	return nil
}

// reply is called after each call of the driver.
func (f *faults) reply(string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.armed != lost || f.hit || f.events != f.at {
		return nil
	}
	f.hit = true
	return errInjected
}

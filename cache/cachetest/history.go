package cachetest

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/snapshot/snapshottest"
)

// Trees is what a driver has beside whose snapshots are no directories: then
// what a Mount calls its path is a name for these methods.
type Trees interface {
	WriteFile(dir, name, text string) error
	ReadTree(dir string) (map[string]string, error)
}

// history is one store, what the model says of it, and the handles that are
// out.
type history struct {
	open Opener
	root string
	boot int

	m      *cache.Manager
	driver *snapshottest.Faulty
	trees  Trees
	model  *model
	faults

	// ids of the names that records have in the model, and back. A name
	// without an id is one that a crash cut off.
	ids   map[string]cache.ID
	names map[cache.ID]string
	next  int

	writers, readers []*handle
	mounts           []*mounted
	holds            []*held
	// ended are handles that were given back, or that a restart ended.
	ended []*handle

	// faulted says that an injected failure may have left something for the
	// next open.
	faulted bool
	opens   int
	trace   []string
}

type handle struct {
	name  string
	mut   *cache.MutableRef
	imm   *cache.ImmutableRef
	touch bool
}

type mounted struct {
	name    string
	writing bool
	mnt     *cache.Mount
}

type held struct {
	name string
	hold *cache.Hold
}

// failure is what a history ends with that shows a bug.
type failure struct{ text string }

func (h *history) fail(format string, args ...any) {
	panic(failure{fmt.Sprintf(format, args...)})
}

func (h *history) must(err error, what string) {
	if err != nil {
		h.fail("%s: %v", what, err)
	}
}

func (h *history) note(format string, args ...any) {
	h.trace = append(h.trace, fmt.Sprintf(format, args...))
}

func newHistory(open Opener, root string) *history {
	return &history{
		open: open, root: root, model: newModel(),
		ids: map[string]cache.ID{}, names: map[cache.ID]string{},
	}
}

// mint is a name for a record that is about to be.
func (h *history) mint() string {
	h.next++
	return fmt.Sprint("r", h.next)
}

// bind says which id the record of that name has.
func (h *history) bind(name string, id cache.ID) {
	h.ids[name], h.names[id] = id, name
}

// id of a name; one that a crash cut off has none that anybody could know.
func (h *history) id(name string) cache.ID {
	if id, ok := h.ids[name]; ok {
		return id
	}
	return cache.ID("never " + name)
}

// call runs one operation: model says how it must end, do does it. With a fault
// armed it may fail, and must then succeed when it is called again; if the
// process dies meanwhile, the store must hold what one of the models says that
// between gives for before and after.
func (h *history) call(op Op, expect func(*model) outcome, do func(context.Context) error) bool {
	var before *model
	if op.Fault.crash() {
		before = h.model.clone()
	}
	want := expect(h.model)
	ctx := h.arm(op.Fault, op.At)
	err := do(ctx)
	hit := h.disarm()
	if op.Fault.crash() {
		if !hit {
			h.agree(want, err)
			before = h.model.clone()
		}
		h.crash(op.Fault == crashOtherBoot, before)
		return false
	}
	if hit {
		h.faulted = true
		h.note(noteOfFault+"%s at %d", faultNames[op.Fault], op.At)
		if errors.Is(err, errInjected) || errors.Is(err, context.Canceled) {
			err = do(context.Background())
		}
	}
	h.expect(want, err)
	return err == nil
}

// noteOfFault begins what the trace says of a failure that was met. Which call
// it meets may depend on the driver, its visible result must not.
const noteOfFault = "  ! "

func (h *history) expect(want outcome, err error) {
	h.agree(want, err)
	h.note("  %s", want)
}

// agree fails unless a call ended as the model says.
func (h *history) agree(want outcome, err error) {
	if got := outcomeOf(err); got != want {
		h.fail("it ended with %q (%v), and the model says %q", got, err, want)
	}
}

func outcomeOf(err error) outcome {
	switch {
	case err == nil:
		return ok
	case errors.Is(err, cache.ErrLocked):
		return locked
	case errdefs.IsNotFound(err):
		return notFound
	case errdefs.IsFailedPrecondition(err):
		return refused
	case errdefs.IsInvalidArgument(err):
		return invalid
	}
	return outcome("error " + err.Error())
}

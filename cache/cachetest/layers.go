package cachetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/lamina-build/lamina/cache"
)

// RunLayers plays random histories of layers: trees that are edited and
// committed, blobs taken in, merges, diffs, extraction, blobs given out, removal,
// failures, restarts, kills and power cuts. Whatever the cache shows or gives
// out is compared with what the layers give when they are applied one after the
// other as maps. After a kill a record is what it was or, if its data may have
// been lost, not found. In the end all are pruned, and nothing may be left.
//
// It needs root, and a driver whose snapshots are directories, and is skipped
// without. A Length of zero is 60 operations.
func RunLayers(t *testing.T, open Opener, o Options) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers with owners need root")
	}
	if o.Length == 0 {
		o.Length = 60
	}
	r := newRunner(t, o, game{
		what: "histories of layers", operations: namesOf(layerOperations()), reach: 12,
		begin: func(dir string) player {
			return &layersHistory{
				history: newHistory(open, filepath.Join(dir, "store")), scratch: dir,
				blobs: map[digest.Digest][]byte{},
			}
		},
	})
	r.run()
}

func layerOperations() []operation[*layersHistory] {
	return []operation[*layersHistory]{
		{"Edit", 4, (*layersHistory).edit},
		{"TakeIn", 2, (*layersHistory).takeIn},
		{"Merge", 2, (*layersHistory).merge},
		{"Diff", 2, (*layersHistory).diff},
		{"Extract", 2, (*layersHistory).extract},
		{"Show", 2, (*layersHistory).show},
		{"GiveOut", 1, (*layersHistory).giveOut},
		{"Drop", 2, (*layersHistory).drop},
		{"Take", 1, (*layersHistory).take},
		{"Remove", 1, (*layersHistory).remove},
		{"End", 1, (*layersHistory).end},
	}
}

// lrecord is a record of which a layersHistory knows.
type lrecord struct {
	id     cache.ID
	op     string
	number int
	tree   ltree
	layers []*llayer
	// on are the records that it cannot be without.
	on  []*lrecord
	ref *cache.ImmutableRef // nil if nobody holds it
	// desc is of the blob that it came as, if any.
	desc *ocispec.Descriptor
}

func (x *lrecord) String() string { return fmt.Sprint(x.op, " ", x.number) }

type layersHistory struct {
	*history
	scratch string
	// rng is what the numbers of the operation under way give, and fault what
	// is still to go wrong in it.
	rng   *rand.Rand
	fault Op
	recs  []*lrecord
	stamp int64
	// blobs are what this history's registry has.
	blobs map[digest.Digest][]byte
}

// ReaderAt implements content.Provider.
func (h *layersHistory) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	data, ok := h.blobs[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	return inMemory{strings.NewReader(string(data))}, nil
}

type inMemory struct{ *strings.Reader }

func (inMemory) Close() error { return nil }

// some picks a record that is held, or nil.
func (h *layersHistory) some() *lrecord {
	held := slices.DeleteFunc(slices.Clone(h.recs), func(x *lrecord) bool { return x.ref == nil })
	if len(held) == 0 {
		return nil
	}
	return held[h.rng.IntN(len(held))]
}

// play implements player.
func (h *layersHistory) play(ops []Op) (why string) {
	return h.guarded(func() {
		for _, op := range ops {
			h.rng, h.fault = rand.New(rand.NewPCG(uint64(op.A)<<16|uint64(op.B)<<8|uint64(op.C), 1)), op
			perform(h, layerOperations(), op)
		}
		h.finish()
	})
}

// try runs one call of an operation. What goes wrong in the operation and does
// not in this call does in one of its next. After a call that fails by it, it is
// called again. It says no if the process died instead.
func (h *layersHistory) try(do func(ctx context.Context) error) bool {
	kind, at := h.fault.Fault, h.fault.At
	ctx := h.arm(kind, at)
	err := do(ctx)
	if !h.disarm() {
		h.must(err, "operation")
		if met := h.met(); met < int(at) {
			h.fault.At -= byte(met)
		} else {
			h.fault.Fault = none
		}
		return true
	}
	h.fault.Fault = none
	h.note(noteOfFault+"%s at %d", faultNames[kind], at)
	if kind.crash() {
		h.reopen(kind == crashSameBoot, false)
		return false
	}
	if errors.Is(err, errInjected) || errors.Is(err, context.Canceled) {
		err = do(context.Background())
	}
	h.must(err, "operation, once more")
	return true
}

// add enters a record that was made or found.
func (h *layersHistory) add(x *lrecord, ref *cache.ImmutableRef) {
	x.id = ref.ID()
	for _, y := range h.recs {
		if y.id != x.id {
			continue
		}
		if d := cmp.Diff(y.tree.list(), x.tree.list()); d != "" {
			h.fail("%s was found for another tree:\n%s", y, d)
		}
		if y.ref == nil {
			y.ref = ref
		} else {
			h.must(ref.Release(context.Background()), "release")
		}
		return
	}
	x.ref = ref
	h.next++
	x.number = h.next
	h.note("%s has %d layers", x, len(x.layers))
	h.recs = append(h.recs, x)
}

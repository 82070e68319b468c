package cachetest

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/cache/policy"
)

// end ends the process, in order or not, or power.
func (h *layersHistory) end(Op) {
	sameBoot, clean := h.rng.IntN(3) > 0, h.rng.IntN(2) == 0
	h.note("end, clean %t, same boot %t", clean, sameBoot)
	if h.rng.IntN(2) == 0 {
		_, err := h.m.Sync(context.Background())
		h.must(err, "sync")
	}
	h.reopen(sameBoot, clean)
}

// reopen opens the store again. What was there is there, after a power cut only
// what was synced or can be made again.
func (h *layersHistory) reopen(sameBoot, clean bool) {
	ctx := context.Background()
	if clean {
		for _, x := range h.recs {
			if x.ref != nil {
				h.must(x.ref.Release(ctx), "release")
			}
		}
		h.must(h.closeStore(), "close")
	} else {
		h.live(false)
		_ = h.closeStore() // nothing of it reaches the disk
		h.live(true)
	}
	if !sameBoot {
		h.boot++
	}
	h.must(h.openStore(), "open again")
	was := h.recs
	h.recs = nil
	for _, x := range was {
		x.ref = nil
		_, err := h.m.Lookup(ctx, x.id)
		switch {
		case err == nil:
			h.recs = append(h.recs, x)
		case !errdefs.IsNotFound(err):
			h.fail("%s: %v", x, err)
		case sameBoot && clean:
			h.fail("%s is gone", x)
		}
	}
	h.removeStrays(ctx)
	h.provideAgain(ctx)
	h.check()
}

// removeStrays removes what was made by a call in which the process died, so
// that nobody got to know its id.
func (h *layersHistory) removeStrays(ctx context.Context) {
	var strays []cache.ID
	for rec, err := range h.m.Records(ctx) {
		h.must(err, "records")
		if !slices.ContainsFunc(h.recs, func(x *lrecord) bool { return x.id == rec.ID }) {
			strays = append(strays, rec.ID)
		}
	}
	if len(strays) == 0 {
		return
	}
	h.note("  %d records that nobody knows go", len(strays))
	out, err := h.m.Remove(ctx, strays...)
	h.must(err, "remove what nobody knows")
	for _, r := range out {
		h.must(r.Err, "remove what nobody knows")
	}
}

// provideAgain tells the new process where blobs can be had from.
func (h *layersHistory) provideAgain(ctx context.Context) {
	for _, x := range h.recs {
		if x.desc == nil {
			continue
		}
		var on *cache.ImmutableRef
		var err error
		if len(x.on) > 0 {
			on, err = h.m.Get(ctx, x.on[0].id, cache.GetOptions{NoUpdate: true})
			h.must(err, "get the parent of "+x.String())
		}
		ref, err := h.m.GetByBlob(ctx, *x.desc, on, cache.BlobOptions{Provider: h})
		h.must(err, "get "+x.String())
		if ref.ID() != x.id {
			h.fail("%s is found as %s", x, ref.ID())
		}
		err = ref.Release(ctx)
		if on != nil {
			err = errors.Join(err, on.Release(ctx))
		}
		h.must(err, "release")
	}
}

// finish shows all trees once more and prunes them, and expects that nothing is
// left: no record, name of the driver, blob or file.
func (h *layersHistory) finish() {
	ctx := context.Background()
	h.reopen(true, true)
	for _, x := range h.recs {
		h.compareTree(x)
	}
	h.check()
	out, err := h.m.Prune(ctx, policy.Policy{All: true})
	for _, r := range out.Failed {
		err = errors.Join(err, r.Err)
	}
	h.must(err, "prune all")
	for rec, err := range h.m.Records(ctx) {
		h.must(err, "records")
		h.fail("after a prune of all there is the record %s, %s", rec.ID, rec.State)
	}
	pending, err := h.driver.Pending(ctx)
	h.must(err, "pending names")
	for _, p := range pending {
		h.fail("after a prune of all the driver has the pending name %s", p.Key)
	}
	h.must(h.driver.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		h.fail("after a prune of all the driver has the name %s", info.Name)
		return nil
	}), "walk")
	h.check()
	h.must(h.closeStore(), "close")
	for _, dir := range []string{"blobs", "content", "holds"} {
		h.must(filepath.WalkDir(filepath.Join(h.root, dir), func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && d.Type().IsRegular() {
				h.fail("after a prune of all there is the file %s", path)
			}
			return err
		}), "look for files")
	}
}

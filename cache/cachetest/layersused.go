package cachetest

import (
	"context"
	"errors"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

func (h *layersHistory) merge(Op) {
	x := &lrecord{op: "merge"}
	var refs []*cache.ImmutableRef
	var lists [][]*llayer
	for range 2 + h.rng.IntN(2) {
		in := h.some()
		if in == nil {
			return
		}
		x.on, refs, lists = append(x.on, in), append(refs, in.ref), append(lists, in.layers)
	}
	x.layers = flatten(slices.Concat(lists...))
	x.tree = stacked(x.layers)
	h.note("merge %v", x.on)
	var ref *cache.ImmutableRef
	if h.try(func(ctx context.Context) (err error) {
		ref, err = h.m.Merge(ctx, refs, cache.MergeOptions{})
		return err
	}) {
		h.add(x, ref)
	}
}

// flatten keeps each layer at its topmost place.
func flatten(list []*llayer) (out []*llayer) {
	for i, l := range list {
		if !slices.Contains(list[i+1:], l) {
			out = append(out, l)
		}
	}
	return out
}

func (h *layersHistory) diff(Op) {
	lower, upper := h.some(), h.some()
	if lower == nil {
		return
	}
	x := &lrecord{op: "diff", on: []*lrecord{lower, upper}}
	if n := len(lower.layers); n <= len(upper.layers) && slices.Equal(lower.layers, upper.layers[:n]) {
		x.layers = slices.Clone(upper.layers[n:])
	} else {
		if lower.linked() || upper.linked() {
			return // whose name an entry has is not said
		}
		own := change(lower.tree, upper.tree)
		x.layers = []*llayer{&own}
		for _, y := range h.recs {
			if y.op == "diff" && slices.Equal(y.on, x.on) {
				x.layers = y.layers // it is found again
			}
		}
	}
	x.tree = stacked(x.layers)
	h.note("diff %v", x.on)
	var ref *cache.ImmutableRef
	if h.try(func(ctx context.Context) (err error) {
		ref, err = h.m.Diff(ctx, lower.ref, upper.ref, cache.MergeOptions{})
		return err
	}) {
		h.add(x, ref)
	}
}

// linked says whether a file of the tree has several names.
func (x *lrecord) linked() bool {
	seen := map[*node]bool{}
	for _, n := range x.tree {
		if n.kind == 'f' && seen[n] {
			return true
		}
		seen[n] = true
	}
	return false
}

func (h *layersHistory) extract(Op) {
	if x := h.some(); x != nil {
		h.note("extract %s", x)
		h.try(x.ref.Extract)
	}
}

func (h *layersHistory) show(Op) {
	if x := h.some(); x != nil {
		h.note("show %s", x)
		h.compareTree(x)
	}
}

// compareTree mounts a record and compares what is in it.
func (h *layersHistory) compareTree(x *lrecord) {
	ctx, ref := context.Background(), x.ref
	if ref == nil {
		var err error
		ref, err = h.m.Get(ctx, x.id, cache.GetOptions{})
		h.must(err, "get "+x.String())
		defer func() { h.must(ref.Release(ctx), "release") }()
	}
	mnt, err := ref.Mount(ctx)
	h.must(err, "mount "+x.String())
	got, err := readLayers(mnt.Path())
	h.must(errors.Join(err, mnt.Unmount()), "read")
	h.same(x, got)
}

func (h *layersHistory) same(x *lrecord, got map[string]string) {
	if d := cmp.Diff(x.tree.list(), got); d != "" {
		h.fail("%s is not its layers one after the other (-want +got):\n%s", x, d)
	}
}

// giveOut applies the blobs of a record to an empty directory.
func (h *layersHistory) giveOut(Op) {
	x := h.some()
	if x == nil {
		return
	}
	o := cache.RemotesOptions{
		Create: true, Force: h.rng.IntN(2) == 0,
		Compression: cache.Compression{Algorithm: []layer.Algorithm{layer.None, layer.Gzip, layer.Zstd}[h.rng.IntN(3)]},
	}
	h.note("give %s out, %s", x, o.Compression.Algorithm)
	var remote *cache.Remote
	if !h.try(func(ctx context.Context) (err error) {
		remote, err = x.ref.GetRemotes(ctx, o)
		return err
	}) {
		return
	}
	ctx := context.Background()
	dir, err := os.MkdirTemp(h.scratch, "given-")
	h.must(err, "make a directory")
	for _, desc := range remote.Descriptors {
		ra, err := remote.Provider.ReaderAt(ctx, desc)
		h.must(err, "open a blob")
		done, err := layer.ApplyBlob(ctx, dir, content.NewReader(ra), desc, layer.ApplyOptions{})
		h.must(errors.Join(err, ra.Close()), "apply a blob")
		if want := desc.Annotations["containerd.io/uncompressed"]; done.DiffID.String() != want {
			h.fail("a blob that is said to hold the layer %s holds %s", want, done.DiffID)
		}
	}
	h.must(remote.Release(ctx), "release what was given out")
	got, err := readLayers(dir)
	h.must(err, "read")
	h.same(x, got)
	h.must(os.RemoveAll(dir), "remove")
}

func (h *layersHistory) drop(Op) {
	if x := h.some(); x != nil {
		h.note("release %s", x)
		h.must(x.ref.Release(context.Background()), "release")
		x.ref = nil
	}
}

// take gets a handle on a record.
func (h *layersHistory) take(Op) {
	if len(h.recs) == 0 {
		return
	}
	x := h.recs[h.rng.IntN(len(h.recs))]
	if x.ref == nil {
		var err error
		x.ref, err = h.m.Get(context.Background(), x.id, cache.GetOptions{})
		h.must(err, "get "+x.String())
	}
}

// remove removes a record; it must go unless somebody needs it.
func (h *layersHistory) remove(Op) {
	if len(h.recs) == 0 {
		return
	}
	x := h.recs[h.rng.IntN(len(h.recs))]
	needed := x.ref != nil || slices.ContainsFunc(h.recs, func(y *lrecord) bool { return slices.Contains(y.on, x) })
	h.note("remove %s, needed %t", x, needed)
	var err error
	if !h.try(func(ctx context.Context) error {
		out, rerr := h.m.Remove(ctx, x.id)
		if err = nil; len(out) > 0 {
			err = out[0].Err
		}
		if errors.Is(err, errInjected) || errors.Is(err, context.Canceled) {
			return err
		}
		return rerr
	}) {
		return
	}
	switch {
	case needed && (errors.Is(err, cache.ErrLocked) || errdefs.IsFailedPrecondition(err)):
	case !needed && (err == nil || errdefs.IsNotFound(err)): // the first attempt may have got that far
		h.recs = slices.DeleteFunc(h.recs, func(y *lrecord) bool { return x == y })
	default:
		h.fail("removal ended with %v", err)
	}
}

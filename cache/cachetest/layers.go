package cachetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

// RunLayers plays random histories of layers: trees that are edited and
// committed, blobs taken in, merges, diffs, extraction, blobs given out, removal,
// failures, restarts, kills and power cuts. Whatever the cache shows or gives
// out is compared with what the layers give when they are applied one after the
// other as maps. After a kill a record is what it was or, if its data may have
// been lost, not found.
//
// The driver's snapshots must be directories, and it needs root. A history that
// fails is printed with its seed, by which LAMINA_HISTORY_SEED repeats it.
func RunLayers(t *testing.T, open Opener, o Options) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("layers with owners need root")
	}
	r := &runner{t: t, open: open, Options: o}
	r.defaults()
	var did atomic.Int64
	for n := range r.Histories {
		seed := r.Seed + uint64(n)
		dir, err := os.MkdirTemp(r.Dir, "layers-")
		if err != nil {
			t.Fatal(err)
		}
		h := &layersHistory{
			history: newHistory(open, filepath.Join(dir, "store")), scratch: dir,
			rng: rand.New(rand.NewPCG(seed, 1)), blobs: map[digest.Digest][]byte{},
		}
		if why := h.run(r.Length); why != "" {
			t.Fatalf("the history of layers of seed %d fails:\n%s\n%s\n\nto repeat it:\n  %s=%d go test -count=1 -run '^%s$' PACKAGE",
				seed, strings.Join(h.trace, "\n"), why, envSeed, seed, t.Name())
		}
		did.Add(int64(h.injected))
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("rig: %d histories of layers from seed %d: %d operations each, %d failures and crashes injected", r.Histories, r.Seed, r.Length, did.Load())
}

// lrecord is a record of which a layersHistory knows.
type lrecord struct {
	id     cache.ID
	op     string
	tree   ltree
	layers []*llayer
	// on are the records that it cannot be without.
	on  []*lrecord
	ref *cache.ImmutableRef // nil if nobody holds it
	// desc is of the blob that it came as, if any.
	desc *ocispec.Descriptor
}

func (x *lrecord) String() string { return fmt.Sprintf("%s %s", x.op, x.id[len(x.id)-6:]) }

type layersHistory struct {
	*history
	scratch string
	rng     *rand.Rand
	recs    []*lrecord
	stamp   int64
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

func (h *layersHistory) run(length int) (why string) {
	defer func() {
		v := recover()
		if v == nil {
			return
		}
		f, failed := v.(failure)
		if why = f.text; !failed {
			panic(v)
		}
		h.abandon()
	}()
	h.must(os.MkdirAll(h.root, 0o700), "make the store")
	h.must(h.openStore(), "open")
	steps := []func(){
		h.edit, h.edit, h.edit, h.edit, h.takeIn, h.takeIn, h.merge, h.merge, h.diff, h.diff, h.extract, h.extract,
		h.show, h.show, h.giveOut, h.drop, h.drop, h.take, h.remove, h.end,
	}
	for range length {
		steps[h.rng.IntN(len(steps))]()
	}
	for _, x := range h.recs {
		h.compareTree(x)
	}
	h.check()
	h.must(h.closeStore(), "close")
	return ""
}

// some picks a record that is held, or nil.
func (h *layersHistory) some() *lrecord {
	held := slices.DeleteFunc(slices.Clone(h.recs), func(x *lrecord) bool { return x.ref == nil })
	if len(held) == 0 {
		return nil
	}
	return held[h.rng.IntN(len(held))]
}

// try runs one operation with a fault now and then. After one that fails by the
// fault it is called again. It says no if the process died instead.
func (h *layersHistory) try(do func(ctx context.Context) error) bool {
	kind, at := none, byte(0)
	if h.rng.IntN(6) == 0 {
		kind = []fault{fail, lost, cancelled, crashSameBoot, crashOtherBoot}[h.rng.IntN(5)]
		at = byte(1 + h.rng.IntN(12))
	}
	ctx := h.arm(kind, at)
	err := do(ctx)
	if !h.disarm() {
		h.must(err, "operation")
		return true
	}
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
	h.note("%s has %d layers", x, len(x.layers))
	h.recs = append(h.recs, x)
}

// edit commits a changed copy of a tree; now and then somebody looks while it is
// finalized.
func (h *layersHistory) edit() {
	parent := h.some()
	if h.rng.IntN(3) == 0 {
		parent = nil
	}
	x := &lrecord{op: "edited"}
	var on *cache.ImmutableRef
	from := ltree{}
	if parent != nil {
		from, on, x.on, x.layers = parent.tree, parent.ref, []*lrecord{parent}, slices.Clone(parent.layers)
	}
	h.note("edit %v", parent)
	var mut *cache.MutableRef
	if !h.try(func(ctx context.Context) (err error) {
		mut, err = h.m.New(ctx, on, cache.NewOptions{})
		return err
	}) {
		return
	}
	mnt, err := mut.Mount(context.Background(), cache.MountOptions{})
	h.must(err, "mount")
	x.tree = h.random(from, mnt.Path())
	h.must(mnt.Unmount(), "unmount")
	own := change(from, x.tree)
	x.layers = append(x.layers, &own)
	x.tree = own.over(from)
	var imm *cache.ImmutableRef
	if !h.try(func(ctx context.Context) (err error) {
		imm, err = mut.Commit(ctx)
		return err
	}) {
		return
	}
	h.add(x, imm)
	switch h.rng.IntN(4) {
	case 0:
		mnt, err := imm.Mount(context.Background())
		h.must(err, "mount")
		h.must(imm.Finalize(context.Background()), "finalize")
		h.must(mnt.Unmount(), "unmount")
	case 1:
		h.try(imm.Finalize)
	}
}

// random changes what is in dir, unless that is empty, and gives the tree that
// comes of it.
func (h *layersHistory) random(from ltree, dir string) ltree {
	t, gone := maps.Clone(from), map[string]bool{}
	apply := func(do func() error) {
		if dir != "" {
			h.must(do(), "change a tree")
		}
	}
	for range 1 + h.rng.IntN(6) {
		p := h.path(t)
		was := t[p]
		switch n := h.rng.IntN(10); {
		case n < 2 && was != nil:
			apply(func() error { return os.RemoveAll(filepath.Join(dir, p)) })
			t.remove(p)
			gone[p] = true
		case n == 2 && was != nil && was.kind == 'd':
			c := *was
			c.mode = []uint32{0o700, 0o755, 0o1777, 0o2750}[h.rng.IntN(4)]
			t[p] = &c
			apply(func() error { return unix.Chmod(filepath.Join(dir, p), c.mode) })
		default:
			made := h.node()
			if gone[p] && made.kind == 'd' || was != nil && was.kind == 'd' && made.kind == 'd' {
				continue // one that is made again hides more than the names that are gone
			}
			if was != nil {
				gone[p] = gone[p] || was.kind == 'd'
				apply(func() error { return os.RemoveAll(filepath.Join(dir, p)) })
				t.remove(p)
			}
			apply(func() error { return made.make(dir, p) })
			t[p] = made
			if q := p + "-too"; made.kind == 'f' && n == 9 && t[q] == nil {
				apply(func() error { return os.Link(filepath.Join(dir, p), filepath.Join(dir, q)) })
				t[q] = made
			}
		}
	}
	return t
}

// path is one that may be in a tree: its directory is.
func (h *layersHistory) path(t ltree) string {
	p := ""
	for {
		p = filepath.Join(p, string("abcd"[h.rng.IntN(4)]))
		if n := t[p]; n == nil || n.kind != 'd' || h.rng.IntN(2) == 0 {
			return p
		}
	}
}

func (h *layersHistory) node() *node {
	h.stamp++
	n := &node{kind: "ddffffl"[h.rng.IntN(7)], mode: []uint32{0o644, 0o755, 0o4755, 0o600}[h.rng.IntN(4)], text: fmt.Sprint("text ", h.stamp), stamp: h.stamp}
	switch n.kind {
	case 'd':
		n.mode, n.text, n.stamp = 0o755, "", 0
	case 'l':
		n.mode = 0o777
	default:
		if h.rng.IntN(4) == 0 {
			n.xattr = fmt.Sprint("x", h.stamp)
		}
	}
	return n
}

// takeIn makes a layer as a blob over a record.
func (h *layersHistory) takeIn() {
	parent := h.some()
	if h.rng.IntN(3) == 0 {
		parent = nil
	}
	x := &lrecord{op: "blob"}
	from := ltree{}
	if parent != nil {
		from, x.on, x.layers = parent.tree, []*lrecord{parent}, slices.Clone(parent.layers)
	}
	own := change(from, h.random(from, ""))
	x.tree, x.layers = own.over(from), append(x.layers, &own)
	data, err := own.tar()
	h.must(err, "write a layer")
	x.desc = h.blob(data)
	h.note("take %s in over %v", x.desc.MediaType, parent)
	h.byBlob(x, func(ref *cache.ImmutableRef) { h.add(x, ref) })
}

// blob compresses a layer and puts it into the registry.
func (h *layersHistory) blob(data []byte) *ocispec.Descriptor {
	var b strings.Builder
	how := cache.Compression{Algorithm: []layer.Algorithm{layer.None, layer.Gzip, layer.Zstd}[h.rng.IntN(3)]}
	z, err := layer.Compress(&b, how)
	h.must(err, "compress")
	_, err = z.Write(data)
	h.must(err, "compress")
	h.must(z.Close(), "compress")
	desc := &ocispec.Descriptor{
		MediaType: how.Algorithm.MediaType(), Digest: digest.FromString(b.String()), Size: int64(b.Len()),
		Annotations: map[string]string{"containerd.io/uncompressed": digest.FromBytes(data).String()},
	}
	h.blobs[desc.Digest] = []byte(b.String())
	return desc
}

func (h *layersHistory) byBlob(x *lrecord, then func(*cache.ImmutableRef)) {
	var on *cache.ImmutableRef
	if len(x.on) > 0 {
		on = x.on[0].ref
	}
	var ref *cache.ImmutableRef
	if h.try(func(ctx context.Context) (err error) {
		ref, err = h.m.GetByBlob(ctx, *x.desc, on, cache.BlobOptions{Provider: h})
		return err
	}) {
		then(ref)
	}
}

func (h *layersHistory) merge() {
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

func (h *layersHistory) diff() {
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

func (h *layersHistory) extract() {
	if x := h.some(); x != nil {
		h.note("extract %s", x)
		h.try(x.ref.Extract)
	}
}

func (h *layersHistory) show() {
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
func (h *layersHistory) giveOut() {
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

func (h *layersHistory) drop() {
	if x := h.some(); x != nil {
		h.note("release %s", x)
		h.must(x.ref.Release(context.Background()), "release")
		x.ref = nil
	}
}

// take gets a handle on a record.
func (h *layersHistory) take() {
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
func (h *layersHistory) remove() {
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

// end ends the process, in order or not, or power.
func (h *layersHistory) end() {
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
	h.provideAgain(ctx)
	h.check()
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

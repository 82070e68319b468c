package cachetest

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
)

// edit commits a changed copy of a tree; now and then somebody looks while it is
// finalized.
func (h *layersHistory) edit(Op) {
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
		switch n := h.rng.IntN(14); {
		case n < 2 && was != nil:
			apply(func() error { return os.RemoveAll(filepath.Join(dir, p)) })
			t.remove(p)
			gone[p] = true
		case n < 4 && was != nil && was.kind != 'l' && t.names(was) == 1:
			// Of several names overlayfs changes one.
			c := h.changed(was)
			t[p] = c
			apply(func() error { return c.set(filepath.Join(dir, p)) })
		case n == 4 && was != nil && was.kind != 'd' && t.names(was) == 1:
			// Away and back is no change.
			for _, names := range [][2]string{{p, "t"}, {"t", p}} {
				apply(func() error { return os.Rename(filepath.Join(dir, names[0]), filepath.Join(dir, names[1])) })
			}
		case n == 5 && was != nil && was.kind != 'd' && t.names(was) == 1:
			q := p + "-moved"
			if t[q] != nil || gone[q] {
				continue
			}
			apply(func() error { return os.Rename(filepath.Join(dir, p), filepath.Join(dir, q)) })
			t.remove(p)
			t[q] = was
		case n == 6 && was == nil && from[p] == nil && !gone[p]:
			// As npm and git do it.
			d, f := h.node(), h.node()
			d.kind, f.kind, d.capability, d.text, d.stamp = 'd', 'f', false, "", 0
			for _, made := range []struct {
				n  *node
				at string
			}{{d, "t"}, {f, "t/" + path.Base(p)}} {
				apply(func() error { return made.n.make(dir, made.at) })
			}
			apply(func() error { return os.Rename(filepath.Join(dir, "t"), filepath.Join(dir, p)) })
			t[p], t[path.Join(p, path.Base(p))] = d, f
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
			if q := p + "-too"; made.kind == 'f' && n >= 12 && t[q] == nil {
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
	n := &node{kind: "ddffffl"[h.rng.IntN(7)], text: fmt.Sprint("text ", h.stamp), stamp: h.stamp}
	switch n.kind {
	case 'd':
		n.text, n.stamp = "", 0
	case 'l':
		n.mode, n.owner = 0o777, h.owner()
		return n
	}
	return h.changed(n)
}

// changed is a file or directory with other attributes.
func (h *layersHistory) changed(n *node) *node {
	c := *n
	c.owner = h.owner()
	c.mode = []uint32{0o644, 0o755, 0o4755, 0o6711, 0o600}[h.rng.IntN(5)]
	if n.kind == 'd' {
		c.mode = []uint32{0o700, 0o755, 0o1777, 0o2750}[h.rng.IntN(4)]
	}
	c.capability = n.kind == 'f' && h.rng.IntN(5) == 0
	if h.rng.IntN(4) == 0 {
		h.stamp++
		c.xattr = fmt.Sprint("x", h.stamp)
	}
	return &c
}

func (h *layersHistory) owner() int { return []int{0, 0, 7, 65533}[h.rng.IntN(4)] }

// takeIn makes a layer as a blob over a record.
func (h *layersHistory) takeIn(Op) {
	parent := h.some()
	if h.rng.IntN(3) == 0 {
		parent = nil
	}
	x := &lrecord{op: "blob"}
	from := ltree{}
	if parent != nil {
		from, x.on, x.layers = parent.tree, []*lrecord{parent}, slices.Clone(parent.layers)
	}
	to := h.random(from, "")
	own := change(from, to)
	for _, p := range slices.Sorted(maps.Keys(to)) {
		if to[p].kind == 'd' && h.rng.IntN(3) == 0 {
			own.enter(to, p)
			own[path.Join(p, opaqueName)] = &node{kind: 'o'}
		}
	}
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

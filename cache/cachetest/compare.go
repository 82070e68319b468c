package cachetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
)

// compare fails unless the store shows what the model says.
func (h *history) compare() {
	if misfit := h.differs(false); misfit != "" {
		h.fail("%s", misfit)
	}
}

// differs compares all that can be seen of the records. After a crash one that
// the model does not know by its id is the one that has none, and counts of
// uses that were in memory only are taken as they are.
func (h *history) differs(crashed bool) string {
	ctx := context.Background()
	seen := map[string]bool{}
	for rec, err := range h.m.Records(ctx) {
		h.must(err, "records")
		name, known := h.names[rec.ID]
		if !known && crashed {
			name = h.unbound()
			known = name != ""
		}
		if !known {
			return fmt.Sprintf("record %s is there that nobody made", rec.ID)
		}
		r := h.model.stored(name)
		if r == nil {
			return fmt.Sprintf("%s is %s, and should not be there", name, rec.State)
		}
		if crashed && rec.UsageCount <= r.uses {
			r.uses = rec.UsageCount
		}
		if got, want := h.describe(rec), h.described(r); got != want {
			return fmt.Sprintf("%s is\n    %s\n  and should be\n    %s", name, got, want)
		}
		if rec.State != cache.Mutable {
			if got := h.contentOf(rec.ID); !maps.Equal(got, r.files) {
				return fmt.Sprintf("%s has the files %v and should have %v", name, got, r.files)
			}
		}
		h.bind(name, rec.ID)
		seen[name] = true
	}
	for _, name := range h.model.names() {
		if !h.model.records[name].unrecorded && !seen[name] {
			return fmt.Sprintf("%s is not there", name)
		}
	}
	return ""
}

// unbound is the name that has no id yet, if there is one.
func (h *history) unbound() string {
	for name := range h.model.records {
		if _, has := h.ids[name]; !has {
			return name
		}
	}
	return ""
}

func (h *history) describe(rec *cache.Record) string {
	values := map[string]string{}
	for _, v := range rec.Values {
		values[v.Name] = v.Index
	}
	var parents []string
	for _, p := range rec.Parents {
		parents = append(parents, h.names[p])
	}
	attached := map[string]string{}
	for _, name := range attachmentNames {
		data, err := h.m.Attachment(context.Background(), rec.ID, name)
		if err == nil {
			attached[name] = string(data)
		} else if !errdefs.IsNotFound(err) {
			h.must(err, "read an attachment")
		}
	}
	return fmt.Sprintf("%s on %q, type %s, text %q, values %v, labels %v, attached %v, retain %t %t, interrupted %t, durable %t, used %d",
		rec.State, strings.Join(parents, " "), rec.Type, rec.Description, values, rec.Labels, attached,
		rec.Retain, rec.RetainAfter, rec.Interrupted, rec.Durable, rec.UsageCount)
}

func (h *history) described(r *record) string {
	return fmt.Sprintf("%s on %q, type %s, text %q, values %v, labels %v, attached %v, retain %t %t, interrupted %t, durable %t, used %d",
		r.state, r.parent, r.kind, r.text, r.values, r.labels, r.attached, r.retain, r.after, r.interrupted, r.durable, r.uses)
}

// contentOf reads a record without being counted as a use.
func (h *history) contentOf(id cache.ID) map[string]string {
	ctx := context.Background()
	imm, err := h.m.Get(ctx, id, cache.GetOptions{NoUpdate: true})
	h.must(err, "get")
	mnt, err := imm.Mount(ctx)
	h.must(err, "mount")
	files := h.read(mnt)
	h.must(errors.Join(mnt.Unmount(), imm.Release(ctx)), "unmount and release")
	return files
}

func (h *history) read(mnt *cache.Mount) map[string]string {
	if h.trees != nil {
		files, err := h.trees.ReadTree(mnt.Path())
		h.must(err, "read a tree")
		return files
	}
	entries, err := os.ReadDir(mnt.Path())
	h.must(err, "read a tree")
	files := map[string]string{}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(mnt.Path(), e.Name()))
		h.must(err, "read a file")
		files[e.Name()] = string(data)
	}
	return files
}

func (h *history) write(mnt *cache.Mount, name, text string) error {
	if h.trees != nil {
		return h.trees.WriteFile(mnt.Path(), name, text)
	}
	return os.WriteFile(filepath.Join(mnt.Path(), name), []byte(text), 0o644)
}

func (h *history) check() {
	for f, err := range h.m.Check(context.Background()) {
		h.must(err, "check")
		h.fail("check found %s of %s %s: %s", f.Code, f.ID, f.Key, f.Message)
	}
}

// finish gives everything back, and expects that nothing is left but what the
// records name.
func (h *history) finish() {
	ctx := context.Background()
	for _, x := range h.mounts {
		h.must(x.mnt.Unmount(), "unmount")
	}
	for _, x := range slices.Concat(h.readers, h.writers) {
		h.must(x.release(ctx), "release")
		h.model.release(x.name, x.mut != nil, x.touch)
	}
	h.writers, h.readers, h.mounts = nil, nil, nil
	h.releaseHolds()
	for _, r := range h.model.records {
		r.shared, r.exclusive = 0, 0
	}
	h.restart(Op{}, true)
	h.check()
	keys := map[string]bool{}
	for name, r := range h.model.records {
		if refs := h.m.Refs(h.id(name)); len(refs) > 0 {
			h.fail("%s is still held: %v", name, refs)
		}
		rec, err := h.m.Lookup(ctx, h.id(name))
		h.must(err, "look up")
		keys[rec.Key] = true
		if r.state == cache.Mutable {
			mut, err := h.m.GetMutable(ctx, rec.ID)
			h.must(err, "continue")
			mnt, err := mut.Mount(ctx, cache.MountOptions{ReadOnly: true})
			h.must(err, "mount")
			if got := h.read(mnt); !maps.Equal(got, r.files) {
				h.fail("%s has the files %v and should have %v", name, got, r.files)
			}
			h.must(errors.Join(mnt.Unmount(), mut.Release(ctx)), "unmount and release")
		}
	}
	pending, err := h.driver.Pending(ctx)
	h.must(err, "pending names")
	for _, p := range pending {
		if !keys[p.Key] {
			h.fail("the driver has the pending name %s, which no record names", p.Key)
		}
	}
	h.must(h.driver.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if !keys[info.Name] {
			h.fail("the driver has the name %s, which no record names", info.Name)
		}
		return nil
	}), "walk")
	h.must(h.closeStore(), "close")
}

func (x *handle) release(ctx context.Context) error {
	if x.mut != nil {
		return x.mut.Release(ctx)
	}
	return x.imm.Release(ctx)
}

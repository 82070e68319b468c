package metadatatest

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/metadata"
)

// Few names, so that histories collide.
func drawRecord(t *rapid.T, id metadata.ID) *metadata.Record {
	name := rapid.StringMatching(`[a-f]`)
	r := &metadata.Record{
		ID: id, Op: metadata.Op(rapid.IntRange(1, 4).Draw(t, "op")), State: metadata.State(rapid.IntRange(1, 4).Draw(t, "state")),
		Type: rapid.SampledFrom([]string{"", "x", "y"}).Draw(t, "type"), Size: rapid.Int64Range(-1, 100).Draw(t, "size"),
		Durable: rapid.Bool().Draw(t, "durable"),
	}
	if r.State != metadata.Lazy {
		r.Key = "k" + name.Draw(t, "key")
		r.Was = rapid.SampledFrom([]string{"", "", "ka", "w"}).Draw(t, "was")
	}
	for _, a := range rapid.SliceOfNDistinct(name, 0, 1, rapid.ID).Draw(t, "aliases") {
		if metadata.ID(a) != id {
			r.Aliases = append(r.Aliases, metadata.ID(a))
		}
	}
	for _, b := range rapid.SliceOfN(name, 0, 2).Draw(t, "blobs") {
		r.Blobs = append(r.Blobs, metadata.Blob{Digest: digest.Digest(b)})
	}
	index := rapid.SampledFrom([]string{"", "i", "i::j", "i\x00", "\xff", "chainid:c"})
	for i, v := range rapid.SliceOfN(index, 0, 3).Draw(t, "indexes") {
		r.Values = append(r.Values, metadata.Value{Name: fmt.Sprint(i), Index: v})
	}
	r.ChainID = digest.Digest(rapid.SampledFrom([]string{"", "c"}).Draw(t, "chain"))
	return r
}

// history is a store and what the model says of it.
type history struct {
	t      *rapid.T
	opener Opener
	path   string
	s      *metadata.Store
	model  *model
}

func newHistory(t *rapid.T, path string, open Opener) *history {
	m := newModel()
	return &history{t: t, path: path, opener: open, model: m}
}

func (h *history) open() {
	s, err := h.opener(h.path, metadata.Options{FlushInterval: -1})
	require.NoError(h.t, err)
	h.s = s
}

func (h *history) reopen(t *rapid.T) {
	require.NoError(t, h.s.Close())
	h.open()
}

func drawID(t *rapid.T) metadata.ID {
	return metadata.ID(rapid.StringMatching(`[a-f]`).Draw(t, "id"))
}

// act does one thing to both and compares what they say.
func (h *history) act(t *rapid.T, store func(*metadata.Tx) error, model func(*model) bool) {
	m := h.model.clone()
	ok := model(m)
	err := h.s.Update(t.Context(), store)
	require.Equal(t, ok, err == nil, "store says %v", err)
	if ok {
		h.model = m
	} else {
		require.True(t, errdefs.IsNotFound(err) || errdefs.IsAlreadyExists(err) || errdefs.IsFailedPrecondition(err), "%v", err)
	}
}

func (h *history) drawParents(t *rapid.T, r *metadata.Record) {
	for _, p := range rapid.SliceOfN(rapid.StringMatching(`[a-f]`), 0, 2).Draw(t, "parents") {
		if metadata.ID(p) != r.ID {
			r.Parents = append(r.Parents, metadata.ID(p))
		}
	}
}

func (h *history) create(t *rapid.T) {
	r := drawRecord(t, drawID(t))
	h.drawParents(t, r)
	h.act(t, func(tx *metadata.Tx) error { return tx.Create(r) }, func(m *model) bool { return m.create(r) })
}

func (h *history) put(t *rapid.T) {
	r := drawRecord(t, drawID(t))
	if old := h.model.records[r.ID]; old != nil {
		r.Revision, r.Parents = old.Revision, old.Parents
	}
	h.act(t, func(tx *metadata.Tx) error { _, err := tx.Put(r); return err }, func(m *model) bool { return m.put(r) })
}

func (h *history) remove(t *rapid.T) {
	id := drawID(t)
	h.act(t, func(tx *metadata.Tx) error { return tx.Delete(id) }, func(m *model) bool { return m.remove(id) })
}

func (h *history) replace(t *rapid.T) {
	old, r := drawID(t), drawRecord(t, drawID(t))
	if old == r.ID {
		return
	}
	h.drawParents(t, r)
	h.act(t, func(tx *metadata.Tx) error { return tx.Replace(old, r) }, func(m *model) bool { return m.replace(old, r) })
}

func (h *history) attach(t *rapid.T) {
	id, name, data := drawID(t), rapid.StringN(1, 3, 10).Draw(t, "name"), rapid.String().Draw(t, "data")
	h.act(t, func(tx *metadata.Tx) error { return tx.SetAttachment(id, name, []byte(data)) }, func(m *model) bool {
		if m.records[id] == nil {
			return false
		}
		if m.files[id] == nil {
			m.files[id] = map[string]string{}
		}
		m.files[id][name] = data
		return true
	})
}

func (h *history) detach(t *rapid.T) {
	id := drawID(t)
	names := slices.Sorted(maps.Keys(h.model.files[id]))
	if len(names) == 0 {
		return
	}
	h.act(t, func(tx *metadata.Tx) error { return tx.DeleteAttachment(id, names[0]) }, func(m *model) bool {
		delete(m.files[id], names[0])
		return true
	})
}

func (h *history) touch(t *rapid.T) {
	id, at := drawID(t), time.Unix(rapid.Int64Range(1, 1000).Draw(t, "at"), 0).UTC()
	h.s.Touch(id, at)
	h.model.touch(id, at)
	// A record that comes before they are written would get the uses.
	if h.model.records[id] == nil || rapid.Bool().Draw(t, "flush") {
		require.NoError(t, h.s.Flush(t.Context()))
	}
}

// several does more than one thing in a transaction, all or nothing.
func (h *history) several(t *rapid.T) {
	a, b, id := drawRecord(t, drawID(t)), drawRecord(t, drawID(t)), drawID(t)
	h.act(t, func(tx *metadata.Tx) error {
		if err := tx.Create(a); err != nil {
			return err
		}
		if err := tx.Create(b); err != nil {
			return err
		}
		return tx.Delete(id)
	}, func(m *model) bool { return m.create(a) && m.create(b) && m.remove(id) })
}

// same compares all that can be asked.
func (h *history) same(t *rapid.T) {
	m := h.model
	require.NoError(t, h.s.View(t.Context(), func(tx *metadata.Tx) error {
		got := map[metadata.ID]*metadata.Record{}
		for r, err := range tx.Records() {
			require.NoError(t, err)
			got[r.ID] = r
		}
		require.Equal(t, len(m.records), len(got))
		totals := map[metadata.Total]bool{}
		want := map[metadata.Total]metadata.Total{}
		for id, r := range m.records {
			require.NotNil(t, got[id], "%s", id)
			requireSame(t, r, got[id])
			require.Equal(t, m.children(id), slices.Sorted(tx.Children(id)))
			require.Equal(t, len(m.children(id)), tx.ChildCount(id))
			for _, a := range r.Aliases {
				res, err := tx.Resolve(a)
				require.NoError(t, err)
				require.Equal(t, id, res)
			}
			for _, k := range []string{r.Key, r.Was} {
				if k != "" {
					res, err := tx.ByKey(k)
					require.NoError(t, err)
					require.Equal(t, id, res)
				}
			}
			for _, v := range r.Values {
				if v.Index != "" {
					require.Contains(t, slices.Collect(tx.ByIndex(v.Index)), id)
				}
			}
			for _, b := range r.Blobs {
				require.Contains(t, slices.Collect(tx.ByBlob(b.Digest)), id)
			}
			files := map[string]string{}
			for name := range tx.Attachments(id) {
				data, err := tx.Attachment(id, name)
				require.NoError(t, err)
				files[name] = string(data)
			}
			require.Equal(t, len(m.files[id]), len(files))
			for n, d := range m.files[id] {
				require.Equal(t, d, files[n])
			}
			g := metadata.Total{Type: r.Type, State: r.State, Shared: len(m.children(id)) >= 2}
			w := want[g]
			want[g] = metadata.Total{Count: w.Count + 1, Bytes: w.Bytes + max(0, r.Size)}
		}
		list, err := tx.Totals()
		require.NoError(t, err)
		for _, g := range list {
			key := metadata.Total{Type: g.Type, State: g.State, Shared: g.Shared}
			require.False(t, totals[key])
			totals[key] = true
			got := metadata.Total{Count: g.Count, Bytes: g.Bytes}
			require.Equal(t, want[key], got)
		}
		require.Len(t, totals, len(want))
		for k, id := range tx.ByIndexPrefix("i") {
			require.True(t, strings.HasPrefix(k, "i"))
			require.True(t, slices.ContainsFunc(m.records[id].Values, func(v metadata.Value) bool { return v.Index == k }))
		}
		for f, err := range tx.Check() {
			require.NoError(t, err)
			require.Fail(t, f.Code, f.Message)
		}
		return nil
	}))
}

func requireSame(t require.TestingT, want, got *metadata.Record) {
	w, g := want, got
	require.Equal(t, fmt.Sprintf("%+v", want.Values), fmt.Sprintf("%+v", got.Values))
	require.Equal(t, fmt.Sprint(w.ID, w.State, w.Op, w.Revision, w.Key, w.Was, w.Parents, w.Aliases, w.Type, w.Size, w.ChainID, w.Blobs, w.Durable, w.UsageCount, w.LastUsed),
		fmt.Sprint(g.ID, g.State, g.Op, g.Revision, g.Key, g.Was, g.Parents, g.Aliases, g.Type, g.Size, g.ChainID, g.Blobs, g.Durable, g.UsageCount, g.LastUsed))
}

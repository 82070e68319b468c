package metadata_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/metadata"
)

func allOf(list []metadata.New) iter.Seq2[metadata.New, error] {
	return func(yield func(metadata.New, error) bool) {
		for _, n := range list {
			if !yield(n, nil) {
				return
			}
		}
	}
}

// drawNew are records of all kinds, parents first.
func drawNew(t *rapid.T) (list []metadata.New) {
	for i := range rapid.IntRange(0, 60).Draw(t, "records") {
		label := fmt.Sprint(i)
		r := &metadata.Record{
			ID: metadata.ID(fmt.Sprintf("%s%d", rapid.StringMatching("[a-z]{1,3}").Draw(t, "id "+label), i)), Op: metadata.Base,
			Type: rapid.SampledFrom([]string{"", "regular", "internal"}).Draw(t, "type "+label),
			Size: rapid.Int64Range(-1, 100).Draw(t, "size "+label), Created: time.Unix(int64(i), 0).UTC(),
		}
		r.State, r.Durable = rapid.SampledFrom([]metadata.State{metadata.Committed, metadata.Finalized, metadata.Lazy}).Draw(t, "state "+label), i%2 == 0
		if r.State != metadata.Lazy {
			r.Key = fmt.Sprintf("key-%d", i)
		} else {
			r.Durable = false
			r.Blobs = []metadata.Blob{{Digest: digest.FromString(label), MediaType: "x", Size: 1, DiffID: digest.FromString("diff")}}
		}
		if i > 0 && rapid.Bool().Draw(t, "layer "+label) {
			r.Op = metadata.Layer
			r.Parents = []metadata.ID{list[rapid.IntRange(0, i-1).Draw(t, "parent "+label)].Record.ID}
		}
		if rapid.Bool().Draw(t, "known "+label) {
			r.ChainID = digest.FromString(label[:1])
			r.Aliases = []metadata.ID{metadata.ID("alias-" + label)}
			r.Values = []metadata.Value{{Name: "v", Data: []byte("1"), Index: "key:" + label[:1]}, {Name: "w", Data: []byte("2")}}
		}
		n := metadata.New{Record: r, Attachments: map[string][]byte{}}
		for k := range rapid.IntRange(0, 2).Draw(t, "attachments "+label) {
			n.Attachments[fmt.Sprint("a", k)] = make([]byte, rapid.SampledFrom([]int{0, 10, 100_000}).Draw(t, "bytes "+label))
		}
		list = append(list, n)
	}
	return list
}

// What Build makes is what the same records make one after the other.
func TestBuildIsCreate(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		list := drawNew(rt)
		dir, err := os.MkdirTemp(t.TempDir(), "")
		require.NoError(rt, err)
		now := func() time.Time { return time.Unix(1000, 0) }
		meta := metadata.Meta{Driver: "native", Created: now().UTC()}

		one, err := metadata.Open(t.Context(), filepath.Join(dir, "one"), metadata.Options{Now: now, FlushInterval: -1})
		require.NoError(rt, err)
		require.NoError(rt, one.Update(t.Context(), func(tx *metadata.Tx) error {
			for _, n := range list {
				if err := tx.Create(n.Record); err != nil {
					return err
				}
				for name, data := range n.Attachments {
					if err := tx.SetAttachment(n.Record.ID, name, data); err != nil {
						return err
					}
				}
			}
			m, err := tx.Meta()
			m.Driver = meta.Driver
			return errors.Join(err, tx.SetMeta(m))
		}))

		shuffled := rapid.Permutation(list).Draw(rt, "order")
		require.NoError(rt, metadata.Build(t.Context(), filepath.Join(dir, "all"), metadata.Options{Now: now}, meta, allOf(shuffled)))
		all, err := metadata.Open(t.Context(), filepath.Join(dir, "all"), metadata.Options{Now: now, FlushInterval: -1})
		require.NoError(rt, err)
		require.Equal(rt, contentOf(rt, one), contentOf(rt, all))
		// And it goes on as any other.
		id := all.NewID()
		require.NoError(rt, all.Update(t.Context(), func(tx *metadata.Tx) error {
			if err := tx.Create(&metadata.Record{ID: id, State: metadata.Lazy, Op: metadata.Base, Size: -1}); err != nil {
				return err
			}
			return tx.SetAttachment(id, "new", []byte("new"))
		}))
		contentOf(rt, all)
		require.NoError(rt, errors.Join(one.Close(), all.Close()))
	})
}

// withoutOwners hides the numbers of attachments, which are given out in the
// order in which the records come.
var withoutOwners = regexp.MustCompile(` attachments:\d+`)

// contentOf is all that a whole store says.
func contentOf(t require.TestingT, s *metadata.Store) (lines []string) {
	require.NoError(t, s.View(context.Background(), func(tx *metadata.Tx) error {
		for f, err := range tx.Check() {
			require.NoError(t, err)
			require.Fail(t, "finding", "%+v", f)
		}
		for r, err := range tx.Records() {
			require.NoError(t, err)
			lines = append(lines, fmt.Sprintf("%+v", *r))
			for name := range tx.Attachments(r.ID) {
				data, err := tx.Attachment(r.ID, name)
				require.NoError(t, err)
				lines = append(lines, fmt.Sprintf("%s %s %s", r.ID, name, digest.FromBytes(data)))
			}
		}
		totals, err := tx.Totals()
		lines = append(lines, fmt.Sprintf("%+v", totals))
		m, merr := tx.Meta()
		lines = append(lines, fmt.Sprintf("%+v", m))
		return errors.Join(err, merr)
	}))
	for i, line := range lines {
		lines[i] = withoutOwners.ReplaceAllString(line, "")
	}
	return lines
}

// Two that ask for one name, and what cannot be, leave no file; neither does an
// error at any step.
func TestBuildRefuses(t *testing.T) {
	lazy := func(id metadata.ID, change func(r *metadata.Record)) metadata.New {
		r := &metadata.Record{ID: id, State: metadata.Lazy, Op: metadata.Base, Size: -1}
		if change != nil {
			change(r)
		}
		return metadata.New{Record: r}
	}
	alias := func(r *metadata.Record) { r.Aliases = []metadata.ID{"b"} }
	key := func(r *metadata.Record) { r.State, r.Key = metadata.Finalized, "k" }
	for name, c := range map[string]struct {
		list  []metadata.New
		class func(error) bool
	}{
		"id twice":       {[]metadata.New{lazy("a", nil), lazy("a", nil)}, errdefs.IsAlreadyExists},
		"alias is an id": {[]metadata.New{lazy("a", alias), lazy("b", nil)}, errdefs.IsAlreadyExists},
		"alias twice":    {[]metadata.New{lazy("a", alias), lazy("c", alias)}, errdefs.IsAlreadyExists},
		"key twice":      {[]metadata.New{lazy("a", key), lazy("c", key)}, errdefs.IsAlreadyExists},
		"no parent": {[]metadata.New{lazy("a", func(r *metadata.Record) {
			r.Op, r.Parents = metadata.Layer, []metadata.ID{"zz"}
		})}, errdefs.IsFailedPrecondition},
		"no id":           {[]metadata.New{lazy("", nil)}, errdefs.IsInvalidArgument},
		"attachment name": {[]metadata.New{{Record: lazy("a", nil).Record, Attachments: map[string][]byte{"": nil}}}, errdefs.IsInvalidArgument},
	} {
		dir := t.TempDir()
		err := metadata.Build(t.Context(), filepath.Join(dir, "s"), metadata.Options{}, metadata.Meta{}, allOf(c.list))
		require.True(t, c.class(err), "%s: %v", name, err)
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, left, name)
	}

	boom := errors.New("boom")
	list := []metadata.New{lazy("a", nil)}
	for i := range 8 {
		list = append(list, lazy(metadata.ID(fmt.Sprint("b", i)), nil))
		list[i].Attachments = map[string][]byte{"big": make([]byte, 1<<20)}
	}
	path := filepath.Join(t.TempDir(), "s")
	for at := 1; ; at++ {
		n := 0
		err := metadata.Build(t.Context(), path, metadata.Options{Step: func(string) error {
			if n++; n == at {
				return boom
			}
			return nil
		}}, metadata.Meta{}, allOf(list))
		if err == nil {
			require.Greater(t, at, 10)
			break
		}
		require.ErrorIs(t, err, boom)
		require.NoFileExists(t, path)
	}
	err := metadata.Build(t.Context(), path, metadata.Options{}, metadata.Meta{}, allOf(nil))
	require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
	require.FileExists(t, path, "it is somebody's")
	err = metadata.Build(t.Context(), path+"2", metadata.Options{MaxSize: 1 << 20}, metadata.Meta{}, allOf(list))
	require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
	require.NoFileExists(t, path+"2")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, metadata.Build(ctx, path+"2", metadata.Options{}, metadata.Meta{}, allOf(list)), context.Canceled)
	require.NoFileExists(t, path+"2")
}

package metadata_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/metadata"
)

func sameRecord(t testing.TB, want, got *metadata.Record) {
	t.Helper()
	opts := cmpopts.IgnoreUnexported(metadata.Record{}, metadata.Blob{}, metadata.Value{})
	require.Empty(t, cmp.Diff(want, got, opts))
}

func full(id metadata.ID) *metadata.Record {
	return &metadata.Record{
		ID: id, State: metadata.Finalized, Op: metadata.Layer, Key: "k\x00" + string(id), Was: "w" + string(id),
		Aliases: []metadata.ID{"alias-" + id, "\xff" + id},
		Retain:  true, Interrupted: true, RetainAfter: true, OnPowerCut: metadata.Keep, Durable: true, Raw: true,
		Type: "t\xff", Description: "desc", Labels: map[string]string{"\xff\x00": "v", "": "e"},
		Created: time.Date(2020, 1, 2, 3, 4, 5, 6, time.UTC), LastUsed: time.Date(1900, 1, 1, 0, 0, 0, 1, time.UTC),
		UsageCount: 1 << 63, Cost: time.Hour, Size: 1 << 40,
		ChainID: "sha256:c", DiffID: "sha256:d", Verified: true,
		Blobs: []metadata.Blob{
			{Digest: "sha256:b1", MediaType: "m", Size: 1, DiffID: "x", Annotations: map[string]string{"a\xff": "b"}, URLs: []string{"u", ""}},
			{Digest: "sha256:b2"},
		},
		ImageRefs: []string{"r1", "\xfe"},
		Values:    []metadata.Value{{Name: "\xff", Data: []byte{0, 255}, Index: "i\x00"}, {Name: ""}},
	}
}

func TestRecordGoesInAndOutWhole(t *testing.T) {
	s := fresh(t)
	r := full("r")
	create(t, s, r)
	require.Zero(t, r.Revision, "the caller's record is its own")
	want := full("r")
	want.Revision = 1
	sameRecord(t, want, get(t, s, "r"))
	sameRecord(t, want, get(t, s, "alias-r"))

	got := get(t, s, "r")
	got.Labels["x"], got.Values[0].Data[0], got.Parents = "y", 9, []metadata.ID{"z"}
	sameRecord(t, want, get(t, s, "r"))
}

func TestOneTransactionPerCreate(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("p"))
	before := s.Stats().Transactions
	r := full("r")
	r.Parents = []metadata.ID{"p"}
	create(t, s, r)
	require.Equal(t, before+1, s.Stats().Transactions)
}

func TestRefusals(t *testing.T) {
	long := metadata.ID(strings.Repeat("x", metadata.MaxIDLen+1))
	type refusal struct {
		name  string
		do    func(*metadata.Tx) error
		is    func(error) bool
		names []string
	}
	create := func(r *metadata.Record) func(*metadata.Tx) error {
		return func(tx *metadata.Tx) error { return tx.Create(r) }
	}
	put := func(r *metadata.Record) func(*metadata.Tx) error {
		return func(tx *metadata.Tx) error { _, err := tx.Put(r); return err }
	}
	with := func(id metadata.ID, f func(*metadata.Record)) *metadata.Record { return rec(id, f) }
	tests := []refusal{
		{"id taken", create(rec("p")), errdefs.IsAlreadyExists, []string{`"p"`}},
		{"id is an alias", create(rec("pal")), errdefs.IsAlreadyExists, []string{`"pal"`, `"p"`}},
		{"alias is an id", create(with("n", func(r *metadata.Record) { r.Aliases = []metadata.ID{"c1"} })), errdefs.IsAlreadyExists, []string{`"c1"`}},
		{"alias is an alias", create(with("n", func(r *metadata.Record) { r.Aliases = []metadata.ID{"pal"} })), errdefs.IsAlreadyExists, []string{`"p"`}},
		{"alias is the own id", create(with("n", func(r *metadata.Record) { r.Aliases = []metadata.ID{"n"} })), errdefs.IsInvalidArgument, nil},
		{"alias twice", create(with("n", func(r *metadata.Record) { r.Aliases = []metadata.ID{"m", "m"} })), errdefs.IsInvalidArgument, nil},
		{"key taken", create(with("n", func(r *metadata.Record) { r.Key = "key-p" })), errdefs.IsAlreadyExists, []string{`"key-p"`, `"p"`}},
		{"key is a former key", create(with("n", func(r *metadata.Record) { r.Key = "former" })), errdefs.IsAlreadyExists, []string{`"p"`}},
		{"former key taken", create(with("n", func(r *metadata.Record) { r.Was = "key-c1" })), errdefs.IsAlreadyExists, []string{`"c1"`}},
		{"no such parent", create(rec("n", over("p", "ghost"))), errdefs.IsFailedPrecondition, []string{`"ghost"`}},
		{"parent is an alias", create(rec("n", over("pal"))), errdefs.IsFailedPrecondition, []string{`"pal"`}},
		{"own parent", create(rec("n", over("n"))), errdefs.IsInvalidArgument, nil},
		{"nil", create(nil), errdefs.IsInvalidArgument, nil},
		{"empty id", create(rec("")), errdefs.IsInvalidArgument, nil},
		{"long id", create(rec(long)), errdefs.IsInvalidArgument, nil},
		{"no state", create(with("n", func(r *metadata.Record) { r.State = 0 })), errdefs.IsInvalidArgument, nil},
		{"unknown state", create(with("n", func(r *metadata.Record) { r.State = 9 })), errdefs.IsInvalidArgument, nil},
		{"no op", create(with("n", func(r *metadata.Record) { r.Op = 0 })), errdefs.IsInvalidArgument, nil},
		{"size", create(with("n", func(r *metadata.Record) { r.Size = -2 })), errdefs.IsInvalidArgument, nil},
		{"lazy with a key", create(with("n", func(r *metadata.Record) { r.State = metadata.Lazy })), errdefs.IsInvalidArgument, nil},
		{"two values of one name", create(rec("n", values(metadata.Value{Name: "a"}, metadata.Value{Name: "a"}))), errdefs.IsInvalidArgument, nil},
		{"long key", create(with("n", func(r *metadata.Record) { r.Key = strings.Repeat("k", metadata.MaxKeyLen+1) })), errdefs.IsInvalidArgument, nil},
		{"long type", create(with("n", func(r *metadata.Record) { r.Type = strings.Repeat("k", metadata.MaxNameLen+1) })), errdefs.IsInvalidArgument, nil},
		{"blob without digest", create(with("n", func(r *metadata.Record) { r.Blobs = make([]metadata.Blob, 1) })), errdefs.IsInvalidArgument, nil},

		{"put of nothing", put(rec("n")), errdefs.IsNotFound, []string{`"n"`}},
		{"put by alias", put(rec("pal")), errdefs.IsNotFound, nil},
		{"put of another revision", put(with("p", func(r *metadata.Record) { r.Revision = 7 })), errdefs.IsFailedPrecondition, []string{"1", "7"}},
		{"put of other parents", put(with("c1", func(r *metadata.Record) { r.Revision = 1 })), errdefs.IsInvalidArgument, nil},
		{"put takes a key", put(with("p", func(r *metadata.Record) { r.Revision, r.Key = 1, "key-c1" })), errdefs.IsAlreadyExists, []string{`"c1"`}},
		{"put takes an id", put(with("p", func(r *metadata.Record) { r.Revision, r.Aliases = 1, []metadata.ID{"c1"} })), errdefs.IsAlreadyExists, []string{`"c1"`}},

		{"delete with children", func(tx *metadata.Tx) error { return tx.Delete("p") }, errdefs.IsFailedPrecondition, []string{`"c1"`, `"c2"`}},
		{"delete of nothing", func(tx *metadata.Tx) error { return tx.Delete("ghost") }, errdefs.IsNotFound, []string{`"ghost"`}},
		{"delete by alias", func(tx *metadata.Tx) error { return tx.Delete("pal") }, errdefs.IsNotFound, nil},
		{"replace with children", func(tx *metadata.Tx) error { return tx.Replace("p", rec("n")) }, errdefs.IsFailedPrecondition, []string{`"c1"`, `"c2"`}},
		{"replace of nothing", func(tx *metadata.Tx) error { return tx.Replace("ghost", rec("n")) }, errdefs.IsNotFound, nil},
		{"replace by itself", func(tx *metadata.Tx) error { return tx.Replace("c1", rec("c1")) }, errdefs.IsInvalidArgument, nil},
		{"replace by another", func(tx *metadata.Tx) error { return tx.Replace("c1", rec("c2")) }, errdefs.IsAlreadyExists, []string{`"c2"`}},
		{"replace by an alias", func(tx *metadata.Tx) error { return tx.Replace("c2", rec("c2al")) }, errdefs.IsAlreadyExists, nil},
		{"replace keeps the id", func(tx *metadata.Tx) error {
			return tx.Replace("c2", with("n", func(r *metadata.Record) { r.Aliases = []metadata.ID{"c2"} }))
		}, errdefs.IsAlreadyExists, nil},
		{"replace over itself", func(tx *metadata.Tx) error { return tx.Replace("c2", rec("n", over("c2"))) }, errdefs.IsFailedPrecondition, nil},

		{"get of nothing", func(tx *metadata.Tx) error { _, err := tx.Get("ghost"); return err }, errdefs.IsNotFound, []string{`"ghost"`}},
		{"get empty", func(tx *metadata.Tx) error { _, err := tx.Get(""); return err }, errdefs.IsInvalidArgument, nil},
		{"get long", func(tx *metadata.Tx) error { _, err := tx.Get(long); return err }, errdefs.IsInvalidArgument, nil},
		{"resolve of nothing", func(tx *metadata.Tx) error { _, err := tx.Resolve("ghost"); return err }, errdefs.IsNotFound, nil},
		{"key of nobody", func(tx *metadata.Tx) error { _, err := tx.ByKey("ghost"); return err }, errdefs.IsNotFound, nil},
		{"attachment of nothing", func(tx *metadata.Tx) error { return tx.SetAttachment("ghost", "a", nil) }, errdefs.IsNotFound, nil},
		{"attachment without name", func(tx *metadata.Tx) error { return tx.SetAttachment("p", "", nil) }, errdefs.IsInvalidArgument, nil},
		{"no such attachment", func(tx *metadata.Tx) error { _, err := tx.Attachment("p", "a"); return err }, errdefs.IsNotFound, nil},
		{"delete no attachment", func(tx *metadata.Tx) error { return tx.DeleteAttachment("p", "a") }, errdefs.IsNotFound, nil},
		{"schema", func(tx *metadata.Tx) error { return tx.SetMeta(metadata.Meta{Schema: 9}) }, errdefs.IsInvalidArgument, nil},
		{"quarantine of the sound", func(tx *metadata.Tx) error { _, err := tx.Quarantine("p"); return err }, errdefs.IsFailedPrecondition, nil},
	}
	s := fresh(t)
	setup := []*metadata.Record{
		with("p", func(r *metadata.Record) { r.Aliases, r.Was = []metadata.ID{"pal"}, "former" }),
		rec("c1", over("p")),
		with("c2", func(r *metadata.Record) { r.Parents, r.Aliases = []metadata.ID{"p"}, []metadata.ID{"c2al"} }),
	}
	update(t, s, func(tx *metadata.Tx) error {
		for _, r := range setup {
			if err := tx.Create(r); err != nil {
				return err
			}
		}
		return nil
	})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := s.Stats().Transactions
			err := s.Update(t.Context(), tt.do)
			require.True(t, tt.is(err), "%v", err)
			for _, n := range tt.names {
				require.ErrorContains(t, err, n)
			}
			// A caller that shrugs the error off writes nothing either.
			_ = s.Update(t.Context(), func(tx *metadata.Tx) error { _ = tt.do(tx); return nil })
			require.Equal(t, before, s.Stats().Transactions)
		})
	}
}

func TestPutCountsRevisions(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("r"))
	a, b := get(t, s, "r"), get(t, s, "r")
	a.Description, b.Description = "a", "b"
	var revision uint64
	update(t, s, func(tx *metadata.Tx) (err error) { revision, err = tx.Put(a); return err })
	require.EqualValues(t, 2, revision)
	require.EqualValues(t, 1, a.Revision)
	err := s.Update(t.Context(), func(tx *metadata.Tx) error { _, err := tx.Put(b); return err })
	require.True(t, errdefs.IsFailedPrecondition(err))
	require.Equal(t, "a", get(t, s, "r").Description)
}

func TestReplace(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("p"))
	create(t, s, rec("old", over("p"), indexed("i"), func(r *metadata.Record) {
		r.State, r.Aliases, r.ChainID = metadata.Committed, []metadata.ID{"al"}, "c"
		r.Blobs = []metadata.Blob{{Digest: "d"}}
	}))
	update(t, s, func(tx *metadata.Tx) error { return tx.SetAttachment("old", "log", []byte("data")) })
	before := s.Stats().Transactions
	n := rec("new", over("p"), indexed("i"), func(r *metadata.Record) {
		r.State, r.Key, r.Retain = metadata.Mutable, "key-old", true
	})
	update(t, s, func(tx *metadata.Tx) error { return tx.Replace("old", n) })
	require.Equal(t, before+1, s.Stats().Transactions)

	require.Equal(t, []metadata.ID{"new"}, search(t, s, "i"))
	require.Empty(t, search(t, s, "chainid:c"))
	require.EqualValues(t, 1, get(t, s, "new").Revision)
	view(t, s, func(tx *metadata.Tx) {
		for _, gone := range []metadata.ID{"old", "al"} {
			_, err := tx.Get(gone)
			require.True(t, errdefs.IsNotFound(err))
		}
		id, err := tx.ByKey("key-old")
		require.NoError(t, err)
		require.Equal(t, metadata.ID("new"), id)
		data, err := tx.Attachment("new", "log")
		require.NoError(t, err)
		require.Equal(t, "data", string(data))
		require.Equal(t, []metadata.ID{"new"}, slices.Collect(tx.Children("p")))
		require.Empty(t, slices.Collect(tx.ByBlob("d")))
	})
}

// TestReplaceAgain: a record is found by its present id alone, however often it
// was replaced, and none of its former ids is given to another record.
func TestReplaceAgain(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("a", indexed("i")))
	for _, next := range [][2]metadata.ID{{"a", "b"}, {"b", "c"}} {
		update(t, s, func(tx *metadata.Tx) error {
			return errors.Join(tx.SetAttachment(next[0], "log", []byte(next[0])), tx.Replace(next[0], rec(next[1], indexed("i"))))
		})
		require.Equal(t, []metadata.ID{next[1]}, search(t, s, "i"))
	}
	s.Touch("c", time.Unix(5, 0))
	s.Touch("a", time.Unix(7, 0))
	require.NoError(t, s.Flush(t.Context()))
	require.EqualValues(t, 1, get(t, s, "c").UsageCount, "a use of a former id is nobody's")
	view(t, s, func(tx *metadata.Tx) {
		for _, gone := range []metadata.ID{"a", "b"} {
			_, err := tx.Get(gone)
			require.True(t, errdefs.IsNotFound(err), "%s: %v", gone, err)
			_, err = tx.Resolve(gone)
			require.True(t, errdefs.IsNotFound(err), "%s: %v", gone, err)
			require.Empty(t, slices.Collect(tx.ByIDPrefix(string(gone))))
		}
		require.Equal(t, []metadata.ID{"c"}, slices.Collect(tx.ByIDPrefix("c")))
		data, err := tx.Attachment("c", "log")
		require.NoError(t, err)
		require.Equal(t, "b", string(data))
	})
	for _, r := range []*metadata.Record{rec("a"), rec("d", func(r *metadata.Record) { r.Aliases = []metadata.ID{"a"} })} {
		err := s.Update(t.Context(), func(tx *metadata.Tx) error { return tx.Create(r) })
		require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
		require.ErrorContains(t, err, `"c"`)
	}
	err := s.Update(t.Context(), func(tx *metadata.Tx) error { return tx.Create(rec("e", over("a"))) })
	require.True(t, errdefs.IsFailedPrecondition(err), "a former id is no parent: %v", err)
	create(t, s, rec("e", over("c")))
	update(t, s, func(tx *metadata.Tx) error { return errors.Join(tx.Delete("e"), tx.Delete("c")) })
	create(t, s, rec("a"))
}

func TestAttachments(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("a"), rec("b"))
	big := []byte(strings.Repeat("0123456789abcdef", 20_000))
	stale := get(t, s, "a")
	update(t, s, func(tx *metadata.Tx) error {
		return errors.Join(tx.SetAttachment("a", "big", big), tx.SetAttachment("a", "\x00\xff", nil), tx.SetAttachment("b", "big", []byte("b")))
	})
	// A writer that read the record before it had attachments keeps them.
	update(t, s, func(tx *metadata.Tx) error { _, err := tx.Put(stale); return err })
	view(t, s, func(tx *metadata.Tx) {
		got, err := tx.Attachment("a", "big")
		require.NoError(t, err)
		require.Equal(t, big, got)
		list := map[string]int64{}
		for n, size := range tx.Attachments("a") {
			list[n] = size
		}
		require.Equal(t, map[string]int64{"big": int64(len(big)), "\x00\xff": 0}, list)
	})
	update(t, s, func(tx *metadata.Tx) error { return tx.DeleteAttachment("a", "\x00\xff") })
	update(t, s, func(tx *metadata.Tx) error { return tx.Delete("a") })
	create(t, s, rec("a"))
	view(t, s, func(tx *metadata.Tx) {
		_, err := tx.Attachment("a", "big")
		require.True(t, errdefs.IsNotFound(err), "attachments die with their record")
		got, err := tx.Attachment("b", "big")
		require.NoError(t, err)
		require.Equal(t, "b", string(got))
	})
}

func TestTotals(t *testing.T) {
	s := fresh(t)
	totals := func() (out []metadata.Total) {
		view(t, s, func(tx *metadata.Tx) {
			var err error
			out, err = tx.Totals()
			require.NoError(t, err)
		})
		return out
	}
	size := func(n int64, typ string) func(*metadata.Record) {
		return func(r *metadata.Record) { r.Size, r.Type = n, typ }
	}
	require.Empty(t, totals())
	create(t, s, rec("p", size(10, "x")), rec("q", size(metadata.SizeUnknown, "x")))
	f := metadata.Finalized
	require.Equal(t, []metadata.Total{{Type: "x", State: f, Count: 2, Bytes: 10}}, totals())
	create(t, s, rec("c1", over("p", "q", "p"), size(1, "y")))
	require.Equal(t, []metadata.Total{{Type: "x", State: f, Count: 2, Bytes: 10}, {Type: "y", State: f, Count: 1, Bytes: 1}}, totals())
	create(t, s, rec("c2", over("p"), size(2, "y")))
	require.Equal(t, []metadata.Total{
		{Type: "x", State: f, Count: 1, Bytes: 0},
		{Type: "y", State: f, Count: 2, Bytes: 3},
		{Type: "x", State: f, Shared: true, Count: 1, Bytes: 10},
	}, totals())
	r := get(t, s, "p")
	r.Size = 100
	update(t, s, func(tx *metadata.Tx) error { _, err := tx.Put(r); return err })
	update(t, s, func(tx *metadata.Tx) error { return tx.Delete("c1") })
	require.Equal(t, []metadata.Total{{Type: "x", State: f, Count: 2, Bytes: 100}, {Type: "y", State: f, Count: 1, Bytes: 2}}, totals())
}

func TestUnsettled(t *testing.T) {
	s := fresh(t)
	set := func(st metadata.State, f func(*metadata.Record)) func(*metadata.Record) {
		return func(r *metadata.Record) {
			if r.State = st; st == metadata.Lazy {
				r.Key = ""
			}
			if f != nil {
				f(r)
			}
		}
	}
	create(t, s,
		rec("mutable", set(metadata.Mutable, nil)), rec("committed", set(metadata.Committed, nil)),
		rec("durable"), rec("not-durable", func(r *metadata.Record) { r.Durable = false }),
		rec("was", func(r *metadata.Record) { r.Was = "w" }),
		rec("lazy", set(metadata.Lazy, func(r *metadata.Record) { r.Durable = false })),
	)
	list := func() (ids []metadata.ID) {
		view(t, s, func(tx *metadata.Tx) { ids = slices.Collect(tx.Unsettled()) })
		return ids
	}
	require.Equal(t, []metadata.ID{"committed", "mutable", "not-durable", "was"}, list())
	for _, id := range list() {
		r := get(t, s, id)
		r.State, r.Durable, r.Was = metadata.Finalized, true, ""
		update(t, s, func(tx *metadata.Tx) error { _, err := tx.Put(r); return err })
	}
	require.Empty(t, list())
}

func TestByIDPrefix(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("ab1", func(r *metadata.Record) { r.Aliases = []metadata.ID{"ab3", "x1", "x2"} }), rec("ab2"), rec("b"))
	for prefix, want := range map[string][]metadata.ID{"ab": {"ab1", "ab2"}, "x": {"ab1"}, "ab3": {"ab1"}, "b": {"b"}, "z": nil, "": {"ab1", "ab2", "b"}} {
		view(t, s, func(tx *metadata.Tx) {
			require.Equal(t, want, slices.Collect(tx.ByIDPrefix(prefix)), "prefix %q", prefix)
		})
	}
}

// TestChangeWhileWalking deletes what an iterator stands on.
func TestChangeWhileWalking(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("p"))
	for i := range 500 {
		create(t, s, rec(metadata.ID(fmt.Sprintf("c%03d", i)), over("p"), indexed("i")))
	}
	n := 0
	update(t, s, func(tx *metadata.Tx) error {
		n = 0
		// A change before the walk puts bbolt's cursor on what changes.
		if err := tx.Create(rec("b", over("p"), indexed("i"))); err != nil {
			return err
		}
		for id := range tx.Children("p") {
			n++
			if err := tx.Delete(id); err != nil {
				return err
			}
		}
		return tx.Delete("p")
	})
	require.Equal(t, 501, n)
	require.Empty(t, search(t, s, "i"))
}

func TestDamagedRecord(t *testing.T) {
	path := storePath(t)
	s := open(t, path, metadata.Options{})
	create(t, s, rec("p"), rec("bad", over("p"), indexed("i", "j"), func(r *metadata.Record) {
		r.Aliases, r.Blobs, r.Durable = []metadata.ID{"al"}, []metadata.Blob{{Digest: "d"}}, false
	}))
	create(t, s, rec("child", over("bad")), rec("other", over("p"), indexed("i")))
	update(t, s, func(tx *metadata.Tx) error { return tx.SetAttachment("other", "a", []byte("data")) })
	require.NoError(t, s.Close())
	raw(t, path, func(tx *bolt.Tx) error {
		flip := func(bucket string, k []byte) error {
			b := tx.Bucket([]byte(bucket))
			v := slices.Clone(b.Get(k))
			v[len(v)-1] ^= 1
			return b.Put(k, v)
		}
		k, _ := tx.Bucket([]byte("attachment")).Cursor().First()
		return errors.Join(flip("record", []byte("bad")), flip("attachment", slices.Clone(k)))
	})

	s, err := metadata.Open(t.Context(), path, metadata.Options{})
	require.NoError(t, err)
	defer s.Close()
	view(t, s, func(tx *metadata.Tx) {
		_, err := tx.Get("bad")
		require.True(t, errdefs.IsDataLoss(err))
		var d *metadata.DamagedError
		require.ErrorAs(t, err, &d)
		require.Equal(t, metadata.ID("bad"), d.ID)
		var good, bad []metadata.ID
		for r, err := range tx.Records() {
			if err == nil {
				good = append(good, r.ID)
			} else if errors.As(err, &d) {
				bad = append(bad, d.ID)
			}
		}
		require.Equal(t, []metadata.ID{"child", "other", "p"}, good)
		require.Equal(t, []metadata.ID{"bad"}, bad)
		require.Equal(t, []metadata.ID{"other"}, slices.Collect(tx.ByIndex("i")))
		require.Equal(t, []metadata.ID{"bad", "other"}, slices.Collect(tx.Children("p")), "the damaged one may need it")
		_, err = tx.Attachment("other", "a")
		require.True(t, errdefs.IsDataLoss(err))
	})
	codes := func() (out []string) {
		for _, f := range findings(t, s) {
			out = append(out, f.Code)
		}
		slices.Sort(out)
		return out
	}
	require.Equal(t, []string{metadata.CodeAttachmentDamaged, metadata.CodeRecordDamaged}, codes())
	err = s.Update(t.Context(), func(tx *metadata.Tx) error { return tx.Delete("bad") })
	require.True(t, errdefs.IsDataLoss(err))
	for _, r := range []*metadata.Record{rec("bad"), rec("n", func(r *metadata.Record) { r.Key = "key-bad" }), rec("al")} {
		err = s.Update(t.Context(), func(tx *metadata.Tx) error { return tx.Create(r) })
		require.Error(t, err, "what the damaged record has is still taken")
	}

	var keys []string
	update(t, s, func(tx *metadata.Tx) (err error) { keys, err = tx.Quarantine("bad"); return err })
	require.Equal(t, []string{"key-bad"}, keys)
	require.Equal(t, []string{metadata.CodeAttachmentDamaged, metadata.CodeParentMissing, metadata.CodeRecordQuarantined}, codes())
	view(t, s, func(tx *metadata.Tx) {
		_, err := tx.Get("bad")
		require.True(t, errdefs.IsNotFound(err))
		require.Empty(t, slices.Collect(tx.ByBlob(digest.Digest("d"))))
		require.Equal(t, []metadata.ID{"other"}, slices.Collect(tx.Children("p")))
		require.Equal(t, []metadata.ID{"child"}, slices.Collect(tx.Children("bad")))
	})
	update(t, s, func(tx *metadata.Tx) error { return errors.Join(tx.Delete("child"), tx.Create(rec("bad"))) })
}

// TestRowsOfDamagedTotals: a sum that cannot be kept up is computed again.
func TestDamagedTotal(t *testing.T) {
	path := storePath(t)
	s := open(t, path, metadata.Options{})
	create(t, s, rec("a"), rec("b"))
	require.NoError(t, s.Close())
	raw(t, path, func(tx *bolt.Tx) error {
		k, _ := tx.Bucket([]byte("total")).Cursor().First()
		return tx.Bucket([]byte("total")).Put(slices.Clone(k), []byte("rubbish"))
	})
	s = open(t, path, metadata.Options{})
	view(t, s, func(tx *metadata.Tx) {
		_, err := tx.Totals()
		require.True(t, errdefs.IsDataLoss(err))
	})
	create(t, s, rec("c"))
	view(t, s, func(tx *metadata.Tx) {
		got, err := tx.Totals()
		require.NoError(t, err)
		require.Equal(t, []metadata.Total{{Type: "regular", State: metadata.Finalized, Count: 3, Bytes: 3}}, got)
	})
}

func TestMeta(t *testing.T) {
	created := time.Date(2021, 1, 1, 0, 0, 0, 5, time.UTC)
	path := storePath(t)
	s := open(t, path, metadata.Options{Now: func() time.Time { return created }})
	want := metadata.Meta{Schema: metadata.SchemaVersion, Created: created}
	read := func() (m metadata.Meta) {
		view(t, s, func(tx *metadata.Tx) {
			var err error
			m, err = tx.Meta()
			require.NoError(t, err)
		})
		return m
	}
	require.Equal(t, want, read())
	want.Driver, want.Attributes, want.BootID, want.MigratedFrom = "overlay", "trusted.", "boot", "/x\xff"
	update(t, s, func(tx *metadata.Tx) error { return tx.SetMeta(want) })
	require.Equal(t, want, read())
	require.NoError(t, s.Close())
	s = open(t, path, metadata.Options{})
	require.Equal(t, want, read())
}

func TestTransactionEnds(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("a"))
	var kept *metadata.Tx
	view(t, s, func(tx *metadata.Tx) { kept = tx })
	_, err := kept.Get("a")
	require.ErrorIs(t, err, metadata.ErrClosed)
	require.NoError(t, s.View(t.Context(), func(tx *metadata.Tx) error {
		require.ErrorIs(t, tx.Create(rec("x")), metadata.ErrReadOnly)
		return nil
	}))
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("why")
	cancel(why)
	require.ErrorIs(t, s.View(ctx, func(*metadata.Tx) error { panic("not called") }), why)
	require.ErrorIs(t, s.Update(ctx, func(*metadata.Tx) error { panic("not called") }), why)
}

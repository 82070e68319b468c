package metadata_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/metadata"
)

type pair struct {
	Key string
	ID  metadata.ID
}

func prefixed(t testing.TB, s *metadata.Store, prefix string) []pair {
	t.Helper()
	var out []pair
	view(t, s, func(tx *metadata.Tx) {
		for k, id := range tx.ByIndexPrefix(prefix) {
			out = append(out, pair{k, id})
		}
	})
	return out
}

func TestIndexIsExact(t *testing.T) {
	s := fresh(t)
	create(t, s,
		rec("1", indexed("foo")),
		rec("2", indexed("foo::bar")),
		rec("3", indexed("foo", "fo")),
		rec("4", indexed("foobar")),
	)
	require.Equal(t, []metadata.ID{"1", "3"}, search(t, s, "foo"))
	require.Equal(t, []metadata.ID{"2"}, search(t, s, "foo::bar"))
	require.Equal(t, []metadata.ID{"3"}, search(t, s, "fo"))
	require.Empty(t, search(t, s, "f"))
	require.Empty(t, search(t, s, ""))
	require.Equal(t, []pair{{"foo", "1"}, {"foo", "3"}, {"foobar", "4"}, {"foo::bar", "2"}}, prefixed(t, s, "foo"))
	require.Equal(t, []pair{{"foo::bar", "2"}}, prefixed(t, s, "foo:"))
	require.Len(t, prefixed(t, s, ""), 5)
	require.Empty(t, prefixed(t, s, "fox"))
}

func TestIndexFollowsValues(t *testing.T) {
	s := fresh(t)
	create(t, s, rec("r", values(
		metadata.Value{Name: "a", Index: "shared"},
		metadata.Value{Name: "b", Index: "shared"},
		metadata.Value{Name: "c", Index: "old"},
	)))
	put := func(v ...metadata.Value) {
		r := get(t, s, "r")
		r.Values = v
		update(t, s, func(tx *metadata.Tx) error { _, err := tx.Put(r); return err })
	}

	put(metadata.Value{Name: "b", Index: "shared"}, metadata.Value{Name: "c", Index: "new"})
	require.Equal(t, []metadata.ID{"r"}, search(t, s, "shared"), "another value still declares it")
	require.Empty(t, search(t, s, "old"))
	require.Equal(t, []metadata.ID{"r"}, search(t, s, "new"))

	put(metadata.Value{Name: "b", Data: []byte("x")})
	require.Empty(t, search(t, s, "shared"))
	require.Empty(t, search(t, s, "new"))
	require.Empty(t, prefixed(t, s, ""))
}

func TestIndexTakesAnyBytes(t *testing.T) {
	keys := []string{
		"\x00", "\x00\x00", "a\x00b", "a", "a\x00", "::", "a::b", "::a", "\xff\xfe", "\xff", "é", "e\u0301",
		strings.Repeat("k", 255), strings.Repeat("k", 256), strings.Repeat("k", 257),
		strings.Repeat("long", 1024), strings.Repeat("long", 1024) + "x",
		strings.Repeat("m", metadata.MaxIndexLen),
	}
	s := fresh(t)
	longID := metadata.ID(strings.Repeat("i", metadata.MaxIDLen))
	for i, k := range keys {
		create(t, s, rec(metadata.ID("id"+string(rune('A'+i))), indexed(k)))
	}
	create(t, s, rec(longID, indexed(keys...)))
	for i, k := range keys {
		want := []metadata.ID{metadata.ID("id" + string(rune('A'+i))), longID}
		require.Equal(t, want, search(t, s, k), "key %q", k)
		var want2 []pair
		for j, other := range keys {
			if strings.HasPrefix(other, k) {
				want2 = append(want2, pair{other, metadata.ID("id" + string(rune('A'+j)))}, pair{other, longID})
			}
		}
		require.ElementsMatch(t, want2, prefixed(t, s, k), "prefix %q", k)
	}
	require.Len(t, prefixed(t, s, ""), 2*len(keys))

	err := s.Update(t.Context(), func(tx *metadata.Tx) error {
		return tx.Create(rec("x", indexed(strings.Repeat("m", metadata.MaxIndexLen+1))))
	})
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
	require.Empty(t, search(t, s, strings.Repeat("m", metadata.MaxIndexLen+1)))
	require.Empty(t, prefixed(t, s, strings.Repeat("m", metadata.MaxIndexLen+1)))
}

func TestChainIDIsIndexed(t *testing.T) {
	s := fresh(t)
	chain := func(r *metadata.Record) { r.ChainID = "sha256:abc" }
	create(t, s, rec("1", chain), rec("2", chain, indexed("chainid:sha256:abc")))
	require.Equal(t, []metadata.ID{"1", "2"}, search(t, s, "chainid:sha256:abc"))
	r := get(t, s, "2")
	r.ChainID = ""
	update(t, s, func(tx *metadata.Tx) error { _, err := tx.Put(r); return err })
	require.Equal(t, []metadata.ID{"1", "2"}, search(t, s, "chainid:sha256:abc"), "the value still declares it")
}

// TestForeignRows puts rows into the derived buckets that no store would
// write. Searches end, and return what is true.
func TestForeignRows(t *testing.T) {
	path := storePath(t)
	s := open(t, path, metadata.Options{})
	create(t, s,
		rec("r", indexed("foo"), func(r *metadata.Record) { r.Blobs = []metadata.Blob{{Digest: "d"}} }),
		rec("child", over("r")),
	)
	require.NoError(t, s.Close())

	foreign := map[string][][2]string{
		"index": {
			{"foo", ""},
			{"\x00", ""},
			{"\x00\x03foo", ""},
			{"\xff\xffzz", ""},
			{"\x00\x03foor", "x"},
			{"\x00\x03fooghost", ""},
			{"\x00\x03barr", ""},
			{"\x00\x09foo", ""},
			{"\x00\x03foo" + strings.Repeat("i", metadata.MaxIDLen+1), ""},
			{"\x00\x02\xffr", ""},
			{"\x7f\xfffoo", ""},
		},
		"child":     {{"\x00\x01rghost", ""}, {"\x00\x01r", ""}, {"r", ""}, {"\x00\x01rr", ""}},
		"blob":      {{"d", ""}, {"\x00\x01dghost", ""}, {"\x00\x01dchild", ""}},
		"unsettled": {{"ghost", ""}, {"r", ""}, {"child", "x"}},
		"snapshot":  {{"other", "ghost"}, {"third", "r"}, {"fourth", strings.Repeat("x", 5000)}},
		"alias":     {{"al", "ghost"}, {"bl", "r"}},
		"total":     {{"x", ""}, {"\x03\x07t", ""}},
		"meta":      {{"else", "x"}},
		"record":    {{strings.Repeat("x", metadata.MaxIDLen+1), "x"}},
	}
	raw(t, path, func(tx *bolt.Tx) error {
		for bucket, rows := range foreign {
			for _, r := range rows {
				if err := tx.Bucket([]byte(bucket)).Put([]byte(r[0]), []byte(r[1])); err != nil {
					return err
				}
			}
		}
		for _, b := range []string{"index", "blob", "snapshot", "record", "attachment", "child"} {
			if _, err := tx.Bucket([]byte(b)).CreateBucket([]byte("\x00\x01nested")); err != nil {
				return err
			}
		}
		_, err := tx.CreateBucket([]byte("elsewhere"))
		return err
	})

	s, err := metadata.Open(t.Context(), path, metadata.Options{})
	require.NoError(t, err)
	defer s.Close()
	require.Equal(t, []metadata.ID{"r"}, search(t, s, "foo"))
	require.Empty(t, search(t, s, "bar"))
	require.Equal(t, []pair{{"foo", "r"}}, prefixed(t, s, ""))
	require.Equal(t, []pair{{"foo", "r"}}, prefixed(t, s, "fo"))
	view(t, s, func(tx *metadata.Tx) {
		require.Equal(t, []metadata.ID{"child"}, slices.Collect(tx.Children("r")))
		require.Equal(t, []metadata.ID{"r"}, slices.Collect(tx.ByBlob(digest.Digest("d"))))
		require.Empty(t, slices.Collect(tx.Unsettled()))
		for _, k := range []string{"other", "third", "fourth"} {
			_, err := tx.ByKey(k)
			require.True(t, errdefs.IsNotFound(err), "%s: %v", k, err)
		}
		for _, a := range []metadata.ID{"al", "bl"} {
			_, err := tx.Get(a)
			require.True(t, errdefs.IsNotFound(err))
			_, err = tx.Resolve(a)
			require.True(t, errdefs.IsNotFound(err))
		}
		n := 0
		for r, err := range tx.Records() {
			if err == nil {
				require.NotNil(t, r)
				n++
			}
		}
		require.Equal(t, 2, n)
	})
	// Each foreign row is found, and by its place. A stale row of a record
	// that does not exist is stale, one that cannot be read is foreign.
	found := map[[2]string]bool{}
	for _, f := range findings(t, s) {
		found[[2]string{f.Bucket, f.Key}] = true
		require.Contains(t, []string{metadata.CodeForeignKey, metadata.CodeRowStale, metadata.CodeRowMissing}, f.Code, f.Message)
	}
	for bucket, rows := range foreign {
		for _, r := range rows {
			require.True(t, found[[2]string{bucket, r[0]}], "bucket %s, key %q", bucket, r[0])
		}
	}
	require.True(t, found[[2]string{"elsewhere", ""}] || found[[2]string{"elsewhere", "elsewhere"}])

	// A ghost is no child, and the store can still be written.
	update(t, s, func(tx *metadata.Tx) error { return tx.Delete("child") })
	update(t, s, func(tx *metadata.Tx) error { return tx.Delete("r") })
}

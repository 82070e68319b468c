package metadata

import (
	"bytes"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/lamina-build/lamina/metadata/internal/recordpb"
)

// FuzzDecodeRecord: no bytes make it panic, the generated messages and a search
// read the same of them, and what it takes it writes again to the same effect.
func FuzzDecodeRecord(f *testing.F) {
	for _, r := range []*Record{
		{ID: "a", State: Committed, Op: Base},
		{ID: "new", row: "a", State: Committed, ChainID: "c", Values: []Value{{Index: "k"}, {Index: "l"}, {Name: "m"}}},
		{ID: "a", Labels: map[string]string{"a": "b"}, Values: []Value{{Name: "x", Data: []byte{1}}}, Blobs: []Blob{{Digest: "d"}}},
	} {
		b, err := encodeRecord(r)
		require.NoError(f, err)
		f.Add(b[frameHeader:])
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, payload []byte) {
		if r, err := decodeRecord("a", payload); err == nil {
			t.Fatalf("bytes without a frame decode as %+v", r)
		}
		requireSameDecoding(t, payload)
		r, err := decodeRecord("a", frame([]byte("a"), payload))
		if err != nil {
			require.ErrorIs(t, err, ErrDamaged)
			return
		}
		b, err := encodeRecord(r)
		require.NoError(t, err)
		again, err := decodeRecord("a", b)
		require.NoError(t, err)
		b2, err := encodeRecord(again)
		require.NoError(t, err)
		require.Equal(t, b, b2)
		for _, key := range append(indexKeys(again), "", "no key of it") {
			id, ok := declares("a", b, key)
			require.Equal(t, slices.Contains(indexKeys(again), key), ok, "index key %q", key)
			require.Equal(t, again.ID, id)
		}
	})
}

// FuzzIndexKeys: whatever the keys are, an exact search finds its own key and
// a prefix its extensions.
func FuzzIndexKeys(f *testing.F) {
	f.Add("foo", "foo::bar", "fo")
	f.Add("\x00", "", "\xff\xff")
	f.Add("a", "a\x00", "\x00\x01a")
	s, err := Open(f.Context(), filepath.Join(f.TempDir(), "s.db"), Options{FlushInterval: -1})
	require.NoError(f, err)
	f.Cleanup(func() { require.NoError(f, s.Close()) })
	s.now.Load().db.NoSync = true
	undo := errors.New("undo")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		keys := map[ID]string{"1": a, "2": b, "3": c}
		err := s.Update(t.Context(), func(tx *Tx) error {
			for id, k := range keys {
				err := tx.Create(&Record{ID: id, State: Committed, Op: Base, Values: []Value{{Index: k}}})
				if err != nil {
					return err
				}
			}
			for _, k := range keys {
				var exact, prefix []ID
				for id, other := range keys {
					if other != "" && other == k {
						exact = append(exact, id)
					}
					if other != "" && strings.HasPrefix(other, k) {
						prefix = append(prefix, id)
					}
				}
				require.ElementsMatch(t, exact, slices.Collect(tx.ByIndex(k)))
				var got []ID
				for key, id := range tx.ByIndexPrefix(k) {
					require.Equal(t, keys[id], key)
					got = append(got, id)
				}
				require.ElementsMatch(t, prefix, got)
			}
			return undo
		})
		if len(a) <= MaxIndexLen && len(b) <= MaxIndexLen && len(c) <= MaxIndexLen {
			require.ErrorIs(t, err, undo)
		}
	})
}

// TestFutureFields: what a newer version wrote survives a rewrite by this
// one, in the record and in the messages inside it.
func TestFutureFields(t *testing.T) {
	future := protowire.AppendString(protowire.AppendTag(nil, 1000, protowire.BytesType), "from the future")
	m := recordToPB(&Record{
		ID: "r", State: Committed, Op: Base, Revision: 1,
		Values: []Value{{Name: "v"}}, Blobs: []Blob{{Digest: "d"}},
	})
	for _, msg := range []proto.Message{m, m.Values[0], m.Blobs[0]} {
		msg.ProtoReflect().SetUnknown(future)
	}
	payload, err := proto.Marshal(m)
	require.NoError(t, err)
	metaPayload, err := proto.Marshal(&recordpb.Meta{})
	require.NoError(t, err)
	metaPayload = append(metaPayload, future...)

	s, err := Open(t.Context(), filepath.Join(t.TempDir(), "s.db"), Options{})
	require.NoError(t, err)
	count := func() (n int) {
		require.NoError(t, s.View(t.Context(), func(tx *Tx) error {
			for _, row := range [][2]string{{bucketRecord, "r"}, {bucketRecord, "n"}, {bucketMeta, keyStore}} {
				v, _, err := tx.get(row[0], []byte(row[1]))
				require.NoError(t, err)
				n += bytes.Count(v, future)
			}
			return nil
		}))
		return n
	}
	require.NoError(t, s.Update(t.Context(), func(tx *Tx) error {
		return errors.Join(
			tx.Create(&Record{ID: "r", State: Committed, Op: Base, Values: []Value{{Name: "v"}}, Blobs: []Blob{{Digest: "d"}}}),
			tx.put(bucketRecord, []byte("r"), frame([]byte("r"), payload)),
			tx.put(bucketMeta, []byte(keyStore), frame([]byte(keyStore), metaPayload)))
	}))
	require.Equal(t, 4, count())
	change := func(fn func(tx *Tx, r *Record) error) {
		require.NoError(t, s.Update(t.Context(), func(tx *Tx) error {
			r, err := tx.Get("r")
			if err != nil {
				return err
			}
			return fn(tx, r)
		}))
	}
	change(func(tx *Tx, r *Record) error { r.Description = "x"; _, err := tx.Put(r); return err })
	require.Equal(t, 4, count())
	change(func(tx *Tx, _ *Record) error { return tx.SetAttachment("r", "a", nil) })
	change(func(tx *Tx, _ *Record) error {
		m, err := tx.Meta()
		m.BootID = "b"
		return errors.Join(err, tx.SetMeta(m))
	})
	require.Equal(t, 4, count())
	// A caller that makes the record anew keeps what is not inside lists.
	change(func(tx *Tx, r *Record) error {
		_, err := tx.Put(&Record{ID: "r", State: Committed, Op: Base, Revision: r.Revision, Values: r.Values, Blobs: r.Blobs})
		return err
	})
	require.Equal(t, 4, count())
	change(func(tx *Tx, r *Record) error {
		r.ID = "n"
		return tx.Replace("r", r)
	})
	require.Equal(t, 4, count())
	require.NoError(t, s.Close())
}

// TestDamageIsNoticed flips each bit of a framed record.
func TestDamageIsNoticed(t *testing.T) {
	r := &Record{ID: "r", State: Committed, Op: Base, Type: "t", Values: []Value{{Name: "v", Data: []byte("data")}}}
	b, err := encodeRecord(r)
	require.NoError(t, err)
	_, err = decodeRecord("other", b)
	require.ErrorIs(t, err, ErrDamaged, "the id is part of the sum")
	for i := range 8 * len(b) {
		c := bytes.Clone(b)
		c[i/8] ^= 1 << (i % 8)
		_, err := decodeRecord("r", c)
		require.ErrorIs(t, err, ErrDamaged, "bit %d", i)
	}
	for n := range len(b) {
		_, err := decodeRecord("r", b[:n])
		require.ErrorIs(t, err, ErrDamaged, "%d bytes", n)
	}
}

package migrate_test

import (
	"context"
	"strconv"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// look migrates a state and looks at one of its records.
func look(t *testing.T, b *legacytest.Builder, id cache.ID, see func(m *cache.Manager, rec *cache.Record)) {
	t.Helper()
	require.NoError(t, b.Write())
	run(t, b.Dir, migrate.Options{})
	use(t, b.Dir, func(_ context.Context, m *cache.Manager) {
		rec, err := m.Lookup(t.Context(), id)
		require.NoError(t, err)
		see(m, rec)
		check(t, m)
	})
}

// Which of the two rows of a pair each field is from.
func TestFieldsOfAPair(t *testing.T) {
	type row = legacytest.Row
	ns := func(n int64) time.Time { return time.Unix(0, n).UTC() }
	tests := map[string]struct {
		imm, mut row
		see      func(t *testing.T, rec *cache.Record)
	}{
		"policy, of the mutable": {nil, nil, func(t *testing.T, rec *cache.Record) { require.True(t, rec.Retain) }},
		"policy, of the immutable": {
			row{"cache.cachePolicy": 1},
			row{"cache.cachePolicy": nil},
			func(t *testing.T, rec *cache.Record) { require.True(t, rec.Retain) },
		},
		"uses, the larger count and the later time": {
			row{"cache.usageCount": 7, "cache.lastUsedAt": 10},
			row{"cache.usageCount": 3, "cache.lastUsedAt": 20},
			func(t *testing.T, rec *cache.Record) {
				require.Equal(t, uint64(7), rec.UsageCount)
				require.Equal(t, ns(20), rec.LastUsed)
			},
		},
		"created, when it was committed": {
			row{"cache.createdAt": int64(30)},
			row{"cache.createdAt": int64(20)},
			func(t *testing.T, rec *cache.Record) { require.Equal(t, ns(30), rec.Created) },
		},
		"what it is called, by the immutable": {
			row{"cache.description": "imm", "cache.recordType": "frontend", "cache.imageRefs": []string{"i"}},
			row{"cache.description": "mut", "cache.recordType": "internal", "cache.imageRefs": []string{"m"}},
			func(t *testing.T, rec *cache.Record) {
				require.Equal(t, []string{"imm", "frontend", "i"}, []string{rec.Description, rec.Type, rec.ImageRefs[0]})
			},
		},
		"what it is called, by the mutable alone": {
			nil,
			row{"cache.description": "mut", "cache.recordType": "internal", "cache.imageRefs": []string{"m"}},
			func(t *testing.T, rec *cache.Record) {
				require.Equal(t, []string{"mut", "internal", "m"}, []string{rec.Description, rec.Type, rec.ImageRefs[0]})
			},
		},
		"size": {
			row{"snapshot.size": 5},
			row{"snapshot.size": 6},
			func(t *testing.T, rec *cache.Record) { require.Equal(t, int64(5), rec.Size) },
		},
		"size, of the mutable": {
			nil, row{"snapshot.size": 6}, func(t *testing.T, rec *cache.Record) { require.Equal(t, int64(6), rec.Size) },
		},
		"size, of none": {
			nil, nil, func(t *testing.T, rec *cache.Record) { require.Equal(t, metadata.SizeUnknown, rec.Size) },
		},
		"values of both, with their keys": {
			row{"k": legacytest.Indexed{Value: "imm", Index: "k:imm"}, "git-snapshot": legacytest.Indexed{Value: "s", Index: "git-snapshot::s"}},
			row{"k": legacytest.Indexed{Value: "mut", Index: "k:mut"}, "local.sharedKey": legacytest.Indexed{Value: "l", Index: "local.sharedKey:l"}, "gone": nil},
			func(t *testing.T, rec *cache.Record) {
				got := map[string]string{}
				for _, v := range rec.Values {
					got[v.Name] = v.Index
				}
				require.Equal(t, map[string]string{"k": "k:imm", "git-snapshot": "git-snapshot::s", "local.sharedKey": "local.sharedKey:l"}, got)
			},
		},
		"the key of a value that has a meaning": {
			row{"cache.description": legacytest.Indexed{Value: "d", Index: "called:d"}},
			row{"cache.usageCount": legacytest.Indexed{Value: 4, Index: "used:4"}},
			func(t *testing.T, rec *cache.Record) {
				require.Equal(t, "d", rec.Description)
				require.Len(t, rec.Values, 2)
				require.Equal(t, "called:d", rec.Values[0].Index)
				require.Equal(t, "used:4", rec.Values[1].Index)
			},
		},
		"parent, of the mutable alone, as up to v0.9": {
			row{"cache.parent": nil},
			nil,
			func(t *testing.T, rec *cache.Record) { require.Equal(t, []metadata.ID{"p"}, rec.Parents) },
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			b := legacytest.NewBuilder(memory(t), "native")
			b.Finalized("p", "", nil)
			b.Pair("i", "m", "p")
			for id, values := range map[string]row{"i": tt.imm, "m": tt.mut} {
				for key, value := range values {
					b.Value(id, key, value)
				}
			}
			look(t, b, "i", func(_ *cache.Manager, rec *cache.Record) {
				require.Equal(t, metadata.Committed, rec.State)
				require.Equal(t, "m-w", rec.Key)
				tt.see(t, rec)
			})
		})
	}
}

// Of records that name one snapshot the extracted one stays, else the older,
// else the one with the smaller id; the blobs of all are its blobs.
func TestWhichTwinStays(t *testing.T) {
	tests := map[string]struct {
		lazy    [2]bool
		created [2]int64
		stays   cache.ID
	}{
		"the extracted one":  {[2]bool{true, false}, [2]int64{1, 2}, "b"},
		"the older":          {[2]bool{false, false}, [2]int64{2, 1}, "b"},
		"the older, of lazy": {[2]bool{true, true}, [2]int64{2, 1}, "b"},
		"the smaller id":     {[2]bool{false, false}, [2]int64{1, 1}, "a"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			b := legacytest.NewBuilder(memory(t), "native")
			diff := digest.FromString("diff")
			for i, id := range []string{"a", "b"} {
				blob := b.Blob("form "+strconv.Itoa(i), nil)
				b.Row(id, legacytest.Row{
					"snapshot.committed": true, "cache.snapshot": layerName + "00", "cache.blobonly": tt.lazy[i], "cache.createdAt": tt.created[i],
					"cache.blob": blob, "cache.diffID": diff, "cache.chainID": diff, "cache.usageCount": i,
				})
				b.Lease(id, []string{layerName + "00"}, blob)
			}
			b.Snapshot(layerName+"00", "", legacytest.Committed)
			look(t, b, "a", func(m *cache.Manager, rec *cache.Record) {
				require.Equal(t, tt.stays, rec.ID)
				require.Len(t, rec.Blobs, 2)
				require.Len(t, rec.Aliases, 1)
				require.Equal(t, uint64(1), rec.UsageCount)
				same, err := m.Lookup(t.Context(), "b")
				require.NoError(t, err)
				require.Equal(t, rec, same)
			})
		})
	}
}

// Only the name that v0.34 gives says that a layer was compared with its
// DiffID; forms of a blob are found by its labels.
func TestWhatIsKnownOfALayer(t *testing.T) {
	diff := digest.FromString("diff")
	for name, verified := range map[string]bool{layerName + "00": true, diff.String(): false} {
		b := legacytest.NewBuilder(memory(t), "native")
		form := b.Blob("form", map[string]string{"buildkit.io/blob/mediatype": "m", "buildkit.io/blob/annotation.a": "b"})
		other := b.Blob("another layer's", map[string]string{"buildkit.io/blob/mediatype": "m", "containerd.io/uncompressed": digest.FromString("x").String()})
		blob := b.Blob("blob", map[string]string{
			"containerd.io/gc.ref.content.blob-" + form.String(): form.String(), "containerd.io/gc.ref.content.blob-" + other.String(): other.String(),
		})
		b.Row("l", legacytest.Row{
			"snapshot.committed": true, "cache.snapshot": name, "cache.blob": blob, "cache.diffID": diff, "cache.chainID": diff, "cache.layer.urls": []string{"u"},
		})
		b.Snapshot(name, "", legacytest.Committed)
		b.Lease("l", []string{name}, blob)
		look(t, b, "l", func(_ *cache.Manager, rec *cache.Record) {
			require.Equal(t, verified, rec.Verified)
			require.Len(t, rec.Blobs, 2)
			require.Equal(t, []string{"u"}, rec.Blobs[0].URLs)
			require.Equal(t, map[string]string{"a": "b"}, rec.Blobs[1].Annotations)
			require.Equal(t, form, rec.Blobs[1].Digest)
		})
	}
}

// Up to v0.6 the blob is in a mapping, and nobody has written down chain ids.
func TestLayersOfV1(t *testing.T) {
	b := legacytest.NewBuilder(memory(t), "native")
	var diffs []digest.Digest
	parent := ""
	for _, id := range []string{"sha256:" + digest.FromString("low").Encoded(), "top"} {
		diff := digest.FromString("diff of " + id)
		diffs = append(diffs, diff)
		blob := b.Blob("blob of "+id, nil)
		b.Finalized(id, parent, legacytest.Row{
			"blobmapping.blob": legacytest.Indexed{Value: map[string]any{"Blobsum": blob, "DiffID": diff}, Index: "blobmap::" + blob.String()},
		})
		parent = id
	}
	b.Older()
	look(t, b, "top", func(m *cache.Manager, rec *cache.Record) {
		require.Equal(t, identity.ChainID(diffs), rec.ChainID)
		require.Equal(t, diffs[1], rec.DiffID)
		require.Equal(t, "application/vnd.docker.image.rootfs.diff.tar.gzip", rec.Blobs[0].MediaType)
		require.Equal(t, []metadata.ID{metadata.ID("sha256:" + digest.FromString("low").Encoded())}, rec.Parents)
		found, err := m.Search(t.Context(), "blobmap::"+rec.Blobs[0].Digest.String())
		require.NoError(t, err)
		require.Equal(t, []cache.ID{"top"}, found)
	})
}

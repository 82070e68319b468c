package migrate_test

import (
	"maps"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// want says what must become of a row: its new state, or why it is dropped.
type want map[string]string

const layerName = "buildkit-layer-snapshot-v1-sha256-"

// What a daemon, or its end, can leave, and what becomes of it.
func TestCases(t *testing.T) {
	type row = legacytest.Row
	tests := map[string]struct {
		build func(b *legacytest.Builder)
		want  want
		// freed and left are counts of steps.
		freed, left int
	}{
		"new, before the row": {
			build: func(b *legacytest.Builder) {
				b.Snapshot("m", "", legacytest.Active)
				b.Lease("m", []string{"m"})
			},
			freed: 1,
		},
		"commit, before the last transaction": {
			build: func(b *legacytest.Builder) {
				b.Mutable("m", "", true)
				b.Row("i", row{"cache.description": "d"})
			},
			want: want{"m": "mutable", "i": "its snapshot is gone"},
		},
		"commit done, nobody retains the pair": {
			build: func(b *legacytest.Builder) {
				b.Pair("i", "m", "")
				b.Value("m", "cache.cachePolicy", nil)
			},
			want: want{"i": "committed", "m": ""},
		},
		"finalize, driver committed, row not": {
			build: func(b *legacytest.Builder) {
				b.Finalized("i", "", row{"cache.equalMutable": "m"})
				b.Row("m", row{"cache.snapshot": "m", "cache.cachePolicy": 1, "local.sharedKey": legacytest.Indexed{Value: "k", Index: "local.sharedKey:k"}})
				b.Lease("m", []string{"m"})
			},
			want: want{"i": "finalized", "m": "finalized in the driver already"},
		},
		"finalize, mutable removed first": {
			build: func(b *legacytest.Builder) { b.Finalized("i", "", row{"cache.equalMutable": "m"}) },
			want:  want{"i": "finalized"},
		},
		"mutable row and snapshots gone": {
			build: func(b *legacytest.Builder) {
				b.Row("i", row{"snapshot.committed": true, "cache.snapshot": "i", "cache.equalMutable": "m", "cache.cachePolicy": 1})
			},
			want: want{"i": "its mutable m has no row"},
		},
		"finalize, mutable not removed": {
			build: func(b *legacytest.Builder) {
				b.Finalized("i", "", row{"cache.equalMutable": nil})
				b.Row("m", row{"cache.snapshot": "m", "cache.cachePolicy": 1})
				b.Lease("m", []string{"m"})
			},
			want: want{"i": "finalized", "m": "its snapshot is gone"},
		},
		"reopened": {
			build: func(b *legacytest.Builder) { b.Mutable("m", "", true) },
			want:  want{"m": "mutable"},
		},
		"prune marked the mutable of a pair": {
			build: func(b *legacytest.Builder) {
				b.Pair("i", "m", "")
				b.Value("m", "cache.deleted", true)
				b.Row("c", row{"snapshot.committed": true, "cache.parent": "i", "cache.blobonly": true})
			},
			want:  want{"i": "its mutable m is marked deleted", "m": "marked deleted", "c": "blob is absent"},
			freed: 1,
		},
		"prune marked the immutable of a pair": {
			build: func(b *legacytest.Builder) {
				b.Pair("i", "m", "")
				b.Value("i", "cache.deleted", true)
			},
			want: want{"i": "marked deleted", "m": "mutable"},
		},
		"prune marked a finalized one": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", row{"cache.deleted": true})
				b.Finalized("c", "p", nil)
				b.Finalized("g", "c", nil)
			},
			want: want{"p": "marked deleted", "c": "its parent p does not come along", "g": "its parent c does not come along"},
			left: 3, // the row that marks the parent goes, but its children's stay for now
		},
		"remove, lease deleted, row not": {
			build: func(b *legacytest.Builder) {
				b.Finalized("x", "", nil)
				b.Lease("x", nil)
			},
			want: want{"x": "no lease holds it"},
			left: 1,
		},
		"lease deleted, but retained": {
			build: func(b *legacytest.Builder) {
				b.Finalized("x", "", row{"cache.cachePolicy": 1})
				b.Lease("x", nil)
			},
			want: want{"x": "finalized"},
		},
		"lease deleted, but a child lies on it": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", nil)
				b.Lease("p", nil)
				b.Finalized("c", "p", nil)
			},
			want: want{"p": "finalized", "c": "finalized"},
		},
		"only a temporary lease": {
			build: func(b *legacytest.Builder) {
				b.Finalized("x", "", nil)
				b.Temporary("x", "x")
			},
			want: want{"x": "no lease holds it"},
			left: 1,
		},
		"garbage": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", nil)
				b.Snapshot("p-view", "p", legacytest.View)
				b.Temporary("p-view", "p-view")
				b.Snapshot("old", "", legacytest.Committed)
				b.Snapshot("nameless", "", legacytest.Active)
				b.Unname()
			},
			want:  want{"p": "finalized"},
			freed: 3,
		},
		"extract, driver committed, row not": {
			build: func(b *legacytest.Builder) {
				d := b.Blob("layer", nil)
				name := layerName + "00"
				b.Row("l", row{"snapshot.committed": true, "cache.blobonly": true, "cache.snapshot": name, "cache.blob": d, "cache.diffID": d, "cache.chainID": d})
				b.Snapshot(name, "", legacytest.Committed)
				b.Lease("l", []string{name}, d)
			},
			want: want{"l": "finalized"},
		},
		"extract, half applied": {
			build: func(b *legacytest.Builder) {
				d := b.Blob("layer", nil)
				b.Row("l", row{"snapshot.committed": true, "cache.blobonly": true, "cache.snapshot": layerName + "00", "cache.blob": d, "cache.diffID": d, "cache.chainID": d})
				b.Lease("l", []string{layerName + "00"}, d)
				b.Snapshot("extract-123 sha256:00", "", legacytest.Active)
				b.Temporary("123-x", "extract-123 sha256:00")
			},
			want:  want{"l": "lazy"},
			freed: 1,
		},
		"lazy layer without its blob": {
			build: func(b *legacytest.Builder) {
				d := b.Blob("layer", nil)
				b.LoseBlob(d)
				b.Row("l", row{"snapshot.committed": true, "cache.blobonly": true, "cache.blob": d, "cache.diffID": d})
				b.Lease("l", []string{"l"}, d)
				b.Row("m", row{"cache.mergeParents": []string{"l", "l"}})
				b.Lease("m", []string{"m"})
			},
			want: want{"l": "blob is absent", "m": "its parent l does not come along"},
		},
		"lazy layer whose blob is cut off": {
			build: func(b *legacytest.Builder) {
				d := b.Blob("layer", nil)
				b.CutBlob(d)
				b.Row("l", row{"snapshot.committed": true, "cache.blobonly": true, "cache.blob": d, "cache.diffID": d, "cache.chainID": d})
				b.Lease("l", []string{"l"}, d)
			},
			want: want{"l": "blob is absent"},
		},
		"no blob, no digest": {
			build: func(b *legacytest.Builder) {
				b.Row("l", row{"snapshot.committed": true, "cache.blobonly": true, "cache.blob": ""})
				b.Lease("l", []string{"l"})
			},
			want: want{"l": "blob is absent"},
		},
		"data of an extracted layer gone, blob here": {
			build: func(b *legacytest.Builder) {
				d := b.Blob("layer", nil)
				b.Finalized("l", "", row{"cache.blob": d, "cache.diffID": d, "cache.chainID": d})
				b.LoseData()
			},
			want: want{"l": "lazy"},
		},
		"data gone": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", nil)
				b.LoseData()
				b.Finalized("c", "p", nil)
			},
			want: want{"p": "the data of its snapshot is gone", "c": "does not come along"},
			left: 1,
		},
		"the snapshotter has forgotten it": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", nil)
				b.LoseKey()
			},
			want:  want{"p": "its snapshot is gone"},
			freed: 1, // the directory is nobody's
		},
		"remote snapshot": {
			build: func(b *legacytest.Builder) {
				d := b.Blob("layer", nil)
				b.Finalized("r", "", nil)
				b.SnapshotLabel("containerd.io/snapshot/remote", "")
				b.Finalized("s", "", row{"cache.blob": d, "cache.diffID": d})
				b.SnapshotLabel("containerd.io/snapshot/remote", "")
			},
			want: want{"r": "kept by a remote snapshotter", "s": "lazy"},
			left: 2,
		},
		"merge and diff without the committed flag": {
			build: func(b *legacytest.Builder) {
				b.Finalized("a", "", nil)
				b.Finalized("z", "a", nil)
				b.Row("m", row{"cache.mergeParents": []string{"a", "z"}})
				b.Lease("m", []string{"m"})
				b.Row("d", row{"cache.lowerDiffParent": "z"})
				b.Lease("d", []string{"d"})
			},
			want: want{"a": "finalized", "z": "finalized", "m": "lazy", "d": "lazy"},
		},
		"empty snapshot name means the id": {
			build: func(b *legacytest.Builder) { b.Finalized("x", "", row{}); b.Value("x", "cache.snapshot", "") },
			want:  want{"x": "finalized"},
		},
		"a mutable that nothing retains": {
			build: func(b *legacytest.Builder) { b.Mutable("m", "", false) },
			want:  want{"m": "nothing retains"},
			left:  1,
		},
		"two immutables name one mutable": {
			build: func(b *legacytest.Builder) {
				b.Pair("old", "m", "")
				b.Row("young", row{"snapshot.committed": true, "cache.snapshot": "young", "cache.equalMutable": "m"})
			},
			want: want{"young": "committed", "old": "a newer record, young", "m": ""},
		},
		"what a pair names as its mutable is immutable": {
			build: func(b *legacytest.Builder) {
				b.Pair("i", "m", "")
				b.Row("a", row{"snapshot.committed": true, "cache.snapshot": "a", "cache.equalMutable": "i"})
				b.Row("z", row{"snapshot.committed": true, "cache.snapshot": "z", "cache.equalMutable": "z"})
			},
			want: want{"i": "committed", "m": "", "a": "i, is immutable", "z": "z, is immutable"},
		},
		"a pair on what is lost": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", nil)
				b.LoseData()
				b.Pair("i", "m", "p")
			},
			want: want{"p": "data of its snapshot is gone", "i": "its parent p", "m": "i, which it was going to be a part of"},
			left: 1,
		},
		"two snapshots in one directory": {
			build: func(b *legacytest.Builder) {
				d := b.Blob("layer", nil)
				b.Finalized("a", "", row{"cache.blob": d, "cache.diffID": d, "cache.chainID": d})
				b.Finalized("b", "", nil)
				b.ShareData()
				b.Finalized("c", "b", nil)
				b.Finalized("fine", "", nil)
			},
			want: want{"a": "lazy", "b": "data of its snapshot is gone", "c": "its parent b", "fine": "finalized"},
			left: 1, // nobody knows whose the shared directory is, so that it is not even listed
		},
		"lazy merges that name one snapshot": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", nil)
				b.Finalized("q", "", nil)
				for id, in := range map[string][]string{"one": {"p", "q"}, "two": {"q", "p"}} {
					b.Row(id, row{"cache.mergeParents": in, "cache.snapshot": "merged"})
					b.Lease(id, []string{"merged"})
				}
			},
			want: want{"p": "finalized", "q": "finalized", "one": "lazy", "two": "lazy"},
		},
		"merges of one snapshot": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", nil)
				b.Finalized("q", "", nil)
				for id, in := range map[string][]string{"one": {"p", "q"}, "two": {"q", "p"}, "zwei": {"q", "p"}} {
					b.Row(id, row{"cache.mergeParents": in, "cache.snapshot": "merged", "cache.createdAt": int64(len(id))})
					b.Lease(id, []string{"merged"})
				}
				b.Snapshot("merged", "q", legacytest.Committed)
			},
			want: want{"p": "finalized", "q": "finalized", "one": "finalized", "two": "is another layer", "zwei": "is another layer"},
		},
		"circle": {
			build: func(b *legacytest.Builder) {
				b.Finalized("a", "", row{"cache.parent": "b"})
				b.Finalized("b", "", row{"cache.parent": "a"})
				b.Finalized("c", "", row{"cache.parent": "c"})
			},
			want: want{"a": "", "b": "", "c": "own ancestor"},
			left: 3,
		},
		"parent is not what the snapshot lies on": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", nil)
				b.Finalized("q", "", nil)
				b.Finalized("c", "p", nil)
				b.Value("c", "cache.parent", "q")
			},
			want: want{"p": "finalized", "q": "finalized", "c": "does not lie on that of its parent"},
			left: 1,
		},
		"parent has no row": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", nil)
				b.Finalized("c", "p", row{})
				b.Value("c", "cache.parent", "lost")
			},
			want: want{"p": "finalized", "c": "its parent lost has no row"},
			left: 1,
		},
		"damaged values": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", row{"cache.description": []byte("{")})
				b.Finalized("c", "p", nil)
				b.Finalized("o", "", row{"cache.blob": "no digest"})
				b.Finalized("ok", "", nil)
			},
			want: want{"p": "its row is damaged", "c": "does not come along", "o": "is no digest", "ok": "finalized"},
			left: 3,
		},
		"stale index rows and externals of nobody": {
			build: func(b *legacytest.Builder) {
				b.Finalized("x", "", row{"cache-dir": legacytest.Indexed{Value: "d:x", Index: "cache-dir:d:x"}})
				b.External("nobody", "filelist", []byte("[]"))
				b.External("x", "filelist", []byte("[]"))
			},
			want: want{"x": "finalized"},
		},
		"twins": {
			build: func(b *legacytest.Builder) {
				d, e := b.Blob("gz", nil), b.Blob("tar", nil)
				for id, blob := range map[string]any{"x": d, "y": e} {
					b.Row(id, row{
						"snapshot.committed": true, "cache.snapshot": "layer", "cache.blob": blob, "cache.diffID": e, "cache.blobonly": id == "y",
						"cache.chainID":     legacytest.Indexed{Value: e, Index: "chainid:" + e.String()},
						"cache.blobChainID": legacytest.Indexed{Value: id, Index: "blobchainid:" + id},
					})
					b.Lease(id, []string{"layer"})
				}
				b.Snapshot("layer", "", legacytest.Committed)
				b.Finalized("c", "layer", row{})
				b.Value("c", "cache.parent", "y")
			},
			want: want{"x": "finalized", "y": "alias", "c": "finalized"},
		},
		"twins on what is lost": {
			build: func(b *legacytest.Builder) {
				b.Finalized("p", "", row{"cache.deleted": true})
				d, e := b.Blob("gz", nil), b.Blob("tar", nil)
				for id, blob := range map[string]any{"x": d, "y": e} {
					b.Row(id, row{
						"snapshot.committed": true, "cache.snapshot": "layer", "cache.blob": blob, "cache.diffID": e,
						"cache.chainID": e, "cache.parent": "p", "cache.createdAt": int64(1),
					})
					b.Lease(id, []string{"layer"})
				}
				b.Snapshot("layer", "p", legacytest.Committed)
			},
			want: want{"p": "marked deleted", "x": "its parent p", "y": "x, which it was going to be a part of"},
			left: 2,
		},
	}
	for name, tt := range tests {
		for _, driver := range []string{"overlayfs", "native"} {
			t.Run(name+"/"+driver, func(t *testing.T) {
				needsRoot(t)
				b := legacytest.NewBuilder(t.TempDir(), driver)
				tt.build(b)
				require.NoError(t, b.Write())
				before := checksums(t, b.Dir)
				planned := run(t, b.Dir, migrate.Options{DryRun: true})
				report := run(t, b.Dir, migrate.Options{})
				require.Equal(t, before, checksums(t, b.Dir))
				require.Equal(t, planned.Plan.Steps, report.Plan.Steps, "the real run does what the dry one said")
				comparePlan(t, report.Plan, tt.want)
				require.Equal(t, tt.freed, count(report.Plan, migrate.Free), "freed")
				require.Equal(t, tt.left, count(report.Plan, migrate.Leave), "left")
				m := open(t, b.Dir)
				compareStore(t, m, report.Plan)
				check(t, m)
			})
		}
	}
}

func count(p *migrate.Plan, action migrate.Action) (n int) {
	for _, s := range p.Steps {
		if s.Action == action {
			n++
		}
	}
	return n
}

// comparePlan looks for a step of each row that says what is wanted.
func comparePlan(t *testing.T, p *migrate.Plan, want want) {
	t.Helper()
	rows := map[string]migrate.Step{}
	for _, s := range p.Steps {
		if s.Action != migrate.Free && s.Action != migrate.Leave {
			rows[s.ID] = s
		}
	}
	for id, text := range want {
		s := rows[id]
		got := s.State
		if s.Action == migrate.Alias {
			got = "alias"
		}
		if s.Action == migrate.Drop {
			got = s.Reason
		}
		require.Contains(t, got, text, "%s: %+v", id, s)
		delete(rows, id)
	}
	require.Empty(t, slices.Collect(maps.Keys(rows)), "rows that nothing is said of")
}

// compareStore looks whether the store is what the plan says, and whether
// what has a snapshot shows the files of its own and of those below it.
func compareStore(t *testing.T, m *cache.Manager, p *migrate.Plan) {
	t.Helper()
	records := map[string]*metadata.Record{}
	for rec, err := range m.Records(t.Context()) {
		require.NoError(t, err)
		records[string(rec.ID)] = rec
	}
	n := 0
	for _, s := range p.Steps {
		switch s.Action {
		case migrate.Keep, migrate.Fold:
			n++
			require.Contains(t, records, s.ID)
			require.Equal(t, s.State, records[s.ID].State.String(), s.ID)
			require.Equal(t, s.Op, records[s.ID].Op.String(), s.ID)
		case migrate.Drop:
			_, err := m.Lookup(t.Context(), cache.ID(s.ID))
			require.ErrorContains(t, err, "not found", s.ID)
		case migrate.Alias:
			rec, err := m.Lookup(t.Context(), cache.ID(s.ID))
			require.NoError(t, err)
			require.Equal(t, s.Into, string(rec.ID))
		}
	}
	require.Len(t, records, n)
	require.Equal(t, p.Records, n)
}

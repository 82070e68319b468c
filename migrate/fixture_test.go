package migrate_test

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

const archives = "testdata"

// needsRoot skips where archives cannot be unpacked: devices, owners and
// trusted attributes need root.
func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("unpacking state directories and mounting their layers needs root")
	}
}

// unpack makes a copy of an archive and returns its worker's directory.
func unpack(t *testing.T, name string) (worker string, e *legacytest.Expect) {
	t.Helper()
	needsRoot(t)
	e, err := legacytest.Load(archives, name)
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, legacytest.Unpack(archives, name, dir))
	return filepath.Join(dir, "runc-"+e.Driver), e
}

// eachArchive runs a test on each of them.
func eachArchive(t *testing.T, test func(t *testing.T, worker string, e *legacytest.Expect)) {
	names, err := legacytest.Names(archives)
	require.NoError(t, err)
	theseArchives(t, test, names...)
}

// theseArchives runs a test on some of them.
func theseArchives(t *testing.T, test func(t *testing.T, worker string, e *legacytest.Expect), names ...string) {
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			worker, e := unpack(t, name)
			test(t, worker, e)
		})
	}
}

func run(t *testing.T, dir string, o migrate.Options) migrate.Report {
	t.Helper()
	reports, err := migrate.Run(t.Context(), dir, o)
	require.NoError(t, err)
	require.Len(t, reports, 1)
	require.NoError(t, reports[0].Err)
	return reports[0]
}

func open(t *testing.T, root string) *cache.Manager {
	t.Helper()
	m, err := cache.Open(t.Context(), cache.Options{
		Root: root, NoCreate: true, SyncInterval: -1, LockTimeout: 5 * time.Second, Unconfirm: contenthash.UnconfirmStored,
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

// survivors are the records that must be there after the fold of twins: by
// id, with the ids that are aliases of them.
func survivors(e *legacytest.Expect, have map[string]*metadata.Record) (records map[string]*legacytest.Record, aliases map[string]string) {
	records, aliases = map[string]*legacytest.Record{}, map[string]string{}
	for id, r := range e.Records {
		twin := false
		for _, other := range r.SharesSnapshotWith {
			o := e.Records[other]
			less := o.Kind == "finalized" && r.Kind != "finalized"
			if o.Kind == r.Kind {
				less = o.CreatedAt < r.CreatedAt || o.CreatedAt == r.CreatedAt && other < id
			}
			if less {
				twin = true
				aliases[id] = other
			}
		}
		if !twin && (have[id] != nil || !r.MayDrop) {
			records[id] = r
		}
	}
	return records, aliases
}

func TestArchivesAgreeWithWhatIsKnownOfThem(t *testing.T) {
	eachArchive(t, func(t *testing.T, worker string, e *legacytest.Expect) {
		before := checksums(t, worker)
		report := run(t, filepath.Dir(worker), migrate.Options{})
		require.Equal(t, migrate.Migrated, report.Status)
		require.Equal(t, before, checksums(t, worker), "legacy files")

		m := open(t, worker)
		have := map[string]*metadata.Record{}
		for rec, err := range m.Records(t.Context()) {
			require.NoError(t, err)
			have[string(rec.ID)] = rec
		}
		want, aliases := survivors(e, have)
		require.Equal(t, slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(have)))
		for id, r := range want {
			compareRecord(t, m, aliases, id, r, have[id])
		}
		for _, f := range e.Folds {
			_, err := m.Lookup(t.Context(), cache.ID(f.Mutable))
			require.ErrorContains(t, err, "not found")
		}
		for id := range e.Gone {
			_, err := m.Lookup(t.Context(), cache.ID(id))
			require.ErrorContains(t, err, "not found")
		}
		for id, first := range aliases {
			rec, err := m.Lookup(t.Context(), cache.ID(id))
			require.NoError(t, err)
			require.Equal(t, cache.ID(first), rec.ID)
		}
		compareTrees(t, m, want)
		check(t, m)
	})
}

func check(t *testing.T, m *cache.Manager) {
	t.Helper()
	for finding, err := range m.Check(t.Context()) {
		require.NoError(t, err)
		t.Errorf("finding: %+v", finding)
	}
}

func compareRecord(t *testing.T, m *cache.Manager, aliases map[string]string, id string, want *legacytest.Record, have *metadata.Record) {
	t.Helper()
	kind := want.Kind
	if kind == "lazy" && want.DriverName != "" {
		kind = "finalized" // extracted, but the row does not say it
	}
	require.Equal(t, kind, have.State.String(), id)
	require.Equal(t, want.Op, have.Op.String(), id)
	parents := want.MergeParents
	for _, p := range []string{want.Parent, want.DiffLower, want.DiffUpper} {
		if p != "" {
			parents = append(parents, p)
		}
	}
	var got []string
	for _, p := range have.Parents {
		got = append(got, string(p))
	}
	for i, p := range parents {
		if first := aliases[p]; first != "" {
			parents[i] = first
		}
	}
	require.Equal(t, parents, got, id)
	require.Equal(t, want.RecordType, have.Type, id)
	require.Equal(t, want.Description, have.Description, id)
	if len(want.SharesSnapshotWith) == 0 {
		require.Equal(t, want.Retain, have.Retain, id)
		require.Equal(t, want.UsageCount, have.UsageCount, id)
		require.Equal(t, want.LastUsedAt, nanos(have.LastUsed), id)
	}
	require.Equal(t, want.CreatedAt, nanos(have.Created), id)
	require.Subset(t, have.ImageRefs, want.ImageRefs, id)
	if want.Size == nil {
		require.Equal(t, metadata.SizeUnknown, have.Size, id)
	} else {
		require.Equal(t, *want.Size, have.Size, id)
	}
	for _, key := range want.Indexes {
		found, err := m.Search(t.Context(), key)
		require.NoError(t, err)
		require.Contains(t, found, have.ID, key)
	}
	values := map[string]string{}
	for _, v := range have.Values {
		values[v.Name] = string(v.Data)
	}
	for name, v := range want.Values {
		require.JSONEq(t, v, values[name], "%s of %s", name, id)
	}
	if want.Blob != nil && want.Blob.Digest != "" {
		i := slices.IndexFunc(have.Blobs, func(b metadata.Blob) bool { return string(b.Digest) == want.Blob.Digest })
		require.GreaterOrEqual(t, i, 0, "blob of %s", id)
		require.Equal(t, want.Blob.MediaType, have.Blobs[i].MediaType)
		_, err := os.Stat(filepath.Join(m.Root(), "content", "blobs", have.Blobs[i].Digest.Algorithm().String(), have.Blobs[i].Digest.Encoded()))
		require.Equal(t, err == nil, have.Blobs[i].Stored, "what usage believes of the blob of %s", id)
		require.Equal(t, want.Blob.DiffID, string(have.Blobs[i].DiffID))
		require.Equal(t, want.Blob.ChainID, string(have.ChainID))
	}
	compareExternals(t, m, id, want)
	if want.SnapshotKind == "Active" {
		require.Equal(t, want.Snapshot+"-w", have.Key)
	}
}

func compareExternals(t *testing.T, m *cache.Manager, id string, want *legacytest.Record) {
	names, err := m.Attachments(t.Context(), cache.ID(id))
	require.NoError(t, err)
	for name := range want.Externals {
		if name == "buildkit.contenthash.v0" {
			require.True(t, slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, "contenthash/") }), id)
			continue
		}
		require.Contains(t, names, name, id)
	}
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// compareTrees mounts each record that has a snapshot.
func compareTrees(t *testing.T, m *cache.Manager, want map[string]*legacytest.Record) {
	t.Helper()
	for id, r := range want {
		rec, err := m.Lookup(t.Context(), cache.ID(id))
		require.NoError(t, err)
		if rec.State == metadata.Lazy || rec.State == metadata.Mutable || r.Tree == "" {
			continue
		}
		ref, err := m.Get(t.Context(), cache.ID(id), cache.GetOptions{})
		require.NoError(t, err)
		require.Equal(t, r.Tree, treeOf(t, ref), "tree of %s", id)
		require.NoError(t, ref.Release(t.Context()))
	}
}

func treeOf(t *testing.T, ref *cache.ImmutableRef) string {
	t.Helper()
	mount, err := ref.Mount(t.Context())
	require.NoError(t, err)
	defer func() { require.NoError(t, mount.Unmount()) }()
	listing, err := legacytest.Listing(mount.Path())
	require.NoError(t, err)
	return legacytest.Sum(listing)
}

// checksums are those of the files that a migration must not touch.
func checksums(t *testing.T, worker string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	for _, name := range []string{"metadata_v2.db", "metadata.db", "containerdmeta.db", "snapshots/metadata.db"} {
		data, err := os.ReadFile(filepath.Join(worker, name))
		if os.IsNotExist(err) {
			continue
		}
		require.NoError(t, err)
		info, err := os.Stat(filepath.Join(worker, name))
		require.NoError(t, err)
		sums[name] = legacytest.Sum(string(data)) + info.ModTime().String() + info.Mode().String()
	}
	for _, dir := range []string{"snapshots/snapshots", "content"} {
		listing, err := legacytest.Listing(filepath.Join(worker, dir))
		require.NoError(t, err)
		sums[dir] = listing
	}
	require.NotEmpty(t, sums)
	return sums
}

package migrate_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate"
)

// layouts are the states that a fuzzed value is put into.
var layouts = []struct {
	driver string
	v1     bool
}{{driver: "native"}, {driver: "overlayfs"}, {driver: "native", v1: true}}

// places are where a fuzzed value goes: a database, and the buckets in it, of
// which "*" stands for an id that is given.
var places = [][]string{
	{"RECORDS", "_main", "*"},
	{"RECORDS", "_external", "*"},
	{"RECORDS", "_index"},
	{"containerdmeta.db", "v1"},
	{"containerdmeta.db", "v1", "buildkit", "leases", "*"},
	{"containerdmeta.db", "v1", "buildkit", "leases", "*", "labels"},
	{"containerdmeta.db", "v1", "buildkit", "leases", "*", "snapshots", "DRIVER"},
	{"containerdmeta.db", "v1", "buildkit", "snapshots", "DRIVER", "*"},
	{"containerdmeta.db", "v1", "buildkit", "snapshots", "DRIVER", "*", "labels"},
	{"containerdmeta.db", "v1", "buildkit", "content", "blob", "*"},
	{"containerdmeta.db", "v1", "buildkit", "content", "blob", "*", "labels"},
	{"snapshots/metadata.db", "v1", "snapshots", "*"},
	{"snapshots/metadata.db", "v1", "parents"},
}

// putAt writes a value where a place says, and makes the buckets on the way.
func putAt(tx *bolt.Tx, path []string, id, key string, value []byte) error {
	b := tx.Cursor().Bucket()
	for _, name := range path {
		if name == "*" {
			name = id
		}
		next, err := b.CreateBucketIfNotExists([]byte(name))
		if err != nil {
			return err
		}
		b = next
	}
	return b.Put([]byte(key), value)
}

// Whatever stands where in the databases of an old daemon, it is taken over and
// whole, or refused with a class and nothing changed; and it can be given back.
func FuzzLegacy(f *testing.F) {
	blob := "sha256:" + strings.Repeat("a", 64)
	for _, seed := range []struct {
		place uint8
		id    string
		key   string
		value string
	}{
		{0, "a", "cache.parent", `{"value":"b"}`},
		{0, "b", "cache.mergeParents", `{"value":["a","b","i"]}`},
		{0, "i", "cache.equalMutable", `{"value":"x"}`},
		{0, "new", "cache.createdAt", `{"value":1}`},
		{0, "a", "snapshot.size", `{"value":-7}`},
		{0, "x", "cache.deleted", `{"value":true}`},
		{0, "b", "cache.blob", `{"value":"` + blob + `"}`},
		{0, "a", "cache.description", `{"value":"\ud83d\ude00 é"}`},
		{0, "m", "cache.snapshot", `{"value":"a"}`},
		{0, "a", "k", `{"value":1,"index":"k::` + strings.Repeat("x", 70_000) + `"}`},
		{1, "i", contenthash.V0Key, "\x0a\x02\x0a\x00"},
		{1, "gone", "filelist", "[]"},
		{2, "", "a::b::c", ""},
		{3, "", "version", "\x0c"},
		{4, "a", "createdat", "\x01"},
		{5, "a", "buildkit/lease.temporary", ""},
		{6, "x", "b", ""},
		{7, "b", "name", "buildkit/101/a"},
		{8, "b", "containerd.io/snapshot/remote", ""},
		{9, blob, "size", "\x08"},
		{10, blob, "containerd.io/gc.ref.content.blob-" + blob, blob},
		{11, "buildkit/101/a", "kind", "\x02"},
		{11, "buildkit/102/b", "id", "\x01"},
		{12, "", "x", "y"},
		{11, "buildkit/102/b", "parent", "buildkit/102/b"},
		{0, "../../x", "snapshot.committed", `{"value":true}`},
		{0, "a\x00\n", "cache.cachePolicy", `{"value":1}`},
		{13, "a", "cache.mergeParents", `{"value":["b","b"]}`},
		{13, "m", "cache.snapshot", `{"value":"x"}`},
		{24, "buildkit/103/m", "kind", "\x03"},
		{26, "a", "blobmapping.blob", `{"value":{"Blobsum":"` + blob + `","DiffID":"` + blob + `"}}`},
		{26, "x", "cache.equalMutable", `{"value":"m"}`},
		{34, "b", "containerd.io/gc.root", ""},
		{37, "buildkit/102/b", "parent", "buildkit/104/x"},
	} {
		f.Add(seed.place, seed.id, seed.key, []byte(seed.value))
	}
	bases := f.TempDir()
	f.Fuzz(func(t *testing.T, place uint8, id, key string, value []byte) {
		number := int(place) / len(places) % len(layouts)
		layout := layouts[number]
		if layout.driver == "overlayfs" {
			needsRoot(t)
		}
		dir, base := filepath.Join(t.TempDir(), "runc-"+layout.driver), filepath.Join(bases, strconv.Itoa(number))
		if _, err := os.Stat(base); err != nil {
			require.NoError(t, os.Rename(smallOf(t, layout.driver, layout.v1).Dir, base))
		}
		require.NoError(t, os.CopyFS(dir, os.DirFS(base)))
		path := slices.Clone(places[int(place)%len(places)])
		for i, name := range path {
			switch {
			case name == "DRIVER":
				path[i] = layout.driver
			case name == "RECORDS" && layout.v1:
				path[i] = "metadata.db"
			case name == "RECORDS":
				path[i] = "metadata_v2.db"
			}
		}
		db, err := bolt.Open(filepath.Join(dir, path[0]), 0o600, &bolt.Options{NoSync: true})
		require.NoError(t, err)
		err = db.Update(func(tx *bolt.Tx) error { return putAt(tx, path[1:], id, key, value) })
		require.NoError(t, db.Close())
		if err != nil {
			t.Skip("bbolt refuses it")
		}
		before := checksums(t, dir)
		planned, err := migrate.Run(t.Context(), dir, migrate.Options{DryRun: true})
		require.NoError(t, err)
		reports, err := migrate.Run(t.Context(), dir, migrate.Options{})
		require.NoError(t, err)
		require.Equal(t, before, checksums(t, dir))
		if r := reports[0]; r.Err != nil {
			require.True(t, errors.Is(r.Err, metadata.ErrDamaged) || errdefs.IsFailedPrecondition(r.Err) ||
				errdefs.IsNotImplemented(r.Err) || errdefs.IsDataLoss(r.Err), "%v", r.Err)
			require.NoFileExists(t, filepath.Join(dir, cache.StoreFile))
			return
		}
		require.Equal(t, planned[0].Plan.Steps, reports[0].Plan.Steps)
		m, err := cache.Open(t.Context(), cache.Options{Root: dir, NoCreate: true, SyncInterval: -1})
		require.NoError(t, err)
		check(t, m)
		n := 0
		for _, err := range m.Records(t.Context()) {
			require.NoError(t, err)
			n++
		}
		require.Equal(t, reports[0].Plan.Records, n)
		require.NoError(t, m.Close())
		back, err := migrate.Rollback(t.Context(), dir, migrate.Options{})
		require.NoError(t, err)
		require.NoError(t, back[0].Err)
	})
}

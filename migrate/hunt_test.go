package migrate_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/buildkit"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// However the directory is called: relative, with a slash behind, through a
// link, and by the root of the daemon.
func TestWaysToNameADirectory(t *testing.T) {
	ways := map[string]func(b *legacytest.Builder) string{
		"relative":       func(b *legacytest.Builder) string { return filepath.Base(b.Dir) },
		"dot":            func(*legacytest.Builder) string { return "." },
		"slash":          func(b *legacytest.Builder) string { return b.Dir + "/" },
		"dots":           func(b *legacytest.Builder) string { return b.Dir + "/../" + filepath.Base(b.Dir) },
		"link to worker": func(b *legacytest.Builder) string { return link(t, b.Dir) },
		"link to root":   func(b *legacytest.Builder) string { return link(t, filepath.Dir(b.Dir)) },
	}
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			b := small(t)
			t.Chdir(filepath.Dir(b.Dir))
			if name == "dot" {
				t.Chdir(b.Dir)
			}
			dir := way(b)
			r := run(t, dir, migrate.Options{})
			require.Equal(t, migrate.Migrated, r.Status)
			require.FileExists(t, filepath.Join(b.Dir, cache.StoreFile))
			require.Equal(t, migrate.Already, run(t, dir, migrate.Options{}).Status)
			check(t, open(t, b.Dir))
		})
	}
}

func link(t *testing.T, to string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "some-link")
	require.NoError(t, os.Symlink(to, path))
	return path
}

// Snapshotters that keep their data in a way of their own are named, and so are
// workers of containerd; the others of one daemon are migrated all the same.
func TestOtherSnapshotters(t *testing.T) {
	root := t.TempDir()
	for _, driver := range []string{"native", "fuse-overlayfs", "stargz"} {
		b := legacytest.NewBuilder(root, driver)
		b.Finalized("a", "", nil)
		require.NoError(t, b.Write())
	}
	require.NoError(t, os.Mkdir(filepath.Join(root, "containerd-overlayfs"), 0o700))
	before := map[string][]string{}
	for _, w := range []string{"runc-fuse-overlayfs", "runc-stargz"} {
		before[w] = names(t, filepath.Join(root, w))
	}
	reports, err := migrate.Run(t.Context(), root, migrate.Options{})
	require.NoError(t, err)
	require.Len(t, reports, 4)
	for _, r := range reports {
		switch r.Worker {
		case "runc-native":
			require.NoError(t, r.Err)
			require.Equal(t, migrate.Migrated, r.Status)
		case "containerd-overlayfs":
			require.Equal(t, migrate.Skipped, r.Status)
			require.NotEmpty(t, r.Reason)
		default:
			require.ErrorIs(t, r.Err, buildkit.ErrUnsupported)
			require.ErrorContains(t, r.Err, strings.TrimPrefix(r.Worker, "runc-"))
			require.Equal(t, before[r.Worker], names(t, r.Root))
		}
	}
}

// A file system that cannot be written to is an error of its class; once it
// can, the same call works.
func TestReadOnlyFileSystem(t *testing.T) {
	needsRoot(t)
	b := small(t)
	require.NoError(t, unix.Mount(b.Dir, b.Dir, "", unix.MS_BIND, ""))
	unmount := func() { require.NoError(t, unix.Unmount(b.Dir, unix.MNT_DETACH)) }
	require.NoError(t, unix.Mount("", b.Dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	before := names(t, b.Dir)
	require.Equal(t, migrate.Planned, run(t, b.Dir, migrate.Options{DryRun: true}).Status, "to plan is to read")
	reports, err := migrate.Run(t.Context(), b.Dir, migrate.Options{})
	require.NoError(t, err)
	require.ErrorIs(t, reports[0].Err, unix.EROFS)
	require.Equal(t, before, names(t, b.Dir))
	unmount()
	require.Equal(t, migrate.Migrated, run(t, b.Dir, migrate.Options{}).Status)
}

// Unfinished downloads, leases without records, ids and descriptions in any
// letters, and values of any size are no reason to stop.
func TestOddState(t *testing.T) {
	b := legacytest.NewBuilder(t.TempDir(), "native")
	text := "Grüße, 世界 \U0001F600\u202e" + strings.Repeat("x", 100_000)
	odd := []string{"..", "a/b", "%41", "sha256:" + strings.Repeat("0", 64), "ünï", strings.Repeat("long", 80), "-", "~a", "x y\tz"}
	for _, id := range odd {
		b.Finalized(id, "", legacytest.Row{"cache.description": text, "huge": strings.Repeat("v", 1<<20), "snapshot.size": -1})
	}
	b.Pair("i/../i", "m\x01m", "..")
	b.External("i/../i", "filelist", make([]byte, 3<<20))
	b.Lease("nobody", []string{"nothing"}, "sha256:zz")
	b.Temporary("1700000000-abc", "..")
	require.NoError(t, b.Write())
	ingest := filepath.Join(b.Dir, "content", "ingest", "0123")
	require.NoError(t, os.MkdirAll(ingest, 0o700))
	write(t, filepath.Join(ingest, "data"), "half")

	r := run(t, b.Dir, migrate.Options{})
	require.Empty(t, r.Plan.Dropped())
	m := open(t, b.Dir)
	for _, id := range odd {
		rec, err := m.Lookup(t.Context(), cache.ID(id))
		require.NoError(t, err)
		require.Equal(t, text, rec.Description)
		ref, err := m.Get(t.Context(), cache.ID(id), cache.GetOptions{})
		require.NoError(t, err)
		child, err := m.New(t.Context(), ref, cache.NewOptions{})
		require.NoError(t, err, id)
		require.NoError(t, child.Release(t.Context()))
		require.NoError(t, ref.Release(t.Context()))
	}
	mut, err := m.GetMutable(t.Context(), "i/../i")
	require.NoError(t, err)
	require.NoError(t, mut.Release(t.Context()))
	require.FileExists(t, filepath.Join(ingest, "data"))
	check(t, m)
}

// What cannot be kept here costs itself and what lies on it.
func TestWhatCannotBeKept(t *testing.T) {
	b := legacytest.NewBuilder(t.TempDir(), "native")
	b.Finalized("fine", "", nil)
	b.Finalized("bad", "fine", legacytest.Row{"k": legacytest.Indexed{Value: 1, Index: strings.Repeat("x", 20_000)}})
	b.Finalized("on-bad", "bad", nil)
	require.NoError(t, b.Write())
	comparePlan(t, run(t, b.Dir, migrate.Options{}).Plan, want{
		"fine": "finalized", "bad": "cannot be kept here", "on-bad": "does not come along",
	})
	check(t, open(t, b.Dir))
}

// A record that names the snapshot of another layer is no second name of it.
func TestAnotherLayerUnderTheSameName(t *testing.T) {
	b := legacytest.NewBuilder(t.TempDir(), "native")
	d, e := b.Blob("one", nil), b.Blob("two", nil)
	b.Finalized("one", "", legacytest.Row{"cache.chainID": d, "cache.diffID": d})
	b.Row("two", legacytest.Row{"snapshot.committed": true, "cache.snapshot": "one", "cache.chainID": e, "cache.diffID": e})
	b.Lease("two", []string{"one"})
	require.NoError(t, b.Write())
	p := run(t, b.Dir, migrate.Options{}).Plan
	comparePlan(t, p, want{"one": "finalized", "two": "is another layer"})
	require.Zero(t, p.Aliases)
}

// Nothing lies on what can still be written to.
func TestSnapshotOnAWritableOne(t *testing.T) {
	b := legacytest.NewBuilder(t.TempDir(), "native")
	b.Pair("i", "m", "")
	b.Row("c", legacytest.Row{"snapshot.committed": true, "cache.snapshot": "c", "cache.parent": "i"})
	b.Snapshot("c", "m", legacytest.Committed)
	b.Lease("c", []string{"c"})
	require.NoError(t, b.Write())
	comparePlan(t, run(t, b.Dir, migrate.Options{}).Plan, want{"i": "committed", "m": "", "c": "is not finalized"})
	check(t, open(t, b.Dir))
}

// One of two fails, then both are run again: the one that is a store stays, the
// other becomes one.
func TestAgainAfterOneFailed(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"native", "overlayfs"} {
		b := legacytest.NewBuilder(root, name)
		b.Finalized("a", "", nil)
		require.NoError(t, b.Write())
	}
	boom := errors.New("boom")
	workers := 0
	reports, err := migrate.Run(t.Context(), root, migrate.Options{Step: func(name string) error {
		if name == "migrate.begin" {
			workers++
		}
		if workers == 2 && name == "migrate.rename" {
			return boom
		}
		return nil
	}})
	require.NoError(t, err)
	require.NoError(t, reports[0].Err)
	if reports[1].Err != nil && !errors.Is(reports[1].Err, boom) {
		t.Skipf("there is no overlayfs here: %v", reports[1].Err)
	}
	require.ErrorIs(t, reports[1].Err, boom)
	again, err := migrate.Run(t.Context(), root, migrate.Options{})
	require.NoError(t, err)
	require.Equal(t, migrate.Already, again[0].Status)
	require.Equal(t, migrate.Migrated, again[1].Status)
	require.NoError(t, again[1].Err)
	for _, r := range again {
		check(t, open(t, r.Root))
	}
}

// A cancelled migration says that nothing happened, and can be run again.
func TestCancelled(t *testing.T) {
	b := small(t)
	before := checksums(t, b.Dir)
	for at := 1; ; at++ {
		ctx, cancel := context.WithCancelCause(t.Context())
		n := 0
		reports, err := migrate.Run(ctx, b.Dir, migrate.Options{Step: func(string) error {
			if n++; n == at {
				cancel(errors.New("somebody pressed a key"))
			}
			return nil
		}})
		cancel(nil)
		require.NoError(t, err)
		require.Equal(t, before, checksums(t, b.Dir))
		if reports[0].Err == nil {
			require.Greater(t, at, 10)
			return
		}
		require.ErrorContains(t, reports[0].Err, "somebody pressed a key")
		require.ErrorContains(t, reports[0].Err, "run it again")
		require.NoFileExists(t, filepath.Join(b.Dir, cache.StoreFile))
	}
}

// Of two names that lead to one snapshot the one that its key was made for has
// it, each time the plan is made: else the way back would be open or shut by
// luck.
func TestTwoNamesOfOneSnapshot(t *testing.T) {
	for range 10 {
		b := small(t)
		db, err := bolt.Open(filepath.Join(b.Dir, "containerdmeta.db"), 0o600, nil)
		require.NoError(t, err)
		require.NoError(t, db.Update(func(tx *bolt.Tx) error {
			return putAt(tx, []string{"v1", "buildkit", "snapshots", "native", "*"}, "b", "name", []byte("buildkit/101/a"))
		}))
		require.NoError(t, db.Close())
		report := run(t, b.Dir, migrate.Options{})
		require.Contains(t, strings.Join(report.Plan.Warnings, "\n"), `snapshot "b" has no key of its own`)
		comparePlan(t, report.Plan, want{"a": "finalized", "b": "its snapshot is gone", "i": "parent b", "m": "i, which it was going to be a part of", "x": "mutable", "merge": "parent b"})
		require.Equal(t, 2, count(report.Plan, migrate.Leave), "what the old daemon may show, and what lies below it")
		m := open(t, b.Dir)
		compareStore(t, m, report.Plan)
		check(t, m)
		require.NoError(t, m.Close())
		back, err := migrate.Rollback(t.Context(), b.Dir, migrate.Options{})
		require.NoError(t, err)
		require.NoError(t, back[0].Err)
	}
}

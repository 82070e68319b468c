package migrate_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/buildkit"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// chains is a state of some pages: chains of layers, pairs on their tops.
func chains(t *testing.T, driver string) *legacytest.Builder {
	t.Helper()
	b := legacytest.NewBuilder(t.TempDir(), driver)
	for c := range 4 {
		parent := ""
		for i := range 4 {
			id := fmt.Sprintf("c%dl%d", c, i)
			b.Finalized(id, parent, legacytest.Row{"cache.description": strings.Repeat("long ", 100)})
			b.External(id, "filelist", []byte(strings.Repeat("x", 900)))
			parent = id
		}
		b.Pair(fmt.Sprintf("c%di", c), fmt.Sprintf("c%dm", c), parent)
	}
	return b
}

func databases() []string {
	return []string{"metadata_v2.db", "containerdmeta.db", "snapshots/metadata.db"}
}

// parentsOf are the ancestors of each record of chains, by its id.
func ancestors(id string) (ids []string) {
	level := 4
	if n := id[len(id)-1]; n >= '0' && n <= '9' {
		level = int(n - '0')
	}
	for i := range level {
		ids = append(ids, fmt.Sprintf("%sl%d", id[:2], i))
	}
	return ids
}

// Whatever page is zeroed or overwritten: a typed error with nothing changed,
// or a store in which each record is whole, with all its ancestors, and the
// rest is named.
func TestDamagedPages(t *testing.T) {
	needsRoot(t)
	b := chains(t, "native")
	require.NoError(t, b.Write())
	whole := planOf(t, b.Dir)
	damages := map[string]func(page []byte){
		"zeroed": func(p []byte) { clear(p) },
		"noise": func(p []byte) {
			for i := range p {
				p[i] = byte(i*7 + 3)
			}
		},
		"another": func(p []byte) { p[8], p[10] = 2, 0xff }, // a leaf with too many elements
	}
	survived := 0
	for _, name := range databases() {
		file := filepath.Join(b.Dir, name)
		good, err := os.ReadFile(file)
		require.NoError(t, err)
		for page := 0; page < len(good)/4096; page++ {
			for what, damage := range damages {
				bad := []byte(string(good))
				damage(bad[page*4096 : (page+1)*4096])
				require.NoError(t, os.WriteFile(file, bad, 0o600))
				at := fmt.Sprintf("page %d of %s %s", page, name, what)
				reports, err := migrate.Run(t.Context(), b.Dir, migrate.Options{DryRun: true})
				require.NoError(t, err, at)
				p := reports[0].Plan
				if reports[0].Err != nil {
					requireTyped(t, reports[0].Err, at)
					continue
				}
				survived++
				kept := map[string]migrate.Step{}
				for _, s := range p.Steps {
					if s.Action == migrate.Keep || s.Action == migrate.Fold {
						kept[s.ID] = s
					}
				}
				for id, s := range kept {
					if s.State == "mutable" {
						continue // its immutable row is lost
					}
					require.Equal(t, whole[id], s, at)
					for _, a := range ancestors(id) {
						require.Contains(t, kept, a, at)
					}
				}
				if len(kept) < len(whole) {
					require.True(t, len(p.Warnings) > 0 || len(p.Dropped()) > 0, "%s: losses are told", at)
				}
			}
		}
		require.NoError(t, os.WriteFile(file, good, 0o600))
	}
	require.Positive(t, survived)
}

func planOf(t *testing.T, dir string) map[string]migrate.Step {
	t.Helper()
	steps := map[string]migrate.Step{}
	for _, s := range run(t, dir, migrate.Options{DryRun: true}).Plan.Steps {
		if s.Action == migrate.Keep || s.Action == migrate.Fold {
			steps[s.ID] = s
		}
	}
	require.NotEmpty(t, steps)
	return steps
}

// requireTyped wants a class, and something to do.
func requireTyped(t *testing.T, err error, at string) {
	t.Helper()
	typed := false
	for _, class := range []error{errdefs.ErrDataLoss, errdefs.ErrFailedPrecondition, errdefs.ErrNotFound, errdefs.ErrNotImplemented} {
		typed = typed || errors.Is(err, class)
	}
	require.True(t, typed, "%s: %v", at, err)
	require.Regexp(t, "restore|move|newer", err.Error(), at)
}

// A file that is cut off anywhere is an error, not a signal.
func TestCutFiles(t *testing.T) {
	needsRoot(t)
	b := chains(t, "native")
	require.NoError(t, b.Write())
	for _, name := range databases() {
		file := filepath.Join(b.Dir, name)
		good, err := os.ReadFile(file)
		require.NoError(t, err)
		used := usedBytes(t, file)
		for size := 0; size < used; size += 1500 {
			require.NoError(t, os.WriteFile(file, good[:size], 0o600))
			reports, err := migrate.Run(t.Context(), b.Dir, migrate.Options{})
			require.NoError(t, err)
			require.ErrorIs(t, reports[0].Err, errdefs.ErrDataLoss, "%s cut at %d", name, size)
			requireTyped(t, reports[0].Err, name)
			require.NoFileExists(t, filepath.Join(b.Dir, cache.StoreFile))
			require.NoDirExists(t, filepath.Join(b.Dir, "snapshots", "active"))
		}
		require.NoError(t, os.WriteFile(file, good, 0o600))
	}
	run(t, b.Dir, migrate.Options{})
}

// usedBytes is how much of a database is in use.
func usedBytes(t *testing.T, file string) int {
	t.Helper()
	db, err := bolt.Open(file, 0o600, &bolt.Options{ReadOnly: true})
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	var size int64
	require.NoError(t, db.View(func(tx *bolt.Tx) error {
		size = tx.Size()
		return nil
	}))
	return int(size)
}

func TestBadDirectories(t *testing.T) {
	tests := map[string]struct {
		spoil func(t *testing.T, dir string)
		class error
		text  string
	}{
		"newer records": {
			func(t *testing.T, dir string) { write(t, filepath.Join(dir, "metadata_v3.db"), "new") },
			errdefs.ErrFailedPrecondition, "metadata_v3.db",
		},
		"unknown bucket": {
			func(t *testing.T, dir string) { put(t, filepath.Join(dir, "metadata_v2.db"), "_novel") },
			errdefs.ErrFailedPrecondition, `bucket "_novel"`,
		},
		"newer containerd": {
			func(t *testing.T, dir string) {
				edit(t, filepath.Join(dir, "containerdmeta.db"), func(tx *bolt.Tx) error {
					return tx.Bucket([]byte("v1")).Put([]byte("version"), []byte{10})
				})
			},
			errdefs.ErrFailedPrecondition, "version 5",
		},
		"newer snapshotter": {
			func(t *testing.T, dir string) { put(t, filepath.Join(dir, "snapshots/metadata.db"), "v2") },
			errdefs.ErrFailedPrecondition, `bucket "v2"`,
		},
		"snapshots without metadata": {
			func(t *testing.T, dir string) {
				require.NoError(t, os.Remove(filepath.Join(dir, "snapshots/metadata.db")))
			},
			errdefs.ErrDataLoss, "snapshots/metadata.db is missing",
		},
		"no names": {
			func(t *testing.T, dir string) {
				require.NoError(t, os.Remove(filepath.Join(dir, "containerdmeta.db")))
			},
			errdefs.ErrDataLoss, "containerdmeta.db is missing",
		},
		"records are a directory": {
			func(t *testing.T, dir string) {
				require.NoError(t, os.Remove(filepath.Join(dir, "metadata_v2.db")))
				require.NoError(t, os.Mkdir(filepath.Join(dir, "metadata_v2.db"), 0o700))
			},
			errdefs.ErrDataLoss, "no bbolt database",
		},
		"another snapshotter": {
			func(t *testing.T, dir string) {
				edit(t, filepath.Join(dir, "containerdmeta.db"), func(tx *bolt.Tx) error {
					ns := tx.Bucket([]byte("v1")).Bucket([]byte("buildkit")).Bucket([]byte("snapshots"))
					if err := ns.DeleteBucket([]byte("native")); err != nil {
						return err
					}
					_, err := ns.CreateBucket([]byte("stargz"))
					return err
				})
			},
			errdefs.ErrNotImplemented, `"stargz"`,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			b := chains(t, "native")
			require.NoError(t, b.Write())
			tt.spoil(t, b.Dir)
			before := names(t, b.Dir)
			reports, err := migrate.Run(t.Context(), b.Dir, migrate.Options{})
			require.NoError(t, err)
			require.Equal(t, migrate.Failed, reports[0].Status)
			require.ErrorIs(t, reports[0].Err, tt.class)
			require.ErrorContains(t, reports[0].Err, tt.text)
			require.Equal(t, before, names(t, b.Dir))
			_, err = migrate.Open(t.Context(), cache.Options{Root: b.Dir}, migrate.Options{})
			require.ErrorIs(t, err, tt.class)
			_, err = cache.Open(t.Context(), cache.Options{Root: b.Dir})
			require.ErrorIs(t, err, cache.ErrLegacy)
		})
	}
}

func names(t *testing.T, dir string) (list []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		list = append(list, path)
		return err
	}))
	return list
}

func write(t *testing.T, path, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
}

func put(t *testing.T, path, bucket string) {
	t.Helper()
	edit(t, path, func(tx *bolt.Tx) error {
		_, err := tx.CreateBucket([]byte(bucket))
		return err
	})
}

func edit(t *testing.T, path string, fn func(*bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, nil)
	require.NoError(t, err)
	require.NoError(t, errors.Join(db.Update(fn), db.Close()))
}

func TestNotBuildKit(t *testing.T) {
	empty := t.TempDir()
	_, err := migrate.Run(t.Context(), empty, migrate.Options{})
	require.ErrorIs(t, err, buildkit.ErrNotBuildKit)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	write(t, filepath.Join(empty, "file"), "")
	_, err = migrate.Run(t.Context(), empty, migrate.Options{})
	require.ErrorIs(t, err, buildkit.ErrNotBuildKit)
	_, err = migrate.Run(t.Context(), filepath.Join(empty, "nowhere"), migrate.Options{})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

// A daemon that runs is named, by its process.
func TestRunningDaemon(t *testing.T) {
	b := chains(t, "native")
	require.NoError(t, b.Write())
	for _, name := range databases() {
		f, err := os.Open(filepath.Join(b.Dir, name))
		require.NoError(t, err)
		require.NoError(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
		reports, err := migrate.Run(t.Context(), b.Dir, migrate.Options{})
		require.NoError(t, err)
		require.ErrorIs(t, reports[0].Err, metadata.ErrLocked)
		var locked *buildkit.LockedError
		require.ErrorAs(t, reports[0].Err, &locked)
		require.Equal(t, os.Getpid(), locked.PID)
		require.Contains(t, locked.Command, filepath.Base(os.Args[0]))
		require.NoError(t, f.Close())
	}
}

// What cannot be read is an error of its class, for whoever is not root.
func TestUnreadable(t *testing.T) {
	if os.Geteuid() == 0 {
		runAsNobody(t, "TestUnreadable")
		return
	}
	b := chains(t, "native")
	require.NoError(t, b.Write())
	for _, name := range append(databases(), "snapshots/snapshots") {
		path := filepath.Join(b.Dir, name)
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.NoError(t, os.Chmod(path, 0))
		reports, err := migrate.Run(t.Context(), b.Dir, migrate.Options{})
		require.NoError(t, err)
		require.ErrorIs(t, reports[0].Err, errdefs.ErrPermissionDenied, name)
		require.ErrorContains(t, reports[0].Err, filepath.Base(name))
		require.NoError(t, os.Chmod(path, info.Mode()))
	}
}

// runAsNobody runs a test of this package again as an ordinary user.
func runAsNobody(t *testing.T, name string) {
	t.Helper()
	binary, err := os.Executable()
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "migrate-nobody-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o777))
	copied := filepath.Join(dir, "test")
	data, err := os.ReadFile(binary)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(copied, data, 0o755))
	cmd := exec.CommandContext(t.Context(), copied, "-test.run", "^"+name+"$", "-test.v")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), "--- PASS: "+name)
}

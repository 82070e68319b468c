package migrate_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/buildkit"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		os.Exit(child(dir))
	}
	os.Exit(m.Run())
}

const (
	childDir  = "MIGRATE_TEST_DIR"
	childStep = "MIGRATE_TEST_STEP"
	childVerb = "MIGRATE_TEST_VERB"
)

// child migrates, or goes back, in a process that is killed at one step.
func child(dir string) int {
	at, err := strconv.Atoi(os.Getenv(childStep))
	if err != nil {
		return 2
	}
	n := 0
	o := migrate.Options{Step: func(string) error {
		if n++; n == at {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	}}
	if os.Getenv(childVerb) == "rollback" {
		reports, err := migrate.Rollback(context.Background(), dir, o)
		if err != nil || reports[0].Err != nil {
			fmt.Fprintln(os.Stderr, err, reports)
			return 1
		}
		return 0
	}
	reports, err := migrate.Run(context.Background(), dir, o)
	if err != nil || reports[0].Err != nil {
		fmt.Fprintln(os.Stderr, err, reports)
		return 1
	}
	return 0
}

// killedAt runs a child and says whether it was killed at that step.
func killedAt(t *testing.T, verb, dir string, step int) bool {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childDir+"="+dir, childStep+"="+strconv.Itoa(step), childVerb+"="+verb)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return true
	}
	require.NoError(t, err, string(out))
	return false
}

// dump is all that a migration made but for the time at which it did.
func dump(t *testing.T, root string) []string {
	t.Helper()
	return dumpOf(t, open(t, root))
}

// dumpOf is the dump of a cache that is open, before anything in it was used.
func dumpOf(t *testing.T, m *cache.Manager) []string {
	t.Helper()
	root := m.Root()
	var lines []string
	for _, dir := range []string{"new", "active", "committed", "trash"} {
		require.NoError(t, filepath.WalkDir(filepath.Join(root, "snapshots", dir), func(path string, d os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, _ := filepath.Rel(root, path)
			line := rel + " " + d.Type().String()
			if target, err := os.Readlink(path); err == nil {
				line += " " + target
			}
			if d.Name() == "info" && dir != "trash" {
				data, err := os.ReadFile(path)
				require.NoError(t, err)
				line += " " + string(data)
			}
			lines = append(lines, line)
			return nil
		}))
	}
	if list, err := os.ReadFile(filepath.Join(root, "snapshots", "adopted")); err == nil {
		lines = append(lines, string(list))
	}
	for rec, err := range m.Records(t.Context()) {
		require.NoError(t, err)
		text, err := json.Marshal(rec)
		require.NoError(t, err)
		lines = append(lines, string(text))
		names, err := m.Attachments(t.Context(), rec.ID)
		require.NoError(t, err)
		for _, name := range names {
			data, err := m.Attachment(t.Context(), rec.ID, name)
			require.NoError(t, err)
			lines = append(lines, fmt.Sprintf("%s %x", name, sha256.Sum256(data)))
		}
	}
	check(t, m)
	slices.Sort(lines)
	return lines
}

// requireSame shows the lines that differ, and no others.
func requireSame(t *testing.T, want, got []string) {
	t.Helper()
	require.Empty(t, cmp.Diff(want, got))
}

// Stopped by an error at each step in turn, in one directory that keeps what
// each attempt left, and then run.
func TestErrorAtEachStep(t *testing.T) {
	worker, _ := unpack(t, "v0.34.1-crash-many")
	clean, _ := unpack(t, "v0.34.1-crash-many")
	steps := 0
	run(t, clean, migrate.Options{Step: func(string) error { steps++; return nil }})
	want := dump(t, clean)
	before := checksums(t, worker)
	boom := errors.New("boom")
	for at := 1; at < steps; at += 3 { // killed at, all of them
		n := 0
		reports, err := migrate.Run(t.Context(), worker, migrate.Options{Step: func(string) error {
			if n++; n == at {
				return boom
			}
			return nil
		}})
		require.NoError(t, err)
		require.ErrorIs(t, reports[0].Err, boom, at)
		require.NoFileExists(t, filepath.Join(worker, cache.StoreFile))
		require.Equal(t, before, checksums(t, worker), at)
	}
	run(t, worker, migrate.Options{})
	requireSame(t, want, dump(t, worker))
}

// small is a state of few records with one of each kind, so that all its steps
// can be tried.
func small(t *testing.T) *legacytest.Builder {
	t.Helper()
	return smallOf(t, "native", false)
}

// smallOf is small for a snapshotter and a layout.
func smallOf(t *testing.T, driver string, v1 bool) *legacytest.Builder {
	t.Helper()
	b := legacytest.NewBuilder(t.TempDir(), driver)
	b.Finalized("a", "", nil)
	b.Finalized("b", "a", nil)
	b.Pair("i", "m", "b")
	b.External("m", "filelist", []byte("[]"))
	b.Mutable("x", "a", true)
	b.Row("merge", legacytest.Row{"cache.mergeParents": []string{"a", "b"}})
	b.Lease("merge", []string{"merge"})
	b.Snapshot("garbage", "", legacytest.Committed)
	if v1 {
		b.Older()
	}
	require.NoError(t, b.Write())
	return b
}

// Killed at each step, then run again: the same as without.
func TestKilledAtEachStep(t *testing.T) {
	clean := small(t)
	run(t, clean.Dir, migrate.Options{})
	want := dump(t, clean.Dir)
	steps := 0
	for ; ; steps++ {
		b := small(t)
		before := checksums(t, b.Dir)
		killed := killedAt(t, "migrate", b.Dir, steps+1)
		require.Equal(t, before, checksums(t, b.Dir), "step %d", steps+1)
		report := run(t, b.Dir, migrate.Options{})
		if !killed {
			require.Equal(t, migrate.Already, report.Status)
			break
		}
		requireSame(t, want, dump(t, b.Dir))
	}
	require.Greater(t, steps, 15)
}

// Killed at some moment, again and again, until one gets through.
func TestKilledAnywhere(t *testing.T) {
	worker, _ := unpack(t, "v0.12.5-crash-finalize")
	clean, _ := unpack(t, "v0.12.5-crash-finalize")
	run(t, clean, migrate.Options{})
	want := dump(t, clean)
	before := checksums(t, worker)
	for range 6 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childDir+"="+worker, childStep+"=0", childVerb+"=migrate")
		require.NoError(t, cmd.Start())
		time.Sleep(rand.N(150 * time.Millisecond)) // any moment will do
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()
		require.Equal(t, before, checksums(t, worker))
	}
	run(t, worker, migrate.Options{})
	requireSame(t, want, dump(t, worker))
}

func TestTwiceIsNothing(t *testing.T) {
	b := small(t)
	run(t, b.Dir, migrate.Options{})
	all := names(t, b.Dir)
	store, err := os.ReadFile(filepath.Join(b.Dir, cache.StoreFile))
	require.NoError(t, err)
	report := run(t, b.Dir, migrate.Options{Step: func(name string) error { return errors.New(name) }})
	require.Equal(t, migrate.Already, report.Status)
	require.Equal(t, all, names(t, b.Dir))
	again, err := os.ReadFile(filepath.Join(b.Dir, cache.StoreFile))
	require.NoError(t, err)
	require.Equal(t, store, again)
}

// Of two at once one is told who the other is.
func TestTwoAtOnce(t *testing.T) {
	b := small(t)
	reached, goOn := make(chan struct{}), make(chan struct{})
	first := make(chan migrate.Report, 1)
	go func() {
		once := false
		reports, err := migrate.Run(t.Context(), b.Dir, migrate.Options{Step: func(string) error {
			if !once {
				once = true
				close(reached)
				<-goOn
			}
			return nil
		}})
		if err != nil {
			reports = []migrate.Report{{Err: err}}
		}
		first <- reports[0]
	}()
	<-reached
	reports, err := migrate.Run(t.Context(), b.Dir, migrate.Options{})
	require.NoError(t, err)
	var locked *buildkit.LockedError
	require.ErrorAs(t, reports[0].Err, &locked)
	require.ErrorIs(t, reports[0].Err, metadata.ErrLocked)
	require.Equal(t, os.Getpid(), locked.PID)
	close(goOn)
	require.NoError(t, (<-first).Err)
	require.Equal(t, migrate.Already, run(t, b.Dir, migrate.Options{}).Status)
}

// A full disk at any step is an error of its class, and nothing has changed.
func TestNoSpace(t *testing.T) {
	b := small(t)
	before := checksums(t, b.Dir)
	for at := 1; ; at++ {
		n, full := 0, false
		reports, err := migrate.Run(t.Context(), b.Dir, migrate.Options{Step: func(name string) error {
			if n++; n == at && name != "migrate.named" {
				full = true
				return &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}
			}
			return nil
		}})
		require.NoError(t, err)
		require.Equal(t, before, checksums(t, b.Dir))
		if !full {
			require.NoError(t, reports[0].Err)
			require.Greater(t, at, 15)
			return
		}
		require.ErrorIs(t, reports[0].Err, syscall.ENOSPC)
		require.ErrorIs(t, reports[0].Err, errdefs.ErrResourceExhausted, at)
		require.ErrorContains(t, reports[0].Err, "make room")
		require.NoFileExists(t, filepath.Join(b.Dir, cache.StoreFile))
	}
}

// migrate.Open migrates when there is a need, and only then.
func TestOpen(t *testing.T) {
	b := small(t)
	_, err := cache.Open(t.Context(), cache.Options{Root: b.Dir})
	require.ErrorIs(t, err, cache.ErrLegacy)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	_, err = migrate.Open(t.Context(), cache.Options{Root: b.Dir, ReadOnly: true}, migrate.Options{})
	require.ErrorIs(t, err, cache.ErrLegacy)
	for range 2 {
		m, err := migrate.Open(t.Context(), cache.Options{Root: b.Dir, SyncInterval: -1}, migrate.Options{})
		require.NoError(t, err)
		ref, err := m.Get(t.Context(), "i", cache.GetOptions{})
		require.NoError(t, err)
		require.NoError(t, ref.Release(t.Context()))
		_, err = m.Lookup(t.Context(), "m")
		require.ErrorIs(t, err, errdefs.ErrNotFound)
		require.NoError(t, m.Close())
	}
	fresh, err := migrate.Open(t.Context(), cache.Options{Root: t.TempDir(), DriverName: "native", SyncInterval: -1}, migrate.Options{})
	require.NoError(t, err)
	require.NoError(t, fresh.Close())
}

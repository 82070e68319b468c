package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/migrate/legacytest"
)

const legacyArchives = "../migrate/testdata"

// Migrations by the command are killed at random moments, on real state
// directories. Until there is a store the old daemon's files are as they were;
// run again, it ends as if nobody had killed it.
func TestKilledMigrations(t *testing.T) {
	for worker, archive := range map[string]string{
		"runc-overlayfs": "v0.34.1-crash-many", "runc-native": "v0.34.1-native",
	} {
		t.Run(worker, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("archives hold files of several owners: root is needed")
			}
			testKilledMigrations(t, archive, worker)
		})
	}
}

func testKilledMigrations(t *testing.T, archive, worker string) {
	t.Helper()
	kills := 12
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		kills = 100
	}
	seed := newSeed(t)
	random := rand.New(rand.NewPCG(seed, 4))
	clean := t.TempDir()
	require.NoError(t, legacytest.Unpack(legacyArchives, archive, clean))
	began := time.Now()
	migrateAll(t, clean)
	takes := time.Since(began)
	want := dumpStore(t, filepath.Join(clean, worker))

	killed, early, times := 0, 0, 0
	defer func() {
		t.Logf("seed %d: %d killed, %d of them before there was a store, %d directories", seed, killed, early, times)
	}()
	for killed < kills {
		dir := t.TempDir()
		require.NoError(t, legacytest.Unpack(legacyArchives, archive, dir))
		times++
		before := legacyFiles(t, filepath.Join(dir, worker))
		for range 4 {
			if !killMigration(t, dir, time.Duration(random.Int64N(int64(takes)))) {
				takes = max(takes*3/4, 10*time.Millisecond) // it was quicker
				continue
			}
			killed++
			_, err := os.Lstat(filepath.Join(dir, worker, "lamina.db"))
			if errors.Is(err, fs.ErrNotExist) {
				early++
			}
			require.Empty(t, cmp.Diff(before, legacyFiles(t, filepath.Join(dir, worker))), "seed %d", seed)
		}
		migrateAll(t, dir)
		require.Empty(t, cmp.Diff(before, legacyFiles(t, filepath.Join(dir, worker))), "seed %d", seed)
		require.Empty(t, cmp.Diff(want, dumpStore(t, filepath.Join(dir, worker))), "seed %d", seed)
	}
}

// migrateAll migrates, and says nothing.
func migrateAll(t *testing.T, dir string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), laminaBinary, "migrate", dir).CombinedOutput()
	require.NoError(t, err, string(out))
}

// killMigration kills a migration after some time, and says whether it got hold
// of it.
func killMigration(t *testing.T, dir string, after time.Duration) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), after)
	defer cancel()
	out, err := exec.CommandContext(ctx, laminaBinary, "migrate", dir).CombinedOutput()
	if err != nil && ctx.Err() == nil {
		require.NoError(t, err, string(out))
	}
	return err != nil
}

// legacyFiles are the checksums of all that the old daemon has, data included.
func legacyFiles(t *testing.T, worker string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	for _, part := range []string{"metadata_v2.db", "metadata.db", "containerdmeta.db", "workerid", "snapshots/metadata.db", "snapshots/snapshots", "content"} {
		err := filepath.WalkDir(filepath.Join(worker, part), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() && strings.HasSuffix(path, "/work/work") {
				return err // what overlayfs does in there is its own
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			sum := info.Mode().String()
			if d.Type().IsRegular() {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				sum += fmt.Sprintf(" %x", sha256.Sum256(data))
			}
			sums[path] = sum
			return nil
		})
		if !errors.Is(err, fs.ErrNotExist) {
			require.NoError(t, err)
		}
	}
	return sums
}

// dumpStore is all that a store says of its records, without the times of the
// looking itself.
func dumpStore(t *testing.T, root string) (lines []string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), laminaBinary, "--root", root, "--json", "ls").Output()
	require.NoError(t, err)
	for line := range bytes.Lines(out) {
		var rec map[string]any
		require.NoError(t, json.Unmarshal(line, &rec))
		shown, err := exec.CommandContext(t.Context(), laminaBinary, "--root", root, "--json", "show", rec["id"].(string)).Output()
		require.NoError(t, err)
		var full map[string]any
		require.NoError(t, json.Unmarshal(shown, &full))
		require.Contains(t, full, "attachments")
		text, err := json.Marshal(full)
		require.NoError(t, err)
		lines = append(lines, string(text))
	}
	slices.Sort(lines)
	list, err := os.ReadFile(filepath.Join(root, "snapshots", "adopted"))
	require.NoError(t, err)
	require.NotEmpty(t, lines)
	check, err := exec.CommandContext(t.Context(), laminaBinary, "--root", root, "check").CombinedOutput()
	require.NoError(t, err, string(check))
	return append(lines, string(list))
}

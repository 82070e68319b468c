package migrate_test

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// Whatever daemons, kills and damage leave together: the plan is always the
// same and true, what is well comes along with its tree, what a kill interrupts
// ends as without it, and all of it can be given back.
//
// The states are those of the seeds from LAMINA_LEGACY_SEED on, as many as
// LAMINA_LEGACY_STATES says.
func TestAnyState(t *testing.T) {
	needsRoot(t)
	few := 60
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		few = 3000
	}
	first, states := number(t, "LAMINA_LEGACY_SEED", 1), number(t, "LAMINA_LEGACY_STATES", few)
	kept := 0
	for seed := first; seed < first+states; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { kept += testState(t, uint64(seed)) })
	}
	require.Greater(t, kept, states, "records came along")
}

func number(t *testing.T, name string, usual int) int {
	text := os.Getenv(name)
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	require.NoError(t, err)
	return n
}

// memory is a directory in which nobody waits for a disk.
func memory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "lamina-migrate-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

func testState(t *testing.T, seed uint64) (kept int) {
	w := legacytest.Random(memory(t), seed)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(strings.Join(w.Log, "\n"))
		}
	})
	require.NoError(t, w.Write())
	before := checksums(t, w.Dir)
	plan := run(t, w.Dir, migrate.Options{DryRun: true}).Plan
	for range 3 { // maps are walked in another order each time
		requireSamePlan(t, plan, run(t, w.Dir, migrate.Options{DryRun: true}).Plan)
	}
	steps := 0
	report := run(t, w.Dir, migrate.Options{Step: func(string) error { steps++; return nil }})
	requireSamePlan(t, plan, report.Plan)
	require.Equal(t, before, checksums(t, w.Dir))
	requireWanted(t, w, plan)
	var clean []string
	use(t, w.Dir, func(_ context.Context, m *cache.Manager) {
		clean = dumpOf(t, m)
		compareStore(t, m, plan)
		requireIndexes(t, m, w)
		requireTrees(t, m, w, plan)
	})

	killed := legacytest.Random(memory(t), seed)
	require.NoError(t, killed.Write())
	require.True(t, killedAt(t, "migrate", killed.Dir, 1+int(seed*7919)%steps))
	run(t, killed.Dir, migrate.Options{})
	requireSame(t, clean, dump(t, killed.Dir))

	require.NoError(t, rollback(t, w.Dir).Err)
	again := run(t, w.Dir, migrate.Options{DryRun: true}).Plan
	noGarbage := func(s migrate.Step) bool { return s.Action == migrate.Free } // it went with the first opening
	require.Equal(t, slices.DeleteFunc(slices.Clone(plan.Steps), noGarbage), again.Steps)
	run(t, w.Dir, migrate.Options{})
	use(t, w.Dir, func(_ context.Context, m *cache.Manager) {
		requireExtracts(t, m, w, plan)
		check(t, m)
	})
	return plan.Records
}

// requireSamePlan compares all that is told of two plans.
func requireSamePlan(t *testing.T, want, got *migrate.Plan) {
	t.Helper()
	require.Empty(t, gocmp.Diff(want, got, cmpopts.IgnoreUnexported(migrate.Plan{}, migrate.Step{})))
}

// requireWanted looks at what becomes of each row: one thing, and the right one
// if no damage concerns it.
func requireWanted(t *testing.T, w *legacytest.World, p *migrate.Plan) {
	t.Helper()
	got, into := map[string]string{}, map[string]string{}
	for _, s := range p.Steps {
		if s.Action == migrate.Free || s.Action == migrate.Leave {
			continue
		}
		require.NotContains(t, got, s.ID, "it has one fate")
		require.NotEmpty(t, s.Reason, s.ID)
		switch s.Action {
		case migrate.Keep:
			got[s.ID] = s.State
		case migrate.Fold:
			got[s.ID] = s.State
			require.NotContains(t, got, s.Into, "it has one fate")
			got[s.Into], into[s.Into] = "fold", s.ID
		default:
			got[s.ID], into[s.ID] = string(s.Action), s.Into
		}
	}
	for _, id := range w.IDs() {
		require.NotEmpty(t, got[id], "what becomes of %s", id)
	}
	for id, want := range w.Want {
		require.Equal(t, want, got[id], id)
		require.Equal(t, w.Into[id], into[id], id)
	}
	for id := range into {
		if s := got[into[id]]; into[id] != "" {
			require.Contains(t, []string{"finalized", "committed", "lazy"}, s, "%s becomes a part of %s", id, into[id])
		}
	}
}

// requireTrees mounts what has a snapshot, and looks for the files that the old
// daemon had in it and below it.
func requireTrees(t *testing.T, m *cache.Manager, w *legacytest.World, p *migrate.Plan) {
	t.Helper()
	for _, s := range p.Steps {
		if s.State != "finalized" && s.State != "committed" {
			continue
		}
		if onLazy(t, m, cache.ID(s.ID)) {
			continue // a mount would extract that, and be the end of the way back
		}
		owner := s.ID
		if s.Action == migrate.Fold {
			owner = s.Into
		}
		require.Equal(t, w.Tree(w.NameOf(owner)), filesOf(t, m, s.ID), s.ID)
		if want := w.Trees[s.ID]; w.Want[s.ID] != "" {
			require.Equal(t, want, filesOf(t, m, s.ID), s.ID)
		}
	}
}

// onLazy says whether something below a record is lazy.
func onLazy(t *testing.T, m *cache.Manager, id cache.ID) bool {
	t.Helper()
	rec, err := m.Lookup(t.Context(), id)
	require.NoError(t, err)
	return rec.State == metadata.Lazy || slices.ContainsFunc(rec.Parents, func(id metadata.ID) bool { return onLazy(t, m, id) })
}

// requireIndexes looks for each key that a row is found by, and for the record
// that it is a part of now.
func requireIndexes(t *testing.T, m *cache.Manager, w *legacytest.World) {
	t.Helper()
	for id, became := range w.Want {
		if became == "drop" {
			continue
		}
		for _, key := range w.Indexes(id) {
			found, err := m.Search(t.Context(), key)
			require.NoError(t, err)
			require.Contains(t, found, cache.ID(cmp.Or(w.Into[id], id)), key)
		}
	}
}

// requireExtracts has every record show its tree, also those that have none
// yet.
func requireExtracts(t *testing.T, m *cache.Manager, w *legacytest.World, p *migrate.Plan) {
	t.Helper()
	for _, s := range p.Steps {
		if want := w.Trees[s.ID]; s.State == "lazy" && w.Want[s.ID] != "" {
			require.Equal(t, want, filesOf(t, m, s.ID), s.ID)
		}
	}
}

// filesOf are the files of a record by path, with what is in them.
func filesOf(t *testing.T, m *cache.Manager, id string) map[string]string {
	t.Helper()
	ref, err := m.Get(t.Context(), cache.ID(id), cache.GetOptions{})
	require.NoError(t, err, id)
	defer func() { require.NoError(t, ref.Release(context.Background())) }()
	mount, err := ref.Mount(t.Context())
	require.NoError(t, err, id)
	defer func() { require.NoError(t, mount.Unmount()) }()
	files := map[string]string{}
	require.NoError(t, filepath.WalkDir(mount.Path(), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		files[strings.TrimPrefix(path, mount.Path()+"/")] = string(data)
		return err
	}))
	return files
}

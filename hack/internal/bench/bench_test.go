package bench_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/hack/internal/bench"
	"github.com/lamina-build/lamina/hack/internal/bench/ours"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// counted is the counter of the whole program, nil where the kernel has none
// for us; uncounted says why.
var (
	counted   *bench.Syncs
	uncounted error
)

func TestMain(m *testing.M) {
	counted, uncounted = bench.CountSyncs()
	os.Exit(m.Run())
}

// legacyWorker makes the directory of an old daemon by hand, as there is no
// peer here.
func legacyWorker(_ context.Context, dir string, n int) error {
	b := legacytest.NewBuilder(filepath.Dir(dir), strings.TrimPrefix(filepath.Base(dir), "runc-"))
	for i := range n {
		b.Finalized(fmt.Sprint("record-", i), "", nil)
	}
	return b.Write()
}

// TestAllOperations measures each operation a few times on a small state of
// the real cache, and holds the counts that do not depend on the machine.
func TestAllOperations(t *testing.T) {
	// Counts do not depend on the disk, and a busy one takes minutes.
	dir, err := os.MkdirTemp(bench.MemoryDir(), "lamina-bench-test-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	opener := ours.Opener()
	opener.Legacy = legacyWorker
	c := bench.Config{
		Openers: []bench.Opener{opener}, Limits: true, Syncs: counted,
		Dir: dir, Sizes: []int{11, 23}, Files: 120, Rounds: 2,
	}
	tx, syncs := map[string]float64{}, map[string]float64{}
	var names, beside, skipped []string
	c.Skipped = func(name, _ string) {
		if !slices.Contains(skipped, name) {
			skipped = append(skipped, name)
		}
	}
	require.NoError(t, bench.Run(t.Context(), c, func(r bench.Result) error {
		require.Len(t, r.Figures, 2)
		require.Equal(t, bench.Limit, r.Figures[1].Subject)
		require.NotEmpty(t, r.Note)
		if strings.HasPrefix(r.Name, "beside-prune") {
			// Percentiles beside the prune of a state, which is gone then.
			require.Less(t, r.Figures[0].Transactions, 1.0)
			require.Positive(t, r.Figures[0].Samples)
			require.Positive(t, r.Figures[1].Samples)
			beside = append(beside, r.Name)
			return nil
		}
		for _, f := range r.Figures {
			require.Positive(t, f.Samples)
			require.Positive(t, f.Median)
			require.LessOrEqual(t, f.Low, f.Median)
			require.LessOrEqual(t, f.Median, f.High)
		}
		f := r.Figures[0]
		require.Equal(t, bench.Ours, f.Subject)
		if len(names) == 0 || names[len(names)-1] != r.Name {
			names = append(names, r.Name)
		}
		if r.Name == "set-value-waiting" || (r.Name == "throughput" && r.N > 1) {
			// Several goroutines share transactions; how many depends on
			// the machine, and a busy one may run them one by one.
			require.LessOrEqual(t, f.Transactions, 1.0)
			return nil
		}
		if r.Name == "checksum-cold" || r.Name == "checksum-child" || r.Name == "checksum-after-finalize" {
			return nil // what was learned may be stored before the clock is read
		}
		if r.Name == "migrate" {
			return nil // works on another directory; how many batches it takes is its own
		}
		if r.Name == "merge" || r.Name == "diff" {
			// A name and a link for each layer, and, the first time, what a
			// record's children are linked to; nothing for each file.
			require.Less(t, f.Made.Inodes, int64(10))
			require.Less(t, f.Made.Links, int64(10))
		}
		if strings.HasPrefix(r.Name, "extract") && r.Name != "extract-bsdtar" {
			require.Greater(t, f.Made.Inodes, int64(360))
			require.Greater(t, f.Made.Bytes, int64(360*3500))
		}
		tx[r.Name] = f.Transactions
		if f.Syncs != nil {
			syncs[r.Name] = *f.Syncs
		}
		return nil
	}))
	measured := slices.DeleteFunc(bench.Names(), func(name string) bool { return strings.HasPrefix(name, "run-") })
	if os.Geteuid() != 0 {
		require.Equal(t, "migrate", skipped[len(skipped)-1], "it needs overlayfs")
		skipped = skipped[:len(skipped)-1]
		measured = slices.DeleteFunc(measured, func(name string) bool { return name == "migrate" })
	}
	if _, err := exec.LookPath("bsdtar"); err != nil {
		require.Equal(t, "extract-bsdtar", skipped[0])
		skipped = skipped[1:]
		measured = slices.DeleteFunc(measured, func(name string) bool { return name == "extract-bsdtar" })
		tx["extract-bsdtar"], syncs["extract-bsdtar"] = tx["extract"], syncs["extract"]
	}
	require.Equal(t, []string{"run-first", "run-noop", "run-noop-git", "run-noop-rsync"}, skipped, "there is no command")
	require.Equal(t, []string{"beside-prune", "beside-prune-get", "beside-prune-release"}, beside)
	require.Equal(t, append([]string{"open", "usage-total", "usage-list", "usage-list-get"}, measured...), append(names, "beside-prune"))
	require.Equal(t, map[string]float64{
		"new": 0, "new-commit-release": 1, "commit": 1, "finalize": 1, "reopen": 1, "get-release": 0, "get-no-update": 0,
		"release": 0, "search": 0, "set-value": 1, "open": 0, "throughput": 1,
		"usage-total": 0, "usage-list": 0, "usage-list-get": 0, "prune": 2.0 / 32, "prune-to-size": 1.0 / 16,
		"checksum-memory": 0, "checksum-stored": 0, "checksum-one-change": 1,
		"getbyblob": 1, "getbyblob-known": 0, "extract": 3, "extract-gzip": 3, "extract-bsdtar": 3,
		"merge": 2, "diff": 2, "blob": 1, "blob-gzip": 1,
	}, tx)

	left, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	require.Empty(t, left, "states are removed")

	if counted == nil {
		t.Skipf("syncs are not looked at: %v", uncounted)
	}
	require.Equal(t, map[string]float64{
		"new": 0, "new-commit-release": 2, "commit": 2, "finalize": 2, "reopen": 2, "get-release": 0, "get-no-update": 0,
		"release": 0, "search": 0, "set-value": 2, "open": 0, "throughput": 2,
		"usage-total": 0, "usage-list": 0, "usage-list-get": 0, "prune": 4.0 / 32, "prune-to-size": 2.0 / 16,
		"checksum-memory": 0, "checksum-stored": 0, "checksum-one-change": 2,
		"getbyblob": 2, "getbyblob-known": 0, "extract": 6, "extract-gzip": 6, "extract-bsdtar": 6,
		// The blob and its directory are synced before a record names it.
		"merge": 4, "diff": 4, "blob": 4, "blob-gzip": 4,
	}, syncs)
}

// TestSyncsAreCounted makes one of each call, in threads of their own.
func TestSyncsAreCounted(t *testing.T) {
	if counted == nil {
		t.Skip(uncounted)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	require.NoError(t, err)
	defer f.Close()
	before, err := counted.Count()
	require.NoError(t, err)
	for i, call := range []func(int) error{unix.Fsync, unix.Fdatasync, unix.Syncfs} {
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with us
			done <- call(int(f.Fd()))
		}()
		require.NoError(t, <-done)
		after, err := counted.Count()
		require.NoError(t, err)
		require.EqualValues(t, i+1, after-before)
	}
}

func environment(out, talk *bytes.Buffer, openers ...bench.Opener) bench.Environment {
	return bench.Environment{Stdout: out, Stderr: talk, Syncs: counted, Openers: openers}
}

func TestJSON(t *testing.T) {
	var out, talk bytes.Buffer
	args := []string{"--json", "--only", "search,new", "--rounds", "1", "--quick", "--dir", t.TempDir()}
	env := environment(&out, &talk, slowed(bench.Ours, 2*time.Millisecond), slowed(bench.Peer, 8*time.Millisecond))
	require.Zero(t, bench.Main(t.Context(), args, env), talk.String())

	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	require.Len(t, lines, 2)
	for i, name := range []string{"new", "search"} {
		var got map[string]any
		require.NoError(t, json.Unmarshal([]byte(lines[i]), &got))
		require.Equal(t, name, got["name"])
		require.InDelta(t, 1000, got["n"], 0)
		require.Equal(t, "us", got["unit"])
		require.ElementsMatch(t, []string{
			"name", "n", "unit", "ours", "peer", "limit", "ratio_peer", "ratio_limit",
			"tx", "syncs", "peer_tx", "peer_syncs", "made", "peer_made", "limit_made", "note",
		}, slices.Collect(maps.Keys(got)))
		require.Contains(t, got["note"], "limit: ")
		if name == "new" {
			require.GreaterOrEqual(t, got["ours"], 2000.0)
			require.GreaterOrEqual(t, got["peer"], 8000.0)
			require.InEpsilon(t, got["ours"].(float64)/got["peer"].(float64), got["ratio_peer"], 0.01)
			require.InEpsilon(t, got["ours"].(float64)/got["limit"].(float64), got["ratio_limit"], 0.01)
		}
	}

	// Without a peer its fields are there, and empty.
	out.Reset()
	require.Zero(t, bench.Main(t.Context(), args, environment(&out, &talk, slowed(bench.Ours, 0))), talk.String())
	require.Contains(t, out.String(), `"peer":null`)
	require.Contains(t, out.String(), `"ratio_peer":null`)
}

func TestTable(t *testing.T) {
	var out, talk bytes.Buffer
	args := []string{"--only", "new,release", "--rounds", "1", "--sizes", "12", "--dir", t.TempDir()}
	env := environment(&out, &talk, slowed(bench.Ours, 0), slowed(bench.Peer, 0))
	require.Zero(t, bench.Main(t.Context(), args, env), talk.String())
	for _, want := range []string{"/ peer", "/ limit", "syncs", "10 % – 90 %", "release: of a record just committed"} {
		require.Contains(t, out.String(), want)
	}
	require.Regexp(t, `(?m)^ new +│ 12 │`, out.String())
}

func TestBadArguments(t *testing.T) {
	for _, args := range [][]string{
		{"--only", "nothing"},
		{"--nope"},
		{"argument"},
		{"--disk", "floppy"},
		{"--sizes", "10"},
		{"--sizes", "20,20"},
		{"--sizes", "x"},
	} {
		var out, talk bytes.Buffer
		require.Equal(t, 2, bench.Main(t.Context(), args, environment(&out, &talk, ours.Opener())), args)
		require.NotEmpty(t, talk.String())
		require.Empty(t, out.String())
	}
	var out, talk bytes.Buffer
	args := []string{"--dir", filepath.Join(t.TempDir(), "missing")}
	require.Equal(t, 1, bench.Main(t.Context(), args, environment(&out, &talk, ours.Opener())))
	require.Contains(t, talk.String(), "missing")
}

// TestPatience has operations that take longer than there is time for.
func TestPatience(t *testing.T) {
	c := bench.Config{
		Openers: []bench.Opener{slowed(bench.Ours, 10*time.Millisecond)},
		Dir:     t.TempDir(), Sizes: []int{11}, Rounds: 100, Only: []string{"new"}, Patience: time.Millisecond,
	}
	require.NoError(t, bench.Run(t.Context(), c, func(r bench.Result) error {
		require.Equal(t, 3, r.Figures[0].Samples)
		return nil
	}))
}

// TestTransactionsAreCounted compares what is read from the meta pages with
// what bbolt was asked to do.
func TestTransactionsAreCounted(t *testing.T) {
	file := filepath.Join(t.TempDir(), "db")
	db, err := bolt.Open(file, 0o600, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()

	first, err := bench.Transactions([]string{file})
	require.NoError(t, err)
	for i := range 5 {
		require.NoError(t, db.Update(func(tx *bolt.Tx) error {
			_, err := tx.CreateBucketIfNotExists([]byte("b"))
			return err
		}))
		require.NoError(t, db.View(func(*bolt.Tx) error { return nil }))
		now, err := bench.Transactions([]string{file})
		require.NoError(t, err)
		require.EqualValues(t, i+1, now-first)
	}
	short := filepath.Join(t.TempDir(), "short")
	require.NoError(t, os.WriteFile(short, []byte("no database"), 0o600))
	_, err = bench.Transactions([]string{short})
	require.ErrorContains(t, err, short)
}

// TestStateOnlyForWhoAsksForRecords has a large state that is never built.
func TestStateOnlyForWhoAsksForRecords(t *testing.T) {
	var built []string
	c := bench.Config{
		Openers: []bench.Opener{slowed(bench.Ours, 0)}, Dir: t.TempDir(), Sizes: []int{1000, 1_000_000_000}, Files: 50, Rounds: 1,
		Progress: func(what string) {
			if strings.HasPrefix(what, "building ") {
				built = append(built, what)
			}
		},
	}
	c.Only = []string{"checksum-memory"}
	require.NoError(t, bench.Run(t.Context(), c, func(bench.Result) error { return nil }))
	require.Equal(t, []string{"building 11 records"}, built)

	// Operations of the command need no other cache.
	c.Only = []string{"run-noop", "run-first"}
	c.Openers[0].Open = func(context.Context, string) (bench.Subject, error) { return nil, errors.New("opened") }
	require.NoError(t, bench.Run(t.Context(), c, func(bench.Result) error { return nil }))
}

// TestInterruptedBenchLeavesNothing: neither in the directory of the states nor
// in memory, where they are built, and where snapshots were mounted by then.
func TestInterruptedBenchLeavesNothing(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	opener := ours.Opener()
	open, built := opener.Open, ""
	opener.Open = func(ctx context.Context, dir string) (bench.Subject, error) {
		s, err := open(ctx, dir)
		built = dir
		return &interrupted{Subject: s, after: 5, cancel: cancel}, err
	}
	c := bench.Config{Openers: []bench.Opener{opener}, Dir: t.TempDir(), Sizes: []int{100}, Rounds: 1, Only: []string{"release"}}
	require.ErrorIs(t, bench.Run(ctx, c, func(bench.Result) error { return nil }), context.Canceled)
	require.NotEmpty(t, built)
	require.NoDirExists(t, built)
	left, err := os.ReadDir(c.Dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

// interrupted cancels when some snapshots were made.
type interrupted struct {
	bench.Subject
	after  int
	cancel context.CancelFunc
}

func (i *interrupted) New(ctx context.Context, parent bench.Immutable, values ...bench.Value) (bench.Mutable, error) {
	if i.after--; i.after == 0 {
		i.cancel()
	}
	return i.Subject.New(ctx, parent, values...)
}

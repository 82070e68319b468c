package bench_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/hack/internal/bench"
	"github.com/lamina-build/lamina/hack/internal/bench/ours"
)

// TestAllOperations measures each operation once on a small state of the real
// cache, and holds the counts that do not depend on the machine.
func TestAllOperations(t *testing.T) {
	dir := t.TempDir()
	c := bench.Config{Openers: []bench.Opener{ours.Opener()}, Dir: dir, Sizes: []int{11, 23}, Rounds: 2}
	tx := map[string]float64{}
	var names []string
	require.NoError(t, bench.Run(t.Context(), c, func(r bench.Result) error {
		require.Len(t, r.Figures, 1)
		f := r.Figures[0]
		require.Equal(t, bench.Ours, f.Subject)
		require.Equal(t, 2, f.Samples)
		require.Positive(t, f.Median)
		require.LessOrEqual(t, f.Low, f.Median)
		require.LessOrEqual(t, f.Median, f.High)
		if r.Name == "throughput" && r.N > 1 {
			// Several goroutines share transactions; how many depends on
			// the machine.
			require.LessOrEqual(t, f.Transactions, 1.0)
		} else {
			tx[r.Name] = f.Transactions
		}
		names = append(names, r.Name)
		return nil
	}))
	require.Equal(t, append([]string{"open"}, append(bench.Names(), "throughput", "throughput")...), names)
	require.Equal(t, map[string]float64{
		"new": 0, "new-commit-release": 1, "commit": 1, "finalize": 1, "reopen": 1, "get-release": 0,
		"release": 0, "search": 0, "set-value": 1, "open": 0, "throughput": 1,
	}, tx)

	left, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	require.Empty(t, left, "states are removed")
}

func TestJSON(t *testing.T) {
	var out, talk bytes.Buffer
	args := []string{"--json", "--only", "search,new", "--rounds", "1", "--quick", "--dir", t.TempDir()}
	code := bench.Main(t.Context(), args, &out, &talk, false, slowed(bench.Ours, 2*time.Millisecond), slowed(bench.Peer, 8*time.Millisecond))
	require.Zero(t, code, talk.String())

	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	require.Len(t, lines, 2)
	for i, name := range []string{"new", "search"} {
		var got map[string]any
		require.NoError(t, json.Unmarshal([]byte(lines[i]), &got))
		require.Equal(t, name, got["name"])
		require.InDelta(t, 1000, got["n"], 0)
		require.Equal(t, "us", got["unit"])
		require.Contains(t, got, "tx")
		require.Contains(t, got, "peer_tx")
		if name == "new" {
			require.GreaterOrEqual(t, got["ours"], 2000.0)
			require.GreaterOrEqual(t, got["peer"], 8000.0)
			require.Less(t, got["ratio_peer"], 1.0)
		}
	}
}

func TestBadArguments(t *testing.T) {
	for _, args := range [][]string{{"--only", "nothing"}, {"--nope"}, {"argument"}} {
		var out, talk bytes.Buffer
		require.Equal(t, 2, bench.Main(t.Context(), args, &out, &talk, false, ours.Opener()), args)
		require.NotEmpty(t, talk.String())
		require.Empty(t, out.String())
	}
	var out, talk bytes.Buffer
	args := []string{"--dir", filepath.Join(t.TempDir(), "missing")}
	require.Equal(t, 1, bench.Main(t.Context(), args, &out, &talk, false, ours.Opener()))
	require.Contains(t, talk.String(), "missing")
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

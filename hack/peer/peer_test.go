package peer_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/hack/internal/bench"
	"github.com/lamina-build/lamina/hack/internal/bench/ours"
	"github.com/lamina-build/lamina/hack/peer"
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

// TestSubjectsAgree runs one story on both subjects: a bench that compares
// them must make them do the same.
func TestSubjectsAgree(t *testing.T) {
	needsRoot(t)
	for _, o := range []bench.Opener{ours.Opener(), peer.Opener()} {
		t.Run(o.Name, func(t *testing.T) {
			ctx, dir := t.Context(), t.TempDir()
			s, err := o.Open(ctx, dir)
			require.NoError(t, err)

			// A base with a file, committed, found by its index, finalized.
			mut, err := s.New(ctx, nil, bench.Value{Name: "v", Data: "1", Index: "key/1"})
			require.NoError(t, err)
			require.NoError(t, mut.Change(ctx, func(dir string) error {
				return os.WriteFile(filepath.Join(dir, "file"), []byte("text"), 0o600)
			}))
			base, err := mut.Commit(ctx)
			require.NoError(t, err)
			require.NoError(t, base.Finalize(ctx))
			found, err := s.Search(ctx, "key/1")
			require.NoError(t, err)
			require.Equal(t, []string{base.ID()}, found)

			// A child, committed, reopened, committed again.
			mut, err = s.New(ctx, base)
			require.NoError(t, err)
			child, err := mut.Commit(ctx)
			require.NoError(t, err)
			first, reopenID := child.ID(), child.ReopenID()
			require.NoError(t, child.Release(ctx))
			mut, err = s.GetMutable(ctx, reopenID)
			require.NoError(t, err)
			_, err = s.Get(ctx, first)
			require.Error(t, err, "the id of the former content")
			child, err = mut.Commit(ctx)
			require.NoError(t, err)
			require.NotEqual(t, first, child.ID())
			require.NoError(t, child.SetValue(ctx, bench.Value{Name: "v", Data: "2", Index: "key/2"}))
			second := child.ID()

			// All of it is there after the handles and the process are gone.
			require.NoError(t, child.Release(ctx))
			require.NoError(t, base.Release(ctx))
			require.NoError(t, s.Close())
			s, err = o.Open(ctx, dir)
			require.NoError(t, err)
			found, err = s.Search(ctx, "key/2")
			require.NoError(t, err)
			require.Equal(t, []string{second}, found)
			for _, get := range []func(context.Context, string) (bench.Immutable, error){s.Get, s.Look} {
				child, err = get(ctx, second)
				require.NoError(t, err)
				require.Equal(t, second, child.ID())
				require.NoError(t, child.Release(ctx))
			}
			require.NoError(t, s.Close())
		})
	}
}

// TestSubjectsHashAlike compares content hashes, whatever became of what was
// known.
func TestSubjectsHashAlike(t *testing.T) {
	needsRoot(t)
	var want []string
	for _, o := range []bench.Opener{peer.Opener(), ours.Opener()} {
		t.Run(o.Name, func(t *testing.T) {
			ctx := t.Context()
			s, err := o.Open(ctx, t.TempDir())
			require.NoError(t, err)
			var got []string
			ask := func(imm bench.Immutable) {
				d, err := imm.Checksum(ctx)
				require.NoError(t, err)
				got = append(got, d)
			}
			mut, err := s.New(ctx, nil)
			require.NoError(t, err)
			require.NoError(t, mut.Change(ctx, func(dir string) error {
				return os.WriteFile(filepath.Join(dir, "file"), []byte("text"), 0o644)
			}))
			base, err := mut.Commit(ctx)
			require.NoError(t, err)
			ask(base)
			require.NoError(t, base.ForgetChecksum(ctx, false))
			ask(base)
			require.NoError(t, base.ForgetChecksum(ctx, true))
			ask(base)
			require.NoError(t, base.Finalize(ctx))
			ask(base)
			mut, err = s.New(ctx, base)
			require.NoError(t, err)
			require.NoError(t, mut.Change(ctx, func(dir string) error {
				return os.WriteFile(filepath.Join(dir, "file"), []byte("other"), 0o644)
			}))
			child, err := mut.Commit(ctx)
			require.NoError(t, err)
			ask(child)
			require.NoError(t, base.ReportChange(ctx, "file", []byte("reported")))
			require.NoError(t, base.ForgetChecksum(ctx, false))
			ask(base)
			require.NoError(t, errors.Join(base.Release(ctx), child.Release(ctx), s.Close()))
			if want == nil {
				want = got
			}
			require.Equal(t, want, got)
			require.Equal(t, got[0], got[3])
			require.NotEqual(t, got[0], got[4])
		})
	}
}

// TestPeerTransactions holds the peer's counts. If one of them moves, the peer
// is not wired as its daemon wires it, or its version changed: then the
// figures that were published no longer compare.
func TestPeerTransactions(t *testing.T) {
	needsRoot(t)
	tx, syncs := map[string]float64{}, map[string]float64{}
	c := bench.Config{
		Openers: []bench.Opener{peer.Opener()},
		Syncs:   counted,
		Dir:     t.TempDir(),
		Sizes:   []int{23},
		Rounds:  3,
		Only: []string{
			"new", "new-commit-release", "commit", "finalize", "reopen", "get-release", "get-no-update",
			"release", "search", "set-value", "open",
		},
	}
	require.NoError(t, bench.Run(t.Context(), c, func(r bench.Result) error {
		tx[r.Name] = r.Figures[0].Transactions
		if n := r.Figures[0].Syncs; n != nil {
			syncs[r.Name] = *n
		}
		return nil
	}))
	want := map[string]float64{
		"new": 8, "new-commit-release": 12, "commit": 2, "finalize": 7, "reopen": 1, "get-release": 1, "get-no-update": 0,
		"release": 2, "search": 0, "set-value": 1, "open": 0,
	}
	require.Equal(t, want, tx)
	if counted == nil {
		t.Skipf("syncs are not looked at: %v", uncounted)
	}
	for name := range want {
		want[name] *= 2
	}
	require.Equal(t, want, syncs, "two for each transaction")
}

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the peer's overlayfs snapshots are mounted")
	}
}

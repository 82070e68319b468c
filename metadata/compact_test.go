package metadata_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/metadata"
)

// contents is all that a store holds, one line each.
func contents(t testing.TB, s *metadata.Store) []string {
	t.Helper()
	var out []string
	view(t, s, func(tx *metadata.Tx) { out = read(t, tx) })
	return out
}

func read(t testing.TB, tx *metadata.Tx) []string {
	t.Helper()
	out, err := readAll(tx)
	require.NoError(t, err)
	return out
}

func readAll(tx *metadata.Tx) (out []string, err error) {
	for r, err := range tx.Records() {
		if err != nil {
			return nil, err
		}
		out = append(out, fmt.Sprintf("%+v", *r))
		for name := range tx.Attachments(r.ID) {
			data, err := tx.Attachment(r.ID, name)
			if err != nil {
				return nil, err
			}
			out = append(out, fmt.Sprintf("%s %s %d bytes", r.ID, name, len(data)))
		}
	}
	m, err := tx.Meta()
	return append(out, fmt.Sprintf("%+v", m)), err
}

// hollow makes a store of which most pages are free.
func hollow(t testing.TB, path string, o metadata.Options, kept int) *metadata.Store {
	t.Helper()
	s, err := metadata.Open(t.Context(), path, o)
	require.NoError(t, err)
	fill := func(tx *metadata.Tx) error {
		for i := range 8 * kept {
			r := rec(metadata.ID(fmt.Sprintf("%05d", i)), indexed("i", fmt.Sprint(i)), func(r *metadata.Record) {
				r.Description = strings.Repeat("x", 200)
			})
			if i%3 == 1 {
				r.Parents = []metadata.ID{"00000"}
			}
			if err := tx.Create(r); err != nil {
				return err
			}
			if i%10 == 0 {
				if err := tx.SetAttachment(r.ID, "a", make([]byte, 100*(i%100))); err != nil {
					return err
				}
			}
		}
		return nil
	}
	update(t, s, fill)
	update(t, s, func(tx *metadata.Tx) error {
		for i := 8*kept - 1; i > 0; i-- {
			if i%8 != 0 {
				if err := tx.Delete(metadata.ID(fmt.Sprintf("%05d", i))); err != nil {
					return err
				}
			}
		}
		return nil
	})
	return s
}

func TestCompact(t *testing.T) {
	path := storePath(t)
	s := hollow(t, path, metadata.Options{FlushInterval: -1}, 20)
	defer s.Close()
	before, st := contents(t, s), s.Stats()
	require.Zero(t, st.Compactions, "too small to be compacted by itself")
	s.Touch("00000", time.Unix(5, 0))
	id := s.NewID()
	require.NoError(t, s.Compact(t.Context()))
	after := s.Stats()
	require.EqualValues(t, 1, after.Compactions)
	require.Less(t, after.UsedBytes, (st.UsedBytes-st.FreeBytes)*3/2)
	require.Less(t, after.FileBytes, st.FileBytes)
	require.Equal(t, 1, after.WaitingUses)
	require.EqualValues(t, 1, get(t, s, "00000").UsageCount)
	require.NoError(t, s.Flush(t.Context()))
	require.EqualValues(t, 1, get(t, s, "00000").UsageCount)
	require.Len(t, contents(t, s), len(before))
	require.Empty(t, findings(t, s))
	require.Greater(t, s.NewID(), id)
	create(t, s, rec("after"))
	want := contents(t, s)

	// Nobody gets in between, neither by the old file nor by the new one.
	_, err := metadata.Open(t.Context(), path, metadata.Options{LockTimeout: -1})
	require.ErrorIs(t, err, metadata.ErrLocked)
	require.NoError(t, s.Close())
	require.ErrorIs(t, s.Compact(t.Context()), metadata.ErrClosed)
	s = open(t, path, metadata.Options{})
	require.Equal(t, want, contents(t, s))
	left, err := filepath.Glob(path + ".compact")
	require.NoError(t, err)
	require.Empty(t, left)
}

// TestCompactWhileInUse: readers see their state to the end, writers go on
// while the file is copied, and what they write is in the new file.
func TestCompactWhileInUse(t *testing.T) {
	path := storePath(t)
	var s *metadata.Store
	parts := 0
	step := func(name string) error {
		// A reader and a writer at each step, those of the writers' turn but
		// for a writer.
		if !strings.HasPrefix(name, "compact") {
			return nil
		}
		if err := s.View(context.Background(), func(tx *metadata.Tx) error { _, err := tx.Get("00000"); return err }); err != nil {
			return err
		}
		if name != "compact copy" && name != "compact data" {
			return nil
		}
		parts++
		return s.Update(context.Background(), func(tx *metadata.Tx) error {
			n := 8 * (parts % 20)
			if err := tx.Create(rec(metadata.ID(fmt.Sprintf("new%d", parts)), over("00000"))); err != nil {
				return err
			}
			if n > 0 {
				if err := tx.Delete(metadata.ID(fmt.Sprintf("%05d", n))); err != nil {
					return err
				}
			}
			r, err := tx.Get("00152")
			if err != nil {
				return err
			}
			r.Description = fmt.Sprint(parts)
			_, err = tx.Put(r)
			return err
		})
	}
	s = hollow(t, path, metadata.Options{Step: step}, 20)
	defer s.Close()
	update(t, s, func(tx *metadata.Tx) error { return tx.SetAttachment("00000", "large", make([]byte, 3<<20)) })

	old := make(chan []string)
	seen, goOn, ended := make(chan []string), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- s.View(context.Background(), func(tx *metadata.Tx) error {
			first, err := readAll(tx)
			seen <- first
			<-goOn
			again, err2 := readAll(tx)
			old <- again
			return errors.Join(err, err2)
		})
	}()
	first := <-seen
	require.NoError(t, s.Compact(t.Context()))
	require.NotZero(t, parts)
	require.EqualValues(t, 1, s.Stats().Compactions)
	close(goOn)
	require.Equal(t, first, <-old, "a reader's state does not change")
	require.NoError(t, <-ended)

	require.Equal(t, fmt.Sprint(parts), get(t, s, "00152").Description)
	view(t, s, func(tx *metadata.Tx) {
		require.Len(t, read(t, tx), len(first), "each step added one and removed one")
	})
	for i := range parts {
		get(t, s, metadata.ID(fmt.Sprintf("new%d", i+1)))
	}
	require.Empty(t, findings(t, s))
	require.NoError(t, s.Close())
	s = open(t, path, metadata.Options{})
	require.Equal(t, fmt.Sprint(parts), get(t, s, "00152").Description)
}

// steps lists the durable steps of a run.
func steps(t *testing.T, run func(o metadata.Options)) (names []string) {
	t.Helper()
	run(metadata.Options{FlushInterval: -1, Step: func(name string) error { names = append(names, name); return nil }})
	require.NotEmpty(t, names)
	return names
}

// TestCompactStepByStep fails each step, and opens what a kill there leaves.
func TestCompactStepByStep(t *testing.T) {
	run := func(o metadata.Options) (*metadata.Store, error) {
		path := storePath(t)
		s := hollow(t, path, metadata.Options{FlushInterval: -1}, 20)
		require.NoError(t, s.Close())
		s, err := metadata.Open(t.Context(), path, o)
		require.NoError(t, err)
		return s, s.Compact(t.Context())
	}
	names := steps(t, func(o metadata.Options) {
		s, err := run(o)
		require.NoError(t, err)
		require.NoError(t, s.Close())
	})
	require.Equal(t, []string{"compact file", "compact copy", "compact data", "compact commit", "compact rename", "compact sync"}, names)
	for _, stop := range names {
		t.Run(stop, func(t *testing.T) {
			path := storePath(t)
			s := hollow(t, path, metadata.Options{FlushInterval: -1}, 20)
			want := contents(t, s)
			require.NoError(t, s.Close())

			killed := filepath.Join(t.TempDir(), "lamina.db")
			s, err := metadata.Open(t.Context(), path, metadata.Options{FlushInterval: -1, Step: func(name string) error {
				if name != stop {
					return nil
				}
				for _, suffix := range []string{"", ".compact"} { // what a kill would leave
					b, err := os.ReadFile(path + suffix)
					if err == nil {
						err = os.WriteFile(killed+suffix, b, 0o600)
					}
					if err != nil && !errors.Is(err, os.ErrNotExist) {
						return err
					}
				}
				return syscall.ENOSPC
			}})
			require.NoError(t, err)
			err = s.Compact(t.Context())
			require.ErrorIs(t, err, syscall.ENOSPC)
			if stop == "compact sync" {
				require.ErrorIs(t, err, metadata.ErrUnknownOutcome)
				require.ErrorIs(t, s.Update(t.Context(), func(*metadata.Tx) error { return nil }), metadata.ErrUnknownOutcome)
			} else {
				require.True(t, errdefs.IsResourceExhausted(err))
				require.Equal(t, want, contents(t, s))
				create(t, s, rec("goes on"))
				require.NoFileExists(t, path+".compact")
			}
			require.NoError(t, s.Close())
			for _, p := range []string{path, killed} {
				s = open(t, p, metadata.Options{})
				got := contents(t, s)
				if p == path && stop != "compact sync" {
					require.Len(t, got, len(want)+1)
				} else {
					require.Equal(t, want, got)
				}
				require.NoFileExists(t, p+".compact")
				require.NoError(t, s.Close())
			}
		})
	}
}

// TestCompactByItself: a store through which many records go stays small.
func TestCompactByItself(t *testing.T) {
	n := 30_000
	if os.Getenv("LAMINA_TEST_FULL") == "1" {
		n = 1_000_000
	}
	const live = 1000
	path := storePath(t)
	s := open(t, path, metadata.Options{FlushInterval: -1})
	var ids []metadata.ID
	batch := 500

	for done := 0; done < n; done += batch {
		// Sometimes many come before others go: the file gets long.
		burst := batch
		if done/batch%20 == 19 {
			burst = 20 * batch
		}
		add := make([]metadata.ID, 0, burst)
		for range burst {
			add = append(add, s.NewID())
		}
		update(t, s, func(tx *metadata.Tx) error {
			for _, id := range add {
				if err := tx.Create(rec(id, indexed(string(id)))); err != nil {
					return err
				}
			}
			return nil
		})
		done += burst - batch
		ids = append(ids, add...)
		if over := len(ids) - live; over > 0 {
			update(t, s, func(tx *metadata.Tx) error {
				for _, id := range ids[:over] {
					if err := tx.Delete(id); err != nil {
						return err
					}
				}
				return nil
			})
			ids = ids[over:]
		}
	}

	require.NoError(t, s.Stats().CompactError)
	require.NotZero(t, s.Stats().Compactions)
	require.NoError(t, s.Close())
	s = open(t, path, metadata.Options{})
	st := s.Stats()
	inUse := st.UsedBytes - st.FreeBytes
	t.Logf("%d records through %d: file %d, in use %d, ratio %.2f", n, live, st.FileBytes, inUse, float64(st.FileBytes)/float64(inUse))
	require.LessOrEqual(t, st.FileBytes, 4*inUse)
	view(t, s, func(tx *metadata.Tx) {
		got := 0
		for _, err := range tx.Records() {
			require.NoError(t, err)
			got++
		}
		require.Equal(t, live, got)
	})
}

// TestCompactCanceled leaves nothing behind.
func TestCompactCanceled(t *testing.T) {
	path := storePath(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	s := hollow(t, path, metadata.Options{Step: func(name string) error {
		if name == "compact data" {
			cancel(io.ErrClosedPipe)
		}
		return nil
	}}, 20)
	require.ErrorIs(t, s.Compact(ctx), io.ErrClosedPipe)
	require.NoFileExists(t, path+".compact")
	require.NoError(t, s.Compact(t.Context()))
	require.NoError(t, s.Close())
}

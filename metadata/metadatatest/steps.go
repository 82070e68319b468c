package metadatatest

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/metadata"
)

var errInjected = errors.New("injected")

// change is one update of the short history, and the ids that are there after it.
type change struct {
	do    func(*metadata.Tx) error
	there []metadata.ID
}

func steps() []change {
	rec := func(id metadata.ID, parents ...metadata.ID) *metadata.Record {
		return &metadata.Record{
			ID: id, State: metadata.Finalized, Op: metadata.Layer, Key: "key " + string(id), Size: 1, Parents: parents,
			Values: []metadata.Value{{Name: "v", Index: "index"}},
		}
	}
	return []change{
		{func(tx *metadata.Tx) error { return tx.Create(rec("a")) }, []metadata.ID{"a"}},
		{func(tx *metadata.Tx) error {
			return errors.Join(tx.Create(rec("b", "a")), tx.SetAttachment("b", "log", make([]byte, 10_000)))
		}, []metadata.ID{"a", "b"}},
		{func(tx *metadata.Tx) error { return tx.Replace("b", rec("c", "a")) }, []metadata.ID{"a", "c"}},
		{func(tx *metadata.Tx) error {
			r, err := tx.Get("c")
			if err == nil {
				r.Description = "changed"
				_, err = tx.Put(r)
			}
			return err
		}, []metadata.ID{"a", "c"}},
		{func(tx *metadata.Tx) error { return tx.Delete("c") }, []metadata.ID{"a"}},
	}
}

// testEveryStepFails: an update that fails has changed nothing, and works when
// it is made again.
func testEveryStepFails(t *testing.T, dir string, open Opener) {
	for at, met := 1, true; met; at++ {
		n, on := 0, false
		path := filepath.Join(dir, fmt.Sprint("step", at))
		s, err := open(path, metadata.Options{FlushInterval: -1, Step: func(string) error {
			if on {
				if n++; n == at {
					return errInjected
				}
			}
			return nil
		}})
		require.NoError(t, err)
		before := []metadata.ID(nil)
		for _, c := range steps() {
			on = true
			err := s.Update(t.Context(), c.do)
			on = false
			if err != nil {
				require.ErrorIs(t, err, errInjected)
				require.Equal(t, before, ids(t, s))
				require.NoError(t, s.Update(t.Context(), c.do), "again")
			}
			require.Equal(t, c.there, ids(t, s))
			before = c.there
		}
		require.NoError(t, s.Close())
		s, err = open(path, metadata.Options{FlushInterval: -1})
		require.NoError(t, err)
		require.Equal(t, before, ids(t, s), "opened again")
		require.NoError(t, s.Close())
		if met = n >= at; !met {
			require.Greater(t, n, len(steps()), "no steps were met: the opener leaves Step out")
			t.Logf("rig: %d steps failed in turn", n)
		}
	}
}

// ids lists the records of a store that Check finds nothing wrong with.
func ids(t *testing.T, s *metadata.Store) (out []metadata.ID) {
	require.NoError(t, s.View(t.Context(), func(tx *metadata.Tx) error {
		for r, err := range tx.Records() {
			require.NoError(t, err)
			out = append(out, r.ID)
		}
		require.Equal(t, len(out), len(slices.Collect(tx.ByIndex("index"))))
		for f, err := range tx.Check() {
			require.NoError(t, err)
			require.Fail(t, f.Code, f.Message)
		}
		return nil
	}))
	return out
}

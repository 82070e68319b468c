// Package metadatatest proves that a record store keeps its promises where
// somebody wants to keep one: on another file system, or with other options.
//
// Run plays random histories of all that changes a store, and compares after
// each step everything that can be asked with a model of maps; then it has each
// durable step of a shorter history fail.
package metadatatest

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/metadata"
)

// Opener opens the store at path, or makes it: metadata.Open with options of
// one's own beside those of o, which must be heeded.
type Opener func(path string, o metadata.Options) (*metadata.Store, error)

// Run proves the stores that open gives, in a fresh directory below dir.
// rapid's flags say how many histories are played, and from which seed.
func Run(t *testing.T, dir string, open Opener) {
	dir, err := os.MkdirTemp(dir, "lamina-metadatatest-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	t.Run("Histories", func(t *testing.T) { testHistories(t, dir, open) })
	t.Run("EveryStepFails", func(t *testing.T) { testEveryStepFails(t, dir, open) })
}

func testHistories(t *testing.T, dir string, open Opener) {
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		h := newHistory(rt, filepath.Join(dir, strconv.Itoa(n)), open)
		h.open()
		defer func() { _ = h.s.Close() }()
		rt.Repeat(map[string]func(*rapid.T){
			"create": h.create, "put": h.put, "delete": h.remove, "replace": h.replace,
			"attach": h.attach, "detach": h.detach, "touch": h.touch, "reopen": h.reopen,
			"several": h.several, "": h.same,
		})
		h.reopen(rt)
		h.same(rt)
	})
	t.Logf("rig: %d histories", n)
}

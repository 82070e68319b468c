package main

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/contenthash/contenthashtest"
	"github.com/lamina-build/lamina/workspace/source"
)

// The digest of a source is what the peer gives for the list of its files once
// its client has sent them: owned by 0:0, and without sockets.
func TestSourceDigestIsThePeersOfAContext(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("makes devices and owners, which takes root")
	}
	write := func(tree contenthashtest.Tree) string {
		dir := t.TempDir()
		require.NoError(t, tree.Write(dir))
		for _, e := range tree.Entries {
			if e.Type == 's' {
				require.NoError(t, os.Remove(filepath.Join(dir, e.Path)))
			}
		}
		return dir
	}
	for seed := range uint64(200) {
		tree := contenthashtest.New(2_000_000 + seed)
		ours, err := source.Scan(t.Context(), write(tree), source.Options{}, nil)
		require.NoError(t, err)
		for i := range tree.Entries {
			tree.Entries[i].UID, tree.Entries[i].GID = 0, 0
		}
		want, err := askPeer(t.Context(), write(tree), fmt.Sprint(t.Name(), seed), contenthashtest.Query{Path: "/", Include: []string{"**"}})
		require.NoError(t, err)
		require.Equal(t, want, ours.Digest(), "seed %d", seed)
	}
}

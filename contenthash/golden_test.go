package contenthash_test

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/contenthash/contenthashtest"
)

// TestPeer compares with what BuildKit's own code answered. Where this fails,
// hack/peer/contenthash shows which question has which answer.
func TestPeer(t *testing.T) {
	needRoot(t, "the trees hold devices, owners and trusted attributes")
	golden, err := contenthashtest.ReadGolden("testdata/peer.txt")
	require.NoError(t, err)
	require.Len(t, golden, 2000)
	every := 1
	if raceEnabled || testing.Short() {
		every = 10
	}
	const parts = 8
	for part := range parts {
		t.Run(strconv.Itoa(part), func(t *testing.T) {
			t.Parallel()
			dir := scratch(t)
			for i := part * every; i < len(golden); i += parts * every {
				checkSeed(t, dir, uint64(i+1), golden[i])
			}
		})
	}
}

// checkSeed asks in three ways: one tree for all questions, one tree a
// question, and a tree that has to validate each fact.
func checkSeed(t *testing.T, dir string, seed uint64, golden string) {
	t.Helper()
	tree := contenthashtest.New(seed)
	root := filepath.Join(dir, strconv.FormatUint(seed, 10))
	require.NoError(t, os.Mkdir(root, 0o700))
	defer os.RemoveAll(root)
	require.NoError(t, tree.Write(root))
	shared, doubted := contenthash.New(), contenthash.New()
	doubted.Unconfirm()
	var one, many, unsure []string
	for _, q := range tree.Queries(seed) {
		ask := func(tree *contenthash.Tree) string {
			d, err := tree.Checksum(t.Context(), contenthash.Dir(root), q.Path, options(q))
			return contenthashtest.Answer(d, err)
		}
		one = append(one, ask(shared))
		if seed%8 == 0 {
			many = append(many, ask(contenthash.New()))
		} else {
			many = append(many, one[len(one)-1])
		}
		unsure = append(unsure, ask(doubted))
	}
	require.Equal(t, golden, contenthashtest.GoldenLine(one), "seed %d", seed)
	require.Equal(t, one, many, "seed %d", seed)
	require.Equal(t, one, unsure, "seed %d", seed)
}

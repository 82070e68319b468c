package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCounts(t *testing.T) {
	rows, err := read(strings.NewReader(`{"Action":"output","Package":"x/cache","Test":"TestB","Output":"    a_test.go:1: rig: 5 histories\n"}
# some words of the compiler
{"Action":"output","Package":"x/cache","Test":"TestB","Output":"no counts\n"}
{"Action":"output","Package":"x/cache","Test":"TestA","Output":"rig: 3 a|b\n"}
{"Action":"pass","Package":"x/cache"}
`))
	require.NoError(t, err)
	require.Equal(t, "| rig | counted |\n|---|---|\n| `cache.TestA` | 3 a\\|b |\n| `cache.TestB` | 5 histories |\n", table(rows))
	_, err = read(strings.NewReader(`{"Action":"fail","Package":"x/cache","Test":"TestA"}`))
	require.ErrorContains(t, err, "TestA failed")
}

// The table names the rigs that there are, all of them and no others. What they
// counted is the last run's.
func TestTheTableIsOfTheRigsThatThereAre(t *testing.T) {
	root := "../../.."
	rigs, err := findRigs(root)
	require.NoError(t, err)
	require.Contains(t, rigs, rig{"cache", "TestHistories"}, "by what it calls in another package")
	require.Contains(t, rigs, rig{"metadata", "TestEveryPageLost"}, "itself")
	require.Contains(t, rigs, rig{"integration", "TestKilledCommandsOnBtrfs"}, "by a function")
	missing, gone, err := stale(root+"/docs/testing.md", rigs)
	require.NoError(t, err)
	require.Empty(t, missing, "rigs that are not in the table: run hack/counts")
	require.Empty(t, gone, "rows without a rig: run hack/counts")

	for page, want := range map[string][2][]string{
		"<!-- counts: x -->\n| `a.TestA/x` | 1 |\n| `a.TestB` | 1 |\n<!-- end of counts -->\n| `a.TestC` |\n": {{"a.TestC"}, {"a.TestB"}},
		"nothing": {},
	} {
		file := filepath.Join(t.TempDir(), "page.md")
		require.NoError(t, os.WriteFile(file, []byte(page), 0o600))
		missing, gone, err = stale(file, []rig{{"x/a", "TestA"}, {"x/a", "TestC"}})
		require.Equal(t, page == "nothing", err != nil)
		require.Equal(t, want, [2][]string{missing, gone})
	}
}

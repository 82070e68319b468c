package arch

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var (
	quoted   = regexp.MustCompile("`[^`\n]+`")
	testName = regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z][A-Za-z0-9_]*(?:\.\.\.)?`)
	script   = regexp.MustCompile(`\b[a-z]+\.txtar\b`)
	declared = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
)

// proofs are the tests and scripts that the project has.
func proofs(t *testing.T, root string) (names map[string]bool) {
	names = map[string]bool{}
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		switch {
		case strings.HasSuffix(path, ".txtar"):
			names[d.Name()] = true
		case strings.HasSuffix(path, "_test.go"):
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for _, m := range declared.FindAllSubmatch(text, -1) {
				names[string(m[1])] = true
			}
		}
		return nil
	}))
	return names
}

// TestProofsThatAreNamedExist: the pages that say which test holds a promise
// name tests that there are. "TestEvery..." stands for all that begin so.
func TestProofsThatAreNamedExist(t *testing.T) {
	root := moduleRoot(t)
	names := proofs(t, root)
	count := 0
	for _, page := range []string{"testing.md", "threat-model.md"} {
		text, err := os.ReadFile(filepath.Join(root, "docs", page))
		require.NoError(t, err)
		for _, q := range quoted.FindAllString(string(text), -1) {
			for _, name := range append(testName.FindAllString(q, -1), script.FindAllString(q, -1)...) {
				count++
				prefix, all := strings.CutSuffix(name, "...")
				there := names[name]
				for n := range names {
					there = there || all && strings.HasPrefix(n, prefix)
				}
				if !there {
					t.Errorf("docs/%s names %s, which does not exist", page, name)
				}
			}
		}
	}
	require.Greater(t, count, 50)
}

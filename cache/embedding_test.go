package cache_test

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Code in the page for embedders is code that the Examples run.
func TestEmbeddingShowsWhatTheExamplesRun(t *testing.T) {
	page, err := os.ReadFile("../docs/embedding.md")
	require.NoError(t, err)
	var examples []byte
	for _, file := range []string{"example_test.go", "example_layers_test.go", "../checksum/example_test.go"} {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		examples = append(append(examples, '\n'), text...)
	}
	code := "\n" + withoutIndent(string(examples))
	blocks := strings.Split(string(page), "```go\n")[1:]
	require.Greater(t, len(blocks), 10)
	for _, block := range blocks {
		block, _, ended := strings.Cut(block, "```\n")
		require.True(t, ended)
		require.Contains(t, code, "\n"+withoutIndent(block))
	}
}

func withoutIndent(code string) string {
	var b strings.Builder
	for line := range strings.Lines(code) {
		b.WriteString(strings.TrimLeft(line, "\t"))
	}
	return b.String()
}

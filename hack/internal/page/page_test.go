package page

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestWrite(t *testing.T) {
	file := filepath.Join(t.TempDir(), "page.md")
	require.NoError(t, os.WriteFile(file, []byte("head\n<!-- x: hack/x writes this -->\nold\n<!-- end of x -->\ntail\n"), 0o600))
	require.NoError(t, Write(file, "x", "new\n"))
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "head\n<!-- x: hack/x writes this -->\nnew\n<!-- end of x -->\ntail\n", string(text))
	require.ErrorContains(t, Write(file, "y", ""), "no block of y")
}

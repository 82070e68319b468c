package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestLinesOfSeveralProfiles(t *testing.T) {
	files := map[string]lines{}
	require.NoError(t, read(files, strings.NewReader("mode: set\n"+module+"cache/a.go:1.2,3.4 2 0\n"+module+"cache/a.go:5.1,5.9 1 1\n")))
	require.NoError(t, read(files, strings.NewReader("mode: set\n"+module+"cache/a.go:1.2,3.4 2 0\n"+module+"cache/a.go:3.4,4.4 1 7\n"+module+"cache/cachetest/b.go:1.1,9.9 9 0\n")))
	run, all := sums(files)
	require.Equal(t, map[string]int{"cache": 3}, run)
	require.Equal(t, map[string]int{"cache": 5}, all)
	var out bytes.Buffer
	missed(&out, module+"cache/a.go", files[module+"cache/a.go"])
	require.Equal(t, "cache/a.go:1-2\n", out.String())
	require.Error(t, read(files, strings.NewReader("nonsense\n")))

	ls := lines{1: true, 2: false, 3: true, 4: false}
	ls.bare("if x {\n\t// why\n\ty()\n}\n")
	require.Equal(t, lines{1: true, 3: true}, ls)
}

package snapshottest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/snapshot"
)

// nameTests are about keys of any bytes and any length.
var nameTests = map[string]func(*testing.T, *env){
	"Names": testNames,
}

func hardNames() []string {
	names := []string{
		"a", "A", ".", "..", "...", ".hidden", "-", "_", "~", "~a", "a~b", "a~", "%", "%41", "%2E", "a/b", "/", "//",
		"../../etc", "a b", " ", "\n", "a\nb", "\x00", "a\x00b", "\xff\xfe", "\u00fc", "u\u0308", "sha256:abc", "a,b", "a:b",
		`a\b`, "id", "parent", "info", "~" + strings.Repeat("0", 64),
	}
	for _, n := range []int{199, 200, 201, 255, 256, 4096} {
		names = append(names, strings.Repeat("n", n), strings.Repeat("/", n))
	}
	// Two that differ only behind what a file name can hold.
	long := strings.Repeat("long", 1000)
	return append(names, long+"1", long+"2")
}

func testNames(t *testing.T, e *env) {
	names := hardNames()
	for i, name := range names {
		e.prepare(name, "")
		_, err := e.Prepare(e.ctx, name, "")
		require.Error(t, err, "%q is taken", name)
		info, err := e.Stat(e.ctx, name)
		require.NoError(t, err)
		require.Equal(t, name, info.Name)
		require.Len(t, e.pending(snapshot.PendingActive), i+1)
	}
	require.ElementsMatch(t, names, e.pending(snapshot.PendingActive))

	// Each under the next one's name: as a key it is free again by then.
	require.NoError(t, e.Commit(e.ctx, "tmp", names[0]))
	for i := 1; i < len(names); i++ {
		require.NoError(t, e.Commit(e.ctx, names[i-1], names[i]), "%q", names[i])
	}
	names[len(names)-1] = "tmp"
	e.reopen()
	all := e.all()
	require.Len(t, all, len(names))
	for i, name := range names {
		require.Contains(t, all, name)
		child := fmt.Sprint("child-", i)
		e.prepare(child, name)
		info, err := e.Stat(e.ctx, child)
		require.NoError(t, err)
		require.Equal(t, name, info.Parent)
		require.Error(t, e.Remove(e.ctx, name), "%q has a child", name)
		require.NoError(t, e.Remove(e.ctx, child))
	}
	require.NoError(t, e.Cleanup(e.ctx))
	var detached []string
	for _, name := range names {
		_, err := e.Detach(e.ctx, name)
		require.NoError(t, err)
		detached = append(detached, name)
	}
	e.reopen()
	require.NoError(t, e.Settle(e.ctx))
	require.ElementsMatch(t, detached, e.pending(snapshot.PendingRemoval))
	require.NoError(t, e.Cleanup(e.ctx))
	require.Empty(t, e.pending(snapshot.PendingRemoval))
	require.Empty(t, e.all())
}

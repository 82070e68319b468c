package cachetest

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A history that is printed is read as what it was, by the game that it is of.
func TestOpsAreReadAsWritten(t *testing.T) {
	for _, names := range [][]string{namesOf(operations()), namesOf(layerOperations())} {
		ops := generate(7, 500, names, 12)
		require.True(t, slices.ContainsFunc(ops, func(o Op) bool { return o.Fault.crash() }))
		read, err := parseOps(formatOps(ops), names)
		require.NoError(t, err)
		require.Equal(t, ops, read)
	}
	for _, text := range []string{"Merge:1:2:3", "New:1:2", "New:1:2:300", "New:1:2:3:what:1", "New:1:2:3:fail:x"} {
		_, err := parseOps(text, namesOf(operations()))
		require.ErrorContains(t, err, text)
	}
}

// What does not matter is left out: operations, and what goes wrong in the
// others.
func TestShrink(t *testing.T) {
	ops := generate(1, 200, namesOf(operations()), 8)
	for i := range ops {
		ops[i].Fault, ops[i].At = lost, 1
	}
	ops[31] = Op{Name: "Commit", A: 1, Fault: fail, At: 3}
	ops[150] = Op{Name: "Restart", A: 2, Fault: cancelled}
	bug := func(ops []Op) bool {
		i := slices.IndexFunc(ops, func(o Op) bool { return o.Name == "Commit" && o.Fault == fail })
		return i >= 0 && slices.ContainsFunc(ops[i:], func(o Op) bool { return o.Name == "Restart" && o.A == 2 })
	}
	short := shrink(ops, time.Now().Add(time.Hour), bug)
	require.Equal(t, []Op{{Name: "Commit", A: 1, Fault: fail, At: 3}, {Name: "Restart", A: 2}}, short)
	require.Equal(t, ops, shrink(ops, time.Time{}, bug), "the time is up")
}

package main

import (
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

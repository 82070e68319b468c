package main

import (
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/workspace/sandbox"
)

func TestParseMount(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(filepath.Dir(dir))
	for spec, want := range map[string]sandbox.Mount{
		dir + ":/b":                {Source: dir, Target: "/b"},
		dir + ":/b:ro":             {Source: dir, Target: "/b", ReadOnly: true},
		dir + ":/b/../c/:rw":       {Source: dir, Target: "/c"},
		filepath.Base(dir) + ":/b": {Source: dir, Target: "/b"},
	} {
		m, err := parseMount(spec)
		require.NoError(t, err, spec)
		require.Equal(t, want, m, spec)
	}
	for _, spec := range []string{"", dir, ":/b", dir + ":", dir + ":b", dir + ":/b:rx", dir + ":/b:ro:x", dir + "/missing:/b"} {
		_, err := parseMount(spec)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, spec)
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("SET_OUTSIDE", "yes")
	env, err := environment([]string{"A=1", "B=2", "AB=0"}, []string{"B=3", "C=", "D=x=y", "SET_OUTSIDE"})
	require.NoError(t, err)
	require.Equal(t, []string{"A=1", "AB=0", "B=3", "C=", "D=x=y", "SET_OUTSIDE=yes"}, env)
	for _, bad := range []string{"", "=x", "A=\x00", "NOT_SET_ANYWHERE"} {
		_, err := environment(nil, []string{bad})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, bad)
	}
}

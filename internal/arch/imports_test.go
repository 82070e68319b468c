package arch

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestImportsPointDownwards(t *testing.T) {
	pkgs := load(t, nil)
	require.NotEmpty(t, pkgs)
	for _, v := range Check(pkgs) {
		t.Error(v)
	}
}

// TestPlantedViolationIsFound adds files to the module as the go command sees
// it, without touching the tree, and expects exactly the planted imports.
func TestPlantedViolationIsFound(t *testing.T) {
	before := Check(load(t, nil))

	root := moduleRoot(t)
	planted := map[string]string{
		"metadata/planted.go":           "package metadata\n\nimport _ \"" + Module + "/cache\"\n",
		"cache/planted.go":              "package cache\n\nimport _ \"go.etcd.io/bbolt\"\n",
		"snapshot/planted_test.go":      "package snapshot\n\nimport _ \"" + Module + "/metadata\"\n",
		"metadata/planted_test.go":      "package metadata\n\nimport _ \"go.etcd.io/bbolt\"\n", // allowed
		"nowhere/planted.go":            "package nowhere\n\nimport _ \"fmt\"\n",
		"snapshot/snapshottest/plan.go": "package snapshottest\n\nimport _ \"testing\"\n", // allowed
	}
	files := map[string]string{}
	for name, text := range planted {
		file := filepath.Join(t.TempDir(), filepath.Base(name))
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		files[filepath.Join(root, name)] = file
	}

	type key struct{ from, imp string }
	got := map[key]bool{}
	for _, v := range Check(load(t, files)) {
		got[key{v.From, v.Import}] = true
	}
	for _, v := range before {
		delete(got, key{v.From, v.Import})
	}
	require.Equal(t, map[key]bool{
		{Module + "/metadata", Module + "/cache"}:    true,
		{Module + "/cache", "go.etcd.io/bbolt"}:      true,
		{Module + "/snapshot", Module + "/metadata"}: true,
		{Module + "/nowhere", "fmt"}:                 true,
	}, got)
}

// TestRules tries each rule on one package at a time.
func TestRules(t *testing.T) {
	const (
		inBuild = iota
		inTest
	)
	tests := []struct {
		from, imp string
		where     int
		allowed   bool
	}{
		{"metadata", Module + "/metadata/internal/pb", inBuild, true},
		{"metadata", Module + "/snapshot", inBuild, false},
		{"metadata", Module + "/contenthash", inTest, false},
		{"snapshot/overlayfs", Module + "/snapshot", inBuild, true},
		{"snapshot", Module + "/cache", inBuild, false},
		{"contenthash", Module + "/snapshot", inBuild, false},
		{"cache", Module + "/metadata", inBuild, true},
		{"cache", Module + "/snapshot/overlayfs", inBuild, true},
		{"cache", Module + "/contenthash", inBuild, false},
		{"cache", Module + "/workspace", inBuild, false},
		{"cache", Module + "/checksum", inTest, false},
		{"checksum", Module + "/cache", inBuild, true},
		{"checksum", Module + "/contenthash", inBuild, true},
		{"checksum", Module + "/workspace", inBuild, false},
		{"migrate", Module + "/checksum", inBuild, true},
		{"cache", Module + "/snapshot/snapshottest", inTest, true},
		{"cache", Module + "/snapshot/snapshottest", inBuild, false},
		{"cache/cachetest", Module + "/snapshot/snapshottest", inBuild, true},
		{"cache", Module + "/cache/policy", inBuild, true},
		{"cache/policy", Module + "/cache", inBuild, false},
		{"cache/policy", Module + "/metadata", inTest, false},
		{"workspace", Module + "/cache", inBuild, true},
		{"workspace", Module + "/workspace/sandbox", inBuild, true},
		{"workspace", Module + "/migrate", inBuild, false},
		{"workspace/sandbox", Module + "/cache", inBuild, false},
		{"workspace/source", Module + "/metadata", inBuild, false},
		{"workspace/source", Module + "/internal/fsat", inBuild, true},
		{"internal/fsat", Module + "/workspace/source", inBuild, false},
		{"workspace/output", Module + "/workspace/source", inBuild, true},
		{"workspace/source", Module + "/workspace/output", inBuild, false},
		{"workspace/output", Module + "/workspace", inTest, false},
		{"migrate", Module + "/cache", inBuild, true},
		{"migrate", Module + "/workspace", inBuild, false},
		{"cmd/lamina", Module + "/workspace", inBuild, true},
		{"cmd/lamina", Module + "/hack/internal/bench", inBuild, false},
		{"cmd/lamina", Module + "/integration", inTest, false},
		{"cmd/other", Module + "/cache", inBuild, false},
		{"hack/internal/bench", Module + "/cache", inBuild, true},
		{"integration", Module + "/cmd/lamina", inTest, true},

		{"metadata", "go.etcd.io/bbolt", inBuild, true},
		{"metadata", "go.etcd.io/bbolt/errors", inBuild, true},
		{"cache", "go.etcd.io/bbolt", inTest, false},
		{"snapshot", "go.etcd.io/bbolt", inTest, true},
		{"snapshot", "go.etcd.io/bbolt", inBuild, false},
		{"migrate", "go.etcd.io/bbolt", inTest, true},
		{"migrate/buildkit", "go.etcd.io/bbolt", inBuild, false},
		{"migrate/legacytest", "go.etcd.io/bbolt", inBuild, true},
		{"migrate/buildkit", Module + "/metadata", inBuild, true},
		{"migrate", Module + "/migrate/legacytest", inBuild, false},
		{"snapshot", "go.etcd.io/bboltlike", inBuild, true},
		{"cache", "google.golang.org/protobuf/proto", inBuild, false},
		{"cmd/lamina", "github.com/spf13/cobra", inBuild, true},
		{"cmd/lamina", "github.com/spf13/cobra/doc", inBuild, false},
		{"hack/internal/man", "github.com/spf13/cobra/doc", inBuild, true},
		{"workspace", "github.com/jedib0t/go-pretty/v6/table", inBuild, false},

		{"snapshot", "github.com/containerd/containerd/v2/core/snapshots", inBuild, true},
		{"snapshot", "github.com/containerd/containerd/snapshots", inBuild, false},
		{"hack/internal/bench", "github.com/containerd/containerd/mount", inBuild, false},
		{"cache", "github.com/stretchr/testify/require", inTest, true},
		{"cache", "github.com/stretchr/testify/require", inBuild, false},
		{"cache", "testing", inBuild, false},
		{"cache/cachetest", "testing", inBuild, true},
	}
	for _, tt := range tests {
		p := Package{ImportPath: Module + "/" + tt.from}
		if tt.where == inTest {
			p.XTestImports = []string{tt.imp}
			p.TestImports = []string{tt.imp}
		} else {
			p.Imports = []string{tt.imp}
		}
		found := Check([]Package{p})
		if tt.allowed {
			require.Emptyf(t, found, "%s imports %s", tt.from, tt.imp)
		} else {
			require.Lenf(t, found, 1, "%s imports %s", tt.from, tt.imp)
			require.Equal(t, tt.where == inTest, found[0].Test)
		}
	}
}

// load asks the go command for the module's packages. overlay replaces or adds
// files: path in the tree to path of the content.
func load(t *testing.T, overlay map[string]string) []Package {
	t.Helper()
	args := []string{"list", "-e", "-json=ImportPath,Imports,TestImports,XTestImports", "-tags", "invariants"}
	if overlay != nil {
		text, err := json.Marshal(map[string]any{"Replace": overlay})
		require.NoError(t, err)
		file := filepath.Join(t.TempDir(), "overlay.json")
		require.NoError(t, os.WriteFile(file, text, 0o600))
		args = append(args, "-overlay", file)
	}
	cmd := exec.CommandContext(t.Context(), "go", append(args, "./...")...)
	cmd.Dir = moduleRoot(t)
	cmd.Env = append(os.Environ(), "GOWORK=off")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())

	var pkgs []Package
	for dec := json.NewDecoder(out); ; {
		var p Package
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		pkgs = append(pkgs, p)
	}
	require.NoError(t, cmd.Wait())
	return pkgs
}

// moduleRoot is the directory of the main module's go.mod.
func moduleRoot(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", ".."))
	require.NoError(t, err)
	require.FileExists(t, filepath.Join(root, "go.mod"))
	return root
}

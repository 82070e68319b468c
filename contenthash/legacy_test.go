package contenthash_test

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/contenthash"
)

type v0Record struct {
	path, digest string
	typ          int
	link         string
}

// appendV0 encodes a record as BuildKit does.
func appendV0(buf []byte, r v0Record) []byte {
	var record, path []byte
	str := func(buf []byte, number int, s string) []byte {
		if s == "" {
			return buf
		}
		buf = binary.AppendUvarint(buf, uint64(number<<3|2))
		return append(binary.AppendUvarint(buf, uint64(len(s))), s...)
	}
	record = str(record, 1, r.digest)
	if r.typ != 0 {
		record = append(record, 2<<3, byte(r.typ))
	}
	record = str(record, 3, r.link)
	path = str(path, 1, r.path)
	path = str(path, 2, string(record))
	return str(buf, 1, string(path))
}

func fake(s string) string { return digest.FromString(s).String() }

var v0Records = []v0Record{
	{path: "", typ: 1},
	{path: "\x00", typ: 2, digest: fake("root header")},
	{path: "\x00a", typ: 1, digest: fake("dir a")},
	{path: "\x00a\x00", typ: 2, digest: fake("header of a")},
	{path: "\x00a\x00f", digest: fake("a/f")},
	{path: "\x00a\x00g"},
	{path: "\x00l", typ: 3, digest: fake("link"), link: "a/f"},
}

func v0Value(testing.TB) (buf []byte) {
	for _, r := range v0Records {
		buf = appendV0(buf, r)
	}
	return buf
}

// Stored digests answer until the first change, also after a restart, and what
// was not stored is computed beside them.
func TestImport(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a/f", "x")
	write(t, dir, "a/g", "y")
	require.NoError(t, os.Symlink("a/f", filepath.Join(dir, "l")))
	imported, err := contenthash.ImportV0(contenthash.V0{Value: v0Value(t)})
	require.NoError(t, err)
	m := memory{}
	m.save(imported)
	stored, err := contenthash.Load(m)
	require.NoError(t, err)
	for _, tree := range []*contenthash.Tree{imported, stored} {
		for path, want := range map[string]string{"a": "dir a", "a/f": "a/f"} {
			require.Equal(t, fake(want), sum(t, tree, "/nowhere", path, contenthash.Options{}))
		}
		require.Equal(t, fake("a/f"), sum(t, tree, "/nowhere", "l", contenthash.Options{FollowLinks: true}))
		require.Equal(t, fake("link"), sum(t, tree, "/nowhere", "l", contenthash.Options{}))
		root := digest.FromString("\x00" + fake("root header") + "\x00a" + fake("dir a") + "\x00l" + fake("link"))
		require.Equal(t, root.String(), sum(t, tree, "/nowhere", "/", contenthash.Options{}))
		require.Equal(t, fresh(t, dir, "a/g"), sum(t, tree, dir, "a/g", contenthash.Options{}))
		_, err := tree.Checksum(t.Context(), contenthash.Dir("/nowhere"), "missing", contenthash.Options{})
		require.ErrorIs(t, err, errdefs.ErrNotFound)

		// A holder that changed nothing confirms all.
		tree.Unconfirm()
		tree.Confirm()
		require.Equal(t, fake("a/f"), sum(t, tree, "/nowhere", "a/f", contenthash.Options{}))

		require.NoError(t, tree.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: "a/g"}))
		require.Equal(t, fresh(t, dir, "/"), sum(t, tree, dir, "/", contenthash.Options{}))
		require.Equal(t, fresh(t, dir, "a/f"), sum(t, tree, dir, "a/f", contenthash.Options{}))
	}
}

// Before v0.11 owners did not count.
func TestImportWithoutOwners(t *testing.T) {
	needRoot(t, "it changes owners")
	dir := t.TempDir()
	write(t, dir, "d/f", "x")
	root := fresh(t, dir, "/")
	require.NoError(t, os.Chown(filepath.Join(dir, "d"), 7, 8))
	require.NoError(t, os.Chown(filepath.Join(dir, "d/f"), 7, 8))
	require.NotEqual(t, root, fresh(t, dir, "/"))
	tree, err := contenthash.ImportV0(contenthash.V0{IgnoreOwners: true})
	require.NoError(t, err)
	require.Equal(t, root, sum(t, tree, dir, "/", contenthash.Options{}))
	m := memory{}
	m.save(tree)
	tree, err = contenthash.Load(m)
	require.NoError(t, err)
	require.Equal(t, root, sum(t, tree.Clone(), "/nowhere", "/", contenthash.Options{}))

	// A writer that tells nothing may have changed anything.
	sealed := tree.Clone()
	sealed.Unconfirm()
	sealed.Seal()
	require.Equal(t, fresh(t, dir, "/"), sum(t, sealed, dir, "/", contenthash.Options{}))

	require.NoError(t, tree.HandleChange(contenthash.Change{Kind: contenthash.Delete, Path: "x"}))
	require.Equal(t, fresh(t, dir, "/"), sum(t, tree, dir, "/", contenthash.Options{}))
}

func TestImportOfRubbish(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "f", "x")
	for name, value := range map[string][]byte{
		"cut":          v0Value(t)[:40],
		"no protobuf":  []byte("hello"),
		"bad digest":   appendV0(nil, v0Record{path: "\x00a", digest: "sha256:1234"}),
		"bad type":     appendV0(nil, v0Record{path: "\x00a", typ: 9}),
		"way out":      appendV0(nil, v0Record{path: "\x00..\x00a", digest: fake("")}),
		"slash":        appendV0(nil, v0Record{path: "\x00a/b", digest: fake("")}),
		"no root":      appendV0(nil, v0Record{path: "a", digest: fake("")}),
		"file as dir":  appendV0(appendV0(nil, v0Record{path: "\x00a"}), v0Record{path: "\x00a\x00b"}),
		"out of order": appendV0(appendV0(nil, v0Record{path: "\x00b"}), v0Record{path: "\x00a"}),
		"root is file": appendV0(nil, v0Record{path: "", digest: fake("")}),
	} {
		tree, err := contenthash.ImportV0(contenthash.V0{Value: value})
		var damaged *contenthash.DamagedError
		require.ErrorAs(t, err, &damaged, name)
		require.Equal(t, contenthash.V0Key, damaged.Page)
		d, err := tree.Checksum(context.Background(), contenthash.Dir(dir), "/", contenthash.Options{})
		require.NoError(t, err, name)
		require.Equal(t, fresh(t, dir, "/"), string(d), name)
	}
}

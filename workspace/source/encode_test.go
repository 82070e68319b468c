package source

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/internal/fsat"
)

// odd has every field at its limits.
func odd() *Tree {
	far := stamp{sec: -1 << 62, nsec: 999_999_999}
	all := copied{set: true, mode: 0o7777, size: 1<<63 - 1, mtime: far, ctime: stamp{sec: 1 << 62}}
	t := &Tree{
		root: true, started: stamp{1, 2}, synced: stamp{3, 4}, notes: []Note{{"s\n", "socket"}},
		nodes: []node{
			{name: "a", parent: -1, link: 0, typ: Dir, mode: 0o7777, uid: 1<<32 - 1, gid: 7, mtime: far, ctime: far, dev: 1<<64 - 1, ino: 1<<64 - 1, copy: all},
			{name: "b", parent: 0, link: 1, typ: Dir},
			{name: "c", parent: 1, link: 2, typ: File, size: 1<<63 - 1, sum: [32]byte{1, 31: 2}, xattrs: []fsat.Xattr{{Name: "user.a", Value: []byte{}}, {Name: "user.b", Value: []byte("\x00x")}}},
			{name: "d", parent: 1, link: 2, typ: File, size: 1<<63 - 1, sum: [32]byte{1, 31: 2}},
			{name: "\xff", parent: 0, link: 4, typ: Symlink, mode: 0o777, target: "\xfe/../x"},
			{name: "z", parent: -1, link: 5, typ: CharDevice, rdev: unix.Mkdev(1, 3)},
			{name: "zz", parent: -1, link: 6, typ: FIFO},
		},
	}
	t.index()
	return t
}

func TestEncodeDecode(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir, sample...)
	real := scan(t, dir, nil)
	for name, tree := range map[string]*Tree{"odd": odd(), "empty": emptyTree(), "real": real} {
		enc, err := tree.Encode()
		require.NoError(t, err)
		back, err := Decode(bytes.Clone(enc))
		require.NoError(t, err, name)
		require.Equal(t, len(tree.nodes), len(back.nodes))
		for i := range tree.nodes {
			require.Equal(t, tree.nodes[i], back.nodes[i], name)
		}
		require.Equal(t, tree.notes, back.notes)
		require.Equal(t, []any{tree.root, tree.started, tree.synced}, []any{back.root, back.started, back.synced})
		require.Equal(t, tree.Digest(), back.Digest())
		again, err := back.Encode()
		require.NoError(t, err)
		require.Equal(t, enc, again)
	}
}

func TestDecodeNoticesAnyDamage(t *testing.T) {
	enc, err := odd().Encode()
	require.NoError(t, err)
	for i := range enc {
		for bit := range 8 {
			bad := bytes.Clone(enc)
			bad[i] ^= 1 << bit
			tree, err := Decode(bad)
			if err == nil { // bits of the zstd frame that mean nothing
				require.Equal(t, odd().Digest(), tree.Digest())
				continue
			}
			require.Equal(t, i != len(encodedMagic), errdefs.IsDataLoss(err), "%v", err)
			require.Equal(t, i == len(encodedMagic), errdefs.IsNotImplemented(err))
		}
		_, err := Decode(enc[:i])
		require.Error(t, err)
	}
	_, err = Decode(append(bytes.Clone(enc), 0))
	require.Error(t, err)
}

// raw frames a body as Encode would, with a right checksum.
func raw(body []byte) []byte {
	b := append([]byte(encodedMagic), encodedVersion, methodStored)
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(body, castagnoli))
	b = binary.AppendUvarint(b, uint64(len(body)))
	return append(b, body...)
}

// Trees that no scan makes are refused although their checksum is right.
func TestDecodeRefusesWrongTrees(t *testing.T) {
	for name, edit := range map[string]func(t *Tree){
		"name with slash":   func(t *Tree) { t.nodes[0].name = "a/b" },
		"name with NUL":     func(t *Tree) { t.nodes[0].name = "a\x00" },
		"empty name":        func(t *Tree) { t.nodes[0].name = "" },
		"dot":               func(t *Tree) { t.nodes[0].name = "." },
		"dot dot":           func(t *Tree) { t.nodes[1].name = ".." },
		"order":             func(t *Tree) { t.nodes[3].name = "b" },
		"same name":         func(t *Tree) { t.nodes[3].name = "c" },
		"type":              func(t *Tree) { t.nodes[6].typ = 'x' },
		"no such type":      func(t *Tree) { t.nodes[6].typ = 0 },
		"mode":              func(t *Tree) { t.nodes[0].mode = 0o10000 },
		"mode of a copy":    func(t *Tree) { t.nodes[0].copy.mode = 0o10000 },
		"mode of a link":    func(t *Tree) { t.nodes[4].mode = 0o644 },
		"time":              func(t *Tree) { t.nodes[0].mtime.nsec = 1_000_000_000 },
		"negative time":     func(t *Tree) { t.nodes[0].ctime.nsec = -1 },
		"time of the scan":  func(t *Tree) { t.started.nsec = -1 },
		"link to later":     func(t *Tree) { t.nodes[2].link = 3 },
		"link to a link":    func(t *Tree) { t.nodes[6].typ = File; t.nodes[6].link = 3 },
		"link to other":     func(t *Tree) { t.nodes[6].link = 3 },
		"link outside":      func(t *Tree) { t.nodes[3].link = 1 << 30 },
		"target with NUL":   func(t *Tree) { t.nodes[4].target = "\x00" },
		"attribute order":   func(t *Tree) { t.nodes[2].xattrs[1].Name = "user.a" },
		"attribute no name": func(t *Tree) { t.nodes[2].xattrs[0].Name = "" },
		"file size":         func(t *Tree) { t.nodes[2].size = -1 },
	} {
		tree := odd()
		edit(tree)
		_, err := Decode(raw(tree.appendBody(nil)))
		require.Error(t, err, name)
		require.True(t, errdefs.IsDataLoss(err), name)
	}
	_, err := Decode(raw(odd().appendBody(nil)))
	require.NoError(t, err)
	_, err = Decode(raw(append(odd().appendBody(nil), 1)))
	require.ErrorContains(t, err, "goes on")
}

// Little input cannot ask for much memory.
func TestDecodeIsBounded(t *testing.T) {
	many := emptyTree()
	for i := range 20_000 {
		many.nodes = append(many.nodes, node{name: "d", parent: int32(i) - 1, link: int32(i), typ: Dir})
	}
	enc, err := many.Encode()
	require.NoError(t, err)
	back, err := Decode(enc)
	require.NoError(t, err)
	require.Equal(t, 20_000, back.Len())
	require.Equal(t, 2*20_000-1, len(back.path(19_999)))
	u := back.Intent(back)
	require.Equal(t, 20_000, u.Len())
	require.Greater(t, len(enc), len(many.appendBody(nil))/maxRatio, "what compresses too well is stored")

	for name, body := range map[string][]byte{
		"count of entries": binary.AppendUvarint(append(odd().appendBody(nil)[:25], 0), 1<<40),
		"count of notes":   binary.AppendUvarint(odd().appendBody(nil)[:25], 1<<40),
		"long string":      binary.AppendUvarint(append(odd().appendBody(nil)[:25], 1), 1<<62),
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Decode(raw(body))
		runtime.ReadMemStats(&after)
		require.Error(t, err, name)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20), name)
	}
	bomb := append([]byte(encodedMagic), encodedVersion, methodZstd, 0, 0, 0, 0)
	bomb = append(binary.AppendUvarint(bomb, 1<<30), strings.Repeat("x", 1000)...)
	_, err = Decode(bomb)
	require.ErrorContains(t, err, "proportion")
}

func FuzzDecode(f *testing.F) {
	for _, t := range []*Tree{odd(), emptyTree()} {
		enc, err := t.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(enc)
		f.Add(raw(t.appendBody(nil)))
		f.Add(t.appendBody(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// As it is, and as a body with a right checksum, which gets further.
		for _, in := range [][]byte{b, raw(b)} {
			tree, err := Decode(in)
			if err != nil {
				require.True(t, errdefs.IsDataLoss(err) || errdefs.IsNotImplemented(err), "%v", err)
				continue
			}
			enc, err := tree.Encode()
			require.NoError(t, err)
			again, err := Decode(enc)
			require.NoError(t, err)
			require.Equal(t, tree.Digest(), again.Digest())
			require.Equal(t, tree.Len(), tree.Intent(again).Len())
			for e := range tree.Entries() {
				require.NotContains(t, e.Path, "\x00")
			}
		}
	})
}

// Whatever decodes cannot make a sync touch anything outside the workspace.
func TestHostilePreviousTreeStaysInside(t *testing.T) {
	base := t.TempDir()
	makeTree(t, base, "src/f=x", "dst/", "outside/victim=x", "dst/link->../outside")
	prev := &Tree{nodes: []node{
		{name: "link", parent: -1, link: 0, typ: Dir},
		{name: "victim", parent: 0, link: 1, typ: File},
	}, now: time.Now}
	prev.index()
	syncDirs(t, base+"/src", base+"/dst", prev)
	require.FileExists(t, base+"/outside/victim")
	_, err := os.Lstat(base + "/dst/link")
	require.ErrorIs(t, err, os.ErrNotExist, "named by prev, so it goes, but not what it leads to")
}

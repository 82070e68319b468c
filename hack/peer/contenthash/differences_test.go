package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	peer "github.com/moby/buildkit/cache/contenthash"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/contenthash/contenthashtest"
)

// These are the differences that docs/contenthash.md lists: what the peer
// answers, and what is answered here.

func ask(t *testing.T, dir string, q contenthashtest.Query) (peers, ours digest.Digest, peerErr, ourErr error) {
	t.Helper()
	peers, peerErr = askPeer(t.Context(), dir, t.Name()+q.Path, q)
	ours, ourErr = contenthash.New().Checksum(t.Context(), contenthash.Dir(dir), q.Path, options(q))
	return peers, ours, peerErr, ourErr
}

// equal asks both and demands one answer.
func equal(t *testing.T, dir string, q contenthashtest.Query) digest.Digest {
	t.Helper()
	peers, ours, peerErr, ourErr := ask(t, dir, q)
	require.NoError(t, peerErr)
	require.NoError(t, ourErr)
	require.Equal(t, peers, ours)
	return ours
}

// In a scan the peer leaves out the numbers of devices; in a sync it counts
// them.
func TestDeviceNumbers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make devices")
	}
	dir := t.TempDir()
	require.NoError(t, unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	require.NoError(t, unix.Mknod(filepath.Join(dir, "zero"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))))
	require.NoError(t, unix.Mknod(filepath.Join(dir, "whiteout"), unix.S_IFCHR|0o600, 0))
	whiteout := equal(t, dir, contenthashtest.Query{Path: "whiteout"})
	seen := map[digest.Digest]bool{whiteout: true}
	for _, name := range []string{"null", "zero"} {
		peers, ours, _, err := ask(t, dir, contenthashtest.Query{Path: name})
		require.NoError(t, err)
		require.Equal(t, whiteout, peers, "the peer takes all devices for one")
		require.False(t, seen[ours])
		seen[ours] = true
		stat, err := fsutil.Stat(filepath.Join(dir, name))
		require.NoError(t, err)
		synced, err := peer.NewFromStat(stat)
		require.NoError(t, err)
		require.Equal(t, digest.NewDigest(digest.SHA256, synced), ours, "as the peer has it after a sync")
	}
}

// The peer looks up the part before the first wildcard with its backslashes.
// If there is such a file it goes on to match others without.
func TestEscapeBeforeWildcard(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "ab"), []byte("x"), 0o644))
	q := contenthashtest.Query{Path: `/a\b`, Wildcard: true}
	nothing := equal(t, dir, q)
	require.Equal(t, digest.FromString(""), nothing)
	require.NoError(t, os.WriteFile(filepath.Join(dir, `a\b`), nil, 0o644))
	peers, ours, _, err := ask(t, dir, q)
	require.NoError(t, err)
	require.NotEqual(t, nothing, peers, "an unrelated file changed the answer")
	require.Equal(t, nothing, ours)
}

// info is a change as the peer's sync reports it.
type info struct {
	*fsutil.StatInfo
	digest digest.Digest
}

func (i info) Digest() digest.Digest { return i.digest }

func report(t *testing.T, cc peer.CacheContext, dir, path string) {
	t.Helper()
	stat, err := fsutil.Stat(filepath.Join(dir, path))
	require.NoError(t, err)
	stat.Path = path
	fi, err := os.Lstat(filepath.Join(dir, path))
	require.NoError(t, err)
	h, err := peer.NewFileHash(filepath.Join(dir, path), fi)
	require.NoError(t, err)
	if fi.Mode().IsRegular() {
		data, err := os.ReadFile(filepath.Join(dir, path))
		require.NoError(t, err)
		_, err = h.Write(data)
		require.NoError(t, err)
	}
	require.NoError(t, cc.HandleChange(fsutil.ChangeKindAdd, path, info{&fsutil.StatInfo{Stat: stat}, digest.NewDigest(digest.SHA256, h)}, nil))
}

func peerContext(t *testing.T) peer.CacheContext {
	t.Helper()
	cc, err := peer.GetCacheContext(t.Context(), &record{id: t.Name()})
	require.NoError(t, err)
	t.Cleanup(func() { peer.ClearCacheContext(&record{id: t.Name()}) })
	return cc
}

// After a sync the peer's root has a header of its own making, so that "/" has
// another digest than after a scan.
func TestRootAfterSync(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o644))
	cc := peerContext(t)
	report(t, cc, dir, "f")
	synced, err := cc.Checksum(t.Context(), tree{dir}, "/", peer.ChecksumOpts{}, nil)
	require.NoError(t, err)
	scanned := equal(t, dir, contenthashtest.Query{Path: "/"})
	require.NotEqual(t, scanned, synced)
	ours := contenthash.New()
	require.NoError(t, ours.HandleChange(contenthash.Change{Kind: contenthash.Add, Path: "f"}))
	d, err := ours.Checksum(t.Context(), contenthash.Dir(dir), "/", contenthash.Options{})
	require.NoError(t, err)
	require.Equal(t, scanned, d)
}

// The peer forgets to remove what was reported in a directory that goes in the
// same batch of changes.
func TestDirectoryThatComesAndGoes(t *testing.T) {
	dir := t.TempDir()
	d := filepath.Join(dir, "d")
	require.NoError(t, os.Mkdir(d, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(d, "old"), nil, 0o644))
	cc, ours := peerContext(t), contenthash.New()
	tell := func(path string) {
		report(t, cc, dir, path)
		fi, err := os.Lstat(filepath.Join(dir, path))
		require.NoError(t, err)
		require.NoError(t, ours.HandleChange(contenthash.Change{Kind: contenthash.Add, Path: path, Mode: fi.Mode()}))
	}
	tell("d")
	tell("d/old")
	require.NoError(t, os.RemoveAll(d))
	require.NoError(t, os.WriteFile(d, nil, 0o644))
	tell("d")
	require.NoError(t, os.Remove(d))
	require.NoError(t, os.Mkdir(d, 0o755))
	tell("d")
	scanned := equal(t, dir, contenthashtest.Query{Path: "d"})
	stale, err := cc.Checksum(t.Context(), tree{dir}, "d", peer.ChecksumOpts{}, nil)
	require.NoError(t, err)
	require.NotEqual(t, scanned, stale)
	got, err := ours.Checksum(t.Context(), contenthash.Dir(dir), "d", contenthash.Options{})
	require.NoError(t, err)
	require.Equal(t, scanned, got)
}

// The peer passes whole paths to the kernel, which takes 4095 bytes.
func TestLongPath(t *testing.T) {
	dir := t.TempDir()
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	for range 25 {
		name := strings.Repeat("n", 200)
		require.NoError(t, unix.Mkdirat(at, name, 0o755))
		next, err := unix.Openat(at, name, unix.O_PATH|unix.O_DIRECTORY, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Close(at))
		at = next
	}
	require.NoError(t, unix.Close(at))
	_, _, peerErr, ourErr := ask(t, dir, contenthashtest.Query{Path: "/"})
	require.ErrorIs(t, peerErr, unix.ENAMETOOLONG)
	require.NoError(t, ourErr)
}

// A damaged stored value: the peer answers with no digest and no error.
func TestDamagedValue(t *testing.T) {
	dir := t.TempDir()
	md := &damaged{record{id: t.Name()}}
	_, err := peer.GetCacheContext(context.Background(), md)
	require.Error(t, err, "which its Checksum takes for an empty digest")
	ours, err := contenthash.ImportV0(contenthash.V0{Value: []byte("rubbish")})
	require.ErrorAs(t, err, new(*contenthash.DamagedError))
	d, err := ours.Checksum(t.Context(), contenthash.Dir(dir), "/", contenthash.Options{})
	require.NoError(t, err)
	require.Equal(t, equal(t, dir, contenthashtest.Query{Path: "/"}), d)
}

type damaged struct{ record }

func (*damaged) GetExternal(string) ([]byte, error) { return []byte("rubbish"), nil }

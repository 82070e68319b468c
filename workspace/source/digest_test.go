package source

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/contenthash/contenthashtest"
)

// The exact byte form, written out once by hand.
func TestDigestIsTheDocumentedForm(t *testing.T) {
	dir := t.TempDir()
	makeTree(t, dir, "d/f=hello", "l->d/f")
	require.NoError(t, os.Chmod(dir+"/d", 0o750))
	require.NoError(t, os.Chmod(dir+"/d/f", 0o711|os.ModeSetuid))
	entry := func(path, mode, size, typ, link, content string) string {
		header := "namemode" + mode + "uid0gid0size" + size + "typeflag" + typ + "linkname" + link + "unamegnamedevmajor0devminor0"
		return path + digest.FromString(header+content).String()
	}
	want := digest.FromString(
		entry("\x00d", "488", "0", "5", "", "") +
			entry("\x00d\x00f", "2505", "5", "0", "", "hello") +
			entry("\x00l", "511", "0", "2", "d/f", ""))
	require.Equal(t, want, scan(t, dir, nil).Digest())
	require.Equal(t, digest.FromString(""), scan(t, t.TempDir(), nil).Digest())
}

// hashed is what contenthash says of a directory, by itself.
func hashed(t tb, dir string, exclude ...string) digest.Digest {
	t.Helper()
	d, err := contenthash.New().Checksum(context.Background(), contenthash.Dir(dir), "/", contenthash.Options{
		IncludePatterns: []string{"**"}, ExcludePatterns: exclude, IgnoreOwners: true,
	})
	require.NoError(t, err)
	return d
}

// Random trees of all types of files: the digest is the one that contenthash
// gives, of the source and of what a sync made of it, beside which something is
// built.
func TestDigestIsThatOfContenthash(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("makes devices and owners, which takes root")
	}
	for seed := range uint64(60) {
		src, dst := t.TempDir(), t.TempDir()
		tree := contenthashtest.New(1_000_000 + seed)
		require.NoError(t, tree.Write(src))
		for _, e := range tree.Entries {
			if e.Type == 's' {
				require.NoError(t, os.Remove(filepath.Join(src, e.Path)))
			}
		}
		require.Equal(t, hashed(t, src), scan(t, src, nil).Digest(), "seed %d", seed)

		first := syncDirs(t, src, dst, nil)
		require.Equal(t, hashed(t, src), hashed(t, dst), "seed %d: the copy", seed)

		// Another one over it, with build products beside.
		write(t, dst+"/built/product", "x")
		require.NoError(t, unix.Chmod(src, 0o755))
		write(t, src+"/added", "x")
		again := syncDirs(t, src, dst, first.Tree)
		require.Equal(t, again.Tree.Digest(), hashed(t, dst, "built"), "seed %d: with products", seed)
		require.NotEqual(t, again.Tree.Digest(), hashed(t, dst), "seed %d: with products", seed)
	}
}

// A tree that an earlier version stored, with digests of contents alone: names
// are known, so what the source drops is removed, and nothing else is believed.
func TestTreeOfAnEarlierVersion(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "a=1", "d/b=2", "gone=3")
	first := syncDirs(t, src, dst, nil)
	settle(first.Tree)
	for i := range first.Tree.nodes {
		if n := &first.Tree.nodes[i]; n.typ == File {
			copy(n.sum[:], strings.Repeat("?", len(n.sum)))
		}
	}
	enc, err := first.Tree.Encode()
	require.NoError(t, err)
	enc[len(encodedMagic)] = plainVersion
	old, err := Decode(enc)
	require.NoError(t, err)
	require.NoError(t, os.Remove(src+"/gone"))
	ino := inode(t, dst+"/a")
	r := syncDirs(t, src, dst, old)
	require.Equal(t, 1, r.Removed)
	require.Zero(t, r.Changed)
	require.Equal(t, ino, inode(t, dst+"/a"), "what is right stays")
	require.Equal(t, hashed(t, src), r.Tree.Digest())
	requireSynced(t, src, dst)
}

// A change of mode or attributes alone copies nothing; together with another
// content of the same size it does.
func TestAttributesAloneCopyNothing(t *testing.T) {
	for name, edit := range map[string]func(p string) error{
		"mode":  func(p string) error { return os.Chmod(p, 0o600) },
		"xattr": func(p string) error { return unix.Setxattr(p, "user.x", []byte("1"), 0) },
		"both":  func(p string) error { return os.WriteFile(p, []byte("other"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			src, dst := t.TempDir(), t.TempDir()
			makeTree(t, src, "f=hello", "g=hello")
			first := syncDirs(t, src, dst, nil)
			settle(first.Tree)
			if name == "both" {
				require.NoError(t, os.Chmod(src+"/f", 0o600))
			}
			require.NoError(t, edit(src+"/f"))
			// Within the clock's tick a change might not show.
			require.NoError(t, os.Chtimes(src+"/f", time.Time{}, time.Now().Add(time.Hour)))
			r := syncDirs(t, src, dst, first.Tree)
			require.Equal(t, 1, r.Changed)
			if name == "both" {
				require.EqualValues(t, 5, r.Bytes)
			} else {
				require.Zero(t, r.Bytes)
			}
			requireSynced(t, src, dst)
			require.Equal(t, hashed(t, dst), r.Tree.Digest())
		})
	}
}

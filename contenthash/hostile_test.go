package contenthash_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/contenthash"
)

// background runs do until the test asks it to stop.
func background(t *testing.T, do func() error) (stop func()) {
	t.Helper()
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if err := do(); err != nil {
				t.Errorf("in the background: %v", err)
				return
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

// While somebody swaps a directory for a link that leads out of the tree, the
// answers are those of one state or the other, and never of what is outside.
func TestSwappedLink(t *testing.T) {
	base := scratch(t)
	outside, dir := filepath.Join(base, "outside"), filepath.Join(base, "tree")
	write(t, outside, "sub/f", "secret")
	write(t, outside, "f", "secret")
	require.NoError(t, unix.Mkfifo(filepath.Join(outside, "sub/fifo"), 0o600))
	write(t, dir, "d/sub/f", "inside")
	write(t, dir, "d/f", "inside")
	require.NoError(t, os.Symlink("../outside", filepath.Join(dir, "swap")))
	paths := []string{"/", "d", "d/f", "d/sub", "d/sub/f"}
	states := map[string]map[string]bool{}
	secret := map[string]bool{fresh(t, outside, "f"): true, fresh(t, outside, "sub"): true, fresh(t, outside, "/"): true}
	exchange := func() error {
		return unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, "d"), unix.AT_FDCWD, filepath.Join(dir, "swap"), unix.RENAME_EXCHANGE)
	}
	for range 2 {
		for _, p := range paths {
			if states[p] == nil {
				states[p] = map[string]bool{}
			}
			d, err := contenthash.New().Checksum(t.Context(), contenthash.Dir(dir), p, contenthash.Options{})
			if err != nil {
				require.ErrorIs(t, err, errdefs.ErrNotFound)
			}
			states[p][string(d)] = true
		}
		require.NoError(t, exchange())
	}
	stop := background(t, exchange)
	defer stop()
	tree := contenthash.New()
	rounds := 1500
	if raceEnabled {
		rounds = 200
	}
	for i := range rounds {
		p := paths[i%len(paths)]
		if i%7 == 0 {
			tree = contenthash.New()
		}
		tree.Unconfirm()
		d, err := tree.Checksum(t.Context(), contenthash.Dir(dir), p, contenthash.Options{FollowLinks: i%2 == 0})
		if err != nil {
			require.Empty(t, d)
			require.True(t, errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, contenthash.ErrChanged), "%v", err)
			continue
		}
		require.NotContains(t, secret, string(d), "%s: read outside of the tree", p)
		if p == "d/f" || p == "d/sub/f" || p == "d/sub" {
			require.Contains(t, states[p], string(d), p)
		}
	}
}

// The same with a file that is swapped for a link to one outside.
func TestSwappedFile(t *testing.T) {
	base := scratch(t)
	dir := filepath.Join(base, "tree")
	write(t, base, "outside", "secret")
	write(t, dir, "f", "inside")
	require.NoError(t, os.Symlink("../outside", filepath.Join(base, "link")))
	allowed := map[string]bool{fresh(t, dir, "f"): true, fresh(t, base, "link"): true}
	stop := background(t, func() error {
		return unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, "f"), unix.AT_FDCWD, filepath.Join(base, "link"), unix.RENAME_EXCHANGE)
	})
	defer stop()
	for range 3000 {
		d, err := contenthash.New().Checksum(t.Context(), contenthash.Dir(dir), "f", contenthash.Options{})
		if err != nil {
			require.ErrorIs(t, err, contenthash.ErrChanged)
			continue
		}
		require.Contains(t, allowed, string(d))
	}
}

// A file that is written to all the while has no digest, and one that was
// written to a moment ago has that of its new content.
func TestFileThatChanges(t *testing.T) {
	dir := scratch(t)
	p := filepath.Join(dir, "f")
	require.NoError(t, os.WriteFile(p, nil, 0o644))
	require.NoError(t, os.Truncate(p, 64<<20))
	f, err := os.OpenFile(p, os.O_WRONLY, 0)
	require.NoError(t, err)
	defer f.Close()
	stop := background(t, func() error {
		_, err := f.WriteAt([]byte("x"), 0)
		return err
	})
	var tree *contenthash.Tree
	var d digest.Digest
	// On a busy machine the writer may not get its turn while the file is read.
	for end := time.Now().Add(time.Minute); ; {
		tree = contenthash.New()
		d, err = tree.Checksum(t.Context(), contenthash.Dir(dir), "/", contenthash.Options{})
		if err != nil || time.Now().After(end) {
			break
		}
		require.NotEmpty(t, d)
	}
	stop()
	require.ErrorIs(t, err, contenthash.ErrChanged)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.Empty(t, d)
	require.NoError(t, f.Truncate(3))
	require.Equal(t, fresh(t, dir, "/"), sum(t, tree, dir, "/", contenthash.Options{}))
}

// FIFOs and devices are looked at and never opened: reading one of these would
// not end.
func TestSpecialFiles(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	if os.Geteuid() == 0 {
		require.NoError(t, unix.Mknod(filepath.Join(dir, "zero"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))))
		require.NoError(t, unix.Mknod(filepath.Join(dir, "full"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 7))))
	}
	tree := contenthash.New()
	sum(t, tree, dir, "/", contenthash.Options{})
	require.Zero(t, tree.Stats().FilesRead)
	if os.Geteuid() == 0 {
		zero := sum(t, tree, dir, "zero", contenthash.Options{})
		require.NotEqual(t, zero, sum(t, tree, dir, "full", contenthash.Options{}), "device numbers count")
		h := contenthash.NewHash(contenthash.Header{Mode: os.ModeDevice | os.ModeCharDevice | 0o600, Devmajor: 1, Devminor: 5})
		require.Equal(t, string(h.Digest()), zero)
	}
}

// Swapping a file for a FIFO does not block either.
func TestSwappedFIFO(t *testing.T) {
	dir := scratch(t)
	write(t, dir, "d/f", "x")
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	stop := background(t, func() error {
		return unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, "d/f"), unix.AT_FDCWD, filepath.Join(dir, "fifo"), unix.RENAME_EXCHANGE)
	})
	defer stop()
	for range 500 {
		d, err := contenthash.New().Checksum(t.Context(), contenthash.Dir(dir), "/", contenthash.Options{})
		if err != nil {
			require.ErrorIs(t, err, contenthash.ErrChanged)
		} else {
			require.True(t, strings.HasPrefix(string(d), "sha256:"))
		}
	}
}

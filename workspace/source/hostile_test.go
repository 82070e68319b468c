package source

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// While scans and syncs go on, directories are swapped for links that lead out
// of the tree, on both sides. Nothing outside may be read or written.
func TestSwappedDirectoriesLeadNowhere(t *testing.T) {
	base := t.TempDir()
	makeTree(t, base, "src/d/e/f=in here", "src/d/g=in here", "src/z=x", "dst/", "outside/e/f=SECRET", "outside/g=SECRET", "outside/only=SECRET")
	src, dst := base+"/src", base+"/dst"
	require.NoError(t, os.Symlink(base+"/outside", base+"/evil"))
	untouched := look(t, base+"/outside")

	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			for _, d := range []string{src, dst, src + "/d", dst + "/d"} {
				swap(base+"/evil", d)
			}
		}
	})
	halt := sync.OnceFunc(func() { close(stop); swapper.Wait() })
	defer halt()
	var prev *Tree
	good, deadline := 0, time.Now().Add(800*time.Millisecond)
	for time.Now().Before(deadline) {
		tree, err := Scan(context.Background(), src, Options{}, prev)
		if err != nil {
			require.ErrorIs(t, err, ErrChanged)
			continue
		}
		for e := range tree.Entries() {
			require.NotEqual(t, "only", filepath.Base(e.Path))
			if e.Type == File {
				require.NotEqual(t, int64(len("SECRET")), e.Size)
			}
		}
		r, err := tree.SyncTo(context.Background(), src, dst, prev, nil)
		prev = r.Tree
		if err == nil {
			good++
		}
	}
	halt()
	require.Equal(t, untouched, look(t, base+"/outside"))
	require.Positive(t, good)

	require.NoError(t, os.RemoveAll(dst))
	require.NoError(t, os.Mkdir(dst, 0o755))
	syncDirs(t, src, dst, nil)
	requireSynced(t, src, dst)
}

// swap exchanges evil for the directory d or e in dir, and back. A sync may have
// brought the link itself to where dir is, as a link of its source, and the
// swapping must not be led outside by it.
func swap(evil, dir string) {
	name := "d"
	if filepath.Base(dir) == "d" {
		name = "e"
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer func() { _ = unix.Close(fd) }()
	if unix.Renameat2(unix.AT_FDCWD, evil, fd, name, unix.RENAME_EXCHANGE) == nil {
		_ = unix.Renameat2(unix.AT_FDCWD, evil, fd, name, unix.RENAME_EXCHANGE)
	}
}

// A FIFO in place of a file that was there a moment ago makes nobody wait.
func TestPipesBlockNobody(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src, "f=x", "p|")
	r := syncDirs(t, src, dst, nil)
	require.NoError(t, os.Remove(dst+"/f"))
	require.NoError(t, unix.Mkfifo(dst+"/f", 0o644))
	r = syncDirs(t, src, dst, r.Tree)
	require.Equal(t, 1, r.Changed)

	swap := func(_, _ int64) {
		_ = os.Remove(src + "/b")
		_ = unix.Mkfifo(src+"/b", 0o644)
	}
	makeTree(t, src, "a=12", "b=34")
	_, err := Scan(context.Background(), src, Options{Progress: swap}, nil)
	if err != nil { // b may have been read before a
		require.ErrorIs(t, err, ErrChanged)
	}
}

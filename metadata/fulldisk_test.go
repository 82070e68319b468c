package metadata_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/metadata"
)

// smallDisk mounts a file system of a few megabytes.
func smallDisk(t *testing.T, kind string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := t.TempDir()
	switch kind {
	case "tmpfs":
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=6m,nr_inodes=12"); err != nil {
			t.Skipf("tmpfs cannot be mounted: %v", err)
		}
	default:
		image := filepath.Join(t.TempDir(), "image")
		require.NoError(t, os.WriteFile(image, nil, 0o600))
		require.NoError(t, os.Truncate(image, 8<<20))
		if out, err := exec.Command("mkfs."+kind, "-q", "-N", "24", "-m", "0", image).CombinedOutput(); err != nil {
			t.Skipf("mkfs.%s: %v: %s", kind, err, out)
		}
		if out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput(); err != nil {
			t.Skipf("mount: %v: %s", err, out)
		}
	}
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	return dir
}

// fillDisk takes the last byte and the last inode.
func fillDisk(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "ballast"))
	require.NoError(t, err)
	for n := 1 << 20; n > 0; {
		if _, err = f.Write(make([]byte, n)); err != nil {
			n /= 2
		}
	}
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Close())
	for i := 0; ; i++ {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint("inode", i)))
		if err != nil {
			require.ErrorIs(t, err, syscall.ENOSPC)
			return
		}
		require.NoError(t, f.Close())
	}
}

// TestFullDisk: looking, opening and removing go on where nothing fits any
// more, and what does not fit changes nothing.
func TestFullDisk(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4"} {
		for _, filled := range []string{"by others", "by the store"} {
			t.Run(kind+" "+filled, func(t *testing.T) {
				dir := smallDisk(t, kind)
				path := filepath.Join(dir, "lamina.db")
				s := open(t, path, metadata.Options{FlushInterval: -1})
				defer func() { require.NoError(t, s.Close()) }()
				size := 1000
				big := func(id metadata.ID) *metadata.Record {
					return rec(id, indexed("i"+string(id)), func(r *metadata.Record) { r.Description = strings.Repeat("x", size) })
				}
				var ids []metadata.ID
				add := func() error {
					id := s.NewID()
					err := s.Update(t.Context(), func(tx *metadata.Tx) error { return tx.Create(big(id)) })
					if err == nil {
						ids = append(ids, id)
					}
					return err
				}
				for range 300 {
					require.NoError(t, add())
				}
				require.NoError(t, os.Remove(path+".holder"))
				if filled == "by others" {
					fillDisk(t, dir)
				}
				size = 20_000
				var err error
				for n := 0; err == nil; n++ {
					require.Less(t, n, 20_000)
					err = add()
				}
				require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
				require.ErrorIs(t, err, syscall.ENOSPC)
				size = 1000
				if filled != "by others" {
					fillDisk(t, dir)
				}
				for err = nil; err == nil; { // what is small fits for some time
					err = add()
				}
				require.ErrorIs(t, err, syscall.ENOSPC)
				want := contents(t, s)
				require.Error(t, add())
				require.Equal(t, want, contents(t, s), "it changed something")
				require.NoError(t, s.Close())

				// Nothing fits, and nothing has to.
				s, err = metadata.Open(t.Context(), path, metadata.Options{FlushInterval: -1})
				require.NoError(t, err)
				require.Equal(t, want, contents(t, s))
				if filled == "by others" { // Close may have found some room
					require.ErrorIs(t, add(), syscall.ENOSPC)
				}
				r := get(t, s, ids[0])
				r.Retain = true
				update(t, s, func(tx *metadata.Tx) error { _, err := tx.Put(r); return err })
				for i, id := range ids {
					if i%7 == 3 {
						update(t, s, func(tx *metadata.Tx) error { return tx.Delete(id) })
					}
				}
				require.NoError(t, s.Close())
				s, err = metadata.Open(t.Context(), path, metadata.Options{FlushInterval: -1})
				require.NoError(t, err)
				// Many at once, which rewrite most of the file.
				update(t, s, func(tx *metadata.Tx) error {
					for i, id := range ids {
						if i%7 != 3 && i < 250 {
							if err := tx.Delete(id); err != nil {
								return err
							}
						}
					}
					return nil
				})
				require.NoError(t, add(), "removal has made room")
				require.Empty(t, findings(t, s))
				require.NoError(t, s.Close())
				s, err = metadata.Open(t.Context(), path, metadata.Options{FlushInterval: -1})
				require.NoError(t, err)
				require.Empty(t, findings(t, s))
			})
		}
	}
}

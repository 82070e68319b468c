package layer_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/layer"
)

// many is a tar of n entries that is made as it is read. Names are repeated, so
// that it is the layer that is long and not the disk that is full.
func many(n int) io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		t := tar.NewWriter(w)
		for i := range n {
			dir := i / 100 % 1000
			h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("dir%d/file%d", dir, i%100), Mode: 0o644}
			switch i % 10 {
			case 7:
				h.Typeflag, h.Name = tar.TypeDir, fmt.Sprintf("dir%d/sub%d", dir, i%3)
			case 8:
				h.Name = fmt.Sprintf("dir%d/.wh.gone%d", dir, i%50)
			case 9:
				h.Typeflag, h.Linkname = tar.TypeSymlink, "target"
			}
			if err := t.WriteHeader(h); err != nil {
				w.CloseWithError(err)
				return
			}
		}
		w.CloseWithError(t.Close())
	}()
	return r
}

// TestMemoryIsBounded: what Apply holds while it works does not grow with the
// number of entries. The heap is looked at when the last has been read.
func TestMemoryIsBounded(t *testing.T) {
	n := 100_000
	if os.Getenv("LAMINA_TEST_FULL") != "" {
		n = 1_000_000
	}
	held := func(form layer.Form, n int, base bool) uint64 {
		dir := mkdir(t)
		if base {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "f"), nil, 0o600))
		}
		src := many(n)
		defer src.Close()
		var stats, before runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		r := io.MultiReader(src, readerFunc(func([]byte) (int, error) {
			runtime.GC()
			runtime.ReadMemStats(&stats)
			return 0, io.EOF
		}))
		out, err := layer.Apply(t.Context(), dir, r, layer.ApplyOptions{Form: form, Owners: layer.OwnersCaller})
		require.NoError(t, err)
		require.GreaterOrEqual(t, out.Entries, int64(n))
		return max(stats.HeapAlloc, before.HeapAlloc) - before.HeapAlloc
	}
	require.Less(t, held(layer.OverlayUser, n, false), uint64(5<<20), "for what is read ahead and 128 directories")
	require.Less(t, held(layer.Plain, n/4, true), uint64(5<<20+40*n/4), "and a number for each path")
}

// TestOrdinaryUser applies a layer with everything that only root may do, as
// a user without rights. The test is its own helper.
func TestOrdinaryUser(t *testing.T) {
	const env = "LAYER_TEST_USER_DIR"
	if dir := os.Getenv(env); dir != "" {
		asOrdinaryUser(t, dir)
		return
	}
	needRoot(t)
	dir := mkdir(t)
	require.NoError(t, os.Chown(dir, 12345, 12345))
	self := filepath.Join(dir, "test")
	b, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(self, b, 0o755))
	p, err := os.StartProcess(self, []string{self, "-test.run=^TestOrdinaryUser$", "-test.v"}, &os.ProcAttr{
		Dir: dir, Env: append(os.Environ(), env+"="+dir), Files: []*os.File{nil, os.Stdout, os.Stderr},
		Sys: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}},
	})
	require.NoError(t, err)
	state, err := p.Wait()
	require.NoError(t, err)
	require.True(t, state.Success())
}

func asOrdinaryUser(t *testing.T, dir string) {
	require.NotEqual(t, 0, os.Geteuid())
	b := pack(t,
		ent{name: "d", typ: tar.TypeDir, mode: 0o555, uid: 1, gid: 2}, file("d/f", "x"),
		ent{name: "d/none", typ: tar.TypeDir, mode: 0}, file("d/none/g", "x"),
		ent{name: "ro", typ: tar.TypeReg, mode: 0o444, body: "x", pax: map[string]string{"SCHILY.xattr.user.k": "v", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02" + string(make([]byte, 16))}},
		ent{name: "null", typ: tar.TypeChar, major: 1, minor: 3},
		ent{name: "implied/h", typ: tar.TypeReg, mode: 0o4755, uid: 7},
	)
	again := pack(t, file("d/none/g2", "y"), whiteout("d/f"))
	for _, form := range []layer.Form{layer.Plain, layer.OverlayUser} {
		root := filepath.Join(dir, fmt.Sprint("root", int(form)))
		require.NoError(t, os.Mkdir(root, 0o755))
		o := layer.ApplyOptions{Form: form, Owners: layer.OwnersCaller, Devices: layer.DevicesSkipped}
		out := apply(t, root, b, o)
		require.Equal(t, layer.Skipped{Devices: 1, Xattrs: 1}, out.Skipped)
		apply(t, root, again, o)
		for name, mode := range map[string]uint32{"d": 0o555, "d/none": 0, "ro": 0o444, "implied": 0o755, "implied/h": 0o4755} {
			var st unix.Stat_t
			require.NoError(t, unix.Lstat(filepath.Join(root, name), &st), name)
			require.Equal(t, mode, st.Mode&0o7777, name)
			require.EqualValues(t, 12345, st.Uid, name)
		}
		require.NoError(t, os.Chmod(filepath.Join(root, "d", "none"), 0o700))
		require.Equal(t, "y", content(t, root, "d", "none", "g2"))
	}
	// Who wants the owners kept, is told.
	_, err := layer.Apply(t.Context(), t.TempDir(), bytes.NewReader(b), layer.ApplyOptions{Devices: layer.DevicesSkipped})
	require.ErrorIs(t, err, unix.EPERM)
}

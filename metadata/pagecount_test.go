package metadata

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// resident counts the pages of a file that the kernel has in memory.
func resident(t *testing.T, path string, pageSize int) (n int) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	info, err := f.Stat()
	require.NoError(t, err)
	m, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Munmap(m)) }()
	vec := make([]byte, (len(m)+pageSize-1)/pageSize)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&vec[0])))
	require.Zero(t, errno)
	for _, v := range vec {
		n += int(v & 1)
	}
	return n
}

// forget drops a file from memory, and tells the kernel not to read ahead, so
// that what is there afterwards is what was asked for.
func forget(t *testing.T, f *os.File) {
	t.Helper()
	require.NoError(t, f.Sync())
	require.NoError(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
}

// TestOpenReadsFewPages counts what opening a large store brings into memory,
// from the disk and in the process.
func TestOpenReadsFewPages(t *testing.T) {
	n := 20_000
	if full() {
		n = 100_000
	}
	path := filepath.Join(t.TempDir(), "s.db")
	s, err := Open(t.Context(), path, faultOptions())
	require.NoError(t, err)
	for done := 0; done < n; done += 10_000 {
		require.NoError(t, s.Update(t.Context(), func(tx *Tx) error {
			for range 10_000 {
				id := s.NewID()
				if err := tx.Create(&Record{ID: id, State: Finalized, Op: Base, Key: string(id), Type: "t", Durable: true, Values: []Value{{Name: "v", Index: string(id)}}}); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	pageSize := int(s.now.Load().pageSize)
	require.NoError(t, s.Close())
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	forget(t, f)
	before := resident(t, path, pageSize)

	var m0, m1 runtime.MemStats
	runtime.ReadMemStats(&m0)
	s, err = Open(context.Background(), path, faultOptions())
	require.NoError(t, err)
	runtime.ReadMemStats(&m1)
	opened := resident(t, path, pageSize) - before
	require.NoError(t, s.Close())
	info, err := f.Stat()
	require.NoError(t, err)
	t.Logf("%d records, %d pages: %d were in memory, opening read %d, and took %d KiB", n, info.Size()/int64(pageSize), before, opened, (m1.TotalAlloc-m0.TotalAlloc)>>10)
	if before > 0 {
		t.Log("the kernel keeps pages of this file system: what was read is not known")
	}
	require.LessOrEqual(t, opened, 50)
	require.Less(t, m1.TotalAlloc-m0.TotalAlloc, uint64(256<<10))
}

package contenthash_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/contenthash"
)

// Benchmarks work on 50,000 files of 3.5 KB, 50 in a directory; with -short on
// a tenth of that.

func benchTree(b *testing.B) (dir string, files int) {
	b.Helper()
	dirs := 1000
	if testing.Short() {
		dirs = 100
	}
	dir = scratch(b)
	data := make([]byte, 3500)
	for d := range dirs {
		sub := benchDir(dir, d)
		require.NoError(b, os.MkdirAll(sub, 0o755))
		for f := range 50 {
			copy(data, fmt.Sprintf("%d %d", d, f))
			require.NoError(b, os.WriteFile(filepath.Join(sub, fmt.Sprintf("file%02d.go", f)), data, 0o644))
		}
	}
	return dir, dirs * 50
}

func benchDir(dir string, d int) string {
	return filepath.Join(dir, fmt.Sprintf("dir%02d", d%25), fmt.Sprintf("sub%04d", d))
}

func BenchmarkCold(b *testing.B) {
	dir, files := benchTree(b)
	for b.Loop() {
		sum(b, contenthash.New(), dir, "/", contenthash.Options{})
	}
	b.ReportMetric(float64(files)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
}

func BenchmarkMemory(b *testing.B) {
	dir, _ := benchTree(b)
	tree := contenthash.New()
	sum(b, tree, dir, "/", contenthash.Options{})
	for b.Loop() {
		sum(b, tree, dir, "/", contenthash.Options{})
	}
}

func BenchmarkStored(b *testing.B) {
	dir, files := benchTree(b)
	tree := contenthash.New()
	sum(b, tree, dir, "/", contenthash.Options{})
	m := memory{}
	m.save(tree)
	for b.Loop() {
		loaded, err := contenthash.Load(m)
		require.NoError(b, err)
		sum(b, loaded, dir, "/", contenthash.Options{})
	}
	b.ReportMetric(float64(m.size())/float64(files), "stored-bytes/file")
}

// The same, but each entry has to be looked at.
func BenchmarkUnconfirmed(b *testing.B) {
	dir, _ := benchTree(b)
	tree := contenthash.New()
	sum(b, tree, dir, "/", contenthash.Options{})
	for b.Loop() {
		tree.Unconfirm()
		tree.Seal()
		sum(b, tree, dir, "/", contenthash.Options{})
	}
}

func BenchmarkOneChange(b *testing.B) {
	dir, _ := benchTree(b)
	tree := contenthash.New()
	sum(b, tree, dir, "/", contenthash.Options{})
	m := memory{}
	m.save(tree)
	written, i := 0, 0
	for b.Loop() {
		i++
		p, err := filepath.Rel(dir, filepath.Join(benchDir(dir, 7), "file07.go"))
		require.NoError(b, err)
		require.NoError(b, os.WriteFile(filepath.Join(dir, p), fmt.Append(nil, i), 0o644))
		require.NoError(b, tree.HandleChange(contenthash.Change{Kind: contenthash.Modify, Path: p}))
		sum(b, tree, dir, "/", contenthash.Options{})
		for _, name := range m.save(tree) {
			written += len(m[name])
		}
	}
	b.ReportMetric(float64(written)/float64(i), "saved-bytes/op")
}

// A child with one changed file: the parent's tree, the layer, one file.
func BenchmarkChild(b *testing.B) {
	dir, _ := benchTree(b)
	parent := contenthash.New()
	sum(b, parent, dir, "/", contenthash.Options{})
	upper := b.TempDir()
	changed := benchDir("", 7) + "/file07.go"
	write(b, upper, changed, "new")
	write(b, dir, changed, "new") // what a mount of both would show
	for b.Loop() {
		child := parent.Clone()
		require.NoError(b, child.ApplyLayer(b.Context(), upperLayer(upper)))
		sum(b, child, dir, "/", contenthash.Options{})
		require.Equal(b, uint64(1), child.Stats().FilesRead)
	}
}

func BenchmarkHeap(b *testing.B) {
	dir, files := benchTree(b)
	var before, after runtime.MemStats
	for b.Loop() {
		runtime.GC()
		runtime.ReadMemStats(&before)
		tree := contenthash.New()
		sum(b, tree, dir, "/", contenthash.Options{})
		runtime.GC()
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(tree)
	}
	b.ReportMetric((float64(after.HeapAlloc)-float64(before.HeapAlloc))/float64(files), "heap-bytes/file")
}

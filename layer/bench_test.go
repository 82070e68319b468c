package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/layer"
)

// benchTar is 50,000 files in 1,000 directories, 204 MB, of a size and
// compressibility like that of source and object files.
var benchTar = sync.OnceValue(func() []byte {
	var b bytes.Buffer
	r := rand.New(rand.NewSource(1))
	text := make([]byte, 1<<20)
	for i := range text {
		text[i] = "etaoin shrdlu\n(){}"[r.Intn(18)]
	}
	w := tar.NewWriter(&b)
	for d := range 1000 {
		dir := fmt.Sprintf("usr/lib/pkg%03d/sub%d/", d/10, d%10)
		_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, ModTime: someTime.Truncate(time.Second)})
		for f := range 50 {
			size := r.Intn(8160)
			at := r.Intn(len(text) - size)
			_ = w.WriteHeader(&tar.Header{
				Typeflag: tar.TypeReg, Name: fmt.Sprintf("%sfile%02d.go", dir, f), Mode: 0o644, Size: int64(size),
				ModTime: someTime.Truncate(time.Second),
			})
			_, _ = w.Write(text[at : at+size])
		}
	}
	_ = w.Close()
	return b.Bytes()
})

func benchGzip(b *testing.B, a layer.Algorithm) []byte {
	var out bytes.Buffer
	z, err := layer.Compress(&out, layer.Compression{Algorithm: a})
	require.NoError(b, err)
	_, err = z.Write(benchTar())
	require.NoError(b, err)
	require.NoError(b, z.Close())
	return out.Bytes()
}

// benchDir is where the benchmarks make their trees: LAYER_BENCH_DIR, to
// choose a file system, or a temporary directory.
func benchDir(b *testing.B) string {
	b.Helper()
	dir, err := os.MkdirTemp(os.Getenv("LAYER_BENCH_DIR"), "layer-bench-")
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, os.RemoveAll(dir)) })
	return dir
}

func benchApply(b *testing.B, apply func(dir string) error) {
	dir := benchDir(b)
	b.SetBytes(int64(len(benchTar())))
	b.ResetTimer()
	start := cpu()
	defer func() { b.ReportMetric(float64(cpu()-start)/1e9/float64(b.N), "cpu-s/op") }()
	for i := range b.N {
		root := filepath.Join(dir, fmt.Sprint(i))
		require.NoError(b, os.Mkdir(root, 0o755))
		require.NoError(b, apply(root))
		b.StopTimer()
		before := cpu()
		require.NoError(b, os.RemoveAll(root))
		start += cpu() - before
		b.StartTimer()
	}
}

// cpu is the processor time of this process in nanoseconds, which a busy
// machine changes less than the time on the wall.
func cpu() int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

func BenchmarkApply(b *testing.B) {
	for _, a := range []layer.Algorithm{layer.None, layer.Gzip, layer.Zstd} {
		blob := benchGzip(b, a)
		b.Run(a.String(), func(b *testing.B) {
			benchApply(b, func(dir string) error {
				d, err := layer.Decompress(bytes.NewReader(blob), a.MediaType())
				if err != nil {
					return err
				}
				_, err = layer.Apply(b.Context(), dir, d, layer.ApplyOptions{Form: layer.OverlayTrusted})
				return err
			})
		})
	}
	b.Run("containerd", func(b *testing.B) {
		benchApply(b, func(dir string) error {
			_, err := archive.Apply(context.Background(), dir, bytes.NewReader(benchTar()))
			return err
		})
	})
}

func BenchmarkWrite(b *testing.B) {
	dir := benchDir(b)
	_, err := layer.Apply(b.Context(), dir, bytes.NewReader(benchTar()), layer.ApplyOptions{Form: layer.OverlayTrusted})
	require.NoError(b, err)
	for _, a := range []layer.Algorithm{layer.None, layer.Gzip, layer.Zstd} {
		b.Run(a.String(), func(b *testing.B) {
			b.SetBytes(int64(len(benchTar())))
			for b.Loop() {
				_, err := layer.WriteBlob(b.Context(), io.Discard, layer.Upper{Dir: dir, Form: layer.OverlayTrusted}, layer.Compression{Algorithm: a}, layer.WriteOptions{})
				require.NoError(b, err)
			}
		})
	}
	b.Run("trees, equal", func(b *testing.B) {
		b.SetBytes(int64(len(benchTar())))
		for b.Loop() {
			_, err := layer.Write(b.Context(), io.Discard, layer.Trees{Lower: dir, Upper: dir}, layer.WriteOptions{})
			require.NoError(b, err)
		}
	})
}

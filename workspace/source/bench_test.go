package source

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// manyFiles makes n small files, twenty to a directory.
func manyFiles(tb testing.TB, dir string, n int) {
	tb.Helper()
	old := time.Now().Add(-time.Hour)
	for i := range n {
		sub := filepath.Join(dir, fmt.Sprintf("pkg%03d", i/400), fmt.Sprintf("dir%05d", i/20))
		if i%20 == 0 {
			require.NoError(tb, os.MkdirAll(sub, 0o755))
		}
		name := filepath.Join(sub, fmt.Sprintf("file%d.go", i))
		require.NoError(tb, os.WriteFile(name, fmt.Appendf(nil, "package p%d\n", i), 0o644))
		require.NoError(tb, os.Chtimes(name, old, old))
	}
}

// settle makes a tree and its copies count as older than any window.
func settle(t *Tree) {
	t.started = stampOf(t.started.time().Add(time.Minute))
	t.synced = stampOf(t.synced.time().Add(time.Minute))
}

func synced(tb testing.TB, n int) (src, dst string, prev *Tree) {
	src, dst = tb.TempDir(), tb.TempDir()
	manyFiles(tb, src, n)
	t, err := Scan(context.Background(), src, Options{}, nil)
	require.NoError(tb, err)
	r, err := t.SyncTo(context.Background(), src, dst, nil, nil)
	require.NoError(tb, err)
	settle(r.Tree)
	return src, dst, r.Tree
}

// BenchmarkNothingChanged is a run after which nothing has to be done.
func BenchmarkNothingChanged(b *testing.B) {
	for _, n := range []int{5_000, 50_000} {
		b.Run(fmt.Sprintf("files=%d", n), func(b *testing.B) {
			src, dst, prev := synced(b, n)
			b.Run("scan", func(b *testing.B) {
				for b.Loop() {
					_, err := Scan(b.Context(), src, Options{}, prev)
					require.NoError(b, err)
				}
			})
			b.Run("scan+sync", func(b *testing.B) {
				for b.Loop() {
					t, err := Scan(b.Context(), src, Options{}, prev)
					require.NoError(b, err)
					r, err := t.SyncTo(b.Context(), src, dst, prev, nil)
					require.NoError(b, err)
					require.Zero(b, r.Changed)
				}
			})
			b.Run("digest", func(b *testing.B) {
				for b.Loop() {
					(&Tree{nodes: prev.nodes}).Digest()
				}
			})
			enc, err := prev.Encode()
			require.NoError(b, err)
			b.Run("encode", func(b *testing.B) {
				b.ReportMetric(float64(len(enc))/float64(n), "bytes/file")
				for b.Loop() {
					_, err := prev.Encode()
					require.NoError(b, err)
				}
			})
			b.Run("decode", func(b *testing.B) {
				for b.Loop() {
					_, err := Decode(enc)
					require.NoError(b, err)
				}
			})
			b.Run("scan-exclude", func(b *testing.B) {
				o := Options{Exclude: []string{"**/*.o", "node_modules", ".git"}}
				for b.Loop() {
					_, err := Scan(b.Context(), src, o, prev)
					require.NoError(b, err)
				}
			})
		})
	}
}

// BenchmarkFirst is the first run of a source.
func BenchmarkFirst(b *testing.B) {
	src := b.TempDir()
	manyFiles(b, src, 5_000)
	b.Run("scan", func(b *testing.B) {
		for b.Loop() {
			_, err := Scan(b.Context(), src, Options{}, nil)
			require.NoError(b, err)
		}
	})
	b.Run("scan+sync", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			dst, err := os.MkdirTemp(b.TempDir(), "")
			require.NoError(b, err)
			b.StartTimer()
			t, err := Scan(b.Context(), src, Options{}, nil)
			require.NoError(b, err)
			r, err := t.SyncTo(b.Context(), src, dst, nil, nil)
			require.NoError(b, err)
			require.EqualValues(b, 5000+250+13, r.Changed)
		}
	})
}

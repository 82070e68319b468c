package main

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/contenthash/contenthashtest"
)

// BenchmarkCold computes the digest of 20,000 files of 3.5 KB, 50 in a
// directory, of which nothing is known.
func BenchmarkCold(b *testing.B) {
	dir := b.TempDir()
	data := make([]byte, 3500)
	for d := range 400 {
		sub := filepath.Join(dir, fmt.Sprintf("dir%02d", d%25), fmt.Sprintf("sub%04d", d))
		require.NoError(b, os.MkdirAll(sub, 0o755))
		for f := range 50 {
			copy(data, fmt.Sprintf("%d %d", d, f))
			require.NoError(b, os.WriteFile(filepath.Join(sub, fmt.Sprintf("file%02d.go", f)), data, 0o644))
		}
	}
	b.Run("peer", func(b *testing.B) {
		for i := range b.N {
			_, err := askPeer(b.Context(), dir, fmt.Sprint(b.Name(), b.N, i), contenthashtest.Query{Path: "/"})
			require.NoError(b, err)
		}
	})
	b.Run("ours", func(b *testing.B) {
		for range b.N {
			_, err := contenthash.New().Checksum(b.Context(), contenthash.Dir(dir), "/", contenthash.Options{})
			require.NoError(b, err)
		}
	})
}

package contenthash_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/lamina-build/lamina/contenthash"
)

var errNoFiles = errors.New("no files here")

func noFiles(context.Context) (*contenthash.Root, error) { return nil, errNoFiles }

// ask asks a tree of unknown origin, which must neither panic nor give an
// empty digest.
func ask(t *testing.T, tree *contenthash.Tree) {
	for _, p := range []string{"/", "a", "a/b", "dir00", "dir00/sub0000/file00"} {
		for _, o := range []contenthash.Options{{}, {FollowLinks: true}, {ExcludePatterns: []string{"b"}}} {
			d, err := tree.Checksum(context.Background(), noFiles, p, o)
			if err == nil {
				require.NoError(t, d.Validate())
			} else {
				require.Empty(t, d)
			}
		}
	}
}

// FuzzLoad takes pages with checksums that fit, each after its length.
func FuzzLoad(f *testing.F) {
	dir := f.TempDir()
	manyFiles(f, dir, 2, 2)
	for _, target := range []int{150, 16 << 10} {
		tree := contenthash.New()
		tree.SetPageTarget(target)
		sum(f, tree, dir, "/", contenthash.Options{})
		m := memory{}
		m.save(tree)
		var seed []byte
		for _, name := range append([]string{"index"}, pageNames(len(m)-1)...) {
			payload := m[name][6:]
			seed = binary.LittleEndian.AppendUint16(seed, uint16(len(payload)))
			seed = append(seed, payload...)
		}
		_, err := contenthash.Load(framed(seed))
		require.NoError(f, err)
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m := framed(data)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		tree, err := contenthash.Load(m)
		runtime.ReadMemStats(&after)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20+2000*m.size()), "memory for %d bytes", m.size())
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
		}
		ask(t, tree)
		// What is loaded can be saved and loaded again, and says the same.
		again := memory{}
		again.save(tree.Clone())
		loaded, err := contenthash.Load(again)
		require.NoError(t, err)
		d, err := tree.Checksum(context.Background(), noFiles, "a", contenthash.Options{})
		d2, err2 := loaded.Checksum(context.Background(), noFiles, "a", contenthash.Options{})
		require.Equal(t, d, d2)
		require.Equal(t, err == nil, err2 == nil)
	})
}

// framed makes pages of fuzzed data.
func framed(data []byte) memory {
	m := memory{}
	names := append([]string{"index"}, pageNames(30)...)
	for i := 0; len(data) >= 2 && i < len(names); i++ {
		n := min(int(binary.LittleEndian.Uint16(data)), len(data)-2)
		m[names[i]] = contenthash.FramePage(names[i], bytes.Clone(data[2:2+n]))
		data = data[2+n:]
	}
	contenthash.FixIndex(m["index"], m)
	return m
}

func pageNames(n int) (names []string) {
	for i := range n {
		names = append(names, fmt.Sprintf("p%d", i+1))
	}
	return names
}

func FuzzImportV0(f *testing.F) {
	f.Add([]byte{})
	f.Add(v0Value(f))
	f.Fuzz(func(t *testing.T, data []byte) {
		tree, err := contenthash.ImportV0(contenthash.V0{Value: data})
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
		}
		ask(t, tree)
	})
}

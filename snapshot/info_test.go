package snapshot

import (
	"bytes"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func anyText(t *rapid.T, label string) text {
	return text(rapid.SliceOf(rapid.Byte()).Draw(t, label))
}

func anyState(t *rapid.T) state {
	s := state{
		Key: anyText(t, "key"), View: rapid.Bool().Draw(t, "view"), Parent: anyText(t, "parent"),
		Created: rapid.Int64().Draw(t, "created"), Updated: rapid.Int64().Draw(t, "updated"),
		Sealed: rapid.Bool().Draw(t, "sealed"),
	}
	labels := map[string]string{}
	for range rapid.IntRange(0, 3).Draw(t, "labels") {
		labels[string(anyText(t, "label"))] = string(anyText(t, "value"))
	}
	s.setLabels(labels)
	if rapid.Bool().Draw(t, "measured") {
		s.Usage = &usage{Inodes: rapid.Int64().Draw(t, "inodes"), Size: rapid.Int64().Draw(t, "size")}
	}
	return s
}

// Strings of any bytes come back as they were.
func TestStateRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := anyState(t)
		line, err := want.line()
		require.NoError(t, err)
		require.Equal(t, len(line)-1, bytes.IndexByte(line, '\n'), "one line")
		got, ok := parseLog(line, want.Sealed)
		require.True(t, ok)
		require.Equal(t, want, got)
		_, ok = parseLog(line, !want.Sealed)
		require.Equal(t, !want.Sealed, ok, "a sealed line never counts for an active entry")
	})
}

// A log is the last state of its kind, wherever it was torn, and goes on
// after that.
func TestTornLog(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		path := filepath.Join(dir, "info")
		require.NoError(t, os.RemoveAll(path))
		first := anyState(t)
		first.Sealed = false
		require.NoError(t, createState(path, first))
		whole, err := os.ReadFile(path)
		require.NoError(t, err)
		second := anyState(t)
		require.NoError(t, appendState(path, second))
		both, err := os.ReadFile(path)
		require.NoError(t, err)
		cut := rapid.IntRange(len(whole), len(both)).Draw(t, "cut")
		require.NoError(t, os.Truncate(path, int64(cut)))

		want := first
		// Without its newline the line is whole all the same.
		if cut >= len(both)-1 && !second.Sealed {
			want = second
		}
		got, err := readState(path, false)
		require.NoError(t, err)
		require.Equal(t, want, got)
		third := anyState(t)
		require.NoError(t, appendState(path, third))
		got, err = readState(path, third.Sealed)
		require.NoError(t, err)
		require.Equal(t, third, got)
	})
}

// No flipped bit goes unnoticed.
func TestDamagedLine(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := anyState(t)
		line, err := s.line()
		require.NoError(t, err)
		i := rapid.IntRange(0, len(line)*8-1).Draw(t, "bit")
		line[i/8] ^= 1 << (i % 8)
		got, ok := parseLog(line, s.Sealed)
		if ok {
			// The newline is not part of it, nor the case of hex digits.
			require.Equal(t, s, got)
			require.True(t, i/8 == len(line)-1 || i/8 < 8, "byte %d", i/8)
		}
	})
}

func TestCompaction(t *testing.T) {
	path := filepath.Join(t.TempDir(), "info")
	active := state{Created: 1, Updated: 1, Parent: "p"}
	require.NoError(t, createState(path, active))
	big := map[string]string{"big": string(make([]byte, 4000))}
	size := int64(0)
	compacted := false
	for i := range 100 {
		active.Updated = int64(i)
		active.setLabels(maps.Clone(big))
		require.NoError(t, appendState(path, active))
		fi, err := os.Stat(path)
		require.NoError(t, err)
		compacted = compacted || fi.Size() < size
		size = fi.Size()
		require.Less(t, size, int64(compactAt+60000))
		got, err := readState(path, false)
		require.NoError(t, err)
		require.Equal(t, active, got)
	}
	require.True(t, compacted)
	require.NoFileExists(t, path+".new")

	// A commit that compacts and is cut then is still no commit.
	for size < compactAt {
		require.NoError(t, appendState(path, active))
		fi, err := os.Stat(path)
		require.NoError(t, err)
		size = fi.Size()
	}
	sealed := state{Sealed: true, Created: 5}
	require.NoError(t, appendState(path, sealed))
	fi, err := os.Stat(path)
	require.NoError(t, err)
	require.Less(t, fi.Size(), size)
	got, err := readState(path, false)
	require.NoError(t, err)
	require.Equal(t, active, got)
	got, err = readState(path, true)
	require.NoError(t, err)
	require.Equal(t, sealed, got)
}

// A power cut can take the sealed line and leave the rename that came after it.
func TestLostSealedLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "info")
	active := state{Created: 1, Updated: 2, Parent: "p"}
	require.NoError(t, createState(path, active))
	require.NoError(t, appendState(path, state{Sealed: true, Created: 3, Parent: "p"}))
	log, err := os.ReadFile(path)
	require.NoError(t, err)
	for zeros := range len(log) / 3 {
		torn := append(log[:len(log)-1-zeros:len(log)-1-zeros], make([]byte, zeros)...)
		require.NoError(t, os.WriteFile(path, torn, 0o600))
		got, err := readState(path, true)
		require.NoError(t, err)
		if zeros > 0 {
			require.Equal(t, active, got)
		}
		got, err = readState(path, false)
		require.NoError(t, err)
		require.Equal(t, active, got)
	}
}

func TestNoState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "info")
	_, err := readState(path, false)
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	_, err = readState(path, false)
	require.True(t, errdefs.IsDataLoss(err), "%v", err)
	require.NoError(t, createState(path+"2", state{}))
	require.ErrorIs(t, createState(path+"2", state{}), fs.ErrExist)
}

func FuzzParseLog(f *testing.F) {
	line, err := state{Parent: "p", Labels: []label{{"a", "b"}}}.line()
	require.NoError(f, err)
	f.Add(line, false)
	f.Add([]byte("\n\n00000000 {}\n"), true)
	f.Add([]byte("00000000"), true)
	f.Fuzz(func(t *testing.T, log []byte, sealed bool) {
		s, ok := parseLog(log, sealed)
		if ok && !sealed {
			require.False(t, s.Sealed, "what an active entry is must not be told by a commit that was cut")
		}
		// Whatever came before, a whole line after it counts.
		last, err := state{Created: 7, Sealed: sealed}.line()
		require.NoError(t, err)
		s, ok = parseLog(append(append(log, '\n'), last...), sealed)
		require.True(t, ok)
		require.EqualValues(t, 7, s.Created)
	})
}

package snapshot

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func anyKey(t *rapid.T, label string) string {
	return rapid.OneOf(
		rapid.Custom(func(t *rapid.T) string {
			return string(rapid.SliceOfN(rapid.Byte(), 1, 300).Draw(t, "bytes"))
		}),
		rapid.StringMatching(`[a-zA-Z0-9._%~/-]{1,220}`),
	).Draw(t, label)
}

func TestNamesAreFileNames(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := anyKey(t, "key")
		name := encodeKey(key)
		require.True(t, entryName(name))
		require.LessOrEqual(t, len(name), maxName)
		require.NotContains(t, name, "/")
		require.NotContains(t, name, "\x00")
		require.False(t, strings.HasPrefix(name, "."))
		require.Equal(t, name, filepath.Base(name))
		if got, ok := decodeKey(name); ok {
			require.Equal(t, key, got)
		} else {
			require.True(t, hashed(name))
			require.Greater(t, 3*len(key), maxName)
		}
		other := anyKey(t, "other")
		require.Equal(t, key == other, name == encodeKey(other), "one name, one key")

		for _, dir := range []string{dirActive, dirCommitted} {
			e := entry{dir, name}
			trash := trashName(e)
			require.LessOrEqual(t, len(trash), 255)
			from, ok := splitTrash(trash)
			require.True(t, ok)
			require.Equal(t, e, from)
		}
	})
}

func TestForeignNames(t *testing.T) {
	for _, name := range []string{
		"", ".", "..", ".hidden", "lost+found", "a b", "%", "%4", "%zz", "%41", "%2e", "~", "~abc",
		"~" + strings.Repeat("A", 64), "a%", strings.Repeat("a", 201),
	} {
		require.False(t, entryName(name), "%q", name)
	}
	for _, name := range []string{"", "~", "a", "a~", "a~x", "~aX", ".a~aX", "a~~aX"} {
		_, ok := splitTrash(name)
		require.False(t, ok, "%q", name)
	}
	from, ok := splitTrash("a~cXYZ")
	require.True(t, ok)
	require.Equal(t, entry{dirCommitted, "a"}, from)
}

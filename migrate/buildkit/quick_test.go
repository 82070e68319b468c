package buildkit

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"
)

// The quick reader says what encoding/json says, or nothing.
func FuzzQuickItem(f *testing.F) {
	for _, seed := range []string{
		`{"value":1700000000000000000}`, `{"value":-1}`, `{"value":true}`, `{"value":null}`, `{"value":"a b"}`,
		`{"value":"sha256:ab","index":"chainid:sha256:ab"}`, `{"value":"a\"b","index":"x"}`, `{"value":"\u00e9"}`,
		`{"value":["a","b"]}`, `{"value":"a","index":""}`, `{"index":"a"}`, `{}`, `{"value":01}`, `{"value":1.5}`,
		`{"value":"x"} `, `{"value":"x","value":"y"}`, `{"value":tru}`, `{"value":"` + "\xff" + `"}`, `{"value":-}`, `{"value":""}`,
	} {
		f.Add([]byte(seed))
	}
	keys := []string{
		"cache.createdAt", "cache.usageCount", "cache.cachePolicy", "cache.description", "snapshot.size",
		"snapshot.committed", "cache.blob", "cache.mergeParents", "unknown",
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		it, ok := quickItem(raw)
		if !ok {
			return
		}
		var want item
		require.NoError(t, json.Unmarshal(raw, &want))
		if string(want.Value) == "null" || string(it.Value) == "null" {
			want.Value, it.Value = nil, nil // which encoding/json gives as nothing
		}
		require.Equal(t, want, it)
		for _, key := range keys {
			var quick, slow Row
			field := quick.field(key)
			if field == nil || !quickValue(it.Value, field) {
				continue
			}
			require.NoError(t, json.Unmarshal(it.Value, slow.field(key)), key)
			require.Equal(t, slow, quick, key)
		}
	})
}

// What BuildKit writes most is read without encoding/json.
func TestQuickReadsWhatBuildKitWrites(t *testing.T) {
	for _, v := range []any{int64(1), "text", true, int64(-1)} {
		for _, index := range []string{"", "key::x"} {
			value, err := json.Marshal(v)
			require.NoError(t, err)
			raw, err := json.Marshal(item{Value: value, Index: index})
			require.NoError(t, err)
			it, ok := quickItem(raw)
			require.True(t, ok, string(raw))
			require.Equal(t, item{Value: value, Index: index}, it)
		}
	}
}

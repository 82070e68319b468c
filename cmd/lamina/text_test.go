package main

import (
	"bytes"
	"compress/gzip"
	"io"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
)

func TestSafe(t *testing.T) {
	for in, want := range map[string]string{
		"":                  "",
		"plain text":        "plain text",
		"Grüße, 世界 \"x\"":   "Grüße, 世界 \"x\"",
		"\x1b[31mred":       `\x1b[31mred`,
		"a\nb\tc":           `a\nb\tc`,
		"bad\xff":           `bad\xff`,
		"right\u202eleft":   `right\u202eleft`,
		"zero\u200bwidth":   `zero\u200bwidth`,
		"quote\"\x07":       `quote"\a`,
		"nonbreaking\u00a0": "nonbreaking\u00a0",
	} {
		require.Equal(t, want, safe(in), "%q", in)
	}
	rapid.Check(t, func(t *rapid.T) {
		out := safe(string(rapid.SliceOf(rapid.Byte()).Draw(t, "bytes")))
		if !utf8.ValidString(out) || strings.ContainsFunc(out, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 }) {
			t.Fatalf("%q reaches the terminal", out)
		}
		if again := safe(out); again != out {
			t.Fatalf("%q becomes %q", out, again)
		}
	})
}

func TestTimesForPrograms(t *testing.T) {
	require.Nil(t, jsonTime(time.Time{}))
	at := time.Date(2026, 2, 3, 4, 5, 6, 7000, time.FixedZone("", 3600))
	require.Equal(t, "2026-02-03T03:05:06.000007000Z", *jsonTime(at))
	parsed, err := time.Parse(time.RFC3339Nano, *jsonTime(at))
	require.NoError(t, err)
	require.True(t, parsed.Equal(at))
}

func TestFilter(t *testing.T) {
	rec := &cache.Record{
		ID: "id1", State: cache.Committed, Op: metadata.Layer, Type: "exec.cachemount", Description: "two words",
		Labels: map[string]string{"team": "a", "with.dots/x": "b"}, Retain: true,
		Values: []cache.Value{{Name: "workspace.key", Data: []byte("app"), Index: "workspace:app"}},
	}
	for filter, want := range map[string]bool{
		"":                            true,
		"id==id1":                     true,
		"id==id":                      false,
		"state==committed":            true,
		"state!=committed":            false,
		"op==layer":                   true,
		"type~=^exec":                 true,
		`type~="^exec\\."`:            true,
		"type~=/^(exec|x)/":           true,
		`description=="a~=("`:         false,
		"key==app":                    true,
		"key":                         true,
		`description=="two words"`:    true,
		"retained==true":              true,
		"retained==false":             false,
		"labels.team==a":              true,
		"labels.team!=a":              false,
		`labels."with.dots/x"==b`:     true,
		"labels.missing":              false,
		"state==committed,key==other": false,
		"state==committed,key==app":   true,
	} {
		var texts []string
		if filter != "" {
			texts = []string{filter}
		}
		keep, err := parseFilter(texts)
		require.NoError(t, err, filter)
		require.Equal(t, want, keep(rec), filter)
	}
	keep, err := parseFilter([]string{"state==mutable", "key==app"})
	require.NoError(t, err)
	require.True(t, keep(rec), "several filters mean or")

	for _, bad := range []string{"colour==red", "id==id1,colour", "labels", "labels.a.b==c", "state=", "==x", "id~=(", `id==x,type~="a("`, "key~=/[/", "id~=a,key~=b)"} {
		_, err := parseFilter([]string{bad})
		require.Error(t, err, bad)
	}
}

func TestCompression(t *testing.T) {
	for _, s := range []string{"none", "gzip", "gzip:1", "gzip:9", "zstd", "zstd:1", "zstd:22"} {
		compression, err := parseCompression(s)
		require.NoError(t, err, s)
		var buf bytes.Buffer
		w, err := layer.Compress(&buf, compression)
		require.NoError(t, err, s)
		_, err = io.WriteString(w, strings.Repeat("text ", 1000))
		require.NoError(t, err)
		require.NoError(t, w.Close())
		var r io.Reader = &buf
		switch {
		case strings.HasPrefix(s, "gzip"):
			r, err = gzip.NewReader(&buf)
		case strings.HasPrefix(s, "zstd"):
			r, err = zstd.NewReader(&buf)
		}
		require.NoError(t, err)
		data, err := io.ReadAll(r)
		require.NoError(t, err)
		require.Equal(t, strings.Repeat("text ", 1000), string(data), s)
	}
	for _, s := range []string{"", "none:1", "gzip:0", "gzip:10", "gzip:", "zstd:23", "zstd:x", "zstd:-1", "xz"} {
		_, err := parseCompression(s)
		require.Error(t, err, s)
	}
}

func TestPercent(t *testing.T) {
	for _, s := range []string{"5", "5%", "0.5%", "100"} {
		p, err := parsePercent(s)
		require.NoError(t, err, s)
		require.Positive(t, p, s)
	}
	for _, s := range []string{"", "%", "0", "-1", "101", "NaN", "Inf", "five", "5%%"} {
		_, err := parsePercent(s)
		require.Error(t, err, s)
	}
}

func TestTimeText(t *testing.T) {
	now := time.Now()
	require.Equal(t, "never", ago(time.Time{}, now))
	require.Contains(t, ago(now.Add(-3*time.Hour), now), "3 hours ago")
	require.Equal(t, "never", used(&cache.Record{}, now))
	require.Contains(t, used(&cache.Record{UsageCount: 2, LastUsed: now}, now), "2x")
}

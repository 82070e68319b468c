package buildkit

import (
	"bytes"
	"strconv"
	"unicode/utf8"

	"github.com/opencontainers/go-digest"
)

// The functions of this file read the JSON that BuildKit writes, for most
// values: a dozen for each record. What is not of that form they leave to
// encoding/json, which says the same of the others, but takes much longer.

// quickItem splits a value and its index. The value shares memory with raw.
func quickItem(raw []byte) (it item, ok bool) {
	rest, ok := bytes.CutPrefix(raw, []byte(`{"value":`))
	if !ok {
		return it, false
	}
	n := quickEnd(rest)
	if n <= 0 || n >= len(rest) {
		return it, false
	}
	it.Value, rest = rest[:n:n], rest[n:]
	if !quickValid(it.Value) {
		return it, false
	}
	if string(rest) == "}" {
		return it, true
	}
	if rest, ok = bytes.CutPrefix(rest, []byte(`,"index":`)); !ok {
		return it, false
	}
	if n = quickEnd(rest); n <= 0 || string(rest[n:]) != "}" {
		return it, false
	}
	it.Index, ok = quickString(rest[:n])
	return it, ok
}

// quickEnd is the length of the string, number or word that b begins with, 0
// if that is not simple.
func quickEnd(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	if b[0] == '"' {
		return bytes.IndexByte(b[1:], '"') + 2
	}
	for i, c := range b {
		switch {
		case c == ',' || c == '}':
			return i
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c == '-' && i == 0:
		default:
			return 0
		}
	}
	return 0
}

// quickValid says whether b is a string without escapes, an integer or a word.
func quickValid(b []byte) bool {
	switch string(b) {
	case "true", "false", "null":
		return true
	}
	if _, ok := quickString(b); ok {
		return true
	}
	_, ok := quickInt(b)
	return ok
}

// quickString reads a string without escapes.
func quickString(b []byte) (string, bool) {
	if len(b) < 2 || b[0] != '"' || b[len(b)-1] != '"' {
		return "", false
	}
	b = b[1 : len(b)-1]
	for _, c := range b {
		if c < ' ' || c == '\\' || c == '"' {
			return "", false
		}
	}
	if !utf8.Valid(b) {
		return "", false // encoding/json replaces what is not
	}
	return string(b), true
}

// quickInt reads an integer as JSON has them.
func quickInt(b []byte) (int64, bool) {
	digits := bytes.TrimPrefix(b, []byte("-"))
	if len(digits) == 0 || len(digits) > 1 && digits[0] == '0' || digits[0] < '0' || digits[0] > '9' {
		return 0, false
	}
	n, err := strconv.ParseInt(string(b), 10, 64)
	return n, err == nil
}

// quickValue reads a value into a field; ok is false for what it leaves alone.
func quickValue(b []byte, field any) (ok bool) {
	switch f := field.(type) {
	case *string:
		s, ok := quickString(b)
		if ok {
			*f = s
		}
		return ok
	case *digest.Digest:
		s, ok := quickString(b)
		if ok {
			*f = digest.Digest(s)
		}
		return ok
	case *int64:
		n, ok := quickInt(b)
		if ok {
			*f = n
		}
		return ok
	case *uint64:
		n, ok := quickInt(b)
		if ok = ok && b[0] != '-'; ok { // nor "-0", which encoding/json refuses
			*f = uint64(n)
		}
		return ok
	case *bool:
		if s := string(b); s == "true" || s == "false" {
			*f = s == "true"
			return true
		}
	case *nanoseconds:
		n, ok := quickInt(b)
		if ok {
			f.set(n)
		}
		return ok
	case *retained:
		n, ok := quickInt(b)
		if ok {
			*f.retain = n == 1
		}
		return ok
	}
	return false
}

package main

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/cache"
)

const filterHelp = `Filters are containerd's: FIELD==VALUE, FIELD!=VALUE, FIELD~=REGEXP, or FIELD
alone for "is set"; a comma means and, several --filter mean or. The fields are
id, state, op, type, key, description, retained (true or false) and
labels.NAME, or labels."NAME" if the name has other characters than letters.`

// parseFilter makes the predicate of --filter flags, any of which has to
// match. No flags match everything.
func parseFilter(texts []string) (func(*cache.Record) bool, error) {
	f, err := filters.ParseAll(texts...)
	if err != nil {
		return nil, fmt.Errorf("--filter: %w", err)
	}
	// The library takes an unknown field for one that is not set.
	if name := unknownField(f); name != "" {
		return nil, fmt.Errorf("--filter: there is no field %q, but id, state, op, type, key, description, retained and labels.NAME: %w", name, errdefs.ErrInvalidArgument)
	}
	for _, text := range texts {
		if err := checkRegexps(text); err != nil {
			return nil, fmt.Errorf("--filter: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	return func(rec *cache.Record) bool {
		return f.Match(filters.AdapterFunc(func(path []string) (string, bool) {
			value, set, _ := field(rec, path)
			return value, set
		}))
	}, nil
}

// checkRegexps compiles what stands after ~= in a filter that the library took:
// it would take a bad one for one that matches nothing.
func checkRegexps(text string) error {
	for text != "" {
		end := quoted(text)
		op, isRegexp := strings.CutPrefix(text, "~=")
		switch {
		case end > 0:
			text = text[end:]
			continue
		case !isRegexp:
			text = text[1:]
			continue
		}
		text = strings.TrimSpace(op)
		var value string
		if end := quoted(text); end > 1 {
			value = text[1 : end-1]
			if text[0] == '"' {
				value, _ = strconv.Unquote(text[:end])
			}
			text = text[end:]
		} else {
			value, text, _ = strings.Cut(text, ",")
		}
		if _, err := regexp.Compile(value); err != nil {
			return err
		}
	}
	return nil
}

// quoted is the length of the quoted text that s begins with, or 0.
func quoted(s string) int {
	if s == "" || !strings.ContainsRune(`"/|`, rune(s[0])) {
		return 0
	}
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case s[0]:
			return i + 1
		}
	}
	return 0
}

// field is what a filter sees of a record.
func field(rec *cache.Record, path []string) (value string, set, known bool) {
	if len(path) == 2 && path[0] == "labels" {
		value, set = rec.Labels[path[1]]
		return value, set, true
	}
	if len(path) != 1 {
		return "", false, false
	}
	switch path[0] {
	case "id":
		value = string(rec.ID)
	case "state":
		value = rec.State.String()
	case "op":
		value = rec.Op.String()
	case "type":
		value = rec.Type
	case "key":
		value = keyOf(rec)
	case "description":
		value = rec.Description
	case "retained":
		value = strconv.FormatBool(rec.Retain)
	default:
		return "", false, false
	}
	return value, value != "", true
}

// unknownField gives the first field of a filter that records do not have.
func unknownField(f filters.Filter) (name string) {
	var each []filters.Filter
	switch f := f.(type) {
	case filters.All:
		each = f
	case filters.Any:
		each = f
	default:
		f.Match(filters.AdapterFunc(func(path []string) (string, bool) {
			if _, _, known := field(&cache.Record{}, path); !known {
				name = fmt.Sprint(path)
				if len(path) == 1 {
					name = path[0]
				}
			}
			return "", false
		}))
		return name
	}
	for _, f := range each {
		if name := unknownField(f); name != "" {
			return name
		}
	}
	return ""
}

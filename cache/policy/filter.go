package policy

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/filters"
)

// Filter selects records. The zero value selects all.
type Filter struct {
	// any has the filters of which one has to match; each has terms that all
	// have to match.
	any [][]term
	// sized says that a term looks at the size.
	sized bool
}

// term is one condition.
type term func(r *Record, now time.Time) bool

// Match says whether the filter selects r.
func (f Filter) Match(r *Record, now time.Time) bool {
	for _, all := range f.any {
		matches := true
		for _, t := range all {
			if matches = t(r, now); !matches {
				break
			}
		}
		if matches {
			return true
		}
	}
	return len(f.any) == 0
}

// LooksAtSize says whether the outcome may depend on the size of a record, so
// that sizes have to be measured first.
func (f Filter) LooksAtSize() bool { return f.sized }

// Fields are the fields of a filter, for help texts.
const Fields = "id, state, op, type, key, cache, description, retained, labels.NAME, size, age, idle, uses and cost"

// ParseFilters reads filters, one of which has to match; none match everything.
//
// The language is containerd's: conditions FIELD==VALUE, FIELD!=VALUE,
// FIELD~=REGEXP, and FIELD alone for "is set", with commas between that mean
// and. Beside it there are ranges: <, <=, >, >=, == and != compare size with an
// amount of bytes ("size>100MB"), age (since it was made), idle (since its last
// use) and cost with a duration ("idle>=7d"), and uses with a number. Labels
// are compared with <, <=, > and >= where both sides are numbers, amounts or
// durations of one kind.
//
// Errors are *SyntaxError.
func ParseFilters(texts ...string) (Filter, error) {
	var f Filter
	for _, text := range texts {
		var all []term
		for at := 0; at <= len(text); {
			end := at + termLen(text[at:])
			t, sized, err := parseTerm(text[at:end])
			if err != nil {
				var fe *SyntaxError
				if errors.As(err, &fe) {
					fe.Text, fe.At = text, min(at+fe.At, len(text))
				}
				return Filter{}, err
			}
			all, f.sized = append(all, t), f.sized || sized
			at = end + 1 // behind the comma
		}
		f.any = append(f.any, all)
	}
	return f, nil
}

// termLen is the length of the condition that s begins with: up to a comma
// outside quotes. Quotes open where a name or a value begins.
func termLen(s string) int {
	begins, afterMatch := true, false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == ',':
			return i
		case begins && (c == '"' || afterMatch && (c == '/' || c == '|')):
			for i++; i < len(s) && s[i] != c; i++ {
				if s[i] == '\\' {
					i++
				}
			}
			begins = false
		case c == ' ':
		default:
			afterMatch = c == '=' && i > 0 && s[i-1] == '~'
			begins = c == '=' || c == '.' || c == '<' || c == '>'
		}
	}
	return len(s)
}

// comparison finds a range's operator in a condition. Labels know < and >
// only: == and != of theirs are containerd's, which compare text.
var comparison = regexp.MustCompile(`^\s*(size|age|idle|uses|cost|labels\.(?:"(?:[^"\\]|\\.)*"|[A-Za-z0-9_-]+))\s*(<=|>=|<|>|==|!=)`)

func parseTerm(text string) (t term, sized bool, err error) {
	if strings.TrimSpace(text) == "" {
		return nil, false, &SyntaxError{What: "filter", Reason: "a condition is missing", Example: "type==regular,size>100MB"}
	}
	if m := comparison.FindStringSubmatchIndex(text); m != nil {
		field, op := text[m[2]:m[3]], text[m[4]:m[5]]
		if label, ok := strings.CutPrefix(field, "labels."); !ok || op[0] == '<' || op[0] == '>' {
			t, err := parseRange(field, label, op, text[m[1]:], m[1])
			return t, field == "size", err
		}
	}
	t, err = parseText(text)
	return t, false, err
}

// parseRange makes a typed condition; at is where the value begins.
func parseRange(field, label, op, value string, at int) (term, error) {
	at = blanks(strings.Repeat(" ", at)+value, at)
	value = strings.TrimSpace(value)
	if unquoted, ok := strings.CutPrefix(value, `"`); ok {
		at, value = at+1, strings.TrimSuffix(unquoted, `"`)
	}
	bad := func(example string) error {
		return &SyntaxError{What: "filter", At: at, Reason: fmt.Sprintf("%q cannot be compared with %s", clip(value), clip(field)), Example: example}
	}
	// within is an error in the value itself, which says the place.
	within := func(err error, example string) error {
		e := &SyntaxError{What: "filter", At: at, Example: example}
		var in *SyntaxError
		if errors.As(err, &in) {
			e.At, e.Reason = at+in.At, in.Reason
		}
		return e
	}
	switch field {
	case "size":
		a, err := ParseAmount(value)
		if err != nil {
			return nil, within(err, "size>100MB")
		}
		if a.ofDisk {
			return nil, bad("size>100MB")
		}
		return func(r *Record, _ time.Time) bool { return r.Size >= 0 && holds(r.Size, op, a.bytes) }, nil
	case "uses":
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			return nil, bad("uses<3")
		}
		return func(r *Record, _ time.Time) bool { return holds(r.Uses, op, n) }, nil
	case "age", "idle", "cost":
		d, err := ParseDuration(value)
		if err != nil {
			return nil, within(err, field+map[string]string{"age": ">30d", "idle": ">=48h", "cost": "<10s"}[field])
		}
		return func(r *Record, now time.Time) bool {
			is := r.Cost
			switch field {
			case "age":
				is = now.Sub(r.Created)
			case "idle":
				is = now.Sub(r.used())
			}
			return holds(is, op, time.Duration(d))
		}, nil
	}
	if unquoted, err := strconv.Unquote(label); err == nil {
		label = unquoted
	}
	want, ok := measure(value)
	if !ok {
		return nil, bad(field + op + "10")
	}
	return func(r *Record, _ time.Time) bool {
		is, ok := measure(r.Labels[label])
		return ok && is.kind == want.kind && holds(is.n, op, want.n)
	}, nil
}

// quantity is a label's value as a number.
type quantity struct {
	kind string
	n    float64
}

// measure reads a number, a duration or an amount of bytes.
func measure(text string) (quantity, bool) {
	if n, err := strconv.ParseFloat(text, 64); err == nil {
		return quantity{"number", n}, true
	}
	if d, err := ParseDuration(text); err == nil {
		return quantity{"duration", float64(d)}, true
	}
	if a, err := ParseAmount(text); err == nil && !a.ofDisk {
		return quantity{"bytes", float64(a.bytes)}, true
	}
	return quantity{}, false
}

func holds[T cmp.Ordered](is T, op string, want T) bool {
	switch op {
	case "<":
		return is < want
	case "<=":
		return is <= want
	case ">":
		return is > want
	case ">=":
		return is >= want
	case "!=":
		return is != want
	}
	return is == want
}

// parseText makes a condition of containerd's language.
func parseText(text string) (term, error) {
	const example = `type==regular or labels.team~=^a`
	f, err := filters.Parse(text)
	if err != nil {
		at := placeOf(err, text)
		if rest := strings.TrimLeft(text[at:], " \t"); rest != "" && rest != text[at:] && operatorAt(text) < at {
			return nil, &SyntaxError{What: "filter", At: at, Reason: "a value with blanks needs quotes", Example: `description=="two words"`}
		}
		return nil, &SyntaxError{What: "filter", At: at, Reason: reasonOf(err), Example: example}
	}
	if at, err := checkRegexp(text); err != nil {
		return nil, &SyntaxError{What: "filter", At: at, Reason: err.Error(), Example: `description~="^make .*"`}
	}
	var unknown string
	f.Match(filters.AdapterFunc(func(path []string) (string, bool) {
		if _, _, known := field(&Record{}, path); !known {
			unknown = strings.Join(path, ".")
		}
		return "", false
	}))
	if unknown != "" {
		return nil, &SyntaxError{What: "filter", At: strings.Index(text, unknown[:1]), Reason: fmt.Sprintf("there is no field %q, but %s", unknown, Fields), Example: example}
	}
	return func(r *Record, _ time.Time) bool {
		return f.Match(filters.AdapterFunc(func(path []string) (string, bool) {
			value, set, _ := field(r, path)
			return value, set
		}))
	}, nil
}

// placeOf finds where containerd's parser stopped: it shows the place as
// "before >|c|< after".
func placeOf(err error, text string) int {
	if at := strings.Index(err.Error(), " >|"); at >= 0 {
		shown := err.Error()[:at]
		if begin := strings.Index(shown, "["); begin >= 0 {
			return min(len(shown)-begin-1, len(text))
		}
	}
	return len(text)
}

// reasonOf is what the parser says without its drawing of the place.
func reasonOf(err error) string {
	reason := err.Error()
	if at := strings.LastIndex(reason, "]: "); at >= 0 {
		reason = reason[at+3:]
	}
	// It shows characters as they are, also a line's end.
	reason = strconv.QuoteToGraphic(reason)
	return strings.ReplaceAll(reason[1:len(reason)-1], `\"`, `"`)
}

// checkRegexp compiles what stands behind ~= in a condition that the library
// took: it would take a bad one for one that matches nothing.
func checkRegexp(text string) (at int, err error) {
	if at = operatorAt(text); !strings.HasPrefix(text[at:], "~=") {
		return 0, nil
	}
	at += len("~=")
	value := strings.TrimSpace(text[at:])
	if n := len(value); n > 1 && strings.ContainsRune(`"/|`, rune(value[0])) && value[n-1] == value[0] {
		if unquoted, err := strconv.Unquote(value); err == nil {
			value = unquoted
		} else {
			value = value[1 : n-1]
		}
	}
	_, err = regexp.Compile(value)
	return at, err
}

// operatorAt is where the field of a condition ends: names in quotes may have
// any characters.
func operatorAt(text string) int {
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '"':
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
		case '=', '!', '~':
			return i
		}
	}
	return len(text)
}

// field is what a filter sees of a record as text.
func field(r *Record, path []string) (value string, set, known bool) {
	if len(path) == 2 && path[0] == "labels" {
		value, set = r.Labels[path[1]]
		return value, set, true
	}
	if len(path) != 1 {
		return "", false, false
	}
	switch path[0] {
	case "id":
		value = r.ID
	case "state":
		value = r.State
	case "op":
		value = r.Op
	case "type":
		value = r.Type
	case "key":
		value = r.Key
	case "cache":
		value = r.Cache
	case "description":
		value = r.Description
	case "retained":
		value = strconv.FormatBool(r.Retained)
	default:
		return "", false, false
	}
	return value, value != "", true
}

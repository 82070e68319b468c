package policy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
)

// FileVersion is the version of the policy files that this package reads.
const FileVersion = 1

// file is a list of policies as it stands in a file.
type file struct {
	Version  int      `json:"version"`
	Policies []Policy `json:"policies"`
}

// FileError says what is wrong with a policy file. It is InvalidArgument.
type FileError struct {
	// Line and Column are those of the place, from 1.
	Line, Column int
	// Path is the place in the document, such as policies[0].max_used_space;
	// empty for the document itself.
	Path string
	Err  error
}

// Error names the place.
func (e *FileError) Error() string {
	where := ""
	if e.Path != "" {
		where = ", " + e.Path
	}
	return fmt.Sprintf("policies, line %d, column %d%s: %v", e.Line, e.Column, where, e.Err)
}

// Unwrap gives the reason and the class.
func (e *FileError) Unwrap() []error { return []error{e.Err, errdefs.ErrInvalidArgument} }

const fileExample = `for example {"version":1,"policies":[{"max_used_space":"10GB"}]}`

// Read reads an ordered list of policies from JSON: an object with "version",
// which is 1, and "policies", whose objects have the fields of Policy.
// Durations are strings with units; amounts are numbers of bytes or strings. A
// field that does not exist, or that is there twice, is an error, not a limit
// that nobody keeps. Errors are *FileError.
func Read(r io.Reader) ([]Policy, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	doc := &document{data: data, dec: json.NewDecoder(bytes.NewReader(data)), at: map[string]int{}, keys: map[string]int{}}
	if err := doc.walk(""); err != nil {
		return nil, err
	}
	end := doc.begin()
	if _, err := doc.dec.Token(); !errors.Is(err, io.EOF) {
		return nil, doc.fail("", end, errors.New("there is something behind the object"))
	}
	var top map[string]json.RawMessage
	if json.Unmarshal(data, &top) != nil || top == nil {
		return nil, doc.failAt("", fmt.Errorf("it is no object, %s", fileExample))
	}
	for _, name := range slices.Sorted(maps.Keys(top)) {
		if name != "version" && name != "policies" {
			return nil, doc.fail(name, doc.keys[name], fmt.Errorf("there is no such field, but version and policies, %s", fileExample))
		}
	}
	if version := string(top["version"]); version != strconv.Itoa(FileVersion) {
		return nil, doc.failAt("version", fmt.Errorf("version is %s, not %d, %s", cmp.Or(clip(version), "missing"), FileVersion, fileExample))
	}
	var list []json.RawMessage
	if top["policies"] != nil && json.Unmarshal(top["policies"], &list) != nil || len(list) == 0 {
		return nil, doc.failAt("policies", fmt.Errorf("there are no policies in it, %s", fileExample))
	}
	policies := make([]Policy, len(list))
	for i, fields := range list {
		if err := doc.policy(fmt.Sprintf("policies[%d]", i), fields, &policies[i]); err != nil {
			return nil, err
		}
	}
	return policies, nil
}

// document is a JSON text, with the place of each value in it.
type document struct {
	data []byte
	dec  *json.Decoder
	at   map[string]int
	// keys are the places of the names of an object's fields.
	keys map[string]int
}

// begin is where the next value or token begins.
func (d *document) begin() int {
	at := int(d.dec.InputOffset())
	for at < len(d.data) && bytes.IndexByte([]byte(" \t\r\n:,"), d.data[at]) >= 0 {
		at++
	}
	return at
}

// walk notes where each value of the document begins. Documents are as deep as
// encoding/json allows.
func (d *document) walk(path string) error {
	begin := d.begin()
	d.at[path] = begin
	tok, err := d.dec.Token()
	if err != nil {
		return d.syntax(path, begin, err)
	}
	open, ok := tok.(json.Delim)
	if !ok {
		return nil
	}
	for i := 0; d.dec.More(); i++ {
		below := fmt.Sprintf("%s[%d]", path, i)
		if open == '{' {
			begin := d.begin()
			key, err := d.dec.Token()
			if err != nil {
				return d.syntax(path, begin, err)
			}
			if below = fmt.Sprint(key); path != "" {
				below = path + "." + below
			}
			d.keys[below] = begin
			if _, twice := d.at[below]; twice {
				return d.fail(below, begin, errors.New("it is there twice"))
			}
		}
		if err := d.walk(below); err != nil {
			return err
		}
	}
	begin = d.begin()
	if _, err = d.dec.Token(); err != nil {
		return d.syntax(path, begin, err)
	}
	return nil
}

// syntax is an error of a text that is no JSON.
func (d *document) syntax(path string, at int, err error) error {
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		at = max(int(syntax.Offset)-1, at)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		at, err = len(d.data), errors.New("the text ends too early")
	}
	return d.fail(path, at, fmt.Errorf("%w, %s", err, fileExample))
}

func (d *document) failAt(path string, err error) error { return d.fail(path, d.at[path], err) }

func (d *document) fail(path string, at int, err error) error {
	before := d.data[:min(at, len(d.data))]
	line := bytes.LastIndexByte(before, '\n') + 1
	return &FileError{Line: 1 + bytes.Count(before, []byte("\n")), Column: 1 + len(before) - line, Path: clip(path), Err: err}
}

// policy decodes one rule, a field at a time, so that an error is about one.
func (d *document) policy(path string, data json.RawMessage, p *Policy) error {
	var fields map[string]json.RawMessage
	if json.Unmarshal(data, &fields) != nil || fields == nil {
		return d.failAt(path, errors.New(`it is no object, for example {"max_used_space":"10GB"}`))
	}
	at := func(name string) int { return d.at[path+"."+name] }
	for _, name := range slices.SortedFunc(maps.Keys(fields), func(a, b string) int { return cmp.Compare(at(a), at(b)) }) {
		one, err := json.Marshal(map[string]json.RawMessage{name: fields[name]})
		if err != nil {
			return d.failAt(path+"."+name, err)
		}
		dec := json.NewDecoder(bytes.NewReader(one))
		dec.DisallowUnknownFields()
		err = dec.Decode(p)
		var typ *json.UnmarshalTypeError
		switch {
		case errors.As(err, &typ):
			err = fmt.Errorf("a %s cannot be here, but a %s", typ.Value, typ.Type)
		case err != nil && !errors.Is(err, errdefs.ErrInvalidArgument):
			return d.fail(path+"."+name, d.keys[path+"."+name], fmt.Errorf("there is no such field, but %s", fieldNames()))
		}
		if err != nil {
			return d.failAt(path+"."+name, err)
		}
	}
	// Parts of a disk are judged when there is one.
	for i, text := range p.Filters {
		if _, err := ParseFilters(text); err != nil {
			return d.failAt(fmt.Sprintf("%s.filters[%d]", path, i), err)
		}
	}
	return nil
}

// fieldNames lists the fields of a rule for people.
func fieldNames() string {
	return "name, filters, types, all, by_label, label_values, unlabelled, keep_duration, " +
		"reserved_space, max_used_space, min_free_space and target_space"
}

// Write writes policies as Read reads them.
func Write(w io.Writer, policies []Policy) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(file{Version: FileVersion, Policies: policies}); err != nil {
		return fmt.Errorf("write policies: %w", err)
	}
	return nil
}

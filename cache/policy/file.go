package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// FileVersion is the version of the policy files that this package reads.
const FileVersion = 1

// file is a list of policies as it stands in a file.
type file struct {
	Version  int      `json:"version"`
	Policies []Policy `json:"policies"`
}

// Read reads an ordered list of policies from JSON: an object with "version",
// which is 1, and "policies", whose objects have the fields of Policy.
// Durations are strings with units; amounts are numbers of bytes or strings. A
// field that does not exist is an error, not a limit that nobody keeps. Errors
// are InvalidArgument and name the line.
func Read(r io.Reader) ([]Policy, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var f file
	err = dec.Decode(&f)
	if err == nil && dec.More() {
		err = errors.New("there is something behind the object")
	}
	if err == nil && f.Version != FileVersion {
		err = fmt.Errorf("version is %d, not %d", f.Version, FileVersion)
	}
	if err == nil && len(f.Policies) == 0 {
		err = errors.New(`there are no policies in it, for example {"version":1,"policies":[{"max_used_space":"10GB"}]}`)
	}
	if err != nil {
		return nil, fmt.Errorf("policies, line %d: %w: %w", lineOf(data, err, dec.InputOffset()), err, errdefs.ErrInvalidArgument)
	}
	for i := range f.Policies {
		// Parts of a disk are judged when there is one.
		if _, err := ParseFilters(f.Policies[i].Filters...); err != nil {
			return nil, fmt.Errorf("policy %d: %w", i+1, err)
		}
	}
	return f.Policies, nil
}

// lineOf is the line that a JSON error is about.
func lineOf(data []byte, err error, offset int64) int {
	var syntax *json.SyntaxError
	var typ *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		offset = syntax.Offset
	case errors.As(err, &typ):
		offset = typ.Offset
	}
	return 1 + bytes.Count(data[:min(int(offset), len(data))], []byte("\n"))
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

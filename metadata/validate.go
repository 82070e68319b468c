package metadata

import (
	"fmt"

	"github.com/containerd/errdefs"
)

const (
	// MaxIndexLen is the longest index key, in bytes. With an id behind it
	// a row's key stays below the 32 KiB that bbolt takes.
	MaxIndexLen = 16 << 10
	// MaxKeyLen is the longest driver key, in bytes.
	MaxKeyLen = 16 << 10
	// MaxNameLen is the longest type, digest and attachment name, in bytes.
	MaxNameLen = 1024
)

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func validateID(what string, id ID) error {
	switch {
	case id == "":
		return invalid("%s is empty", what)
	case len(id) > MaxIDLen:
		return invalid("%s %.32q... has %d bytes, at most %d are allowed", what, string(id), len(id), MaxIDLen)
	}
	return nil
}

func validateLen(id ID, what, s string, limit int) error {
	if len(s) > limit {
		return invalid("record %q: %s has %d bytes, at most %d are allowed", id, what, len(s), limit)
	}
	return nil
}

// validate checks what can be said of a record without looking at others.
func validate(r *Record) error {
	if r == nil {
		return invalid("record is nil")
	}
	if err := validateID("record id", r.ID); err != nil {
		return err
	}
	if r.State < Mutable || r.State > Lazy {
		return invalid("record %q: state %d", r.ID, r.State)
	}
	if r.Op < Base || r.Op > Diff {
		return invalid("record %q: op %d", r.ID, r.Op)
	}
	if r.OnPowerCut > Keep {
		return invalid("record %q: power cut policy %d", r.ID, r.OnPowerCut)
	}
	if r.Size < SizeUnknown {
		return invalid("record %q: size %d", r.ID, r.Size)
	}
	if r.State == Lazy && (r.Key != "" || r.Was != "") {
		return invalid("record %q: lazy, but with snapshot %q", r.ID, r.Key+r.Was)
	}
	if err := validateRelations(r); err != nil {
		return err
	}
	return validateContent(r)
}

func validateRelations(r *Record) error {
	for _, p := range r.Parents {
		if err := validateID("parent id", p); err != nil {
			return fmt.Errorf("record %q: %w", r.ID, err)
		}
		if p == r.ID {
			return invalid("record %q is its own parent", r.ID)
		}
	}
	seen := map[ID]bool{r.ID: true}
	for _, a := range r.Aliases {
		if err := validateID("alias", a); err != nil {
			return fmt.Errorf("record %q: %w", r.ID, err)
		}
		if seen[a] {
			return invalid("record %q: alias %q twice", r.ID, a)
		}
		seen[a] = true
	}
	return nil
}

func validateContent(r *Record) error {
	lens := []struct {
		what, s string
		limit   int
	}{
		{"driver key", r.Key, MaxKeyLen},
		{"former driver key", r.Was, MaxKeyLen},
		{"type", r.Type, MaxNameLen},
		{"chain id", string(r.ChainID), MaxNameLen},
		{"diff id", string(r.DiffID), MaxNameLen},
	}
	for _, l := range lens {
		if err := validateLen(r.ID, l.what, l.s, l.limit); err != nil {
			return err
		}
	}
	for _, b := range r.Blobs {
		if b.Digest == "" {
			return invalid("record %q: blob without digest", r.ID)
		}
		if err := validateLen(r.ID, "blob digest", string(b.Digest), MaxNameLen); err != nil {
			return err
		}
	}
	names := map[string]bool{}
	for _, v := range r.Values {
		if names[v.Name] {
			return invalid("record %q: value %q twice", r.ID, v.Name)
		}
		names[v.Name] = true
		if err := validateLen(r.ID, "index key", v.Index, MaxIndexLen); err != nil {
			return err
		}
	}
	return nil
}

// Validate says whether a record can be stored as it is, whatever else is in
// the store. Errors: invalid argument.
func Validate(r *Record) error { return validate(r) }

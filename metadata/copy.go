package metadata

import (
	"fmt"
	"maps"
	"slices"
)

// Clone is a deep copy: nothing that is done to it shows in r.
func (r *Record) Clone() *Record {
	c := *r
	c.Parents = slices.Clone(r.Parents)
	c.Aliases = slices.Clone(r.Aliases)
	c.Labels = maps.Clone(r.Labels)
	c.ImageRefs = slices.Clone(r.ImageRefs)
	c.Blobs = slices.Clone(r.Blobs)
	for i := range c.Blobs {
		c.Blobs[i].Annotations = maps.Clone(c.Blobs[i].Annotations)
		c.Blobs[i].URLs = slices.Clone(c.Blobs[i].URLs)
		c.Blobs[i].unknown = slices.Clone(c.Blobs[i].unknown)
	}
	c.Values = slices.Clone(r.Values)
	for i := range c.Values {
		c.Values[i].Data = slices.Clone(c.Values[i].Data)
		c.Values[i].unknown = slices.Clone(c.Values[i].unknown)
	}
	c.unknown = slices.Clone(r.unknown)
	return &c
}

// String is the word for the state that people and JSON see.
func (s State) String() string {
	names := [...]string{Mutable: "mutable", Committed: "committed", Finalized: "finalized", Lazy: "lazy"}
	if int(s) < len(names) && names[s] != "" {
		return names[s]
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// String is the word for the op that people and JSON see.
func (o Op) String() string {
	names := [...]string{Base: "base", Layer: "layer", Merge: "merge", Diff: "diff"}
	if int(o) < len(names) && names[o] != "" {
		return names[o]
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}

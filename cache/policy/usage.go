package policy

import "time"

// Record is what a plan needs to know of one record.
type Record struct {
	ID string
	// Revision names the state of the record that was looked at. Who executes
	// a plan removes nothing that has another one by then.
	Revision uint64

	State       string
	Op          string
	Type        string
	Key         string
	Description string
	Labels      map[string]string
	Retained    bool
	// Cache is the id of the cache directory that the record is, empty for
	// other records.
	Cache string
	// Image says that an image names the record.
	Image bool

	// Parents are ids; those that are not in the usage are passed over.
	Parents []string
	// Size is how many bytes are free once the record is gone; negative is
	// unknown, and counts as nothing.
	Size int64

	Created time.Time
	// LastUsed is zero if nobody used the record yet.
	LastUsed time.Time
	Uses     uint64
	// Cost is what it took to make the content.
	Cost time.Duration

	// Held says why nobody may remove the record now; empty if it may go.
	Held string
}

// used is when somebody last had to do with the record.
func (r *Record) used() time.Time {
	if r.LastUsed.After(r.Created) {
		return r.LastUsed
	}
	return r.Created
}

// bytes is the size as far as it is known.
func (r *Record) bytes() int64 { return max(r.Size, 0) }

// Usage is all records of a store at one moment, in any order.
type Usage struct {
	Records []Record
}

// Disk describes the file system that the store is on, in bytes.
type Disk struct {
	Total int64 `json:"total"`
	// Free is what is left for users without privileges.
	Free int64 `json:"free"`
}

// Before is the order in which records go, of those that may: what was used
// longest ago first, then what was used less often, then the larger, then what
// is cheaper to make again, then the smaller id. No two records of a store are
// equal in it.
func Before(a, b *Record) bool {
	if at, bt := a.used(), b.used(); !at.Equal(bt) {
		return at.Before(bt)
	}
	switch {
	case a.Uses != b.Uses:
		return a.Uses < b.Uses
	case a.bytes() != b.bytes():
		return a.bytes() > b.bytes()
	case a.Cost != b.Cost:
		return a.Cost < b.Cost
	}
	return a.ID < b.ID
}

package cache

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// ErrLocked is the class of errors that say that a record is held by somebody
// else, here or in another process. errors.As to *LockedError tells by whom.
var ErrLocked = errors.New("locked")

// ErrLegacy is returned by Open for a directory that holds the state of a
// BuildKit worker and no store: it must be migrated first.
var ErrLegacy = fmt.Errorf("legacy state: %w", errdefs.ErrFailedPrecondition)

// LockedError says who holds a record. It is ErrLocked and errdefs'
// Unavailable: trying again later can succeed.
type LockedError struct {
	ID      metadata.ID
	Holders []Holder
}

// Error names the record and each holder.
func (e *LockedError) Error() string {
	who := make([]string, len(e.Holders))
	for i, h := range e.Holders {
		who[i] = h.String()
	}
	if len(who) == 0 {
		who = []string{"somebody who just left"}
	}
	return fmt.Sprintf("record %s is held by %s", short(e.ID), strings.Join(who, ", "))
}

// Unwrap gives the classes of the error.
func (e *LockedError) Unwrap() []error { return []error{ErrLocked, errdefs.ErrUnavailable} }

// HolderKind says in which way somebody holds a record.
type HolderKind string

const (
	// HolderMutable is a MutableRef of this manager.
	HolderMutable HolderKind = "mutable handle"
	// HolderImmutable is an ImmutableRef of this manager.
	HolderImmutable HolderKind = "immutable handle"
	// HolderMount is a mount that this manager made and that is still there.
	HolderMount HolderKind = "mount"
	// HolderOperation is an operation of this manager that is under way.
	HolderOperation HolderKind = "operation"
	// HolderProcess is a process that works in the snapshot while it does
	// not have the store open.
	HolderProcess HolderKind = "process"
	// HolderWriter is a mount, in some mount namespace, that still has the
	// snapshot as its writable layer, although nobody holds the record.
	HolderWriter HolderKind = "leftover writer"
)

// Holder is one reason why a record cannot be removed, reopened or written.
type Holder struct {
	Kind HolderKind
	// PID and Command name the process; PID is 0 for this one.
	PID     int
	Command string
	// Site is the place in the source that acquired a handle.
	Site  string
	Since time.Time
}

// String is one phrase for people.
func (h Holder) String() string {
	var b strings.Builder
	b.WriteString(string(h.Kind))
	if h.PID != 0 {
		fmt.Fprintf(&b, " %d", h.PID)
	}
	if h.Command != "" {
		fmt.Fprintf(&b, " (%s)", h.Command)
	}
	if h.Site != "" {
		fmt.Fprintf(&b, " from %s", h.Site)
	}
	if !h.Since.IsZero() {
		fmt.Fprintf(&b, " since %s", h.Since.Format(time.RFC3339))
	}
	return b.String()
}

// short keeps messages readable when somebody passes kilobytes as an id.
func short(id metadata.ID) string {
	const most = 80
	if len(id) > most {
		return fmt.Sprintf("%q... (%d bytes)", string(id[:most]), len(id))
	}
	for i := range len(id) {
		if c := id[i]; c < 0x21 || c > 0x7e {
			return fmt.Sprintf("%q", string(id))
		}
	}
	return string(id)
}

// is reports whether err is of one of the classes.
func is(err error, classes ...error) bool {
	for _, c := range classes {
		if errors.Is(err, c) {
			return true
		}
	}
	return false
}

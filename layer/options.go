package layer

import (
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Form says what a directory holds: a tree as it is seen, or a layer as
// overlayfs keeps it.
type Form int

const (
	// Plain is a whole tree. Applying a whiteout to it removes what it names.
	Plain Form = iota
	// OverlayTrusted is an upper directory of overlayfs with its marks in
	// trusted.* attributes. A whiteout becomes a character device 0:0.
	OverlayTrusted
	// OverlayUser is the same with the marks in user.* attributes, which an
	// ordinary user may write.
	OverlayUser
)

// marks is how the names of overlayfs's attributes begin.
func (f Form) marks() string {
	if f == OverlayUser {
		return "user.overlay."
	}
	return "trusted.overlay."
}

func (f Form) check() error {
	if f < Plain || f > OverlayUser {
		return fmt.Errorf("form %d of a layer directory: %w", int(f), errdefs.ErrInvalidArgument)
	}
	return nil
}

// Owners says who owns what Apply makes.
type Owners int

const (
	// OwnersKept gives every file the owner that the layer names. Where that
	// is not allowed Apply fails.
	OwnersKept Owners = iota
	// OwnersCaller leaves everything to the user who calls, as tar does for
	// an ordinary user.
	OwnersCaller
)

// Devices says what becomes of device nodes in a layer.
type Devices int

const (
	// DevicesRefused makes a layer with a device node an error
	// (PermissionDenied).
	DevicesRefused Devices = iota
	// DevicesSkipped leaves them out and counts them, as engines do in a user
	// namespace.
	DevicesSkipped
	// DevicesMade makes them, which takes the privilege to. The device 0:0 is
	// refused even so: it is how overlayfs writes a whiteout.
	DevicesMade
)

// ApplyOptions are the options of Apply. The zero value applies to a whole
// tree as root and refuses device nodes.
type ApplyOptions struct {
	// Form is what the directory is. An overlay's upper directory holds
	// nothing yet but what this layer is to hold.
	Form Form
	// Parents are the directories of the layers below an upper directory,
	// topmost first, in the same form. They are only read: for the attributes
	// of directories that the layer has entries in but no entry for, and for
	// hard links to files that lie below. A Plain directory needs none.
	Parents []string
	Owners  Owners
	Devices Devices
	Limits  Limits
}

// Limits bound what one layer may make of a disk. They are absolute: a ratio
// of compression says nothing about what is too much. Zero stands for the
// default.
type Limits struct {
	// Entries is how many files, of all types, and whiteouts; directories that
	// are only named on the way to an entry count. Default: 1<<24.
	Entries int64
	// Bytes is the length of the tar stream, and of the content of all files.
	// Default: 1<<40.
	Bytes int64
	// EntryBytes is the content of one file. Default: Bytes.
	EntryBytes int64
	// NameBytes is the length of a path in the layer. Default: 4095, the
	// longest that a system call takes.
	NameBytes int
}

func (l Limits) withDefaults() (Limits, error) {
	if l.Entries < 0 || l.Bytes < 0 || l.EntryBytes < 0 || l.NameBytes < 0 {
		return l, fmt.Errorf("negative limit for a layer: %w", errdefs.ErrInvalidArgument)
	}
	if l.Entries == 0 {
		l.Entries = 1 << 24
	}
	if l.Bytes == 0 {
		l.Bytes = 1 << 40
	}
	if l.EntryBytes == 0 {
		l.EntryBytes = l.Bytes
	}
	if l.NameBytes == 0 {
		l.NameBytes = 4095
	}
	return l, nil
}

// Copy copies an uncompressed layer from r to its end, and says how long it is.
// One that is longer than Bytes ends in ResourceExhausted, and no more than that
// is written of it: what a small blob unpacks to is bounded for those, too, who
// do not apply it.
func (l Limits) Copy(w io.Writer, r io.Reader) (int64, error) {
	l, err := l.withDefaults()
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(w, io.LimitReader(r, l.Bytes))
	if err != nil || n < l.Bytes {
		return n, err
	}
	more, err := io.CopyN(io.Discard, r, 1)
	if more > 0 {
		return n, tooLong(l.Bytes)
	}
	if err == io.EOF { //nolint:errorlint // the end is io.EOF itself, as of every reader
		err = nil
	}
	return n, err
}

// CheckLength is the error that Copy has for what is n bytes long, known
// beforehand.
func (l Limits) CheckLength(n int64) error {
	l, err := l.withDefaults()
	if err == nil && n > l.Bytes {
		err = tooLong(l.Bytes)
	}
	return err
}

// CheckEntries is ResourceExhausted for more than Entries.
func (l Limits) CheckEntries(n int64) error {
	l, err := l.withDefaults()
	if err == nil && n > l.Entries {
		err = exhausted("more than %d entries", l.Entries)
	}
	return err
}

func tooLong(most int64) error { return exhausted("it is longer than %d bytes", most) }

// Applied says what was applied.
type Applied struct {
	// DiffID is the SHA-256 of the whole tar stream, to its last byte.
	DiffID digest.Digest
	// Size is the length of the tar stream in bytes.
	Size int64
	// Entries counts files and whiteouts, and directories made on the way.
	Entries int64
	// Bytes is the content of all files.
	Bytes int64
	// Skipped is what could not be kept.
	Skipped Skipped
}

// Skipped counts what Apply left out and went on.
type Skipped struct {
	// Devices are device nodes, see DevicesSkipped.
	Devices int64
	// Xattrs are extended attributes that no layer may set (see the package's
	// doc), that this file system does not have, or that an ordinary user may
	// not set.
	Xattrs int64
}

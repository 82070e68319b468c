package cache

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/lamina-build/lamina/metadata"
)

// ErrOriginChanged is the class of errors of a store that was made of another
// system's state, whose databases have been written to since: that system has
// worked in the directories that both know of. Such a store is read-only.
var ErrOriginChanged = fmt.Errorf("another daemon has worked here since the migration: %w", errdefs.ErrFailedPrecondition)

// Origin says what a store was made of. It is what a store's
// Meta.MigratedFrom holds, in JSON.
type Origin struct {
	// System is "buildkit", Version that of its layout, Worker the name of the
	// directory then.
	System  string `json:"system"`
	Version int    `json:"version"`
	Worker  string `json:"worker"`
	// Migrated is when.
	Migrated time.Time `json:"migrated"`
	// Files are the databases of the other system, as they were.
	Files []OriginFile `json:"files"`
	// Adopted is a digest of what was taken over, by which one who wants it back
	// knows whether all of it is still there.
	Adopted string `json:"adopted"`
}

// OriginFile is the state of a bbolt database of another system.
type OriginFile struct {
	// Name is the path below the root.
	Name        string    `json:"name"`
	Size        int64     `json:"size"`
	ModTime     time.Time `json:"mod_time"`
	Transaction uint64    `json:"transaction"`
}

// Encode is the form in the store.
func (o Origin) Encode() (string, error) {
	b, err := json.Marshal(o)
	return string(b), err
}

// ParseOrigin reads what a store was made of; an empty text is nil.
func ParseOrigin(text string) (*Origin, error) {
	if text == "" {
		return nil, nil
	}
	var o Origin
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return nil, fmt.Errorf("what the store was made of: %w: %w", err, errdefs.ErrDataLoss)
	}
	return &o, nil
}

// Changed says in what a database below root differs from what it was, empty
// if none does. The number of the last transaction and the length decide: a
// restored copy has another time, but nobody has worked with it. Files that
// are gone are no change: that system cannot go on without them.
func (o *Origin) Changed(root string) (string, error) {
	for _, f := range o.Files {
		now, err := f.read(root)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return "", err
		case now.Transaction != f.Transaction:
			return fmt.Sprintf("%s is at transaction %d and was at %d", f.Name, now.Transaction, f.Transaction), nil
		case now.Size != f.Size:
			return fmt.Sprintf("%s has %d bytes and had %d", f.Name, now.Size, f.Size), nil
		}
	}
	return "", nil
}

func (f OriginFile) read(root string) (OriginFile, error) {
	file, err := os.Open(filepath.Join(root, f.Name))
	if err != nil {
		return OriginFile{}, err
	}
	defer file.Close()
	now, err := metadata.OpenForeign(file)
	if errors.Is(err, metadata.ErrDamaged) || errors.Is(err, metadata.ErrForeign) {
		return OriginFile{}, nil // no longer what it was
	}
	if err != nil {
		return OriginFile{}, err
	}
	return OriginFile{Size: now.Size(), Transaction: now.Transaction()}, nil
}

// checkOrigin refuses all changes to a store whose origin goes on living.
func (m *Manager) checkOrigin(meta metadata.Meta) error {
	o, err := ParseOrigin(meta.MigratedFrom)
	if err != nil || o == nil {
		return err
	}
	changed, err := o.Changed(m.root)
	if err != nil {
		return fmt.Errorf("look at the databases that store %s was made of: %w", m.root, classify(err))
	}
	if changed == "" {
		return nil
	}
	m.readOnly = true
	m.refused = fmt.Errorf("store %s is open read-only: %w: %s. Its snapshots may be another daemon's by now. To go on with that daemon, move %s away; "+
		"to go on here, stop it and move its databases (%s) away", m.root, ErrOriginChanged, changed, StoreFile, o.names())
	return nil
}

func (o *Origin) names() string {
	var b []byte
	for i, f := range o.Files {
		if i > 0 {
			b = append(b, ", "...)
		}
		b = append(b, f.Name...)
	}
	return string(b)
}

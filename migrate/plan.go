package migrate

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate/buildkit"
)

// What happens with a row, or with a snapshot that no row names.
const (
	// Keep takes a row over as it is.
	Keep Action = "keep"
	// Fold makes one record of an immutable row and the mutable one that owns
	// its snapshot; that one's id goes.
	Fold Action = "fold"
	// Alias makes the row's id a second name of another record, which has the
	// same snapshot.
	Alias Action = "alias"
	// Drop leaves a row behind: it is a miss from now on.
	Drop Action = "drop"
	// Free deletes what a snapshot that nobody needs occupies, with the first
	// opening of the new store.
	Free Action = "free"
	// Leave keeps bytes that no record of the new store needs, for the old
	// daemon, which might still show them.
	Leave Action = "leave"
)

// Action is what happens with a row or a snapshot.
type Action string

// Step is one line of a plan.
type Step struct {
	Action Action
	// ID is the row's, or of a snapshot without one its name.
	ID string
	// Into is the id of the record that it becomes a part of.
	Into string
	// State and Op are those of the new record.
	State, Op string
	Reason    string
	// Bytes is the size of what is kept, left or freed, -1 if unknown.
	Bytes int64

	// dir is the data directory of what is freed or left.
	dir string
}

// Plan says what becomes of a worker's state. It is a function of that state
// alone.
type Plan struct {
	// Worker names the worker, Root is its directory and that of the new store.
	Worker, Root string
	// Driver is that of the new store, "overlay" or "native", and Attributes its
	// class of extended attributes, empty for native.
	Driver, Attributes string
	// Version is that of the legacy layout.
	Version int
	// Ownerless says that the daemon was older than v0.11, whose content
	// digests do not count owners.
	Ownerless bool
	// Steps are what happens, in the order of ids, leftovers last.
	Steps []Step
	// Records, Folded and Aliases are counts: of records in the new store, of
	// those that were pairs, and of second names.
	Records, Folded, Aliases int
	// Bytes are the known sizes of the records, Freed what is given back, Left
	// what stays for the old daemon's sake.
	Bytes, Freed, Left int64
	// Warnings are what could not be read.
	Warnings []string
	// Files are the legacy databases that the plan was made from.
	Files []buildkit.FileMark

	// items are the records to write, parents first.
	items []*item
	// discard are the names of data directories that go with the first opening.
	discard []string
}

// Dropped are the rows that are left behind.
func (p *Plan) Dropped() []Step {
	var dropped []Step
	for _, s := range p.Steps {
		if s.Action == Drop {
			dropped = append(dropped, s)
		}
	}
	return dropped
}

// item is a record with what belongs to it.
type item struct {
	rec *metadata.Record
	// snap is the adopted snapshot, nil for a lazy record; base is the record
	// whose snapshot lies below.
	snap *buildkit.Snapshot
	base *item
	// sources are the rows whose external values come along, hashes those
	// whose content hashes do. The first that has one wins: in a pair that is
	// the mutable row for hashes, as that is where the daemon keeps them, and
	// the immutable one for all others.
	sources, hashes []string
	// folded is the mutable's id.
	folded string
	reason string
}

// NewPlan decides what becomes of a worker's state. It touches no file but
// through o.
func NewPlan(s *buildkit.State, o PlanOptions) (*Plan, error) {
	b := &planner{
		s: s, all: make([]*fate, len(s.List)),
		ofSnapshot: make(map[*buildkit.Snapshot]*item, len(s.Snapshots)),
	}
	b.judgeRows()
	b.foldTwins()
	b.connect()
	b.dropUnneeded()
	p := &Plan{
		Worker: s.Worker, Root: s.Dir, Version: s.Version, Driver: driverOf(s.Snapshotter),
		Warnings: slices.Clone(s.Warnings), Files: slices.Clone(s.Files),
	}
	if p.Driver == "" {
		return nil, fmt.Errorf("snapshotter %q: %w", s.Snapshotter, buildkit.ErrUnsupported)
	}
	p.Ownerless, p.Attributes = o.Ownerless, o.Attributes
	b.finish(p)
	for i := range p.Steps {
		st := &p.Steps[i]
		if st.dir == "" || o.Size == nil {
			continue
		}
		n, err := o.Size(st.dir)
		if err != nil {
			return nil, err
		}
		st.Bytes = n
	}
	p.total()
	return p, nil
}

// PlanOptions are what a plan needs to know beside the databases.
type PlanOptions struct {
	// Ownerless says that the daemon was older than v0.11.
	Ownerless bool
	// Attributes is the class of extended attributes that layers were made
	// with.
	Attributes string
	// Size measures a data directory by its name, in bytes; nil leaves what is
	// freed and left unknown.
	Size func(dir string) (int64, error)
}

// driverOf is the driver that can adopt a snapshotter's directories.
func driverOf(snapshotter string) string {
	switch snapshotter {
	case buildkit.Overlayfs:
		return "overlay"
	case buildkit.Native:
		return "native"
	}
	return ""
}

// total adds up the steps.
func (p *Plan) total() {
	for _, st := range p.Steps {
		bytes := max(st.Bytes, 0)
		switch st.Action {
		case Keep:
			p.Records++
			p.Bytes += bytes
		case Fold:
			p.Records++
			p.Folded++
			p.Bytes += bytes
		case Alias:
			p.Aliases++
		case Free:
			p.Freed += bytes
		case Leave:
			p.Left += bytes
		}
	}
}

// Rollback says, for people, until when the old daemon can have its state back.
func (p *Plan) Rollback() string {
	return strings.Join([]string{
		"possible with lamina migrate --rollback until a snapshot of the old daemon is finalized, reopened, extracted,",
		"removed or cleaned by lamina, or the old daemon has worked in the directory",
	}, " ")
}

// digest is over what is adopted: which records, and the data of which
// snapshots.
func (p *Plan) digest() string {
	h := sha256.New()
	var line []byte
	for _, it := range p.items {
		dir := ""
		if it.snap != nil {
			dir = it.snap.Dir
		}
		line = strconv.AppendQuote(line[:0], string(it.rec.ID))
		line = append(append(append(line, ' '), it.rec.State.String()...), ' ')
		line = append(strconv.AppendQuote(line, it.rec.Key), ' ')
		h.Write(append(strconv.AppendQuote(line, dir), '\n'))
	}
	return hex.EncodeToString(h.Sum(nil))
}

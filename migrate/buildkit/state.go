package buildkit

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/metadata"
)

// Names of the databases, below the worker's directory.
const (
	recordsV2 = "metadata_v2.db"
	recordsV1 = "metadata.db"
	names     = "containerdmeta.db"
	driverDB  = "snapshots/metadata.db"
)

// Snapshotters whose directories can be taken over.
const (
	Overlayfs = "overlayfs"
	Native    = "native"
)

// State is what a worker's directory holds. It keeps the databases open and
// locked until Close; what it told before stays true as long.
type State struct {
	// Dir is the worker's directory, Worker its name.
	Dir, Worker string
	// Snapshotter is Overlayfs or Native.
	Snapshotter string
	// Version is 2, or 1 for the layout up to v0.6.
	Version int
	// Files are the databases as they are.
	Files []FileMark

	// Rows are the records by id, and List are they in its order.
	Rows map[string]*Row
	List []*Row
	// Leases are those of the worker's namespace by id.
	Leases map[string]*Lease
	// Snapshots are those that have a name, by it.
	Snapshots map[string]*Snapshot
	// Named are the same in the order of the names, and Unnamed are snapshots
	// that only the snapshotter knows, in the order of its keys.
	Named, Unnamed []*Snapshot
	// Blobs are those that a row or the worker's namespace speaks of.
	Blobs map[digest.Digest]*Blob
	// StrayDirs are data directories that no snapshot owns.
	StrayDirs []string
	// Warnings are what could not be read, for people.
	Warnings []string
	// warning guards Warnings while the databases are read.
	warning sync.Mutex

	// ctx ends the reading, and nothing else.
	ctx context.Context
	// external is the database that has external values, nil if none has.
	external *database
	open     []*database
}

// Lease keeps what it holds from being collected.
type Lease struct {
	ID        string
	Temporary bool
	// Snapshots are the names of those that it holds.
	Snapshots []string
}

// Snapshot is one of the snapshotter's.
type Snapshot struct {
	// Name is the one that records use, empty for an unnamed one.
	Name string
	// Key is the snapshotter's own name for it, Parent that of its parent, which
	// is Below, nil if there is none, or none of that key.
	Key, Parent string
	Below       *Snapshot
	// Dir is the name of its data directory.
	Dir  string
	Kind Kind
	// Size and Inodes are known of committed ones.
	Size, Inodes     int64
	Created, Updated time.Time
	Labels           map[string]string
	// Present says that the data directory is there.
	Present bool
}

// Remote says that the data is not in the directory but somewhere else.
func (snap *Snapshot) Remote() bool {
	_, ok := snap.Labels["containerd.io/snapshot/remote"]
	return ok
}

// Kind of a snapshot, as the snapshotter stores it.
type Kind uint8

// The kinds.
const (
	View Kind = iota + 1
	Active
	Committed
)

func (k Kind) String() string {
	switch k {
	case View:
		return "view"
	case Active:
		return "active"
	case Committed:
		return "committed"
	}
	return fmt.Sprintf("of kind %d", uint8(k))
}

// Blob is one of the content store's.
type Blob struct {
	Digest digest.Digest
	// Size is the length of the file in bytes; Present says that there is one.
	Size    int64
	Present bool
	Labels  map[string]string
}

// HasRecords says whether dir is a worker's directory.
func HasRecords(dir string) bool {
	for _, name := range []string{recordsV2, recordsV1} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return true
		}
	}
	return false
}

// Open reads the state of a worker, and locks it until Close.
//
// Errors: ErrNotBuildKit; ErrNewer; ErrUnsupported; ErrIncomplete;
// *LockedError; errdefs.ErrPermissionDenied; metadata.ErrDamaged if so much of
// a file cannot be read that the rest says nothing.
func Open(ctx context.Context, dir string) (_ *State, err error) {
	s := &State{
		ctx: ctx, Dir: dir, Worker: filepath.Base(dir),
		Rows: map[string]*Row{}, Leases: map[string]*Lease{}, Snapshots: map[string]*Snapshot{},
		Blobs: map[digest.Digest]*Blob{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	records, err := s.choose()
	if err != nil {
		return nil, err
	}
	for _, name := range []string{records, names, driverDB} {
		db, err := openDatabase(dir, name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, advise(fmt.Errorf("%s is missing, without which the records name nothing: %w", filepath.Join(dir, name), ErrIncomplete))
		}
		if err != nil {
			return nil, err
		}
		s.open = append(s.open, db)
		s.Files = append(s.Files, db.mark)
		if db.rows.Stale() {
			s.warn("%s: one of its meta pages cannot be read; its last transaction may be lost", name)
		}
	}
	if err := s.readDatabases(ctx); err != nil {
		return nil, err
	}
	if err := s.readData(ctx); err != nil {
		return nil, err
	}
	if s.Version == 1 {
		s.upgradeV1()
	}
	return s, s.readBlobs()
}

// readDatabases reads the three of them, two at a time: containerd's takes as
// long as the other two.
func (s *State) readDatabases(ctx context.Context) error {
	read := func(i int, read func(*database, metadata.ForeignBucket) error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		db := s.open[i]
		if err := db.rows.Read(func(root metadata.ForeignBucket) error { return read(db, root) }); err != nil {
			return advise(fmt.Errorf("%s: %w", filepath.Join(s.Dir, s.Files[i].Name), err))
		}
		return nil
	}
	var names, rest error
	var known []snapshotName
	var snapshots []*Snapshot
	var wg sync.WaitGroup
	wg.Go(func() {
		names = read(1, func(db *database, root metadata.ForeignBucket) (err error) {
			known, err = s.readNames(db, root)
			return err
		})
	})
	if rest = read(0, s.readRecords); rest == nil {
		rest = read(2, func(db *database, root metadata.ForeignBucket) (err error) {
			snapshots, err = s.readDriver(db, root)
			return err
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.nameSnapshots(known, snapshots)
	// What was found meanwhile is told in one order.
	slices.Sort(s.Warnings)
	return cmp.Or(rest, names)
}

// Forget gives back the memory of what was read, once a plan is made of it.
// External values can be read as before.
func (s *State) Forget() {
	s.Rows, s.List, s.Leases, s.Blobs = nil, nil, nil, nil
	s.Snapshots, s.Named, s.Unnamed, s.StrayDirs = nil, nil, nil, nil
}

// Close frees the databases.
func (s *State) Close() error {
	var errs []error
	for _, db := range s.open {
		errs = append(errs, db.close())
	}
	s.open = nil
	return errors.Join(errs...)
}

func (s *State) warn(format string, args ...any) {
	s.warning.Lock()
	defer s.warning.Unlock()
	s.Warnings = append(s.Warnings, fmt.Sprintf(format, args...))
}

// choose finds out which database has the records, and what snapshotter.
func (s *State) choose() (records string, err error) {
	files, err := os.ReadDir(s.Dir)
	if err != nil {
		return "", classify(err)
	}
	for _, f := range files {
		switch name := f.Name(); {
		case name == recordsV2:
			records, s.Version = recordsV2, 2
		case name == recordsV1 && records == "":
			records, s.Version = recordsV1, 1
		case newerRecords(name):
			return "", fmt.Errorf("%s: %w", filepath.Join(s.Dir, name), ErrNewer)
		}
	}
	if records == "" {
		return "", fmt.Errorf("%s has no %s: %w", s.Dir, recordsV2, ErrNotBuildKit)
	}
	if strings.HasPrefix(s.Worker, "containerd-") {
		return "", fmt.Errorf("worker %s keeps its snapshots and blobs in containerd's own directory: %w", s.Worker, ErrUnsupported)
	}
	return records, nil
}

// newerRecords recognises databases of records that are to come.
func newerRecords(name string) bool {
	v, ok := strings.CutPrefix(name, "metadata_v")
	v, isDB := strings.CutSuffix(v, ".db")
	return ok && isDB && v != "2" && v != "" && strings.Trim(v, "0123456789") == ""
}

// buckets reads the top level, on which everything hangs: no damage is
// tolerated here, and no bucket that is not known.
func buckets(root metadata.ForeignBucket, known ...string) (map[string]metadata.ForeignBucket, error) {
	found := map[string]metadata.ForeignBucket{}
	for row, err := range root.Rows() {
		if err != nil {
			return nil, err
		}
		if !slices.Contains(known, string(row.Key)) || row.Bucket == nil {
			return nil, fmt.Errorf("bucket %q: %w", printable(string(row.Key)), ErrNewer)
		}
		found[string(row.Key)] = *row.Bucket
	}
	return found, nil
}

// readRecords reads all rows. What cannot be read costs what is in it.
func (s *State) readRecords(db *database, root metadata.ForeignBucket) error {
	top, err := buckets(root, "_main", "_index", "_external")
	if err != nil {
		return err
	}
	if _, ok := top["_external"]; ok {
		s.external = db
	}
	main, ok := top["_main"]
	if !ok {
		return nil // a daemon that never made a record
	}
	var lost error
	for row, err := range main.Rows() {
		id := string(row.Key)
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		switch {
		case id == "" && err != nil:
			lost = err
			s.warn("%s: %v; the records in it are lost", db.mark.Name, err)
		case err != nil:
			s.addRow(&Row{ID: id, Damaged: err})
		case row.Bucket == nil:
			s.addRow(&Row{ID: id, Damaged: errors.New("it is no bucket")})
		default:
			s.addRow(readRow(id, *row.Bucket))
		}
	}
	if lost != nil && len(s.Rows) == 0 {
		return fmt.Errorf("no record can be read: %w", lost)
	}
	return nil
}

func (s *State) addRow(r *Row) {
	r.Number = len(s.List)
	s.List = append(s.List, r)
	s.Rows[r.ID] = r
}

func readRow(id string, b metadata.ForeignBucket) *Row {
	r := &Row{ID: id, Size: -1}
	var damaged error
	for row, err := range b.Rows() {
		if err != nil {
			damaged = err
		} else if row.Bucket == nil {
			r.parse(row.Key, row.Value)
		}
	}
	r.check()
	if damaged != nil {
		r.Damaged = damaged
	}
	return r
}

// External returns what is stored beside the row of an id, by name. It reads
// the file. Values that cannot be read are left out, and are an error.
func (s *State) External(id string) (values map[string][]byte, err error) {
	if s.external == nil {
		return nil, nil
	}
	err = s.external.rows.Read(func(root metadata.ForeignBucket) error {
		all, err := child(&root, "_external")
		if err != nil || all == nil {
			return err
		}
		own, err := child(all, id)
		if err != nil || own == nil {
			return err
		}
		values = map[string][]byte{}
		var damaged error
		for row, err := range own.Rows() {
			if err != nil {
				damaged = err
			} else if row.Bucket == nil {
				values[string(row.Key)] = bytes.Clone(row.Value)
			}
		}
		return damaged
	})
	return values, err
}

// BlobPath is the file of a blob.
func (s *State) BlobPath(d digest.Digest) string {
	return filepath.Join(s.Dir, "content", "blobs", d.Algorithm().String(), d.Encoded())
}

// readBlobs looks which blobs have their file.
func (s *State) readBlobs() error {
	for _, r := range s.List {
		if r.Blob != "" && r.Damaged == nil && s.Blobs[r.Blob] == nil {
			s.Blobs[r.Blob] = &Blob{Digest: r.Blob}
		}
	}
	for _, d := range slices.Sorted(maps.Keys(s.Blobs)) { // of several errors always the same
		b := s.Blobs[d]
		info, err := os.Lstat(s.BlobPath(d))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return classify(err)
		case info.Mode().IsRegular() && (b.Size == 0 || b.Size == info.Size()):
			b.Size, b.Present = info.Size(), true
		}
	}
	return nil
}

// DataDir is the directory of a snapshot's data.
func (s *State) DataDir(dir string) string {
	return filepath.Join(s.Dir, "snapshots", "snapshots", dir)
}

// readData looks which snapshots have their data.
func (s *State) readData(ctx context.Context) error {
	dirs, err := os.ReadDir(s.DataDir(""))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return classify(err)
	}
	there := make(map[string]bool, len(dirs))
	for _, d := range dirs {
		there[d.Name()] = d.IsDir()
	}
	owned := map[string]*Snapshot{}
	var all []*Snapshot
	for _, list := range [][]*Snapshot{s.Unnamed, s.Named} {
		for _, snap := range list {
			if other := owned[snap.Dir]; other != nil {
				s.warn("%s: snapshots %q and %q both have directory %s; they are lost", driverDB, printable(other.Key), printable(snap.Key), snap.Dir)
				other.Present = false
				continue
			}
			owned[snap.Dir] = snap
			snap.Present = there[snap.Dir]
			all = append(all, snap)
		}
	}
	if err := s.lookForData(ctx, all); err != nil {
		return err
	}
	for name, isDir := range there {
		if owned[name] == nil && isDir {
			s.StrayDirs = append(s.StrayDirs, name)
		}
	}
	slices.Sort(s.StrayDirs)
	return nil
}

// lookForData looks into the directories of the snapshots that have one, for
// what overlayfs needs.
func (s *State) lookForData(ctx context.Context, all []*Snapshot) error {
	if s.Snapshotter == Native || len(all) == 0 {
		return nil
	}
	dir, err := os.Open(s.DataDir(""))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return classify(err)
	}
	defer dir.Close()
	const workers = 4 // it is the disk that they wait for, if for anything
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < len(all) && ctx.Err() == nil && errs[w] == nil; i += workers {
				if snap := all[i]; snap.Present {
					snap.Present, errs[w] = s.hasData(snap, int(dir.Fd()))
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(context.Cause(ctx), errors.Join(errs...))
}

// hasData says whether the directory is as the snapshotter makes it. dirs is a
// descriptor of the one that all are in.
func (s *State) hasData(snap *Snapshot, dirs int) (bool, error) {
	elems := [...]string{snap.Dir + "/fs", snap.Dir + "/work"}
	n := 1
	if snap.Kind == Active {
		n = 2
	}
	for _, elem := range elems[:n] {
		var st unix.Stat_t
		err := unix.Fstatat(dirs, elem, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return false, nil
		}
		if err != nil {
			return false, classify(&os.PathError{Op: "stat", Path: s.DataDir(elem), Err: err})
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return false, nil
		}
	}
	return true, nil
}

package buildkit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/lamina-build/lamina/metadata"
)

// namespace is the one that the worker's records live in. That of the build
// history has blobs only, which are not ours.
const namespace = "buildkit"

// knownVersion is the newest version of containerd's schema that is known.
const knownVersion = 4

// snapshotName is a snapshot as records know it.
type snapshotName struct {
	name, key string
	labels    map[string]string
}

// readNames reads names of snapshots, leases, and blobs.
func (s *State) readNames(db *database, root metadata.ForeignBucket) (list []snapshotName, err error) {
	v1, err := onlyV1(root)
	if err != nil || v1 == nil {
		s.Snapshotter = s.snapshotterByName()
		return nil, err
	}
	version, ok, err := v1.Get("version")
	if err != nil {
		return nil, err
	}
	if n, _ := binary.Varint(version.Value); ok && n > knownVersion {
		return nil, fmt.Errorf("schema has version %d, and %d is known: %w", n, knownVersion, ErrNewer)
	}
	ns, err := child(v1, namespace)
	if err != nil {
		return nil, err
	}
	drivers, err := child(ns, "snapshots")
	if err != nil {
		return nil, err
	}
	if list, err = s.readSnapshotNames(db, drivers); err != nil {
		return nil, err
	}
	leases, err := child(ns, "leases")
	if err != nil {
		return nil, err
	}
	s.eachBucket(db, leases, "leases", s.readLease)
	content, err := child(ns, "content")
	if err != nil {
		return nil, err
	}
	blobs, err := child(content, "blob")
	if err != nil {
		return nil, err
	}
	s.eachBucket(db, blobs, "blobs", s.readBlob)
	return list, nil
}

// onlyV1 is the bucket that all others are in, nil if there is none yet.
func onlyV1(root metadata.ForeignBucket) (*metadata.ForeignBucket, error) {
	top, err := buckets(root, "v1")
	if err != nil {
		return nil, err
	}
	if v1, ok := top["v1"]; ok {
		return &v1, nil
	}
	return nil, nil
}

// child is a bucket in b, which may be nil, nil if it is not there.
func child(b *metadata.ForeignBucket, name string) (*metadata.ForeignBucket, error) {
	if b == nil {
		return nil, nil
	}
	row, _, err := b.Get(name)
	return row.Bucket, err
}

// eachBucket calls read for each bucket in b, which may be nil. Those that
// cannot be read are warned of.
func (s *State) eachBucket(db *database, b *metadata.ForeignBucket, what string, read func(name string, b metadata.ForeignBucket) error) {
	if b == nil {
		return
	}
	for row, err := range b.Rows() {
		if s.ctx.Err() != nil {
			return // readDatabases says so
		}
		name := string(row.Key)
		if err == nil && row.Bucket != nil {
			err = read(name, *row.Bucket)
		}
		switch {
		case err != nil && name == "":
			s.warn("%s: %s: %v; those in it are lost", db.mark.Name, what, err)
		case err != nil:
			s.warn("%s: %s: %q: %v; it is lost", db.mark.Name, what, printable(name), err)
		}
	}
}

// snapshotterByName is the snapshotter that the worker's name tells.
func (s *State) snapshotterByName() string {
	_, driver, _ := strings.Cut(s.Worker, "-")
	return driver
}

func (s *State) readSnapshotNames(db *database, drivers *metadata.ForeignBucket) (list []snapshotName, err error) {
	var found []string
	if drivers != nil {
		for row, err := range drivers.Rows() {
			if err != nil {
				return nil, err
			}
			found = append(found, string(row.Key))
		}
	}
	switch own := s.snapshotterByName(); {
	case slices.Contains(found, own) || len(found) == 0:
		s.Snapshotter = own
	case len(found) == 1:
		s.Snapshotter = found[0] // the directory has another name now
	default:
		return nil, fmt.Errorf("snapshots of %s, and the worker is called %s: %w", strings.Join(found, ", "), s.Worker, ErrUnsupported)
	}
	if s.Snapshotter != Overlayfs && s.Snapshotter != Native {
		return nil, fmt.Errorf("snapshots of the snapshotter %q are kept in a way of their own: %w", s.Snapshotter, ErrUnsupported)
	}
	own, err := child(drivers, s.Snapshotter)
	if err != nil {
		return nil, err
	}
	s.eachBucket(db, own, "names of snapshots", func(name string, b metadata.ForeignBucket) error {
		snap := snapshotName{name: name}
		for row, err := range b.Rows() {
			switch {
			case err != nil:
				return err
			case row.Bucket == nil && string(row.Key) == "name":
				snap.key = string(row.Value)
			case row.Bucket != nil && string(row.Key) == "labels":
				if snap.labels, err = valuesOf(row.Bucket); err != nil {
					return err
				}
			}
		}
		list = append(list, snap)
		return nil
	})
	return list, nil
}

func labelsOf(b metadata.ForeignBucket) (map[string]string, error) {
	labels, err := child(&b, "labels")
	if err != nil || labels == nil {
		return nil, err
	}
	return valuesOf(labels)
}

// valuesOf are the rows of a bucket.
func valuesOf(b *metadata.ForeignBucket) (map[string]string, error) {
	m := map[string]string{}
	for row, err := range b.Rows() {
		if err != nil {
			return nil, err
		}
		m[string(row.Key)] = string(row.Value)
	}
	return m, nil
}

func (s *State) readLease(id string, b metadata.ForeignBucket) error {
	l := &Lease{ID: id}
	for row, err := range b.Rows() {
		if err != nil {
			return err
		}
		if row.Bucket == nil {
			continue
		}
		switch string(row.Key) {
		case "labels":
			_, l.Temporary, err = row.Bucket.Get("buildkit/lease.temporary")
		case "snapshots":
			var own *metadata.ForeignBucket
			if own, err = child(row.Bucket, s.Snapshotter); err == nil {
				l.Snapshots, err = keys(own)
			}
		}
		if err != nil {
			return err
		}
	}
	s.Leases[id] = l
	return nil
}

// keys are those of b, which may be nil.
func keys(b *metadata.ForeignBucket) (list []string, err error) {
	if b == nil {
		return nil, nil
	}
	for row, err := range b.Rows() {
		if err != nil {
			return nil, err
		}
		list = append(list, string(row.Key))
	}
	return list, nil
}

func (s *State) readBlob(name string, b metadata.ForeignBucket) error {
	d, err := digest.Parse(name)
	if err != nil {
		return err
	}
	size, _, err := b.Get("size")
	if err != nil {
		return err
	}
	labels, err := labelsOf(b)
	if err != nil {
		return err
	}
	n, _ := binary.Varint(size.Value)
	s.Blobs[d] = &Blob{Digest: d, Size: max(n, 0), Labels: labels}
	return nil
}

// readDriver reads what the snapshotter knows of the snapshots.
func (s *State) readDriver(db *database, root metadata.ForeignBucket) (list []*Snapshot, err error) {
	v1, err := onlyV1(root)
	if err != nil {
		return nil, err
	}
	snapshots, err := child(v1, "snapshots")
	if err != nil {
		return nil, err
	}
	s.eachBucket(db, snapshots, "snapshots", func(key string, b metadata.ForeignBucket) error {
		snap := &Snapshot{Key: key}
		err := snap.read(b)
		if err == nil {
			list = append(list, snap)
		}
		return err
	})
	return list, nil
}

// nameSnapshots brings names and snapshots together. A name that leads to none
// is no snapshot.
func (s *State) nameSnapshots(known []snapshotName, snapshots []*Snapshot) {
	byKey := make(map[string]*Snapshot, len(snapshots))
	for _, snap := range snapshots {
		byKey[snap.Key] = snap
	}
	for _, n := range known {
		snap := byKey[n.key]
		switch {
		case !n.ownKey():
			s.warn("%s: snapshot %q has no key of its own; it is lost", names, printable(n.name))
		case snap != nil:
			snap.Name, snap.Labels = n.name, n.labels
			s.Snapshots[n.name] = snap
			s.Named = append(s.Named, snap)
		}
	}
	for _, snap := range snapshots {
		if snap.Below = byKey[snap.Parent]; snap.Name == "" {
			s.Unnamed = append(s.Unnamed, snap)
		}
	}
}

// ownKey says whether the snapshotter's key was made for this name, as
// containerd does with all: NAMESPACE/NUMBER/NAME. What another one leads to is
// the snapshot of somebody else.
func (n snapshotName) ownKey() bool {
	parts := strings.SplitN(n.key, "/", 3)
	return len(parts) == 3 && parts[2] == n.name
}

// read takes what the snapshotter's row says.
func (snap *Snapshot) read(b metadata.ForeignBucket) error {
	for row, err := range b.Rows() {
		if err != nil {
			return err
		}
		if row.Bucket != nil {
			continue
		}
		switch v := row.Value; string(row.Key) {
		case "id":
			if id, n := binary.Uvarint(v); n > 0 && id != 0 {
				snap.Dir = strconv.FormatUint(id, 10)
			}
		case "kind":
			if len(v) == 1 {
				snap.Kind = Kind(v[0])
			}
		case "parent":
			snap.Parent = string(v)
		case "size":
			snap.Size, _ = binary.Varint(v)
		case "inodes":
			snap.Inodes, _ = binary.Varint(v)
		case "createdat":
			err = readTime(&snap.Created, v)
		case "updatedat":
			err = readTime(&snap.Updated, v)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", row.Key, err)
		}
	}
	switch {
	case snap.Dir == "":
		return errors.New("it has no number")
	case snap.Kind == 0:
		return errors.New("it has no kind")
	}
	return nil
}

func readTime(at *time.Time, v []byte) error {
	if len(v) == 0 {
		return nil
	}
	err := at.UnmarshalBinary(v)
	*at = at.UTC()
	return err
}

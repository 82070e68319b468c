package migrate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate/buildkit"
	"github.com/lamina-build/lamina/snapshot"
)

// RolledBack says that the old daemon can have its state back; Untouched that
// there was no store to take away.
const (
	RolledBack Status = "rolled_back"
	Untouched  Status = "untouched"
)

// asidePrefix begins the name of the directory that takes what is taken away.
const asidePrefix = "lamina-rolled-back-"

// ErrNoWayBack is the class of a rollback that is refused: the old daemon
// would find another state than it left. The message says why.
var ErrNoWayBack = fmt.Errorf("the state of the old daemon cannot be restored: %w", errdefs.ErrFailedPrecondition)

// RollbackReport is what a rollback did to one worker.
type RollbackReport struct {
	Worker, Root string
	Status       Status
	Reason       string
	// Aside is the directory with the store that was taken away, and with
	// what else Lamina made.
	Aside string
	// Records are those that Lamina made since the migration: the old daemon
	// does not know them, they are kept aside.
	Records []cache.Record
	Err     error
}

// Rollback takes the stores in dir away again, so that the old daemon finds
// its state as it left it. dir is as for Run.
//
// That is refused with ErrNoWayBack once an adopted snapshot was finalized,
// reopened, extracted, written to or removed, or once its overlay attributes
// were cleaned; and once the old daemon has changed its databases. It looks at
// all that was adopted, and believes no note. A process that works in the store
// is a *metadata.LockedError or cache.ErrLocked.
//
// What Lamina made since is moved aside as a whole, and listed. A rollback that
// is killed is finished by running it again.
func Rollback(ctx context.Context, dir string, o Options) ([]RollbackReport, error) {
	workers, err := buildkit.Workers(dir)
	if err != nil {
		return nil, err
	}
	var reports []RollbackReport
	for _, w := range workers {
		r := RollbackReport{Worker: w.Name, Root: w.Dir, Status: Skipped, Reason: w.Reason}
		if w.Reason == "" {
			if err := rollback(ctx, &r, o); err != nil {
				r.Status, r.Err = Failed, fmt.Errorf("roll back %s: %w", w.Dir, classify(err))
			}
		}
		reports = append(reports, r)
	}
	return reports, nil
}

// retreat is one rollback.
type retreat struct {
	o     Options
	root  string
	store *metadata.Store
	s     *buildkit.State
	p     *Plan
	// adopted is the digest of what the migration took over.
	adopted string
	// dataOf says where the data of an adopted snapshot is.
	dataOf func(key string, kind snapshots.Kind) (string, error)
	aside  string
}

func rollback(ctx context.Context, r *RollbackReport, o Options) (err error) {
	lock, err := buildkit.LockDir(r.Root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	b := &retreat{o: o, root: r.Root}
	there, err := isStore(r.Root)
	if err != nil {
		return err
	}
	if !there {
		r.Status, r.Reason = Untouched, "there is no store"
		if b.aside, err = b.unfinished(); err != nil || b.aside == "" {
			return err
		}
		r.Status, r.Reason, r.Aside = RolledBack, "an earlier rollback was finished", b.aside
		return b.moveNames()
	}
	if err := b.settle(ctx); err != nil {
		return err
	}
	b.store, err = metadata.Open(ctx, filepath.Join(r.Root, cache.StoreFile), metadata.Options{
		LockTimeout: time.Second, FlushInterval: -1, Command: "lamina migrate --rollback",
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.store.Close()) }()
	if err := b.read(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.s.Close()) }()
	if r.Records, err = b.compare(ctx); err != nil {
		return err
	}
	if o.DryRun {
		r.Status = Planned
		return nil
	}
	b.aside = filepath.Join(r.Root, asidePrefix+o.now().UTC().Format("20060102T150405.000Z"))
	if err := b.move(r.Records); err != nil {
		return err
	}
	r.Status, r.Aside = RolledBack, b.aside
	return nil
}

// settle opens the cache once, so that nothing is left half done, stale mounts
// are gone, and no process works in a snapshot.
func (b *retreat) settle(ctx context.Context) error {
	m, err := cache.Open(ctx, cache.Options{Root: b.root, NoCreate: true, SyncInterval: -1, Command: "lamina migrate --rollback"})
	if err != nil {
		return err
	}
	for rec, rerr := range m.Records(ctx) {
		if rerr != nil {
			continue // compare says what is missing
		}
		if held := m.Refs(rec.ID); len(held) > 0 {
			err = &cache.LockedError{ID: rec.ID, Holders: held}
			break
		}
	}
	return errors.Join(err, m.Close())
}

// read makes the plan again, from databases that must be as they were.
func (b *retreat) read(ctx context.Context) error {
	var meta metadata.Meta
	err := b.store.View(ctx, func(tx *metadata.Tx) (err error) {
		meta, err = tx.Meta()
		return err
	})
	if err != nil {
		return err
	}
	origin, err := cache.ParseOrigin(meta.MigratedFrom)
	if err != nil {
		return err
	}
	if origin == nil {
		return fmt.Errorf("the store was not made by a migration: %w", ErrNoWayBack)
	}
	changed, err := origin.Changed(b.root)
	if err != nil {
		return err
	}
	if changed != "" {
		return fmt.Errorf("the old daemon has worked here since: %s: %w", changed, ErrNoWayBack)
	}
	b.adopted = origin.Adopted
	b.s, b.p, err = read(ctx, b.root)
	if errors.Is(err, buildkit.ErrNotBuildKit) || errors.Is(err, buildkit.ErrIncomplete) {
		return fmt.Errorf("the old databases were removed: %w: %w", ErrNoWayBack, err)
	}
	return err
}

// compare looks whether everything that was adopted is as it was then, and
// lists what came since.
func (b *retreat) compare(ctx context.Context) (made []cache.Record, err error) {
	var reasons []string
	if b.dataOf, err = snapshot.AdoptedDirs(b.root); err != nil {
		return nil, err
	}
	err = b.store.View(ctx, func(tx *metadata.Tx) error {
		planned := map[metadata.ID]bool{}
		for _, it := range b.p.items {
			planned[it.rec.ID] = true
			rec, err := tx.Get(it.rec.ID)
			if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
				return err
			}
			why, err := b.differs(it, rec)
			if err != nil {
				return err
			}
			if why != "" {
				reasons = append(reasons, fmt.Sprintf("record %s %s", it.rec.ID, why))
			}
		}
		for rec, err := range tx.Records() {
			if err == nil && !planned[rec.ID] {
				made = append(made, *rec)
			}
		}
		return nil
	})
	if err == nil && len(reasons) == 0 && b.p.digest() != b.adopted {
		// With data that is gone the plan is another one.
		reasons = append(reasons, "snapshots or blobs that were taken over are no longer there")
	}
	if err != nil || len(reasons) == 0 {
		return made, err
	}
	const most = 5
	text := strings.Join(reasons[:min(most, len(reasons))], "; ")
	if n := len(reasons) - most; n > 0 {
		text += fmt.Sprintf("; and %d more", n)
	}
	return nil, fmt.Errorf("%w: %s", ErrNoWayBack, text)
}

// differs says in what a record is not what the migration made, empty if it
// is. Only what the old daemon would notice counts.
func (b *retreat) differs(it *item, rec *metadata.Record) (string, error) {
	switch {
	case rec == nil && it.rec.State == metadata.Committed:
		return "was reopened or removed", nil
	case rec == nil:
		return "was removed", nil
	case rec.State == metadata.Finalized && it.rec.State == metadata.Lazy:
		return "was extracted", nil
	case rec.State != it.rec.State:
		return fmt.Sprintf("was %s and is %s", it.rec.State, rec.State), nil
	case rec.Key != it.rec.Key:
		return "has another snapshot", nil
	case rec.State == metadata.Mutable && (rec.UsageCount != it.rec.UsageCount || !rec.LastUsed.Equal(it.rec.LastUsed)):
		return "was written to", nil
	}
	if it.snap == nil {
		return "", nil
	}
	return b.dataDiffers(it)
}

// dataDiffers looks at the entry of an adopted snapshot and at its data.
func (b *retreat) dataDiffers(it *item) (string, error) {
	kind := snapshots.KindCommitted
	if it.snap.Kind == buildkit.Active {
		kind = snapshots.KindActive
	}
	data, err := b.dataOf(it.rec.Key, kind)
	if errors.Is(err, errdefs.ErrNotFound) || err == nil && data != it.snap.Dir {
		return "has other data than it had", nil
	}
	if err != nil || it.snap.Kind != buildkit.Active || b.s.Snapshotter != buildkit.Overlayfs {
		return "", err
	}
	// Our writable mounts leave a mark with which the old daemon's would fail.
	_, err = os.Lstat(filepath.Join(b.s.DataDir(it.snap.Dir), "work", "work", "incompat", "volatile"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return "was written to", err
}

// move takes away the store first: from then on the directory is the old
// daemon's again. All else is names that it does not look at.
func (b *retreat) move(made []cache.Record) error {
	if err := b.step("rollback.aside"); err != nil {
		return err
	}
	if err := os.Mkdir(b.aside, 0o700); err != nil {
		return err
	}
	if err := b.keepBlobs(made); err != nil {
		return err
	}
	if err := b.step("rollback.rename"); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(b.root, cache.StoreFile), filepath.Join(b.aside, cache.StoreFile)); err != nil {
		return err
	}
	return b.moveNames()
}

func (b *retreat) step(name string) error {
	if b.o.Step == nil {
		return nil
	}
	return b.o.Step(name)
}

// keepBlobs gives the blobs of Lamina's records a second name: the old daemon
// collects what it does not know.
func (b *retreat) keepBlobs(made []cache.Record) error {
	for _, rec := range made {
		for _, blob := range rec.Blobs {
			if blob.Digest.Validate() != nil {
				continue
			}
			from := b.s.BlobPath(blob.Digest)
			to := filepath.Join(b.aside, "content", "blobs", blob.Digest.Algorithm().String(), blob.Digest.Encoded())
			if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
				return err
			}
			if err := os.Link(from, to); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
				return err
			}
		}
	}
	return nil
}

// ours are the names that Lamina has in a worker's directory.
func ours() []string {
	return []string{
		"clean", "dirty", "holds", "mounts", "blobs", cache.StoreFile + ".holder",
		"snapshots/driver", "snapshots/new", "snapshots/active", "snapshots/committed", "snapshots/trash",
		"snapshots/empty", "snapshots/l", "snapshots/adopted",
	}
}

// moveNames moves all names but the store's, those that are there yet.
func (b *retreat) moveNames() error {
	if err := os.MkdirAll(filepath.Join(b.aside, "snapshots"), 0o700); err != nil {
		return err
	}
	for _, name := range ours() {
		if err := b.step("rollback.move"); err != nil {
			return err
		}
		err := unix.Renameat2(unix.AT_FDCWD, filepath.Join(b.root, name), unix.AT_FDCWD, filepath.Join(b.aside, name), unix.RENAME_NOREPLACE)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return &os.LinkError{Op: "rename", Old: filepath.Join(b.root, name), New: b.aside, Err: err}
		}
	}
	for _, dir := range []string{b.aside, filepath.Join(b.root, "snapshots"), b.root} {
		f, err := os.Open(dir)
		if err == nil {
			err = errors.Join(f.Sync(), f.Close())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unfinished is where a rollback that was killed was moving things, empty if
// none was.
func (b *retreat) unfinished() (string, error) {
	dirs, err := filepath.Glob(filepath.Join(b.root, asidePrefix+"*"))
	if err != nil || len(dirs) == 0 {
		return "", err
	}
	aside := slices.Max(dirs)
	if _, err := os.Lstat(filepath.Join(aside, cache.StoreFile)); err != nil {
		return "", nil //nolint:nilerr // killed before it took the store away
	}
	for _, name := range ours() {
		if _, err := os.Lstat(filepath.Join(b.root, name)); err == nil {
			return aside, nil
		}
	}
	return "", nil
}

package migrate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/contenthash"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/migrate/buildkit"
	"github.com/lamina-build/lamina/snapshot"
)

// unfinished is the name of the new store until it is whole.
const unfinished = cache.StoreFile + ".migrating"

// execution makes a plan true.
type execution struct {
	s    *buildkit.State
	p    *Plan
	o    Options
	done int
}

func (x *execution) step(name string) error {
	if x.o.Step == nil {
		return nil
	}
	if err := x.o.Step(name); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (x *execution) progress(stage string) {
	if x.o.Progress != nil {
		x.o.Progress(Progress{Worker: x.p.Worker, Stage: stage, Done: x.done, Total: len(x.p.items)})
	}
}

// run writes the new store beside, and gives it its name last. Whatever is
// interrupted before that leaves the old daemon's files as they are.
func (x *execution) run(ctx context.Context) (err error) {
	if err := x.removeUnfinished(); err != nil {
		return err
	}
	if err := x.write(ctx); err != nil {
		return err
	}
	if err := x.adoptAndVerify(ctx); err != nil {
		return err
	}
	return x.publish()
}

func (x *execution) path(name string) string { return filepath.Join(x.p.Root, name) }

// removeUnfinished removes what a migration left that was cut off.
func (x *execution) removeUnfinished() error {
	if err := x.step("migrate.begin"); err != nil {
		return err
	}
	for _, name := range []string{unfinished, unfinished + ".holder", unfinished + ".new"} {
		if err := os.Remove(x.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove what an earlier migration left: %w", err)
		}
	}
	return nil
}

// adopt makes the driver's entries.
func (x *execution) adopt(ctx context.Context) error {
	if err := x.step("migrate.adopt"); err != nil {
		return err
	}
	o := snapshot.Options{Driver: x.p.Driver, Attributes: x.p.Attributes, Step: x.o.Step}
	x.done = 0
	return snapshot.Adopt(ctx, x.p.Root, o, x.adopted(), x.p.discard)
}

func (x *execution) adopted() iter.Seq[snapshot.Adopted] {
	return func(yield func(snapshot.Adopted) bool) {
		for _, it := range x.p.items {
			x.done++
			if it.snap == nil {
				continue
			}
			x.progress("adopting snapshots")
			a := snapshot.Adopted{
				Key: it.rec.Key, Kind: snapshots.KindCommitted, Dir: it.snap.Dir,
				Created: it.snap.Created, Updated: it.snap.Updated,
				Usage: snapshots.Usage{Size: it.snap.Size, Inodes: it.snap.Inodes},
			}
			if it.base != nil {
				a.Parent = it.base.rec.Key
			}
			if it.snap.Kind == buildkit.Active {
				a.Kind = snapshots.KindActive
			}
			if !yield(a) {
				return
			}
		}
	}
}

// write fills the new store.
func (x *execution) write(ctx context.Context) error {
	if err := x.step("migrate.store"); err != nil {
		return err
	}
	meta, err := x.meta()
	if err != nil {
		return err
	}
	x.done = 0
	return metadata.Build(ctx, x.path(unfinished), metadata.Options{Now: x.o.now, Step: x.o.Step}, meta, x.records())
}

// records are what the new store gets.
func (x *execution) records() iter.Seq2[metadata.New, error] {
	return func(yield func(metadata.New, error) bool) {
		for _, it := range x.p.items {
			a, err := x.attachments(it)
			if x.done++; !yield(metadata.New{Record: it.rec, Attachments: a}, err) {
				return
			}
			x.progress("writing records")
		}
	}
}

// attachments are the external values of a record. Content hashes become the
// pages of a tree that answers what the old daemon would. What cannot be read
// is left out: it can be computed again.
func (x *execution) attachments(it *item) (map[string][]byte, error) {
	out := map[string][]byte{}
	external := map[string]map[string][]byte{}
	for _, id := range it.sources {
		values, err := x.s.External(id)
		if err != nil && !errors.Is(err, metadata.ErrDamaged) {
			return nil, err
		}
		external[id] = values
		for name, data := range values {
			if _, have := out[name]; !have && name != contenthash.V0Key && name != "" && len(name) <= metadata.MaxNameLen {
				out[name] = data
			}
		}
	}
	v0 := contenthash.V0{IgnoreOwners: x.p.Ownerless}
	found := false
	for _, id := range it.hashes {
		if value, ok := external[id][contenthash.V0Key]; ok {
			v0.Value, found = value, true
			break
		}
	}
	if !found && !x.p.Ownerless {
		return out, nil
	}
	tree, err := contenthash.ImportV0(v0)
	if err != nil {
		return out, nil //nolint:nilerr // hashes that cannot be read are computed anew
	}
	for name, data := range tree.Save().Put {
		out[cache.TreePrefix+name] = data
	}
	return out, nil
}

// meta is what the store is.
func (x *execution) meta() (meta metadata.Meta, err error) {
	origin := cache.Origin{System: "buildkit", Version: x.p.Version, Worker: x.p.Worker, Migrated: x.o.now().UTC(), Adopted: x.p.digest()}
	for _, f := range x.p.Files {
		origin.Files = append(origin.Files, cache.OriginFile(f))
	}
	meta.MigratedFrom, err = origin.Encode()
	meta.Driver, meta.Attributes = x.p.Driver, x.p.Attributes
	// No boot is named: the first opening compares all names with all records.
	return meta, err
}

// adoptAndVerify makes the driver's entries and brings everything to the disk,
// and reads the new store again meanwhile.
func (x *execution) adoptAndVerify(ctx context.Context) error {
	if err := x.step("migrate.verify"); err != nil {
		return err
	}
	verified := make(chan error, 1)
	go func() { verified <- x.verify(ctx) }()
	err := x.adopt(ctx)
	if err == nil {
		err = x.sync(ctx)
	}
	return errors.Join(err, <-verified)
}

// verify reads the new store again, from its file: that each page is where the
// tree says and in use once, that each record and attachment has the checksum
// with which it was made and can be read, that indexes and all else that is
// derived are what the records ask for, that totals add up, and that there are
// as many records as were planned. That a record says what the plan says rests
// on metadata.Build, which is tested against single transactions; that it stays
// on the disk, on the sync, and on nothing that could be read before it.
func (x *execution) verify(ctx context.Context) (err error) {
	store, err := metadata.Open(ctx, x.path(unfinished), metadata.Options{ReadOnly: true, LockTimeout: -1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	return store.View(ctx, func(tx *metadata.Tx) error {
		for finding, err := range tx.Check() {
			if err != nil {
				return err
			}
			return fmt.Errorf("the new store is not whole: %s %q: %s: %w", finding.Code, finding.ID, finding.Message, metadata.ErrDamaged)
		}
		totals, err := tx.Totals()
		n := 0
		for _, total := range totals {
			n += int(total.Count)
		}
		if err == nil && n != len(x.p.items) {
			return fmt.Errorf("the new store has %d records of %d: %w", n, len(x.p.items), metadata.ErrDamaged)
		}
		return err
	})
}

// sync brings to the disk what the new store is going to rely on: its own
// names, the adopted data, and the blobs.
func (x *execution) sync(ctx context.Context) error {
	if err := x.step("migrate.sync"); err != nil {
		return err
	}
	x.progress("checking and syncing")
	synced := map[uint64]bool{}
	for _, name := range []string{".", "snapshots", "snapshots/snapshots", "content"} {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := syncOnce(x.path(name), synced); err != nil {
			return err
		}
	}
	return nil
}

// syncOnce syncs the file system of a directory, unless that was done.
func syncOnce(dir string, synced map[uint64]bool) error {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil && !synced[st.Dev] {
		if err = unix.Syncfs(int(f.Fd())); err != nil {
			err = &os.PathError{Op: "syncfs", Path: dir, Err: err}
		}
		synced[st.Dev] = true
	}
	return errors.Join(err, f.Close())
}

// publish gives the new store its name.
func (x *execution) publish() error {
	if err := x.step("migrate.rename"); err != nil {
		return err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, x.path(unfinished), unix.AT_FDCWD, x.path(cache.StoreFile), unix.RENAME_NOREPLACE); err != nil {
		return &os.LinkError{Op: "rename", Old: x.path(unfinished), New: x.path(cache.StoreFile), Err: err}
	}
	if err := x.step("migrate.named"); err != nil {
		return err
	}
	dir, err := os.Open(x.p.Root)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// now is the clock.
func (o Options) now() time.Time {
	if o.Now != nil {
		return o.Now()
	}
	return time.Now()
}

// Package peer puts BuildKit's cache manager, unmodified, under the bench. It
// is wired as the daemon's runc worker wires it.
package peer

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	ctdmetadata "github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/diff/walking"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/moby/buildkit/cache"
	"github.com/moby/buildkit/cache/metadata"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/snapshot"
	containerdsnapshot "github.com/moby/buildkit/snapshot/containerd"
	"github.com/moby/buildkit/snapshot/imagerefchecker"
	"github.com/moby/buildkit/util/db/boltutil"
	"github.com/moby/buildkit/util/leaseutil"
	"github.com/moby/buildkit/util/winlayers"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/hack/internal/bench"
)

const (
	driver    = "overlayfs"
	namespace = "buildkit"
)

// Opener opens the peer in a directory of its own.
func Opener() bench.Opener {
	return bench.Opener{
		Name:     bench.Peer,
		Portable: true,
		Legacy:   Legacy,
		Open: func(ctx context.Context, dir string) (bench.Subject, error) {
			return open(ctx, dir)
		},
		Databases: func(dir string) []string {
			return []string{
				filepath.Join(dir, "metadata_v2.db"),
				filepath.Join(dir, "containerdmeta.db"),
				filepath.Join(dir, "snapshots", "metadata.db"),
			}
		},
	}
}

type subject struct {
	cache.Manager
	store   *metadata.Store
	content content.Store
	// closers run after the manager's Close, last first.
	closers []func() error
}

func open(ctx context.Context, root string) (_ *subject, err error) {
	s := &subject{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	sn, err := overlay.NewSnapshotter(filepath.Join(root, "snapshots"), overlay.AsynchronousRemove)
	if err != nil {
		return nil, err
	}
	s.closers = append(s.closers, sn.Close)
	blobs, err := local.NewStore(filepath.Join(root, "content"))
	if err != nil {
		return nil, err
	}
	db, err := boltutil.Open(filepath.Join(root, "containerdmeta.db"), 0o644, &bolt.Options{
		FreelistType:   bolt.FreelistMapType,
		NoFreelistSync: true,
	})
	if err != nil {
		return nil, err
	}
	s.closers = append(s.closers, db.Close)
	mdb := ctdmetadata.NewDB(db, blobs, map[string]snapshots.Snapshotter{driver: sn})
	if err := mdb.Init(ctx); err != nil {
		return nil, err
	}
	if s.store, err = metadata.NewStore(filepath.Join(root, "metadata_v2.db")); err != nil {
		return nil, err
	}
	s.content = containerdsnapshot.NewContentStore(mdb.ContentStore(), namespace)
	leases := leaseutil.WithNamespace(ctdmetadata.NewLeaseManager(mdb), namespace)
	s.Manager, err = cache.NewManager(cache.ManagerOpt{
		Snapshotter:     containerdsnapshot.NewSnapshotter(driver, mdb.Snapshotter(driver), namespace, nil),
		ContentStore:    s.content,
		LeaseManager:    leases,
		PruneRefChecker: imagerefchecker.New(imagerefchecker.Opt{ContentStore: s.content}),
		GarbageCollect:  mdb.GarbageCollect,
		Applier:         winlayers.NewFileSystemApplierWithWindows(s.content, apply.NewFileSystemApplier(s.content)),
		Differ:          winlayers.NewWalkingDiffWithWindows(s.content, walking.NewWalkingDiff(s.content)),
		MetadataStore:   s.store,
		Root:            root,
		MountPoolRoot:   filepath.Join(root, "cachemounts"),
	})
	if err != nil {
		return nil, errors.Join(err, s.store.Close())
	}
	// As the worker does: leases that a killed daemon left.
	temporary, err := leases.List(ctx, `labels."buildkit/lease.temporary"`)
	if err != nil {
		return nil, err
	}
	for _, l := range temporary {
		if err := leases.Delete(ctx, l); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Close closes the manager, and with it its store, then the databases.
func (s *subject) Close() error {
	var err error
	if s.Manager != nil {
		err = s.Manager.Close()
	}
	for i := len(s.closers) - 1; i >= 0; i-- {
		err = errors.Join(err, s.closers[i]())
	}
	return err
}

func (s *subject) New(ctx context.Context, parent bench.Immutable, values ...bench.Value) (bench.Mutable, error) {
	return s.new(ctx, parent, values)
}

func (s *subject) NewVictim(ctx context.Context, parent bench.Immutable) (bench.Mutable, error) {
	return s.new(ctx, parent, nil, cache.WithDescription(bench.Victims))
}

func (s *subject) new(ctx context.Context, parent bench.Immutable, values []bench.Value, o ...cache.RefOption) (bench.Mutable, error) {
	var p cache.ImmutableRef
	if parent != nil {
		p = parent.(*immutable).ref
	}
	// Without the policy a lazy commit dies with its last handle.
	ref, err := s.Manager.New(ctx, p, nil, append(o, cache.CachePolicyRetain)...)
	if err != nil {
		return nil, err
	}
	return &mutable{s: s, ref: ref, values: values}, nil
}

func (s *subject) Get(ctx context.Context, id string) (bench.Immutable, error) {
	return s.get(ctx, id)
}

func (s *subject) Look(ctx context.Context, id string) (bench.Immutable, error) {
	return s.get(ctx, id, cache.NoUpdateLastUsed)
}

func (s *subject) get(ctx context.Context, id string, o ...cache.RefOption) (bench.Immutable, error) {
	ref, err := s.Manager.Get(ctx, id, nil, o...)
	if err != nil {
		return nil, err
	}
	return &immutable{s, ref}, nil
}

func (s *subject) GetMutable(ctx context.Context, id string) (bench.Mutable, error) {
	ref, err := s.Manager.GetMutable(ctx, id)
	if err != nil {
		return nil, err
	}
	return &mutable{s: s, ref: ref}, nil
}

func (s *subject) Search(ctx context.Context, key string) ([]string, error) {
	found, err := s.Manager.Search(ctx, key, false)
	if err != nil {
		return nil, err
	}
	ids := make([]string, 0, len(found))
	for _, md := range found {
		ids = append(ids, md.ID())
	}
	return ids, nil
}

// Prune waits for the channel, as whoever asks the daemon does. The garbage
// collection at its end is the peer's own.
func (s *subject) Prune(ctx context.Context, description string, maxUsed *int64) (removed int, err error) {
	info := client.PruneInfo{All: true}
	if description != "" {
		info.Filter = []string{"description==" + description}
	}
	if maxUsed != nil {
		info.MaxUsedSpace = *maxUsed
	}
	went, counted := make(chan client.UsageInfo), make(chan struct{})
	go func() {
		defer close(counted)
		for range went {
			removed++
		}
	}()
	err = s.Manager.Prune(ctx, went, info)
	close(went)
	<-counted
	return removed, err
}

func (s *subject) Used(ctx context.Context) (sum int64, err error) {
	all, err := s.Manager.DiskUsage(ctx, client.DiskUsageInfo{})
	for _, u := range all {
		sum += u.Size
	}
	return sum, err
}

func (s *subject) List(ctx context.Context) (int, error) {
	all, err := s.Manager.DiskUsage(ctx, client.DiskUsageInfo{})
	return len(all), err
}

type mutable struct {
	s   *subject
	ref cache.MutableRef
	// values are set on what is committed: those of a mutable stay with its
	// own record.
	values []bench.Value
}

func (m *mutable) ID() string { return m.ref.ID() }

func (m *mutable) Change(ctx context.Context, change func(dir string) error) error {
	mountable, err := m.ref.Mount(ctx, false, nil)
	if err != nil {
		return err
	}
	mounter := snapshot.LocalMounter(mountable)
	dir, err := mounter.Mount()
	if err != nil {
		return err
	}
	return errors.Join(change(dir), mounter.Unmount())
}

func (m *mutable) Commit(ctx context.Context) (bench.Immutable, error) {
	ref, err := m.ref.Commit(ctx)
	if err != nil {
		return nil, err
	}
	imm := &immutable{m.s, ref}
	for _, v := range m.values {
		if err := imm.SetValue(ctx, v); err != nil {
			return nil, errors.Join(err, ref.Release(ctx))
		}
	}
	return imm, nil
}

func (m *mutable) Release(ctx context.Context) error { return m.ref.Release(ctx) }

type immutable struct {
	s   *subject
	ref cache.ImmutableRef
}

func (i *immutable) ID() string { return i.ref.ID() }

// ReopenID is the id of the other record of the snapshot.
func (i *immutable) ReopenID() string {
	if md, ok := i.ref.GetEqualMutable(); ok {
		return md.ID()
	}
	return ""
}

// Finalize also waits for the part that the peer leaves to a goroutine of its
// own, which removes the mutable record under the manager's lock.
func (i *immutable) Finalize(ctx context.Context) error {
	other := i.ReopenID()
	if err := i.ref.Finalize(ctx); err != nil {
		return err
	}
	if other == "" {
		return nil
	}
	for {
		// Search waits for the lock, and so for a removal under way. That one
		// may not have begun is seen by what it leaves.
		if _, err := i.s.Manager.Search(ctx, "none", false); err != nil {
			return err
		}
		if _, there := i.s.store.Get(other); !there {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("wait for the removal of %s: %w", other, err)
		}
		runtime.Gosched()
	}
}

func (i *immutable) SetValue(_ context.Context, v bench.Value) error {
	return i.ref.SetString(v.Name, v.Data, v.Index)
}

func (i *immutable) Release(ctx context.Context) error { return i.ref.Release(ctx) }

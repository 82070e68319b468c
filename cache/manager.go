package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/lamina-build/lamina/cache/policy"
	"github.com/lamina-build/lamina/layer"
	"github.com/lamina-build/lamina/metadata"
	"github.com/lamina-build/lamina/snapshot"
)

// StoreFile is the name of the record store below a cache's root.
const StoreFile = "lamina.db"

var errClosed = fmt.Errorf("cache is closed: %w", errdefs.ErrFailedPrecondition)

// Manager is an open cache. Get one from Open and end it with Close.
type Manager struct {
	// Fixed after Open.
	root      string
	store     *metadata.Store
	driver    snapshot.Driver
	ownDriver bool
	info      snapshot.Info
	readOnly  bool
	// refused says why a store that was to be changed is read-only.
	refused   error
	command   string
	bootID    string
	log       *slog.Logger
	now       func() time.Time
	step      func(string) error
	limits    layer.Limits
	unconfirm func([]byte) ([]byte, error)
	blobs     *blobStore
	marks     *marks
	pool      *pool
	syncer    *syncer
	sizer     *sizer
	collector *collector
	// diskFigures stands in for statfs, if not nil.
	diskFigures func() (policy.Disk, error)

	// extracting and cleaning share the extraction of one record, and the
	// making of a cleaned copy of its layer.
	extracting, cleaning shared[ID, struct{}]
	copies               copies
	// blobbing shares the making of one blob.
	blobbing shared[blobKey, ocispec.Descriptor]

	mu sync.Mutex
	// Guarded by mu.
	entries map[metadata.ID]*entry
	// measured are sizes of records that the store does not know yet, found
	// out after so many cleaned copies were made.
	measured      map[metadata.ID]measured
	measuredAfter uint64
	// surveyed is how many records there were when all were looked at last.
	surveyed int
	// written are the driver keys whose only writer was this process, so
	// that Commit and Finalize need no probe. Keys leave with their record.
	written map[string]struct{}
	// unswapped are records whose snapshot is committed in the driver, or
	// may be if the value is false, while no transaction says so.
	unswapped map[metadata.ID]bool
	// orphans are snapshots that no record names and that could not be
	// removed, with the second half of their removal if the first was done.
	// They are tried again with the next removal.
	orphans map[string]snapshot.Pending
	// leftover says that the next open has something to settle.
	leftover bool
	// broken refuses all changes: a sync has failed.
	broken error
	closed bool
	// running counts operations that Close waits for.
	running sync.WaitGroup
}

// Open opens the cache below o.Root, making it if need be, and settles what a
// killed process or a power cut left half done. After a clean Close in the
// same boot there is nothing to settle: nothing is written and the driver is
// not asked.
//
// Errors: NotFound where there is no store and o.NoCreate is set;
// *metadata.LockedError, which is Unavailable, if another process has it open;
// ErrLegacy; FailedPrecondition for another driver or a newer schema;
// PermissionDenied for a root of somebody else.
func Open(ctx context.Context, o Options) (*Manager, error) {
	o.setDefaults()
	if err := checkRoot(&o); err != nil {
		return nil, err
	}
	store, err := metadata.Open(ctx, filepath.Join(o.Root, StoreFile), metadata.Options{
		ReadOnly:      o.ReadOnly,
		LockTimeout:   o.LockTimeout,
		OnWait:        o.OnWait,
		FlushInterval: o.FlushInterval,
		Command:       o.Command,
		Now:           o.Now,
		Step:          o.Step,
	})
	if err != nil {
		return nil, err
	}
	m := &Manager{
		root:     o.Root,
		store:    store,
		readOnly: o.ReadOnly,
		command:  o.Command,
		bootID:   o.BootID,
		log:      o.Logger,

		diskFigures: o.Disk,

		now:       o.Now,
		step:      o.Step,
		limits:    o.LayerLimits,
		unconfirm: o.Unconfirm,
		entries:   map[metadata.ID]*entry{},
		written:   map[string]struct{}{},
		unswapped: map[metadata.ID]bool{},
		orphans:   map[string]snapshot.Pending{},
	}
	m.blobs = newBlobStore(m, &o)
	if err := m.open(ctx, &o); err != nil {
		if m.ownDriver && m.driver != nil {
			err = errors.Join(err, m.driver.Close())
		}
		return nil, errors.Join(err, store.Close())
	}
	m.startSyncer(o.SyncInterval)
	m.startSizer(o.SyncInterval, o.Collect != nil)
	if err := m.startCollector(o.Collect); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func (m *Manager) open(ctx context.Context, o *Options) error {
	var meta metadata.Meta
	err := m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		meta, err = tx.Meta()
		return err
	})
	if err != nil {
		return err
	}
	if err := m.openDriver(ctx, o, meta); err != nil {
		return err
	}
	m.info = m.driver.Info()
	if meta.Driver != "" && (m.info.Name != meta.Driver || m.info.Attributes != meta.Attributes) {
		return fmt.Errorf("store %s was made with driver %s, attributes %q, not %s, %q: %w",
			m.root, meta.Driver, meta.Attributes, m.info.Name, m.info.Attributes, errdefs.ErrFailedPrecondition)
	}
	if err := m.checkOrigin(meta); err != nil {
		return err
	}
	m.pool = newPool(m.root, o.PrivateMounts, o.NoMounts)
	m.marks = &marks{root: m.root, step: m.step}
	if m.readOnly {
		return nil
	}
	for _, dir := range []string{"mounts", "holds"} {
		if err := os.Mkdir(filepath.Join(m.root, dir), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	sameBoot := meta.BootID == m.bootID && m.bootID != ""
	if sameBoot && m.marks.clean() {
		return nil
	}
	return m.settle(ctx, meta, sameBoot)
}

// openDriver takes the driver that was handed in or opens the store's own.
func (m *Manager) openDriver(ctx context.Context, o *Options, meta metadata.Meta) error {
	if o.Driver != nil {
		m.driver = o.Driver
		return nil
	}
	name, class := o.DriverName, ""
	if meta.Driver != "" {
		if name != "" && name != meta.Driver {
			return fmt.Errorf("store %s was made with driver %s, so it cannot be opened with %s: %w",
				m.root, meta.Driver, name, errdefs.ErrFailedPrecondition)
		}
		name, class = meta.Driver, meta.Attributes
	}
	d, err := snapshot.Open(ctx, m.root, snapshot.Options{
		Driver: name, Attributes: class, Step: m.step, Now: m.now,
	})
	if err != nil {
		return fmt.Errorf("open the snapshot driver of %s: %w", m.root, err)
	}
	m.driver, m.ownDriver = d, true
	return nil
}

// checkRoot looks at the root before anything is made in it.
func checkRoot(o *Options) error {
	abs, err := filepath.Abs(o.Root)
	if err != nil || o.Root == "" {
		return fmt.Errorf("root directory %q: %w", o.Root, errdefs.ErrInvalidArgument)
	}
	o.Root = abs
	_, err = os.Lstat(filepath.Join(abs, StoreFile))
	switch {
	case err == nil:
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("look for the store: %w", classify(err))
	case errors.Is(err, fs.ErrNotExist) && hasLegacyState(abs):
		return fmt.Errorf("%s holds the state of a BuildKit worker and no store: %w", abs, ErrLegacy)
	case o.NoCreate || o.ReadOnly:
		return fmt.Errorf("no store in %s: %w", abs, errdefs.ErrNotFound)
	default:
		if err := os.MkdirAll(abs, 0o700); err != nil {
			return fmt.Errorf("make the root directory: %w", classify(err))
		}
	}
	st, err := os.Stat(abs)
	if err != nil {
		return fmt.Errorf("root directory: %w", classify(err))
	}
	if !st.IsDir() {
		return fmt.Errorf("root %s is not a directory: %w", abs, errdefs.ErrInvalidArgument)
	}
	if o.ReadOnly {
		return nil
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && int(sys.Uid) != os.Geteuid() {
		return fmt.Errorf("root %s belongs to uid %d, not to uid %d: %w", abs, sys.Uid, os.Geteuid(), errdefs.ErrPermissionDenied)
	}
	if st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("root %s is writable by others (mode %04o): %w", abs, st.Mode().Perm(), errdefs.ErrPermissionDenied)
	}
	return nil
}

// classify gives an error of the operating system its class.
func classify(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &classified{err, errdefs.ErrNotFound}
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return &classified{err, errdefs.ErrPermissionDenied}
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, fs.ErrExist):
		return &classified{err, errdefs.ErrInvalidArgument}
	}
	return fullDisk(err)
}

// fullDisk gives the errors of a full disk their class: drivers pass them on
// as the kernel gave them.
func fullDisk(err error) error {
	if is(err, syscall.ENOSPC, syscall.EDQUOT) && !errors.Is(err, errdefs.ErrResourceExhausted) {
		return &classified{err, errdefs.ErrResourceExhausted}
	}
	return err
}

// classified is an error that has a class beside what it says.
type classified struct{ err, class error }

func (e *classified) Error() string   { return e.err.Error() }
func (e *classified) Unwrap() []error { return []error{e.err, e.class} }

// hasLegacyState recognises a worker's directory by its cache records.
func hasLegacyState(root string) bool {
	for _, name := range []string{"metadata_v2.db", "metadata.db"} {
		if _, err := os.Lstat(filepath.Join(root, name)); err == nil {
			return true
		}
	}
	return false
}

// Root is the absolute path of the store's directory.
func (m *Manager) Root() string { return m.root }

// Driver describes the snapshot driver.
func (m *Manager) Driver() snapshot.Info { return m.info }

// Meta is what the store says about itself.
func (m *Manager) Meta(ctx context.Context) (meta metadata.Meta, err error) {
	err = m.store.View(ctx, func(tx *metadata.Tx) (err error) {
		meta, err = tx.Meta()
		return err
	})
	return meta, err
}

// Stats are exact counts of what the store did since Open.
func (m *Manager) Stats() metadata.Stats { return m.store.Stats() }

// begin counts an operation that Close waits for.
func (m *Manager) begin() (end func(), err error) {
	m.lock()
	defer m.unlock()
	if m.closed {
		return nil, errClosed
	}
	m.running.Add(1)
	return m.running.Done, nil
}

// beginChange is begin for an operation that writes.
func (m *Manager) beginChange() (end func(), err error) {
	if m.refused != nil {
		return nil, m.refused
	}
	if m.readOnly {
		return nil, fmt.Errorf("store %s is open read-only: %w", m.root, errdefs.ErrFailedPrecondition)
	}
	m.lock()
	broken := m.broken
	m.unlock()
	if broken != nil {
		return nil, broken
	}
	return m.begin()
}

// Close waits for the operations that are under way, ends this manager's
// mounts that nobody detached, syncs what is not on the disk yet unless that was
// left to callers, writes the gathered use counts and releases the
// store. Handles that are still out become invalid: their records stay,
// mutables without a record are removed by the next Open. Closing twice is
// harmless.
func (m *Manager) Close() error {
	m.collector.end()
	m.sizer.end()
	m.syncer.end()
	m.lock()
	if m.closed {
		m.unlock()
		return nil
	}
	m.closed = true
	m.unlock()
	m.running.Wait()
	m.assertEmpty()

	var errs []error
	leftover := m.unsettled() || !m.readOnly && m.blobs.settleSkipped(context.Background())
	if m.pool != nil {
		left, err := m.pool.close()
		leftover = leftover || left
		errs = append(errs, err)
	}
	if !m.readOnly && !leftover && !foreignHolds(m.root) {
		errs = append(errs, m.marks.setClean())
	}
	if m.ownDriver {
		errs = append(errs, m.driver.Close())
	}
	return errors.Join(append(errs, m.store.Close())...)
}

// unsettled says whether the driver has a name that no record names, or under
// another name than its record says.
func (m *Manager) unsettled() bool {
	m.lock()
	defer m.unlock()
	for _, e := range m.entries {
		if e.rec != nil && !e.recorded {
			return true
		}
	}
	return m.leftover || len(m.unswapped) > 0 || len(m.orphans) > 0 || m.blobs.busy()
}

package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/moby/locker"
	"golang.org/x/sys/unix"
)

// The directories below snapshots.
const (
	dirNew       = "new"
	dirActive    = "active"
	dirCommitted = "committed"
	dirTrash     = "trash"
	dirEmpty     = "empty"
	dirLinks     = "l"
	dirAdopted   = "snapshots"
)

// tree is what the two drivers have in common: names, infos and children on
// the layout of the package's documentation.
type tree struct {
	// Fixed after Open.
	dir     string // the absolute path of snapshots
	dev     uint64 // the device it lies on
	info    Info
	backend backend
	steps   func(string) error
	clock   func() time.Time
	locks   *locker.Locker

	adoptions adoptions
	removers  sync.Pool // of *remover

	syncMu sync.Mutex
	synced []*os.File // a descriptor per file system, kept for Sync

	mu      sync.Mutex
	held    map[string]bool // trash names that Cleanup leaves alone
	making  map[string]bool // names in new that a call is working on
	layers  map[string]layer
	cleaned map[string]snapshots.Usage // by entry name, what Clean found
	gen     uint64                     // counts names that ceased to be, see forget
	sealing []string                   // committed names whose work may still be there
}

// layer is what is remembered of a committed name.
type layer struct {
	parent  string
	stack   []string // the layers of a stack that show, topmost first
	opaque  bool     // nothing below it shows
	clean   bool
	bound   string
	link    string // the short link to its fs, once there is one
	isStack bool
}

// layer is what is remembered of an entry with this state.
func (s state) layer() layer {
	l := layer{parent: string(s.Parent), opaque: s.Opaque, clean: s.Clean, bound: string(s.Bound), isStack: s.stack()}
	for _, name := range slices.Backward(s.Layers[s.Hidden:]) {
		l.stack = append(l.stack, string(name))
	}
	return l
}

// A backend is how one of the drivers keeps the trees of entries.
type backend interface {
	// check refuses, before anything is made, a parent that cannot get
	// another layer.
	check(parent string) error
	// fill makes what the new entry at path holds beside info: the parent's
	// content lies in the directory from, which is empty for none.
	fill(ctx context.Context, path, from string, view bool) error
	// mounts describes the mounts of an active entry e. Its directory is at
	// the path at, from where it may be about to move to its place.
	mounts(e entry, s state, at string) ([]mount.Mount, error)
	mount(e entry, s state, target string, readOnly bool) error
	// whole is the directory with the whole tree of an entry.
	whole(e entry, s state) (dir string, ok bool)
	inUse(e entry, s state) (bool, error)
	// examine notes what there is to know of the adopted tree at path.
	examine(path string, s *state) error
	// describe notes what the layer at path is, which is about to be
	// committed.
	describe(path string, s *state) error
	// rebase says whether a snapshot can get its parent when it is committed.
	rebase() error
	// tidy removes what the sealed entry at path no longer needs; again
	// says that it is to be asked once more later.
	tidy(path string, patient bool) (again bool, err error)
}

// entry is the place of a snapshot: one of the directories, and its name.
type entry struct{ dir, name string }

func (t *tree) path(elem ...string) string {
	return below(t.dir, elem...)
}

// below is filepath.Join of names that have nothing to be cleaned. A third of
// all that New and a removal allocated was to look and copy once more.
func below(dir string, names ...string) string {
	n := len(dir)
	for _, name := range names {
		n += 1 + len(name)
	}
	var b strings.Builder
	b.Grow(n)
	b.WriteString(dir)
	for _, name := range names {
		b.WriteByte('/')
		b.WriteString(name)
	}
	return b.String()
}

func (t *tree) at(e entry) string { return t.path(e.dir, e.name) }

// step announces a durable step; an error of it stands for the step's own.
func (t *tree) step(name string) error {
	if t.steps == nil {
		return nil
	}
	if err := t.steps(name); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// rename moves a complete entry to a name that must be free.
func (t *tree) rename(step string, from, to entry) error {
	if err := t.step(step); err != nil {
		return err
	}
	if err := t.left(from); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, t.at(from), unix.AT_FDCWD, t.at(to), unix.RENAME_NOREPLACE)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EEXIST):
		err = fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
	case errors.Is(err, unix.ENOENT):
		err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return fmt.Errorf("rename %s/%s to %s: %w", from.dir, from.name, to.dir, err)
}

// lock takes the locks of the keys, without empty ones, in their order.
func (t *tree) lock(keys ...string) (unlock func()) { return lockKeys(t.locks, keys) }

func lockKeys(locks *locker.Locker, keys []string) (unlock func()) {
	slices.Sort(keys)
	keys = slices.Compact(keys)
	keys = slices.DeleteFunc(keys, func(k string) bool { return k == "" })
	for _, k := range keys {
		locks.Lock(k)
	}
	return func() {
		for _, k := range keys {
			if err := locks.Unlock(k); err != nil {
				panic(fmt.Sprintf("snapshot: unlock %q: %v", k, err))
			}
		}
	}
}

func requireKey(key string) error {
	if key == "" {
		return fmt.Errorf("empty key: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

func exists(path string) (bool, error) {
	// Not os.Lstat: half of all that a removal would allocate is its answer.
	var st unix.Stat_t
	switch err := unix.Lstat(path, &st); {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOENT):
		return false, nil
	default:
		return false, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
}

// find is where key is. It looks twice, as Commit may move it from a place
// not yet seen to one seen already. An adopted snapshot gets its entry.
func (t *tree) find(key string) (entry, error) {
	if err := requireKey(key); err != nil {
		return entry{}, err
	}
	name := encodeKey(key)
	for i := range 2 {
		if i > 0 {
			if err := t.claim(name); err != nil {
				return entry{}, fmt.Errorf("snapshot %q: %w", key, err)
			}
		}
		for _, dir := range []string{dirCommitted, dirActive} {
			e := entry{dir, name}
			if ok, err := exists(t.at(e)); err != nil {
				return entry{}, err
			} else if ok {
				return e, nil
			}
		}
	}
	return entry{}, fmt.Errorf("snapshot %q: %w", key, errdefs.ErrNotFound)
}

// load is find, and what is known of the entry.
func (t *tree) load(key string) (entry, state, error) {
	if err := requireKey(key); err != nil {
		return entry{}, state{}, err
	}
	name := encodeKey(key)
	for i := range 2 {
		if i > 0 {
			if err := t.claim(name); err != nil {
				return entry{}, state{}, fmt.Errorf("snapshot %q: %w", key, err)
			}
		}
		for _, dir := range []string{dirCommitted, dirActive} {
			e := entry{dir, name}
			s, err := t.stateOf(e)
			if !errors.Is(err, fs.ErrNotExist) {
				return e, s, err
			}
		}
	}
	e, err := t.find(key)
	if err != nil {
		return entry{}, state{}, err
	}
	return entry{}, state{}, fmt.Errorf("%s/%s has no info: %w", e.dir, e.name, errdefs.ErrDataLoss)
}

func (t *tree) stateOf(e entry) (state, error) {
	s, err := readState(below(t.at(e), "info"), e.dir == dirCommitted)
	if err != nil || s.Sealed || e.dir != dirCommitted {
		return s, err
	}
	// The sealed line is lost. It may have named another parent, to which a
	// commit had moved the snapshot: the link tells at least whether there
	// is one.
	linked, err := exists(below(t.at(e), "parent"))
	if err == nil && linked != (s.Parent != "") {
		err = fmt.Errorf("%s/%s has lost its parent's name: %w", e.dir, e.name, errdefs.ErrDataLoss)
	}
	return s, err
}

// free refuses a key that is taken.
func (t *tree) free(key string) error {
	name := encodeKey(key)
	for _, dir := range []string{dirCommitted, dirActive} {
		if ok, err := exists(t.path(dir, name)); err != nil {
			return err
		} else if ok {
			return fmt.Errorf("snapshot %q: %w", key, errdefs.ErrAlreadyExists)
		}
	}
	if _, ok, err := t.awaited(name); err != nil || ok {
		return errors.Join(err, fmt.Errorf("adopted snapshot %q: %w", key, errdefs.ErrAlreadyExists))
	}
	return nil
}

// look is load for those who only ask: an adopted snapshot stays without an
// entry.
func (t *tree) look(key string) (entry, state, error) {
	name := encodeKey(key)
	for _, dir := range []string{dirCommitted, dirActive} {
		e := entry{dir, name}
		if s, err := t.stateOf(e); !errors.Is(err, fs.ErrNotExist) {
			return e, s, err
		}
	}
	if a, ok, err := t.awaited(name); err != nil || ok {
		return a.entry(), a.state(), err
	}
	return t.load(key)
}

func (e entry) kind(s state) snapshots.Kind {
	switch {
	case e.dir == dirCommitted:
		return snapshots.KindCommitted
	case s.View:
		return snapshots.KindView
	}
	return snapshots.KindActive
}

// layerOf is what is known of a committed name.
func (t *tree) layerOf(name string) (layer, error) {
	t.mu.Lock()
	l, ok := t.layers[name]
	gen := t.gen
	t.mu.Unlock()
	if ok {
		return l, nil
	}
	e := entry{dirCommitted, encodeKey(name)}
	s, err := t.stateOf(e)
	if errors.Is(err, fs.ErrNotExist) {
		if err := t.claim(e.name); err != nil {
			return layer{}, fmt.Errorf("layer %q: %w", name, err)
		}
		s, err = t.stateOf(e)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return layer{}, fmt.Errorf("layer %q: %w: %w", name, err, errdefs.ErrNotFound)
	}
	if err != nil {
		return layer{}, err
	}
	l = s.layer()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gen == gen {
		t.layers[name] = l
	}
	return l, nil
}

// chain is what shows of name and its ancestors, topmost first, but no more
// than limit: the layers of a stack stand in its place.
func (t *tree) chain(name string, limit int) ([]string, error) {
	var names []string
	for name != "" && len(names) < limit {
		l, err := t.layerOf(name)
		if err != nil {
			return nil, err
		}
		if l.isStack {
			return append(names, l.stack[:min(len(l.stack), limit-len(names))]...), nil
		}
		names = append(names, name)
		if l.opaque {
			break
		}
		name = l.parent
	}
	return names, nil
}

// remember notes a committed name that has just come to be.
func (t *tree) remember(name string, s state) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.layers[name] = s.layer()
}

// forget drops what is remembered of a name that ceases to be. Who read its
// state before and would note it now sees by gen that it is too late.
func (t *tree) forget(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.layers, name)
	t.gen++
}

// Info implements Driver.
func (t *tree) Info() Info { return t.info }

// Stacker implements Driver.
func (t *tree) Stacker() (Stacker, bool) { return nil, false }

// Sync implements Driver.
func (t *tree) Sync(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	t.syncMu.Lock()
	defer t.syncMu.Unlock()
	if t.synced == nil {
		return fmt.Errorf("sync: driver is closed: %w", errdefs.ErrFailedPrecondition)
	}
	if err := t.step("sync"); err != nil {
		return err
	}
	var errs []error
	for _, f := range t.synced {
		if err := unix.Syncfs(int(f.Fd())); err != nil {
			errs = append(errs, &os.PathError{Op: "syncfs", Path: f.Name(), Err: err})
		}
	}
	return errors.Join(errs...)
}

// Close implements Driver. Mounts and names stay.
func (t *tree) Close() error {
	var errs []error
	t.syncMu.Lock()
	open := t.synced
	t.synced = nil
	t.syncMu.Unlock()
	if open != nil {
		errs = append(errs, t.tidy(closeTidies))
	}
	for _, f := range open {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

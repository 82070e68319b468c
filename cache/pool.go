package cache

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/moby/locker"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/lamina-build/lamina/metadata"
)

// pool keeps the mounts of this process: at most one for writing and one for
// reading of each record. An upper directory is never in two overlays at once,
// so whatever comes second is a bind of the mount that has it.
type pool struct {
	// Fixed when made.
	dir string
	// private says that the mounts are in a namespace that dies with the
	// process.
	private bool
	// plain says that the process cannot mount: the driver's own directory
	// stands for a mount.
	plain bool
	locks *locker.Locker // one per record, held across the mount call

	// groundMu is a leaf, held across mount calls on the mount points'
	// directory itself.
	groundMu sync.Mutex

	mu sync.Mutex
	// Guarded by mu.
	mounts map[poolKey]*poolMount
	closed bool
}

type poolKey struct {
	id       metadata.ID
	readOnly bool
}

type poolMount struct {
	path string
	refs int
	// upper says that the kernel mount behind it has the snapshot as its
	// upper directory, be it visible here for reading only.
	upper bool
	// plain says that nothing was mounted.
	plain bool
	// detached mounts outlive the manager.
	detached bool
}

func newPool(root string, private, plain bool) *pool {
	return &pool{
		dir: filepath.Join(root, "mounts"), private: private, plain: plain,
		locks: locker.New(), mounts: map[poolKey]*poolMount{},
	}
}

func (p *pool) lockKey(id metadata.ID) (unlock func()) {
	p.locks.Lock(string(id))
	return func() {
		if err := p.locks.Unlock(string(id)); err != nil {
			panic("cache: mount pool: " + err.Error())
		}
	}
}

func (p *pool) lookup(key poolKey) *poolMount {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mounts[key]
}

// get gives the path of the mount of key, made by mount if there is none.
// Each get wants a put.
func (p *pool) get(ctx context.Context, key poolKey, mount func(target string) error, plain func() (string, error)) (string, error) {
	defer p.lockKey(key.id)()
	if t := p.lookup(key); t != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		t.refs++
		return t.path, nil
	}
	if err := ctx.Err(); err != nil {
		return "", context.Cause(ctx)
	}
	t := &poolMount{refs: 1}
	var err error
	if p.plain {
		t.plain = true
		if t.path, err = plain(); err == nil && t.path == "" {
			err = fmt.Errorf("nothing can be mounted here, and the driver has no plain directory: %w", errdefs.ErrFailedPrecondition)
		}
	} else {
		other := p.lookup(poolKey{id: key.id, readOnly: !key.readOnly})
		t.upper = !key.readOnly || other != nil && other.upper
		t.path, err = p.mount(key, func(target string) error {
			if other != nil && other.upper {
				return bind(other.path, target, key.readOnly)
			}
			return mount(target)
		})
	}
	if err != nil {
		return "", err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mounts[key] = t
	return t.path, nil
}

// mount makes a directory for key and mounts on it.
func (p *pool) mount(key poolKey, mount func(target string) error) (string, error) {
	if err := p.layGround(); err != nil {
		return "", classify(err)
	}
	target, err := os.MkdirTemp(p.dir, mountName(key)+"~")
	if err != nil {
		return "", classify(err)
	}
	if err := mount(target); err != nil {
		// It may have failed after something was mounted.
		return "", errors.Join(err, unmount(target, unix.MNT_DETACH))
	}
	return target, nil
}

// put gives a get back and unmounts after the last one.
func (p *pool) put(key poolKey) error {
	defer p.lockKey(key.id)()
	t := p.lookup(key)
	if t == nil {
		return nil
	}
	if t.refs == 1 {
		if err := t.end(0); err != nil {
			return err
		}
	}
	p.mu.Lock()
	if t.refs--; t.refs == 0 {
		delete(p.mounts, key)
	}
	last := p.closed && len(p.mounts) == 0
	p.mu.Unlock()
	if last {
		return p.liftGround()
	}
	return nil
}

func (t *poolMount) end(flags int) error {
	if t.plain {
		return nil
	}
	return unmount(t.path, flags)
}

// unmount ends what is mounted on a directory, if anything is, and removes the
// directory.
func unmount(path string, flags int) error {
	// EINVAL: nothing is, or somebody else unmounted it.
	if err := unix.Unmount(path, flags|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// writable reports whether a writable mount of id is there.
func (p *pool) writable(id metadata.ID) bool {
	return p.lookup(poolKey{id: id}) != nil
}

// mounted reports whether any mount of id is there.
func (p *pool) mounted(id metadata.ID) bool {
	return p.writable(id) || p.lookup(poolKey{id: id, readOnly: true}) != nil
}

// detach lets the mounts of id outlive the manager.
func (p *pool) detach(id metadata.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ro := range []bool{false, true} {
		if t := p.mounts[poolKey{id: id, readOnly: ro}]; t != nil {
			t.detached = true
		}
	}
}

// close ends all mounts that were not detached. It says whether mounts are
// left that somebody may have to clean up after this process.
func (p *pool) close() (left bool, err error) {
	p.mu.Lock()
	mounts := maps.Clone(p.mounts)
	p.closed = true
	p.mu.Unlock()
	var errs []error
	for key, t := range mounts {
		if t.detached {
			left = left || !p.private && !t.plain
			continue
		}
		errs = append(errs, p.endNow(key))
	}
	if !p.private && !p.plain {
		// Also those of processes that were killed while this one had the
		// store open.
		names, rerr := os.ReadDir(p.dir)
		left = left || len(names) > 0
		if rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			errs = append(errs, rerr)
		}
	}
	if !left {
		errs = append(errs, p.liftGround())
	}
	err = errors.Join(errs...)
	return left || err != nil && !p.private, err
}

// endNow ends a mount whoever uses it.
func (p *pool) endNow(key poolKey) error {
	defer p.lockKey(key.id)()
	t := p.lookup(key)
	if t == nil {
		return nil
	}
	p.mu.Lock()
	delete(p.mounts, key)
	p.mu.Unlock()
	return t.end(unix.MNT_DETACH)
}

// layGround puts a file system of its own under the mount points, before the
// first of them. So a mount needs no free byte or inode of the disk; in a mount
// namespace of this process nobody else sees the mount points; and in one that
// others share, an unmount reaches the copies that their namespaces have of a
// mount, which would else keep its upper directory in use.
func (p *pool) layGround() error {
	p.groundMu.Lock()
	defer p.groundMu.Unlock()
	if there, err := p.hasGround(); err != nil || there {
		return err
	}
	if err := unix.Mount("lamina", p.dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700"); err != nil {
		return &os.PathError{Op: "mount tmpfs on", Path: p.dir, Err: err}
	}
	if err := unix.Mount("", p.dir, "", unix.MS_SHARED, ""); err != nil {
		return errors.Join(&os.PathError{Op: "share", Path: p.dir, Err: err}, unix.Unmount(p.dir, unix.MNT_DETACH))
	}
	return nil
}

// hasGround says whether something is mounted on the mount points' directory.
func (p *pool) hasGround() (bool, error) {
	var own, root unix.Stat_t
	if err := unix.Stat(p.dir, &own); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, &os.PathError{Op: "stat", Path: p.dir, Err: err}
	}
	if err := unix.Stat(filepath.Dir(p.dir), &root); err != nil {
		return false, &os.PathError{Op: "stat", Path: filepath.Dir(p.dir), Err: err}
	}
	return own.Dev != root.Dev, nil
}

// liftGround takes the file system away when no mount is left on it. In a
// namespace of this process it stays, for mounts that outlive the manager.
func (p *pool) liftGround() error {
	p.groundMu.Lock()
	defer p.groundMu.Unlock()
	if there, err := p.hasGround(); err != nil || !there || p.private {
		return err
	}
	if err := unix.Unmount(p.dir, unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EBUSY) {
		return &os.PathError{Op: "unmount", Path: p.dir, Err: err}
	}
	return nil
}

// cleanStale unmounts what a killed process left below the mount points, but
// not what a living one uses, which held says by the id's fileName. Removing a
// mount point takes the mounts on it away in all other namespaces, too.
func (p *pool) cleanStale(held func(name string) bool) error {
	dir, err := filepath.EvalSymlinks(p.dir)
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range slices.Backward(mounts) {
		if t.Mountpoint != dir && !held(mountedID(dir, t.Mountpoint)) {
			if err := unix.Unmount(t.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				errs = append(errs, &os.PathError{Op: "unmount", Path: t.Mountpoint, Err: err})
			}
		}
	}
	names, err := os.ReadDir(dir)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, n := range names {
		if held(mountedID(dir, filepath.Join(dir, n.Name()))) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, n.Name())); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, p.liftGround())...)
}

// mountedID is the fileName of the id that was mounted below dir on path.
func mountedID(dir, path string) string {
	rel, err := filepath.Rel(dir, path)
	if err != nil {
		return ""
	}
	name, _, _ := strings.Cut(rel, string(filepath.Separator))
	if i := strings.LastIndexByte(name, '~'); i >= 0 {
		name = name[:i]
	}
	return strings.TrimSuffix(name, readOnlySuffix)
}

// readOnlySuffix cannot be the end of a fileName: it has a byte that is not in
// one.
const readOnlySuffix = "+ro"

func bind(source, target string, readOnly bool) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "bind mount", Path: target, Err: err}
	}
	flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT)
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount("", target, "", flags, ""); err != nil {
		return errors.Join(&os.PathError{Op: "remount", Path: target, Err: err}, unix.Unmount(target, unix.MNT_DETACH))
	}
	return nil
}

// mountName makes a directory name that a person recognises.
func mountName(key poolKey) string {
	if key.readOnly {
		return fileName(key.id) + readOnlySuffix
	}
	return fileName(key.id)
}

// fileName turns an id, which may hold any bytes, into one path component.
func fileName(id metadata.ID) string {
	const most = 128
	plain := id != "" && len(id) <= most && !strings.HasPrefix(string(id), ".") && !strings.HasPrefix(string(id), "sha-")
	for i := 0; plain && i < len(id); i++ {
		c := id[i]
		plain = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.'
	}
	if plain {
		return string(id)
	}
	sum := sha256.Sum256([]byte(id))
	return "sha-" + hex.EncodeToString(sum[:])
}

package metadata

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// waitNotice is after what time a person would like to know what is waited
// for.
const waitNotice = time.Second

// acquire opens the store's file, making it if need be, and takes its lock:
// shared to read, else exclusive.
func acquire(ctx context.Context, path string, o Options) (*os.File, error) {
	w := &lockWait{path: path, opts: o, start: time.Now()}
	for {
		flag := os.O_RDWR
		if o.ReadOnly {
			flag = os.O_RDONLY
		}
		f, err := os.OpenFile(path, flag, 0)
		if errors.Is(err, fs.ErrNotExist) {
			if o.ReadOnly {
				return nil, fmt.Errorf("open store: %w: %w", err, errdefs.ErrNotFound)
			}
			if err := create(ctx, path, w); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, ioError("open store", err)
		}
		if err := w.lock(ctx, f, o.ReadOnly); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		same, err := names(path, f)
		if err == nil && same {
			return f, nil
		}
		// Another file took the name while we waited.
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
	}
}

// names says whether path still leads to the open file.
func names(path string, f *os.File) (bool, error) {
	mine, err := f.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return os.SameFile(mine, there), nil
}

// lockWait is the wait of one Open, over all the locks that it takes.
type lockWait struct {
	path     string
	opts     Options
	start    time.Time
	noticed  bool
	interval time.Duration
}

// lock takes the flock of f, asking again and again: a wait in the kernel
// would end neither with the context nor after a time.
func (w *lockWait) lock(ctx context.Context, f *os.File, shared bool) error {
	how := unix.LOCK_EX
	if shared {
		how = unix.LOCK_SH
	}
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", w.path, err)
		}
		waited := time.Since(w.start)
		if waited >= w.opts.LockTimeout {
			return &LockedError{Path: w.path, Holder: w.holder(f)}
		}
		if waited >= waitNotice && !w.noticed && w.opts.OnWait != nil {
			w.noticed = true
			w.opts.OnWait(w.holder(f))
		}
		if err := w.pause(ctx, w.opts.LockTimeout-waited); err != nil {
			return fmt.Errorf("wait for %s, open in %s: %w", w.path, w.holder(f), err)
		}
	}
}

// pause waits a little, longer each time: the store is mostly held for the
// moments of one transaction.
func (w *lockWait) pause(ctx context.Context, most time.Duration) error {
	w.interval = min(max(2*w.interval, time.Millisecond), 25*time.Millisecond)
	t := time.NewTimer(min(w.interval, most))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// holder finds out who has the lock. A shared lock that can be had means
// that readers have it; the hint is then an old writer's.
func (w *lockWait) holder(f *os.File) Holder {
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil {
		_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
		return Holder{Readers: true}
	}
	return readHolder(w.path)
}

// create makes an empty store under another name and renames it, so that a
// kill leaves either no store or a whole one. Of several who try, one makes
// it, and the others find it.
func create(ctx context.Context, path string, w *lockWait) error {
	if err := w.opts.Step("create file"); err != nil {
		return ioError("create store", err)
	}
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return ioError("create store", err)
	}
	if err := w.lock(ctx, f, false); err != nil {
		return errors.Join(err, f.Close())
	}
	same, err := names(tmp, f)
	if err != nil || !same {
		return errors.Join(err, f.Close())
	}
	if _, err := os.Lstat(path); err == nil {
		return errors.Join(os.Remove(tmp), f.Close())
	}
	db, err := fill(f, w.opts)
	if err == nil {
		err = writeSeal(f)
	}
	if err == nil {
		err = publish(tmp, path, w.opts)
	}
	if err != nil {
		err = errors.Join(ioError("create store", err), removeIfThere(tmp))
	}
	// Closing frees the lock, which is on the file and not on its name: who
	// waits for it finds it renamed. Hence this comes last.
	if db != nil {
		err = errors.Join(err, db.Close())
	}
	return errors.Join(err, closeFile(f))
}

// fill writes an empty store into the locked file. What is in it is a rest
// of somebody who was killed here.
func fill(f *os.File, o Options) (*bolt.DB, error) {
	if err := f.Truncate(0); err != nil {
		return nil, err
	}
	writeInPlace(f)
	db, err := bolt.Open(f.Name(), 0o600, &bolt.Options{
		Timeout:  time.Millisecond,
		OpenFile: func(string, int, os.FileMode) (*os.File, error) { return f, nil },
	})
	if err != nil {
		return nil, err
	}
	db.AllocSize = growStep
	return db, db.Update(func(b *bolt.Tx) error {
		return newTx(nil, nil, b).init(o.Now())
	})
}

// publish gives the file its name, for good.
func publish(tmp, path string, o Options) error {
	if err := o.Step("create rename"); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	if err := o.Step("create sync"); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func removeIfThere(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return ioError("sync directory", err)
	}
	return errors.Join(ioError("sync directory", d.Sync()), d.Close())
}

// boltMeta is what we read of a meta page: the page's header of 16 bytes,
// then magic, version, page size, flags (4 bytes each), root page, its
// sequence, free list, high water mark, transaction, and an FNV-64a of all
// that from the magic on (8 bytes each), in the machine's byte order.
type boltMeta struct {
	pageSize             uint32
	root, freelist, used uint64
	txid                 uint64
}

const (
	boltMagic      = 0xED0CDAED
	boltVersion    = 2
	boltNoFreelist = ^uint64(0)
	boltHeader     = 16
	boltMetaSize   = 64
)

var (
	errNoMeta  = errors.New("no meta page")
	errBadMeta = errors.New("damaged meta page")
)

func readMeta(f *os.File, at int64) (boltMeta, error) {
	var b [boltHeader + boltMetaSize]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		return boltMeta{}, fmt.Errorf("%w: %w", errNoMeta, err)
	}
	return decodeBoltMeta(b[boltHeader:])
}

func metaSum(p []byte) uint64 {
	h := fnv.New64a()
	h.Write(p[:boltMetaSize-8])
	return h.Sum64()
}

// inspect looks at the length of the file and its meta pages before bbolt
// maps it: a page that is missing raises SIGBUS there. It returns the meta
// page that bbolt will go by. One that was damaged is restored, where the file
// may be written.
func inspect(f *os.File, readOnly bool) (boltMeta, error) {
	info, err := f.Stat()
	if err != nil {
		return boltMeta{}, err
	}
	if !info.Mode().IsRegular() {
		return boltMeta{}, fmt.Errorf("not a regular file: %w", ErrForeign)
	}
	if info.Size() == 0 {
		return boltMeta{}, fmt.Errorf("file is empty: %w", ErrDamaged)
	}
	m, s, sealed, damaged, err := newest(f)
	if err != nil {
		return boltMeta{}, err
	}
	if need := int64(m.used) * int64(m.pageSize); m.used > 1<<40 || info.Size() < need {
		return boltMeta{}, fmt.Errorf("file has %d bytes of %d: %w", info.Size(), need, ErrDamaged)
	}
	outside := func(page uint64) bool { return page < 2 || page >= m.used }
	if outside(m.root) || (m.freelist != boltNoFreelist && outside(m.freelist)) {
		return boltMeta{}, fmt.Errorf("meta page points outside of the file: %w", ErrDamaged)
	}
	if readOnly {
		if damaged {
			err = errDamagedMeta(m)
		}
		return m, err
	}
	if err := prepare(f, m, s, sealed); err != nil {
		return boltMeta{}, err
	}
	if damaged {
		err = ioError("restore the meta page", s.restore(f))
	}
	return m, err
}

// newestMeta finds the meta page that bbolt will go by. The second one lies
// behind the first page, whose size is known only from a meta page.
func newestMeta(f *os.File) (boltMeta, error) {
	best, err := readMeta(f, 0)
	damaged := errors.Is(err, errBadMeta)
	found := err == nil
	at := []int64{int64(best.pageSize)}
	if !found {
		at = nil
		for size := int64(1024); size <= 16<<20; size *= 2 {
			at = append(at, size)
		}
	}
	for _, pos := range at {
		m, err := readMeta(f, pos)
		damaged = damaged || errors.Is(err, errBadMeta)
		if err == nil && int64(m.pageSize) == pos && (!found || m.txid > best.txid) {
			best, found = m, true
		}
	}
	switch {
	case !found && damaged:
		return boltMeta{}, fmt.Errorf("both meta pages: %w", ErrDamaged)
	case !found:
		return boltMeta{}, fmt.Errorf("no bbolt file: %w", ErrForeign)
	case best.pageSize < 1024 || best.pageSize > 16<<20 || best.pageSize&(best.pageSize-1) != 0:
		return boltMeta{}, fmt.Errorf("page size %d: %w", best.pageSize, ErrDamaged)
	}
	return best, nil
}

package metadata

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// New is a record that Build writes, with what is attached to it.
type New struct {
	Record      *Record
	Attachments map[string][]byte
}

// Build makes a new store at path out of the records of all, in one go. It is
// how many records come in at once: each bucket is written in the order of its
// keys, page behind page, where an Update for some of the records after the
// other would write most pages again and again. Records may come in any order.
//
// Records are held in memory, encoded, until the last has come: about as much
// as the file is going to have. Attachments are not.
//
// Nothing is synced, neither the file nor its name: who relies on them does
// that before, perhaps together with other things. If Build fails there is no
// file, or, if the process is killed, one that is to be thrown away. Options
// that matter are MaxSize, Now and Step, whose steps are "build file" and "build
// rows" (each part).
//
// Errors: already exists if there is such a file, or if an id, an alias or a
// driver key is asked for twice; failed precondition if a parent is not among
// the records; invalid argument; and the error that comes with a record.
func Build(ctx context.Context, path string, o Options, meta Meta, all iter.Seq2[New, error]) (err error) {
	o = o.withDefaults()
	b := &builder{ctx: ctx, opts: o}
	defer func() {
		if err != nil {
			err = fmt.Errorf("build %s: %w", path, ioError("build store", err))
		}
	}()
	if err := b.step("build file"); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return err
	}
	writeInPlace(f)
	defer func() {
		if err != nil {
			err = errors.Join(err, removeIfThere(path))
		}
		err = errors.Join(err, closeFile(f))
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if b.db, err = openBoltFresh(f, o, os.Getpagesize()); err != nil {
		return err
	}
	err = b.run(meta, all)
	if err == nil {
		err = writeSeal(f)
	}
	return errors.Join(err, b.db.Close())
}

// builder is one Build.
type builder struct {
	ctx  context.Context
	opts Options
	db   *bolt.DB
	out  *batchWriter

	// waiting are records that are not encoded yet.
	waiting []*Record
	// rows are all but attachments.
	rows   map[string][]builtRow
	totals *sums
	// newest is the time of the newest id that was made here.
	newest uint64
}

// builtRow is a row to be written; id is the record that asks for it.
type builtRow struct {
	key, value string
	id         ID
}

// bytesOf are the bytes of a string, which nobody may change.
func bytesOf(s string) []byte { return unsafe.Slice(unsafe.StringData(s), len(s)) }

func (b *builder) step(name string) error {
	if err := context.Cause(b.ctx); err != nil {
		return err
	}
	return b.opts.Step(name)
}

func (b *builder) run(meta Meta, all iter.Seq2[New, error]) error {
	b.rows, b.totals = map[string][]builtRow{}, newSums()
	b.out = &batchWriter{db: b.db, before: func() error { return b.step("build rows") }}
	defer b.out.rollback()
	for n, err := range all {
		if err == nil {
			err = context.Cause(b.ctx)
		}
		if err == nil {
			err = b.add(n)
		}
		if err != nil {
			return err
		}
	}
	if err := b.encode(); err != nil {
		return err
	}
	var sorts sync.WaitGroup
	for _, rows := range b.rows {
		sorts.Go(func() {
			slices.SortFunc(rows, func(x, y builtRow) int { return strings.Compare(x.key, y.key) })
		})
	}
	sorts.Wait()
	if err := b.check(); err != nil {
		return err
	}
	if err := b.write(); err != nil {
		return err
	}
	return b.finish(meta)
}

// add takes a record, and writes its attachments.
func (b *builder) add(n New) error {
	if err := validate(n.Record); err != nil {
		return err
	}
	r := *n.Record
	r.Revision, r.row, r.unknown = 1, r.ID, nil
	if len(n.Attachments) > 0 {
		if err := b.attach(&r, n.Attachments); err != nil {
			return err
		}
	}
	const together = 1024 // enough that starting goroutines costs nothing
	if b.waiting = append(b.waiting, &r); len(b.waiting) < together {
		return nil
	}
	return b.encode()
}

// encode makes rows of the records that wait for it, on all processors.
func (b *builder) encode() error {
	type rows struct {
		value   string
		derived []row
		err     error
	}
	made := make([]rows, len(b.waiting))
	var work sync.WaitGroup
	workers := runtime.GOMAXPROCS(0)
	for w := range workers {
		work.Go(func() {
			for i := w; i < len(made); i += workers {
				value, err := encodeRecord(b.waiting[i])
				made[i].value, made[i].err = unsafe.String(unsafe.SliceData(value), len(value)), err
				made[i].derived = derived(b.waiting[i])
			}
		})
	}
	work.Wait()
	for i, r := range b.waiting {
		if made[i].err != nil {
			return made[i].err
		}
		b.row(bucketRecord, string(r.ID), made[i].value, r.ID)
		for _, d := range made[i].derived {
			b.row(d.bucket, d.key, d.value, r.ID)
		}
		b.totals.add(r)
		if ms, ok := ulidTime(r.ID); ok {
			b.newest = max(b.newest, ms)
		}
	}
	b.waiting = b.waiting[:0]
	return nil
}

func (b *builder) row(bucket, key, value string, id ID) {
	b.rows[bucket] = append(b.rows[bucket], builtRow{key, value, id})
}

// attach writes attachments: they may be much more than fits into memory. Those
// of records that come in the order of their ids lie in order, too.
func (b *builder) attach(r *Record, attachments map[string][]byte) error {
	if err := b.out.bucket(bucketAttachment); err != nil {
		return err
	}
	names := make([]string, 0, len(attachments))
	for name := range attachments {
		if name == "" || len(name) > MaxNameLen {
			return invalid("record %q: attachment name of %d bytes, 1 to %d are allowed", r.ID, len(name), MaxNameLen)
		}
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		key := attachmentKey(r.row, name)
		if err := b.out.put(bucketAttachment, key, frame(key, attachments[name])); err != nil {
			return err
		}
	}
	return nil
}

// check looks for names that two records ask for, and for parents that are not
// there. The rows are sorted.
func (b *builder) check() error {
	for _, bucket := range []string{bucketRecord, bucketAlias, bucketSnapshot} {
		rows := b.rows[bucket]
		for i := 1; i < len(rows); i++ {
			if rows[i-1].key == rows[i].key {
				return fmt.Errorf("%s %q of record %q is taken by record %q: %w", bucket, rows[i].key, rows[i].id, rows[i-1].id, errdefs.ErrAlreadyExists)
			}
		}
	}
	for _, alias := range b.rows[bucketAlias] {
		if b.have(alias.key) {
			return fmt.Errorf("alias %q of record %q is a record's id: %w", alias.key, alias.id, errdefs.ErrAlreadyExists)
		}
	}
	for _, row := range b.rows[bucketChild] {
		parent, _, _ := splitPair(bytesOf(row.key))
		if !b.have(parent) {
			return fmt.Errorf("record %q: parent %q does not exist: %w", row.id, parent, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

func (b *builder) have(id string) bool {
	_, ok := slices.BinarySearchFunc(b.rows[bucketRecord], id, func(r builtRow, id string) int { return strings.Compare(r.key, id) })
	return ok
}

// write writes the sorted rows, bucket after bucket.
func (b *builder) write() error {
	for _, bucket := range buckets() {
		if err := b.out.bucket(bucket); err != nil {
			return err
		}
		for _, row := range b.rows[bucket] {
			if err := b.out.put(bucket, bytesOf(row.key), bytesOf(row.value)); err != nil {
				return err
			}
		}
	}
	return b.out.commit()
}

// finish writes totals and counters, and what the store is.
func (b *builder) finish(meta Meta) error {
	if err := b.step("build rows"); err != nil {
		return err
	}
	b.db.NoFreelistSync = false // as Close leaves it
	return b.db.Update(func(btx *bolt.Tx) error {
		tx := newTx(nil, nil, btx)
		created := meta.Created
		if created.IsZero() {
			created = b.opts.Now()
		}
		if err := tx.init(created); err != nil {
			return err
		}
		meta.Created, meta.Schema = created, 0
		if err := tx.SetMeta(meta); err != nil {
			return err
		}
		groups := b.totals.groups()
		for g, t := range groups {
			if err := tx.putTotal(g, t.Count, t.Bytes); err != nil {
				return err
			}
		}
		if err := tx.setSequence(bucketRecord, b.newest); err != nil {
			return err
		}
		return tx.err
	})
}

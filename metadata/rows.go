package metadata

import (
	"bytes"
	"fmt"
	"iter"
	"runtime/debug"

	bolt "go.etcd.io/bbolt"
)

// This file is the only way to the rows. bbolt answers a damaged page with a
// panic, and reads of a file that was cut behind our back fault: both become
// errors here, so that what is above need not know of them. What is returned
// is a copy; bbolt's own slices point into the memory map.

// guard runs a few calls of bbolt. In a writing transaction a failure
// spoils the whole transaction, since bbolt may have stopped half way.
func (tx *Tx) guard(what string, f func() error) (err error) {
	if tx.done {
		return fmt.Errorf("%s: transaction has ended: %w", what, ErrClosed)
	}
	if tx.err != nil && tx.tx.Writable() {
		return tx.err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = recovered(what, p)
			if tx.tx.Writable() {
				tx.fail(err)
			}
		}
	}()
	return f()
}

// fail makes the transaction end in err whatever its function returns.
func (tx *Tx) fail(err error) {
	if tx.err == nil {
		tx.err = err
	}
}

// get returns a copy of the value; ok is false if there is none.
func (tx *Tx) get(bucket string, key []byte) (value []byte, ok bool, err error) {
	err = tx.guard("read "+bucket, func() error {
		if b := tx.tx.Bucket([]byte(bucket)); b != nil {
			if v := b.Get(key); v != nil {
				value, ok = bytes.Clone(v), true
			}
		}
		return nil
	})
	return value, ok, err
}

func (tx *Tx) has(bucket string, key []byte) (ok bool, err error) {
	err = tx.guard("read "+bucket, func() error {
		if b := tx.tx.Bucket([]byte(bucket)); b != nil {
			ok = b.Get(key) != nil
		}
		return nil
	})
	return ok, err
}

// put writes a row. Any error fails the transaction: rows of one change
// must not be written in part.
func (tx *Tx) put(bucket string, key, value []byte) error {
	tx.writes++
	return tx.change("write "+bucket, bucket, func(b *bolt.Bucket) error { return b.Put(key, value) })
}

// remove deletes a row, if it is there. Errors as for put.
func (tx *Tx) remove(bucket string, key []byte) error {
	tx.writes++
	return tx.change("remove from "+bucket, bucket, func(b *bolt.Bucket) error { return b.Delete(key) })
}

func (tx *Tx) change(what, bucket string, f func(*bolt.Bucket) error) error {
	if !tx.tx.Writable() {
		return fmt.Errorf("%s: transaction only reads: %w", what, ErrReadOnly)
	}
	err := tx.guard(what, func() error {
		b, err := tx.tx.CreateBucketIfNotExists([]byte(bucket))
		if err != nil {
			return err
		}
		return f(b)
	})
	if err != nil {
		err = ioError(what, err)
		tx.fail(err)
	}
	return err
}

// makeBucket makes sure that a bucket exists.
func (tx *Tx) makeBucket(bucket string) error {
	return tx.change("make "+bucket, bucket, func(*bolt.Bucket) error { return nil })
}

// sequence is the number that bbolt keeps in a bucket's header, where it
// costs no page of its own.
func (tx *Tx) sequence(bucket string) (n uint64, err error) {
	err = tx.guard("read "+bucket, func() error {
		if b := tx.tx.Bucket([]byte(bucket)); b != nil {
			n = b.Sequence()
		}
		return nil
	})
	return n, err
}

func (tx *Tx) setSequence(bucket string, n uint64) error {
	tx.writes++
	return tx.change("number "+bucket, bucket, func(b *bolt.Bucket) error { return b.SetSequence(n) })
}

// rootKeys lists the names at the top of the file.
func (tx *Tx) rootKeys() (map[string]bool, error) {
	names := map[string]bool{}
	err := tx.guard("list buckets", func() error {
		c := tx.tx.Cursor()
		for k, _ := c.First(); k != nil; k, _ = c.Next() {
			names[string(k)] = true
		}
		return nil
	})
	return names, err
}

// cursor walks a bucket in the order of its keys. In a writing transaction
// it finds its place again at each step, since bbolt's cursors do not
// survive changes.
type cursor struct {
	tx     *Tx
	bucket string
	c      *bolt.Cursor
	last   []byte
	err    error
}

func (tx *Tx) cursor(bucket string) *cursor { return &cursor{tx: tx, bucket: bucket} }

// seek moves to the first row whose key is not less than key. A nested
// bucket, which does not belong here, has a nil value.
func (c *cursor) seek(key []byte) (k, v []byte, ok bool) {
	return c.step(func() ([]byte, []byte) { return c.c.Seek(key) }, nil)
}

// next moves on. Keys out of order mean a damaged page; stopping there keeps
// a walk from going in circles.
func (c *cursor) next() (k, v []byte, ok bool) {
	return c.step(func() ([]byte, []byte) {
		if !c.tx.tx.Writable() {
			return c.c.Next()
		}
		k, v := c.c.Seek(c.last)
		if bytes.Equal(k, c.last) {
			k, v = c.c.Next()
		}
		return k, v
	}, c.last)
}

func (c *cursor) step(move func() ([]byte, []byte), after []byte) (k, v []byte, ok bool) {
	err := c.tx.guard("walk "+c.bucket, func() error {
		if c.c == nil {
			b := c.tx.tx.Bucket([]byte(c.bucket))
			if b == nil {
				return nil
			}
			c.c = b.Cursor()
		}
		bk, bv := move()
		if bk == nil {
			return nil
		}
		k, v, ok = bytes.Clone(bk), bytes.Clone(bv), true
		return nil
	})
	if err == nil && ok && after != nil && bytes.Compare(k, after) <= 0 {
		err = &DamagedError{Bucket: c.bucket, Key: string(k), Reason: "keys are out of order"}
	}
	if err != nil {
		c.err = err
		return nil, nil, false
	}
	c.last = k
	return k, v, ok
}

// scan walks the rows whose keys have the prefix. It has no way to return an
// error: one makes the transaction fail at its end.
func (tx *Tx) scan(bucket string, prefix []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func(k, v []byte) bool) {
		c := tx.cursor(bucket)
		for k, v, ok := c.seek(prefix); ok && bytes.HasPrefix(k, prefix); k, v, ok = c.next() {
			if !yield(k, v) {
				return
			}
		}
		if c.err != nil {
			tx.fail(c.err)
		}
	}
}

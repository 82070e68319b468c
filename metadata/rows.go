package metadata

import (
	"bytes"
	"fmt"
	"iter"
	"runtime/debug"
	"unsafe"

	bolt "go.etcd.io/bbolt"
)

// This file is the only way to the rows. Those that are read come from our own
// look at the pages (see tree), those that are written go through bbolt, after
// the same look at each page that it will go by. bbolt answers what is still
// wrong with a panic, and reads of a file that was cut behind our back fault:
// both become errors here, so that what is above need not know of them. What
// is returned is a copy; pages are in the memory map.

// guard runs a few calls of bbolt, which do something to a bucket. In a writing
// transaction a failure spoils the whole transaction, since bbolt may have
// stopped half way.
func (tx *Tx) guard(verb, bucket string, f func() error) (err error) {
	if tx.done {
		return fmt.Errorf("%s %s: transaction has ended: %w", verb, bucket, ErrClosed)
	}
	if tx.err != nil && tx.writable {
		return tx.err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = recovered(verb+" "+bucket, p)
			if tx.writable {
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

// newTx wraps a transaction of bbolt.
func newTx(s *Store, h *handle, b *bolt.Tx) *Tx {
	info := b.DB().Info()
	size := uint64(info.PageSize)
	var t *tree
	if h != nil {
		t, _ = h.trees.Get().(*tree)
	}
	if t == nil {
		t = new(tree)
	}
	t.src, t.pageSize, t.used, t.root = mapped(b, info), size, uint64(b.Size())/size, uint64(b.Cursor().Bucket().Root())
	if h == nil {
		t.checked = &checkedPages{}
	} else {
		t.checked, t.known, t.txid = &h.checked, &h.roots, uint64(b.ID())
		// A writing transaction goes by the pages of the one before it.
		if b.Writable() {
			t.txid--
		}
		t.roots = h.roots.of(t.txid)
		// Nobody has committed if this is there after the begin.
		if free := h.free.Load(); free != nil {
			t.free = *free
		}
	}
	t.checked.cover(t.used)
	return &Tx{store: s, handle: h, tx: b, tree: t, writable: b.Writable()}
}

// mapped is the part of the memory map that the transaction sees. It stands
// until the transaction ends, or commits.
func mapped(b *bolt.Tx, info *bolt.Info) mapSource {
	// The field is an address outside of Go's heap.
	at := *(*unsafe.Pointer)(unsafe.Pointer(&info.Data))
	return unsafe.Slice((*byte)(at), b.Size())
}

// get returns a copy of the value; ok is false if there is none.
func (tx *Tx) get(bucket string, key []byte) (value []byte, ok bool, err error) {
	err = tx.find(bucket, key, func(v []byte) { value, ok = bytes.Clone(v), true })
	return value, ok, err
}

func (tx *Tx) has(bucket string, key []byte) (ok bool, err error) {
	err = tx.find(bucket, key, func([]byte) { ok = true })
	return ok, err
}

// find calls found with the value of a row, which is not a copy. A writing
// transaction sees what it has written, and so has to ask bbolt.
func (tx *Tx) find(bucket string, key []byte, found func([]byte)) error {
	return tx.guard("read", bucket, func() error {
		if !tx.writable {
			v, ok, err := tx.tree.get(bucket, key)
			if ok {
				found(v)
			}
			return err
		}
		if err := tx.tree.look(bucket, key, false); err != nil {
			return err
		}
		if b := tx.tx.Bucket([]byte(bucket)); b != nil {
			if v := b.Get(key); v != nil {
				found(v)
			}
		}
		return nil
	})
}

// put writes a row. Any error fails the transaction: rows of one change
// must not be written in part.
func (tx *Tx) put(bucket string, key, value []byte) error {
	tx.writes++
	n := int64(len(key) + len(value))
	tx.putBytes, tx.largest = tx.putBytes+n, max(tx.largest, n)
	return tx.change("write", bucket, key, func(b *bolt.Bucket) error { return b.Put(key, value) })
}

// remove deletes a row, if it is there. Errors as for put.
func (tx *Tx) remove(bucket string, key []byte) error {
	tx.writes++
	return tx.change("remove from", bucket, key, func(b *bolt.Bucket) error { return b.Delete(key) })
}

// change changes a row, or with a nil key what is kept with the bucket.
func (tx *Tx) change(verb, bucket string, key []byte, f func(*bolt.Bucket) error) error {
	if !tx.writable {
		return fmt.Errorf("%s %s: transaction only reads: %w", verb, bucket, ErrReadOnly)
	}
	err := tx.guard(verb, bucket, func() error {
		if err := tx.tree.look(bucket, key, true); err != nil {
			return err
		}
		b := tx.tx.Bucket([]byte(bucket))
		if b == nil {
			var err error
			if b, err = tx.tx.CreateBucket([]byte(bucket)); err != nil {
				return err
			}
		}
		return f(b)
	})
	if err != nil {
		err = ioError(verb+" "+bucket, err)
		tx.fail(err)
	}
	return err
}

// makeBucket makes sure that a bucket exists.
func (tx *Tx) makeBucket(bucket string) error {
	return tx.change("make", bucket, nil, func(*bolt.Bucket) error { return nil })
}

// sequence is the number that bbolt keeps in a bucket's header, where it
// costs no page of its own.
func (tx *Tx) sequence(bucket string) (n uint64, err error) {
	err = tx.guard("read", bucket, func() error {
		if !tx.writable {
			b, _, err := tx.tree.bucket(bucket)
			n = b.sequence
			return err
		}
		if err := tx.tree.look(bucket, nil, false); err != nil {
			return err
		}
		if b := tx.tx.Bucket([]byte(bucket)); b != nil {
			n = b.Sequence()
		}
		return nil
	})
	return n, err
}

func (tx *Tx) setSequence(bucket string, n uint64) error {
	tx.writes++
	return tx.change("number", bucket, nil, func(b *bolt.Bucket) error { return b.SetSequence(n) })
}

// rootKeys lists the names at the top of the file, as it was when the
// transaction began, and whether they are those of buckets.
func (tx *Tx) rootKeys() (map[string]bool, error) {
	names := map[string]bool{}
	err := tx.guard("list", "buckets", func() error {
		c := treeCursor{t: tx.tree, root: bucketRoot{page: tx.tree.root}}
		ok, err := c.seek(nil)
		for ; ok && err == nil; ok, err = c.next() {
			_, names[string(c.key())] = c.value()
		}
		return err
	})
	return names, err
}

// cursor walks a bucket in the order of its keys. What it returns is a copy.
type cursor struct {
	tx     *Tx
	bucket string
	err    error

	// reads is where it is in a transaction that reads.
	reads treeCursor
	// In a writing transaction it finds its place again at each step, from
	// the last key, since bbolt's cursors do not survive changes.
	last []byte
}

func (tx *Tx) cursor(bucket string) *cursor { return &cursor{tx: tx, bucket: bucket} }

// seek moves to the first row whose key is not less than key. A nested
// bucket, which does not belong here, has a nil value.
func (c *cursor) seek(key []byte) (k, v []byte, ok bool) {
	return c.step(func() (bool, error) {
		if c.reads.t == nil {
			b, ok, err := c.tx.tree.bucket(c.bucket)
			if err != nil || !ok {
				return false, err
			}
			c.reads = c.tx.tree.walk(b)
		}
		return c.reads.seek(key)
	}, func(b *bolt.Cursor) ([]byte, []byte) { return b.Seek(key) }, key)
}

// next moves on.
func (c *cursor) next() (k, v []byte, ok bool) {
	return c.step(c.reads.next, func(b *bolt.Cursor) ([]byte, []byte) {
		k, v := b.Seek(c.last)
		if bytes.Equal(k, c.last) {
			k, v = b.Next()
		}
		return k, v
	}, c.last)
}

// step moves by reads, or by bbolt's cursor in a writing transaction.
func (c *cursor) step(read func() (bool, error), write func(*bolt.Cursor) ([]byte, []byte), from []byte) (k, v []byte, ok bool) {
	c.err = c.tx.guard("walk", c.bucket, func() (err error) {
		if !c.tx.writable {
			if ok, err = read(); !ok || err != nil {
				return err
			}
			value, nested := c.reads.value()
			if k = bytes.Clone(c.reads.key()); !nested {
				v = bytes.Clone(value)
			}
			return nil
		}
		if err := c.look(from); err != nil {
			return err
		}
		b := c.tx.tx.Bucket([]byte(c.bucket))
		if b == nil {
			return nil
		}
		if bk, bv := write(b.Cursor()); bk != nil {
			k, v, ok = bytes.Clone(bk), bytes.Clone(bv), true
		}
		return nil
	})
	if c.err != nil {
		return nil, nil, false
	}
	c.last = k
	return k, v, ok
}

// look checks the pages that bbolt goes by from a key to the row behind it.
func (c *cursor) look(key []byte) error {
	b, ok, err := c.tx.tree.bucket(c.bucket)
	if err != nil || !ok {
		return err
	}
	at := c.tx.tree.walk(b)
	defer at.end()
	ok, err = at.seek(key)
	if ok && bytes.Equal(at.key(), key) {
		_, err = at.next()
	}
	return err
}

// scan walks the rows whose keys have the prefix. It has no way to return an
// error: one makes the transaction fail at its end.
func (tx *Tx) scan(bucket string, prefix []byte) iter.Seq2[[]byte, []byte] {
	return func(yield func(k, v []byte) bool) {
		c := tx.cursor(bucket)
		defer c.reads.end()
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

package bench

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	bolt "go.etcd.io/bbolt"
)

// limits does on the same disk the least that an operation could do, without
// a cache around it: its directories, and one transaction of a plain bbolt
// file that is as large as a cache's of as many records.
type limits struct {
	dir  string
	size int
	// db is written to. It does not store its list of free pages, which makes
	// each commit cheaper.
	db *bolt.DB
	// stored is a closed file that does, which makes opening it cheaper.
	stored string

	// legacy is as a world's.
	legacy map[int]*legacyState

	mu   sync.Mutex
	last int
	held map[string]int
}

// recordSize is about what a record of the cache takes in its file.
const recordSize = 256

var (
	recordBucket = []byte("record")
	indexBucket  = []byte("index")
)

func recordKey(i int) []byte { return fmt.Appendf(nil, "%026d", i) }

// record is a checksum and what it is of.
func record(i int) []byte {
	b := bytes.Repeat([]byte(strconv.Itoa(i)+" "), recordSize)[:recordSize]
	return append(binary.BigEndian.AppendUint32(nil, crc32.Checksum(b, castagnoli())), b...)
}

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

func newLimits(dir string, size int) (_ *limits, err error) {
	l := &limits{
		dir:    filepath.Join(dir, fmt.Sprintf("limit-%d", size)),
		size:   size,
		stored: filepath.Join(dir, fmt.Sprintf("limit-%d", size), "stored.db"),
		held:   map[string]int{},
	}
	for _, d := range []string{"new", "active", "committed"} {
		if err := os.MkdirAll(filepath.Join(l.dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	stored, err := bolt.Open(l.stored, 0o600, nil)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(l.fill(stored), stored.Close()); err != nil {
		return nil, err
	}
	l.db, err = bolt.Open(filepath.Join(l.dir, "puts.db"), 0o600, &bolt.Options{
		FreelistType:   bolt.FreelistMapType,
		NoFreelistSync: true,
	})
	if err != nil {
		return nil, err
	}
	if err := l.fill(l.db); err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

func (l *limits) fill(db *bolt.DB) error {
	l.last = l.size
	return db.Update(func(tx *bolt.Tx) error {
		records, err := tx.CreateBucket(recordBucket)
		if err != nil {
			return err
		}
		index, err := tx.CreateBucket(indexBucket)
		if err != nil {
			return err
		}
		for i := range l.size {
			if err := errors.Join(
				records.Put(recordKey(i), record(i)),
				index.Put(append([]byte(indexKey(i)), recordKey(i)...), nil),
			); err != nil {
				return err
			}
		}
		return nil
	})
}

func (l *limits) close() error { return l.db.Close() }

// next is a number that no record has.
func (l *limits) next() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	return l.last
}

func (l *limits) name(state string, i int) string {
	return filepath.Join(l.dir, state, strconv.Itoa(i))
}

// directories makes the three directories of a writable layer under a name
// that does not count, and gives them one that does.
func (l *limits) directories(i int) error {
	tmp := l.name("new", i)
	for _, d := range []string{tmp, filepath.Join(tmp, "fs"), filepath.Join(tmp, "work")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	return os.Rename(tmp, l.name("active", i))
}

// put writes records in one transaction: two syncs.
func (l *limits) put(ids ...int) error {
	return l.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(recordBucket)
		for _, i := range ids {
			if err := b.Put(recordKey(i), record(i)); err != nil {
				return err
			}
		}
		return nil
	})
}

func limitNew(_ context.Context, l *limits, _ int) (sample, error) {
	i := l.next()
	return sample{
		run:   func(context.Context) error { return l.directories(i) },
		after: func(context.Context) error { return os.RemoveAll(l.name("active", i)) },
	}, nil
}

func limitLife(_ context.Context, l *limits, _ int) (sample, error) {
	i := l.next()
	return sample{run: func(context.Context) error {
		if err := l.directories(i); err != nil {
			return err
		}
		return l.put(i)
	}}, nil
}

func limitCommit(_ context.Context, l *limits, _ int) (sample, error) {
	i := l.next()
	// Directories that are not synced yet make the next put dearer, here as
	// in a cache.
	if err := l.directories(i); err != nil {
		return sample{}, err
	}
	return sample{run: func(context.Context) error { return l.put(i) }}, nil
}

// committed is a record with its directories.
func (l *limits) committed() (int, error) {
	i := l.next()
	return i, errors.Join(l.directories(i), l.put(i))
}

func limitFinalize(_ context.Context, l *limits, _ int) (sample, error) {
	i, err := l.committed()
	return sample{run: func(context.Context) error {
		if err := os.Rename(l.name("active", i), l.name("committed", i)); err != nil {
			return err
		}
		return l.put(i)
	}}, err
}

func limitReopen(_ context.Context, l *limits, _ int) (sample, error) {
	old, err := l.committed()
	id := l.next()
	return sample{run: func(context.Context) error {
		return l.db.Update(func(tx *bolt.Tx) error {
			b := tx.Bucket(recordBucket)
			return errors.Join(b.Delete(recordKey(old)), b.Put(recordKey(id), record(id)))
		})
	}}, err
}

func limitGet(_ context.Context, l *limits, _ int) (sample, error) {
	key := recordKey(l.next() * 7919 % l.size)
	return sample{run: func(context.Context) error {
		return l.db.View(func(tx *bolt.Tx) error {
			v := tx.Bucket(recordBucket).Get(key)
			if len(v) < 4 || crc32.Checksum(v[4:], castagnoli()) != binary.BigEndian.Uint32(v) {
				return fmt.Errorf("record %s is not what was written", key)
			}
			_ = bytes.Clone(v)
			return nil
		})
	}}, nil
}

func limitSearch(_ context.Context, l *limits, _ int) (sample, error) {
	i := l.next() * 7919 % l.size
	key, want := []byte(indexKey(i)), recordKey(i)
	return sample{run: func(context.Context) error {
		return l.db.View(func(tx *bolt.Tx) error {
			found, _ := tx.Bucket(indexBucket).Cursor().Seek(key)
			if id := bytes.Clone(bytes.TrimPrefix(found, key)); !bytes.Equal(id, want) {
				return fmt.Errorf("search for %s found %q", key, id)
			}
			return nil
		})
	}}, nil
}

// limitRelease drops a count that is kept in memory.
func limitRelease(_ context.Context, l *limits, _ int) (sample, error) {
	key := strconv.Itoa(l.next())
	l.held[key] = 1
	return sample{run: func(context.Context) error {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.held[key]--
		if l.held[key] == 0 {
			delete(l.held, key)
		}
		return nil
	}}, nil
}

func limitSetValue(_ context.Context, l *limits, _ int) (sample, error) {
	i := l.next() * 7919 % l.size
	return sample{run: func(context.Context) error { return l.put(i) }}, nil
}

func limitSetValues(_ context.Context, l *limits, n int) (sample, error) {
	ids := make([]int, n)
	for i := range ids {
		ids[i] = l.next() * 7919 % l.size
	}
	return sample{run: func(context.Context) error { return l.put(ids...) }}, nil
}

func limitOpen(_ context.Context, l *limits, _ int) (sample, error) {
	var db *bolt.DB
	return sample{
		run: func(context.Context) (err error) {
			db, err = bolt.Open(l.stored, 0o600, nil)
			return err
		},
		after: func(context.Context) error { return db.Close() },
	}, nil
}

// limitThroughput lets n goroutines make directories, and puts what they made
// in one transaction for all.
func limitThroughput(_ context.Context, l *limits, n int) (sample, error) {
	return sample{run: func(context.Context) error {
		for range lives(n) / n {
			ids := make([]int, n)
			err := together(n, func(i int) error {
				ids[i] = l.next()
				return l.directories(ids[i])
			})
			if err != nil {
				return err
			}
			if err := l.put(ids...); err != nil {
				return err
			}
		}
		return nil
	}}, nil
}

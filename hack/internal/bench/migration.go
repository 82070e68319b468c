package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/cache"
	"github.com/lamina-build/lamina/migrate"
)

// migrationOperations take over the state of an old daemon.
func migrationOperations() []operation {
	return []operation{{
		name: "migrate", batch: 1, rounds: 5, sizes: legacySizes, ownOnly: true, legacy: true,
		prepare: prepareMigrate, limit: limitMigrate,
		note: "a directory with n records that the peer's own library made, chains of layers with a pair on top; " +
			"limit: one pass over its databases that looks at every key and value, and a new bbolt file with the rows that " +
			"the migration writes, in order, in as many transactions, synced once",
	}}
}

// legacySizes are a tenth of a large daemon's state, and with the larger sizes
// of the bench all of it.
func legacySizes(c *Config) []int {
	n := 1
	for _, size := range c.Sizes {
		n = max(n, size)
	}
	if n = min(2*n, 20_000); n > 2000 {
		return []int{2000, n}
	}
	return []int{n}
}

// legacyState is the directory of an old daemon, and what a migration writes.
type legacyState struct {
	dir          string
	rows         []storedRow
	transactions int
}

// storedRow is a row of a bbolt file with buckets at its top only.
type storedRow struct{ bucket, key, value []byte }

// legacyWorker is what the directory of a worker is called, which says the
// snapshotter.
const legacyWorker = "runc-overlayfs"

// legacyOpener is the one whose library makes a legacy directory, nil for none.
func (c *Config) legacyOpener() *Opener {
	for i := range c.Openers {
		if c.Openers[i].Legacy != nil {
			return &c.Openers[i]
		}
	}
	return nil
}

// makeLegacy makes the directory of a worker with n records below dir, which
// serves all rounds. It is built in memory, where nobody waits for a disk.
func (c *Config) makeLegacy(ctx context.Context, dir string, n int) (s *legacyState, err error) {
	memory, err := os.MkdirTemp(memoryDir(), "lamina-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, removeAll(memory)) }()
	if err := c.legacyOpener().Legacy(ctx, filepath.Join(memory, legacyWorker), n); err != nil {
		return nil, err
	}
	s = &legacyState{dir: filepath.Join(dir, fmt.Sprintf("legacy-%d", n), legacyWorker)}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	//nolint:gosec // both directories are our own
	cp := exec.CommandContext(ctx, "cp", "-a", "--", filepath.Join(memory, legacyWorker)+"/.", s.dir)
	if out, err := cp.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("copy the state: %w: %s", err, out)
	}
	// Once for the limit: how much is written.
	err = s.migrate(ctx, migrate.Options{Step: func(name string) error {
		if name == "build rows" {
			s.transactions++
		}
		return nil
	}})
	if err != nil {
		return nil, err
	}
	if s.rows, err = storedRows(filepath.Join(s.dir, cache.StoreFile)); err != nil {
		return nil, err
	}
	return s, s.rollBack(ctx)
}

func (s *legacyState) migrate(ctx context.Context, o migrate.Options) error {
	reports, err := migrate.Run(ctx, s.dir, o)
	if err == nil {
		err = reports[0].Err
	}
	if err == nil && (reports[0].Status != migrate.Migrated || len(reports[0].Plan.Dropped()) > 0) {
		err = fmt.Errorf("%s was not taken over as a whole", s.dir)
	}
	return err
}

func (s *legacyState) rollBack(ctx context.Context) error {
	reports, err := migrate.Rollback(ctx, s.dir, migrate.Options{})
	if err == nil {
		err = reports[0].Err
	}
	if err != nil {
		return err
	}
	return removeAll(reports[0].Aside)
}

func prepareMigrate(_ context.Context, w *world, n int) (sample, error) {
	s := w.legacy[n]
	return sample{
		run:   func(ctx context.Context) error { return s.migrate(ctx, migrate.Options{}) },
		after: s.rollBack,
	}, nil
}

// limitMigrate reads the rows of the three databases and writes a fourth.
func limitMigrate(_ context.Context, l *limits, n int) (sample, error) {
	s := l.legacy[n]
	path := filepath.Join(l.dir, "migrated.db")
	return sample{
		run: func(context.Context) error {
			for _, name := range []string{"metadata_v2.db", "containerdmeta.db", filepath.Join("snapshots", "metadata.db")} {
				if err := readRows(filepath.Join(s.dir, name)); err != nil {
					return err
				}
			}
			return writeRows(path, s.rows, s.transactions)
		},
		after: func(context.Context) error { return os.Remove(path) },
	}, nil
}

// readRows looks at each byte of each row.
func readRows(path string) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		return err
	}
	var sum byte
	look := func(b []byte) {
		for _, c := range b {
			sum ^= c
		}
	}
	var walk func(b *bolt.Bucket) error
	walk = func(b *bolt.Bucket) error {
		return b.ForEach(func(k, v []byte) error {
			look(k)
			look(v)
			if v == nil {
				return walk(b.Bucket(k))
			}
			return nil
		})
	}
	err = db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return walk(b) })
	})
	return errors.Join(err, db.Close())
}

// storedRows are the rows of a store, in order.
func storedRows(path string) (rows []storedRow, err error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	err = db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			name = bytes.Clone(name)
			return b.ForEach(func(k, v []byte) error {
				rows = append(rows, storedRow{name, bytes.Clone(k), bytes.Clone(v)})
				return nil
			})
		})
	})
	return rows, errors.Join(err, db.Close())
}

// writeRows makes a file of rows in that many transactions.
func writeRows(path string, rows []storedRow, transactions int) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{NoSync: true, NoGrowSync: true, NoFreelistSync: true})
	if err != nil {
		return err
	}
	for part := 0; part < transactions && err == nil; part++ {
		err = db.Update(func(tx *bolt.Tx) error {
			for _, r := range rows[len(rows)*part/transactions : len(rows)*(part+1)/transactions] {
				b, err := tx.CreateBucketIfNotExists(r.bucket)
				if err != nil {
					return err
				}
				b.FillPercent = 0.9
				if err := b.Put(r.key, r.value); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err == nil {
		err = db.Sync()
	}
	return errors.Join(err, db.Close())
}

package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/migrate"
	"github.com/lamina-build/lamina/migrate/legacytest"
)

// migrationOperations take over the state of an old daemon.
func migrationOperations() []operation {
	return []operation{{
		name: "migrate", batch: 1, rounds: 3, sizes: legacySizes, ownOnly: true,
		prepare: prepareMigrate, limit: limitMigrate,
		note: "n records of an old daemon, chains of layers with pairs on top; " +
			"limit: each row of its databases read once, and n puts in transactions of 1,000",
	}}
}

// legacySizes is twice the state, but no more than a large daemon has.
func legacySizes(c *Config) []int {
	n := 1
	for _, size := range c.Sizes {
		n = max(n, size)
	}
	return []int{min(2*n, 20_000)}
}

// legacy makes the directory of a worker with n records, unless it is there.
func legacy(dir string, n int) (*legacytest.Builder, error) {
	driver := "native"
	if os.Geteuid() == 0 {
		driver = "overlayfs"
	}
	b := legacytest.NewBuilder(filepath.Join(dir, fmt.Sprintf("legacy-%d", n)), driver)
	if _, err := os.Stat(b.Dir); err == nil {
		return b, nil
	}
	for made, c := 0, 0; made < n; c++ {
		parent := ""
		for i := 0; i < 8 && made < n; i++ {
			id := fmt.Sprintf("c%06dl%dxxxxxxxxxxxxxxxx", c, i)
			b.Finalized(id, parent, legacytest.Row{
				"cache.description": "a step of a build", "snapshot.size": 4096,
				"cache.usageCount": 3, "cache.lastUsedAt": int64(1_700_000_000_000_000_000),
			})
			parent = id
			made++
		}
		if made < n {
			b.Pair(fmt.Sprintf("c%06dixxxxxxxxxxxxxxxxx", c), fmt.Sprintf("c%06dmxxxxxxxxxxxxxxxxx", c), parent)
			made += 2
		}
	}
	return b, b.Write()
}

func prepareMigrate(_ context.Context, w *world, n int) (sample, error) {
	b, err := legacy(filepath.Dir(w.dir), n)
	if err != nil {
		return sample{}, err
	}
	return sample{
		run: func(ctx context.Context) error {
			reports, err := migrate.Run(ctx, b.Dir, migrate.Options{})
			if err == nil {
				err = reports[0].Err
			}
			if err == nil && (reports[0].Status != migrate.Migrated || len(reports[0].Plan.Dropped()) > 0) {
				err = fmt.Errorf("%s was not taken over as a whole", b.Dir)
			}
			return err
		},
		after: func(ctx context.Context) error {
			reports, err := migrate.Rollback(ctx, b.Dir, migrate.Options{})
			if err == nil {
				err = reports[0].Err
			}
			if err != nil {
				return err
			}
			return removeAll(reports[0].Aside)
		},
	}, nil
}

// limitMigrate reads the rows of the three databases and writes a fourth.
func limitMigrate(_ context.Context, l *limits, n int) (sample, error) {
	b, err := legacy(filepath.Dir(l.dir), n)
	if err != nil {
		return sample{}, err
	}
	path := filepath.Join(l.dir, "migrated.db")
	return sample{
		run: func(context.Context) error {
			for _, name := range []string{"metadata_v2.db", "containerdmeta.db", filepath.Join("snapshots", "metadata.db")} {
				if err := readRows(filepath.Join(b.Dir, name)); err != nil {
					return err
				}
			}
			return writeRecords(path, n)
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
	var walk func(b *bolt.Bucket) error
	walk = func(b *bolt.Bucket) error {
		return b.ForEach(func(k, v []byte) error {
			for _, c := range v {
				sum ^= c
			}
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

func writeRecords(path string, n int) error {
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	for at := 0; at < n && err == nil; at += 1000 {
		err = db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists(recordBucket)
			for i := at; i < min(at+1000, n) && err == nil; i++ {
				err = b.Put(recordKey(i), record(i))
			}
			return err
		})
	}
	return errors.Join(err, db.Close())
}

package metadata_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/metadata"
)

func benchRecord(id metadata.ID) *metadata.Record {
	return rec(id, over("p"), indexed("key:one", "key:two"), func(r *metadata.Record) {
		r.State, r.Created = metadata.Committed, time.Unix(1, 0)
	})
}

func benchStore(b *testing.B) *metadata.Store {
	s := open(b, filepath.Join(b.TempDir(), "s.db"), metadata.Options{})
	create(b, s, rec("p"))
	return s
}

// BenchmarkUpdate is one writer alone; BenchmarkBoltUpdate is what bbolt
// takes for rows of the same number.
func BenchmarkUpdate(b *testing.B) {
	s := benchStore(b)
	for b.Loop() {
		r := benchRecord(s.NewID())
		update(b, s, func(tx *metadata.Tx) error { return tx.Create(r) })
	}
}

func BenchmarkBoltUpdate(b *testing.B) {
	put := boltStore(b)
	for b.Loop() {
		put()
	}
}

// BenchmarkUpdateRatio runs both in turns, so that what else the machine does
// meets both, and reports how much longer the median of ours takes.
func BenchmarkUpdateRatio(b *testing.B) {
	s, put := benchStore(b), boltStore(b)
	var ours, theirs []time.Duration
	for b.Loop() {
		start := time.Now()
		r := benchRecord(s.NewID())
		update(b, s, func(tx *metadata.Tx) error { return tx.Create(r) })
		between := time.Now()
		put()
		ours, theirs = append(ours, between.Sub(start)), append(theirs, time.Since(between))
	}
	slices.Sort(ours)
	slices.Sort(theirs)
	o, t := ours[len(ours)/2], theirs[len(theirs)/2]
	b.ReportMetric(float64(o)/float64(t), "ratio")
	b.ReportMetric(float64(o.Microseconds()), "ours-us")
	b.ReportMetric(float64(t.Microseconds()), "bbolt-us")
}

// boltStore returns a transaction of bbolt alone that writes rows as those of
// a record are.
func boltStore(b *testing.B) (put func()) {
	db, err := bolt.Open(filepath.Join(b.TempDir(), "bolt.db"), 0o600, nil)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, db.Close()) })
	names := []string{"record", "index", "child", "snapshot", "unsettled", "total"}
	require.NoError(b, db.Update(func(tx *bolt.Tx) error {
		for _, n := range names {
			if _, err := tx.CreateBucket([]byte(n)); err != nil {
				return err
			}
		}
		return nil
	}))
	n := 0
	return func() {
		n++
		id := fmt.Sprintf("%026d", n)
		rows := []struct {
			bucket, key string
			value       int
		}{
			{"record", id, 160},
			{"index", "\x00\x07key:one" + id, 0},
			{"index", "\x00\x07key:two" + id, 0},
			{"child", "\x00\x01p" + id, 0},
			{"snapshot", "key-" + id, len(id)},
			{"unsettled", id, 0},
			{"total", "\x02\x00regular", 10},
		}
		require.NoError(b, db.Update(func(tx *bolt.Tx) error {
			for _, r := range rows {
				if err := tx.Bucket([]byte(r.bucket)).Put([]byte(r.key), make([]byte, r.value)); err != nil {
					return err
				}
			}
			return nil
		}))
	}
}

func BenchmarkUpdateParallel(b *testing.B) {
	for _, writers := range []int{8, 64} {
		b.Run(fmt.Sprint(writers), func(b *testing.B) {
			s := benchStore(b)
			before := s.Stats()
			b.SetParallelism(writers / 2)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					r := benchRecord(s.NewID())
					if err := s.Update(b.Context(), func(tx *metadata.Tx) error { return tx.Create(r) }); err != nil {
						b.Error(err)
					}
				}
			})
			st := s.Stats()
			b.ReportMetric(float64(st.Transactions-before.Transactions)/float64(st.Updates-before.Updates), "tx/update")
		})
	}
}

func BenchmarkGet(b *testing.B) {
	s := benchStore(b)
	var ids []metadata.ID
	update(b, s, func(tx *metadata.Tx) error {
		for range 1000 {
			ids = append(ids, s.NewID())
			if err := tx.Create(benchRecord(ids[len(ids)-1])); err != nil {
				return err
			}
		}
		return nil
	})
	var n atomic.Int64
	for b.Loop() {
		id := ids[int(n.Add(1))%len(ids)]
		view(b, s, func(tx *metadata.Tx) {
			if _, err := tx.Get(id); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkPut rewrites one of a thousand records, as the setting of a value
// does.
func BenchmarkPut(b *testing.B) {
	s := benchStore(b)
	var ids []metadata.ID
	update(b, s, func(tx *metadata.Tx) error {
		for range 1000 {
			ids = append(ids, s.NewID())
			if err := tx.Create(benchRecord(ids[len(ids)-1])); err != nil {
				return err
			}
		}
		return nil
	})
	n := 0
	for b.Loop() {
		n++
		update(b, s, func(tx *metadata.Tx) error {
			r, err := tx.Get(ids[n*7%len(ids)])
			if err != nil {
				return err
			}
			r.Values = []metadata.Value{{Name: "value", Data: fmt.Append(nil, n), Index: fmt.Sprint("index:", n)}}
			_, err = tx.Put(r)
			return err
		})
	}
}

func BenchmarkTouch(b *testing.B) {
	s := benchStore(b)
	for b.Loop() {
		s.Touch("p", time.Unix(1, 0))
	}
}

// BenchmarkOpen opens and closes a store that was closed cleanly.
func BenchmarkOpen(b *testing.B) {
	for _, n := range []int{100, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "s.db")
			s := open(b, path, metadata.Options{})
			create(b, s, rec("p"))
			for done := 0; done < n; done += 10_000 {
				update(b, s, func(tx *metadata.Tx) error {
					for range min(10_000, n-done) {
						if err := tx.Create(rec(s.NewID(), over("p"))); err != nil {
							return err
						}
					}
					return nil
				})
			}
			require.NoError(b, s.Close())
			for b.Loop() {
				s, err := metadata.Open(b.Context(), path, metadata.Options{})
				require.NoError(b, err)
				require.NoError(b, s.Close())
			}
		})
	}
}

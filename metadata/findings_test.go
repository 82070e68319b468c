package metadata

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
)

// fixture makes a store in which exactly one thing is wrong.
type fixture struct {
	// write does it by ways of the package that check nothing, raw behind its
	// back.
	write func(*Tx) error
	raw   func(*bolt.Tx) error
	// file does it to the closed file.
	file func(t *testing.T, path string)
}

func findingFixtures() map[string]fixture {
	record := func(id ID, change ...func(*Record)) *Record {
		r := &Record{ID: id, State: Committed, Op: Base, Key: "key-" + string(id), Type: "t", Size: 1}
		for _, c := range change {
			c(r)
		}
		return r
	}
	put := func(records ...*Record) func(*Tx) error {
		return func(tx *Tx) error {
			for _, r := range records {
				r.row = r.ID
				if err := tx.write(nil, r); err != nil {
					return err
				}
			}
			return nil
		}
	}
	rawPut := func(bucket, key string, value []byte) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Put([]byte(key), value) }
	}
	flip := func(bucket string) func(*bolt.Tx) error {
		return func(tx *bolt.Tx) error {
			b := tx.Bucket([]byte(bucket))
			k, v := b.Cursor().Last()
			k, v = bytes.Clone(k), bytes.Clone(v)
			v[len(v)-1] ^= 1
			return b.Put(k, v)
		}
	}
	named := func(key string) func(*Record) { return func(r *Record) { r.Key = key } }
	orphan := string(attachmentKey("ghost", "a"))
	return map[string]fixture{
		CodePageDamaged: {file: func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			require.NoError(t, err)
			defer f.Close()
			m, err := newestMeta(f)
			require.NoError(t, err)
			_, err = f.WriteAt([]byte{0xff}, int64(m.freelist)*int64(m.pageSize)+boltHeader)
			require.NoError(t, err)
		}},
		CodeMetaDamaged:   {raw: flip(bucketMeta)},
		CodeForeignKey:    {raw: rawPut(bucketMeta, "else", []byte("x"))},
		CodeBucketMissing: {raw: func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte(bucketAlias)) }},
		CodeRecordDamaged: {raw: flip(bucketRecord)},
		CodeRecordInvalid: {write: put(record("x", func(r *Record) { r.Op = 99 }))},
		CodeRecordQuarantined: {write: func(tx *Tx) error {
			return errors.Join(tx.setSequence(bucketQuarantine, 1), tx.put(bucketQuarantine, append(make([]byte, 7), "\x01x"...), []byte("was")))
		}},
		CodeParentMissing:     {write: put(record("x", func(r *Record) { r.Parents = []ID{"ghost"} }))},
		CodeNameConflict:      {write: put(record("x", func(r *Record) { r.Aliases = []ID{"r"} }))},
		CodeKeyConflict:       {write: put(record("x", named("k")), record("y", named("k")))},
		CodeRowMissing:        {raw: func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucketUnsettled)).Delete([]byte("r")) }},
		CodeRowStale:          {raw: rawPut(bucketSnapshot, "ghost-key", []byte("ghost"))},
		CodeTotalWrong:        {raw: func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucketTotal)).Delete([]byte("\x02\x00t")) }},
		CodeAttachmentDamaged: {raw: flip(bucketAttachment)},
		CodeAttachmentOrphan:  {raw: rawPut(bucketAttachment, orphan, frame([]byte(orphan), []byte("x")))},
		CodeNumberWrong:       {write: put(record("01ARZ3NDEKTSV4RRFFQ69G5FAV"))},
	}
}

// TestEachFinding: each code has a store that it alone is found in, and that
// Repair makes whole.
func TestEachFinding(t *testing.T) {
	source, err := os.ReadFile("check.go")
	require.NoError(t, err)
	declared := len(regexp.MustCompile(`(?m)^\tCode[A-Z]\w* += "`).FindAll(source, -1))
	fixtures := findingFixtures()
	require.Len(t, fixtures, declared, "a fixture for each code")
	for _, code := range slices.Sorted(maps.Keys(fixtures)) {
		t.Run(code, func(t *testing.T) {
			path := filepath.Join(memDir(t), "s.db")
			s, err := Open(t.Context(), path, faultOptions())
			require.NoError(t, err)
			require.NoError(t, s.Update(t.Context(), func(tx *Tx) error {
				err := tx.Create(&Record{ID: "r", State: Committed, Op: Base, Key: "key-r", Type: "t", Size: 1})
				return errors.Join(err, tx.SetAttachment("r", "a", []byte("data")))
			}))
			found, err := check(t, s)
			require.NoError(t, err)
			require.Empty(t, found)
			f := fixtures[code]
			if f.write != nil {
				require.NoError(t, s.Update(t.Context(), f.write))
			}
			require.NoError(t, s.Close())
			if f.raw != nil {
				db, err := bolt.Open(path, 0o600, nil)
				require.NoError(t, err)
				require.NoError(t, db.Update(f.raw))
				require.NoError(t, db.Close())
			}
			if f.file != nil {
				f.file(t, path)
			}
			if code != CodePageDamaged && code != CodeMetaDamaged { // those refuse to open
				s, err := Open(t.Context(), path, faultOptions())
				require.NoError(t, err)
				found, err := check(t, s)
				require.NoError(t, err)
				requireOnly(t, code, found)
				require.NoError(t, s.Close())
			} else {
				_, err := Open(t.Context(), path, faultOptions())
				require.ErrorIs(t, err, ErrDamaged)
			}
			report, err := Repair(t.Context(), path, faultOptions())
			require.NoError(t, err)
			requireOnly(t, code, report.Findings)
			require.Equal(t, stays(Finding{Code: code}), report.Whole)

			s, err = Open(t.Context(), path, faultOptions())
			require.NoError(t, err)
			found, err = check(t, s)
			require.NoError(t, err)
			for _, f := range found {
				require.True(t, stays(f), "%s: %s", f.Code, f.Message)
			}
			require.NoError(t, s.Close())
		})
	}
}

func requireOnly(t *testing.T, code string, found []Finding) {
	t.Helper()
	require.NotEmpty(t, found)
	for _, f := range found {
		require.Equal(t, code, f.Code, f.Message)
		require.NotEmpty(t, f.Message)
	}
}

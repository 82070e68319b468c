package metadata_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/metadata"
)

// hurt makes a store with a record that cannot be read, its child and
// grandchild, and rows that no record asks for.
func hurt(t *testing.T, path string) {
	t.Helper()
	s, err := metadata.Open(t.Context(), path, metadata.Options{FlushInterval: -1})
	require.NoError(t, err)
	create(t, s, rec("bad", indexed("i")), rec("child", over("bad")), rec("grandchild", over("child")), rec("well", indexed("w")))
	update(t, s, func(tx *metadata.Tx) error {
		if err := tx.SetAttachment("well", "a", []byte("data")); err != nil {
			return err
		}
		return tx.SetMeta(metadata.Meta{Driver: "overlay", BootID: "boot"})
	})
	require.NoError(t, s.Close())
	raw(t, path, func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte("record"))
		v := append([]byte(nil), b.Get([]byte("bad"))...)
		v[len(v)-1] ^= 1
		return errors.Join(
			b.Put([]byte("bad"), v),
			tx.Bucket([]byte("snapshot")).Put([]byte("ghost-key"), []byte("ghost")),
			tx.Bucket([]byte("index")).Delete([]byte("\x00\x01wwell")),
		)
	})
}

func requireRepaired(t *testing.T, path string) {
	t.Helper()
	s, err := metadata.Open(t.Context(), path, metadata.Options{FlushInterval: -1})
	require.NoError(t, err)
	defer s.Close()
	var codes []string
	for _, f := range findings(t, s) {
		codes = append(codes, f.Code+" "+string(f.ID))
	}
	require.ElementsMatch(t, []string{"record-quarantined bad", "parent-missing child"}, codes)
	require.Equal(t, []metadata.ID{"well"}, search(t, s, "w"))
	view(t, s, func(tx *metadata.Tx) {
		data, err := tx.Attachment("well", "a")
		require.NoError(t, err)
		require.Equal(t, "data", string(data))
		m, err := tx.Meta()
		require.NoError(t, err)
		require.Equal(t, "overlay", m.Driver)
		require.Equal(t, "boot", m.BootID)
		_, err = tx.Get("bad")
		require.True(t, errdefs.IsNotFound(err))
	})
}

func TestRepair(t *testing.T) {
	path := storePath(t)
	hurt(t, path)
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	s, err := metadata.Open(t.Context(), path, metadata.Options{})
	require.NoError(t, err)
	_, err = metadata.Repair(t.Context(), path, metadata.Options{LockTimeout: -1})
	require.ErrorIs(t, err, metadata.ErrLocked)
	require.NoError(t, s.Close())

	r, err := metadata.Repair(t.Context(), path, metadata.Options{})
	require.NoError(t, err)
	require.False(t, r.Whole)
	require.Equal(t, []metadata.ID{"ghost"}, r.Lost)
	require.Equal(t, []metadata.ID{"bad"}, r.Quarantined)
	require.Equal(t, []metadata.ID{"child", "grandchild"}, r.Descendants)
	require.Equal(t, 3, r.Records)
	require.Equal(t, 1, r.Attachments)
	require.NotEmpty(t, r.Findings)
	kept, err := os.ReadFile(r.Kept)
	require.NoError(t, err)
	require.True(t, string(before[8192:]) == string(kept[8192:]), "the damaged file is kept as it was")
	requireRepaired(t, path)

	again, err := metadata.Repair(t.Context(), path, metadata.Options{})
	require.NoError(t, err)
	require.True(t, again.Whole)
	require.Empty(t, again.Kept)
	left, err := filepath.Glob(path + "*")
	require.NoError(t, err)
	require.ElementsMatch(t, []string{path, path + ".holder", r.Kept}, left)
}

// TestRepairStepByStep stops at each step, and repairs what a kill there
// leaves.
func TestRepairStepByStep(t *testing.T) {
	path := storePath(t)
	hurt(t, path)
	names := steps(t, func(o metadata.Options) {
		_, err := metadata.Repair(t.Context(), path, o)
		require.NoError(t, err)
	})
	require.Subset(t, names, []string{"repair file", "repair copy", "repair data", "repair keep", "repair rename", "repair sync"})
	for n, stop := range names {
		for _, killed := range []bool{false, true} {
			path := storePath(t)
			hurt(t, path)
			at := 0
			o := metadata.Options{FlushInterval: -1, Step: func(string) error {
				if at++; at <= n {
					return nil
				}
				if killed {
					panic("killed")
				}
				return syscall.EIO
			}}
			if killed {
				func() {
					defer func() { require.NotNil(t, recover(), stop) }()
					_, _ = metadata.Repair(t.Context(), path, o)
				}()
			} else {
				_, err := metadata.Repair(t.Context(), path, o)
				require.ErrorIs(t, err, syscall.EIO, stop)
			}
			// The file in place is the former one or the new one.
			s, err := metadata.Open(t.Context(), path, metadata.Options{LockTimeout: -1})
			require.NoError(t, err, stop)
			require.NoError(t, s.Close())
			_, err = metadata.Repair(t.Context(), path, metadata.Options{LockTimeout: -1})
			require.NoError(t, err, stop)
			requireRepaired(t, path)
			kept, err := filepath.Glob(path + ".damaged-*")
			require.NoError(t, err)
			require.Len(t, kept, 1, "%s: kept once", stop)
			require.NoFileExists(t, path+".repair")
		}
	}
}

func TestRepairRefuses(t *testing.T) {
	path := storePath(t)
	_, err := metadata.Repair(t.Context(), path, metadata.Options{})
	require.True(t, errdefs.IsNotFound(err), "%v", err)
	require.NoFileExists(t, path)

	require.NoError(t, os.WriteFile(path, make([]byte, 64<<10), 0o600))
	_, err = metadata.Repair(t.Context(), path, metadata.Options{})
	require.ErrorIs(t, err, metadata.ErrForeign)

	for name, is := range map[string]error{"legacy": metadata.ErrForeign, "newer": metadata.ErrNewerSchema} {
		path := storePath(t)
		raw(t, path, func(tx *bolt.Tx) error {
			if name == "legacy" {
				_, err := tx.CreateBucket([]byte("_main"))
				return err
			}
			b, err := tx.CreateBucket([]byte("meta"))
			return errors.Join(err, b.Put([]byte("schema"), metadata.Frame([]byte("schema"), []byte{0, 0, 0, 99})))
		})
		before, err := os.ReadFile(path)
		require.NoError(t, err)
		_, err = metadata.Repair(t.Context(), path, metadata.Options{})
		require.ErrorIs(t, err, is)
		after, err := os.ReadFile(path)
		require.NoError(t, err)
		require.True(t, string(before) == string(after), "left as it was")
	}

	s := fresh(t)
	_, err = metadata.Repair(t.Context(), storePath(t), metadata.Options{ReadOnly: true})
	require.ErrorIs(t, err, metadata.ErrReadOnly)
	require.NoError(t, s.Close())
}

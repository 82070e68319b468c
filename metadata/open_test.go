package metadata_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/oklog/ulid/v2"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/lamina-build/lamina/metadata"
)

func TestHolderIsNamed(t *testing.T) {
	path := storePath(t)
	start := time.Now()
	cmd, _ := startChild(t, path)
	for _, readOnly := range []bool{false, true} {
		_, err := metadata.Open(t.Context(), path, metadata.Options{ReadOnly: readOnly, LockTimeout: 30 * time.Millisecond})
		require.ErrorIs(t, err, metadata.ErrLocked)
		require.True(t, errdefs.IsUnavailable(err))
		var l *metadata.LockedError
		require.ErrorAs(t, err, &l)
		require.Equal(t, path, l.Path)
		require.Equal(t, cmd.Process.Pid, l.Holder.PID)
		require.Equal(t, `the child\x1b`, l.Holder.Command, "safe for a terminal")
		require.WithinDuration(t, start, l.Holder.Since, time.Minute)
		require.ErrorContains(t, err, fmt.Sprintf("pid %d (the child", cmd.Process.Pid))
	}
	require.NoError(t, cmd.Process.Kill())
	s := open(t, path, metadata.Options{LockTimeout: time.Minute})
	require.NoError(t, s.Close())
}

func TestReadersAreNamedReaders(t *testing.T) {
	path := storePath(t)
	require.NoError(t, open(t, path, metadata.Options{}).Close())
	r1 := open(t, path, metadata.Options{ReadOnly: true})
	r2 := open(t, path, metadata.Options{ReadOnly: true})
	_, err := metadata.Open(t.Context(), path, metadata.Options{LockTimeout: -1})
	var l *metadata.LockedError
	require.ErrorAs(t, err, &l)
	require.Equal(t, metadata.Holder{Readers: true}, l.Holder)
	require.NoError(t, r1.Close())
	require.NoError(t, r2.Close())
	require.NoError(t, open(t, path, metadata.Options{LockTimeout: -1}).Close())
}

func TestWaitingForALock(t *testing.T) {
	path := storePath(t)
	s := open(t, path, metadata.Options{Command: "first"})
	noticed := make(chan metadata.Holder, 10)
	type opened struct {
		s   *metadata.Store
		err error
	}
	second := make(chan opened, 1)
	go func() {
		s, err := metadata.Open(t.Context(), path, metadata.Options{LockTimeout: time.Minute, OnWait: func(h metadata.Holder) { noticed <- h }})
		second <- opened{s, err}
	}()
	require.Equal(t, "first", (<-noticed).Command)
	require.NoError(t, s.Close())
	o := <-second
	require.NoError(t, o.err)
	require.Empty(t, noticed, "told once")

	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	_, err := metadata.Open(ctx, path, metadata.Options{LockTimeout: time.Minute})
	require.ErrorIs(t, err, why)
	require.NoError(t, o.s.Close())
}

func TestCreateStepByStep(t *testing.T) {
	var steps []string
	path := storePath(t)
	s := open(t, path, metadata.Options{Step: func(name string) error { steps = append(steps, name); return nil }})
	require.NoError(t, s.Close())
	require.Equal(t, []string{"create file", "create rename", "create sync"}, steps)
	for _, stop := range steps {
		t.Run(stop, func(t *testing.T) {
			path := storePath(t)
			fail := func(name string) error {
				if name == stop {
					return syscall.EIO
				}
				return nil
			}
			_, err := metadata.Open(t.Context(), path, metadata.Options{Step: fail})
			require.ErrorIs(t, err, syscall.EIO)
			_, err = os.Stat(path + ".new")
			require.ErrorIs(t, err, fs.ErrNotExist)

			// A kill cleans nothing up.
			path = storePath(t)
			crash := func(name string) error {
				if name == stop {
					panic(name)
				}
				return nil
			}
			require.Panics(t, func() { _, _ = metadata.Open(t.Context(), path, metadata.Options{Step: crash}) })
		})
	}
	// What a killed process left under the other name is used again.
	path = storePath(t)
	require.NoError(t, os.WriteFile(path+".new", []byte(strings.Repeat("rest", 10_000)), 0o600))
	s = open(t, path, metadata.Options{})
	require.Empty(t, findings(t, s))
	left, err := filepath.Glob(filepath.Dir(path) + "/*.new")
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestCreateTogether(t *testing.T) {
	path := storePath(t)
	done := make(chan error, 8)
	for i := range cap(done) {
		go func() {
			s, err := metadata.Open(t.Context(), path, metadata.Options{LockTimeout: time.Minute})
			if err == nil {
				err = s.Update(t.Context(), func(tx *metadata.Tx) error { return tx.Create(rec(metadata.ID(fmt.Sprint(i)))) })
				err = errors.Join(err, s.Close())
			}
			done <- err
		}()
	}
	for range cap(done) {
		require.NoError(t, <-done)
	}
	s := open(t, path, metadata.Options{})
	n := 0
	view(t, s, func(tx *metadata.Tx) {
		for range tx.Records() {
			n++
		}
	})
	require.Equal(t, cap(done), n)
}

func TestRefusedFiles(t *testing.T) {
	sound := storePath(t)
	s := open(t, sound, metadata.Options{})
	for i := range 100 {
		create(t, s, rec(metadata.ID(fmt.Sprintf("%0200d", i))))
	}
	require.NoError(t, s.Close())
	content, err := os.ReadFile(sound)
	require.NoError(t, err)
	page := os.Getpagesize()

	legacy := filepath.Join(t.TempDir(), "metadata_v2.db")
	raw(t, legacy, func(tx *bolt.Tx) error {
		_, err := tx.CreateBucket([]byte("_main"))
		return err
	})
	other, err := os.ReadFile(legacy)
	require.NoError(t, err)
	newer := filepath.Join(t.TempDir(), "newer.db")
	require.NoError(t, os.WriteFile(newer, content, 0o600))
	raw(t, newer, func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("meta")).Put([]byte("schema"), metadata.Frame([]byte("schema"), []byte{0, 0, 0, 99}))
	})
	future, err := os.ReadFile(newer)
	require.NoError(t, err)
	flip := func(at ...int) []byte {
		b := append([]byte(nil), content...)
		for _, i := range at {
			b[i] ^= 0xff
		}
		return b
	}
	tests := map[string]struct {
		content []byte
		is      error
	}{
		"empty":            {nil, metadata.ErrDamaged},
		"text":             {[]byte("hello"), metadata.ErrForeign},
		"long text":        {[]byte(strings.Repeat("hello", 10_000)), metadata.ErrForeign},
		"zeros":            {make([]byte, 64<<10), metadata.ErrForeign},
		"legacy":           {other, metadata.ErrForeign},
		"newer":            {future, metadata.ErrNewerSchema},
		"no meta page":     {flip(16+8, page+16+8), metadata.ErrDamaged},
		"half a meta page": {content[:40], metadata.ErrForeign},
		"one page":         {content[:page], metadata.ErrDamaged},
		"two pages":        {content[:2*page], metadata.ErrDamaged},
		"eight pages":      {content[:8*page], metadata.ErrDamaged},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			for _, readOnly := range []bool{false, true} {
				path := storePath(t)
				require.NoError(t, os.WriteFile(path, tt.content, 0o600))
				require.NoError(t, os.WriteFile(path+".holder", []byte("whose it is"), 0o600))
				_, err := metadata.Open(t.Context(), path, metadata.Options{ReadOnly: readOnly})
				require.ErrorIs(t, err, tt.is)
				holder, err := os.ReadFile(path + ".holder")
				require.NoError(t, err)
				require.Equal(t, "whose it is", string(holder))
				got, err := os.ReadFile(path)
				require.NoError(t, err)
				require.Equal(t, len(tt.content), len(got))
				require.Equal(t, string(tt.content), string(got), "a refused file is left as it was")
				entries, err := os.ReadDir(filepath.Dir(path))
				require.NoError(t, err)
				require.Len(t, entries, 2)
			}
		})
	}
	t.Run("one meta page is enough", func(t *testing.T) {
		for _, at := range []int{16 + 8, page + 16 + 8} {
			path := storePath(t)
			require.NoError(t, os.WriteFile(path, flip(at), 0o600))
			s, err := metadata.Open(t.Context(), path, metadata.Options{})
			require.NoError(t, err)
			require.NoError(t, s.Close())
		}
	})
	t.Run("directory", func(t *testing.T) {
		_, err := metadata.Open(t.Context(), t.TempDir(), metadata.Options{})
		require.ErrorIs(t, err, syscall.EISDIR)
		_, err = metadata.Open(t.Context(), t.TempDir(), metadata.Options{ReadOnly: true})
		require.ErrorIs(t, err, metadata.ErrForeign)
	})
	t.Run("nothing to read", func(t *testing.T) {
		path := storePath(t)
		_, err := metadata.Open(t.Context(), path, metadata.Options{ReadOnly: true})
		require.True(t, errdefs.IsNotFound(err))
		require.ErrorIs(t, err, fs.ErrNotExist)
		_, err = metadata.Open(t.Context(), filepath.Join(path, "no", "dir"), metadata.Options{})
		require.ErrorIs(t, err, fs.ErrNotExist)
		entries, err := os.ReadDir(filepath.Dir(path))
		require.NoError(t, err)
		require.Empty(t, entries)
	})
}

// TestOpenReadsLittle opens a store of which hardly a page is left.
func TestOpenReadsLittle(t *testing.T) {
	path := storePath(t)
	s := open(t, path, metadata.Options{})
	update(t, s, func(tx *metadata.Tx) error {
		for i := range 3000 {
			if err := tx.Create(rec(metadata.ID(fmt.Sprintf("7%05d", i)), indexed("i"))); err != nil {
				return err
			}
		}
		return nil
	})
	for range 40 { // beyond the first, which store the free pages anyway
		id := s.NewID()
		create(t, s, rec(id))
	}
	before := s.Stats()
	require.NoError(t, s.Close())
	content, err := os.ReadFile(path)
	require.NoError(t, err)

	// Clean: nothing is written, whichever way it is opened.
	for _, readOnly := range []bool{true, false} {
		s := open(t, path, metadata.Options{ReadOnly: readOnly})
		require.NoError(t, s.Close())
		got, err := os.ReadFile(path)
		require.NoError(t, err)
		require.True(t, string(content) == string(got), "opening wrote something")
	}

	page := int64(os.Getpagesize())
	meta, err := metadata.NewestMeta(path)
	require.NoError(t, err)
	keep := map[int64]bool{0: true, 1: true, int64(meta.Root): true}
	for i := range 1 + int64(binary.NativeEndian.Uint32(content[int64(meta.Freelist)*page+12:])) {
		keep[int64(meta.Freelist)+i] = true
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	for i := range before.UsedBytes / page {
		if !keep[i] {
			_, err := f.WriteAt(make([]byte, page), i*page)
			require.NoError(t, err)
		}
	}
	require.NoError(t, f.Close())
	s, err = metadata.Open(t.Context(), path, metadata.Options{})
	require.NoError(t, err)
	require.NotEmpty(t, s.NewID())
	require.Error(t, s.View(t.Context(), func(tx *metadata.Tx) error { _, err := tx.Get("700001"); return err }))
	require.NoError(t, s.Close())
}

func TestReadOnly(t *testing.T) {
	path := storePath(t)
	s := open(t, path, metadata.Options{})
	create(t, s, rec("a"))
	require.NoError(t, s.Close())
	require.NoError(t, os.Remove(path+".holder"))

	r := open(t, path, metadata.Options{ReadOnly: true})
	require.EqualValues(t, 1, get(t, r, "a").Revision)
	require.ErrorIs(t, r.Update(t.Context(), func(*metadata.Tx) error { return nil }), metadata.ErrReadOnly)
	r.Touch("a", time.Now())
	require.NoError(t, r.Flush(t.Context()))
	require.NoError(t, r.Close())
	entries, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Len(t, entries, 1, "nothing beside it")
}

func TestReadOnlyFileSystem(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "lamina.db")
	s := open(t, path, metadata.Options{})
	create(t, s, rec("a"))
	require.NoError(t, s.Close())
	if err := syscall.Mount(dir, dir, "", syscall.MS_BIND, ""); err != nil {
		t.Skipf("cannot mount here: %v", err)
	}
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(dir, 0)) })
	require.NoError(t, syscall.Mount("", dir, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	r, err := metadata.Open(t.Context(), path, metadata.Options{ReadOnly: true})
	require.NoError(t, err)
	get(t, r, "a")
	require.NoError(t, r.Close())
	_, err = metadata.Open(t.Context(), path, metadata.Options{})
	require.ErrorIs(t, err, syscall.EROFS)
	require.True(t, errdefs.IsFailedPrecondition(err))
}

// TestKilledWithoutFreelist opens a copy that was made while the store was
// open and did not store its free pages.
func TestKilledWithoutFreelist(t *testing.T) {
	path := storePath(t)
	s := open(t, path, metadata.Options{})
	for i := range 50 {
		create(t, s, rec(metadata.ID(fmt.Sprint(i))))
	}
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	killed := storePath(t)
	require.NoError(t, os.WriteFile(killed, content, 0o600))
	r := open(t, killed, metadata.Options{ReadOnly: true})
	get(t, r, "49")
	require.NoError(t, r.Close())
	s = open(t, killed, metadata.Options{})
	got, err := os.ReadFile(killed)
	require.NoError(t, err)
	require.True(t, string(content) == string(got), "opening wrote something")
	create(t, s, rec("x"))
	get(t, s, "49")
}

func TestClose(t *testing.T) {
	path := storePath(t)
	s := open(t, path, metadata.Options{})
	create(t, s, rec("a"))
	require.NoError(t, s.Close())
	require.NoError(t, s.Close())
	require.ErrorIs(t, s.Update(t.Context(), func(*metadata.Tx) error { return nil }), metadata.ErrClosed)
	require.ErrorIs(t, s.View(t.Context(), func(*metadata.Tx) error { return nil }), metadata.ErrClosed)
	require.ErrorIs(t, s.Flush(t.Context()), metadata.ErrClosed)
	s.Touch("a", time.Now())
	require.NotEmpty(t, s.NewID())
	_ = s.Stats()
	hint, err := os.ReadFile(path + ".holder")
	require.NoError(t, err)
	require.Empty(t, hint, "nobody holds it")
}

func TestNewID(t *testing.T) {
	now := time.UnixMilli(1_700_000_000_000)
	path := storePath(t)
	o := metadata.Options{Now: func() time.Time { return now }}
	s := open(t, path, o)
	seen := map[metadata.ID]bool{}
	var last metadata.ID
	next := func() metadata.ID {
		t.Helper()
		id := s.NewID()
		require.False(t, seen[id])
		require.Greater(t, id, last)
		_, err := ulid.ParseStrict(string(id))
		require.NoError(t, err)
		seen[id], last = true, id
		return id
	}
	for range 1000 {
		next()
	}
	now = now.Add(-time.Hour)
	for range 1000 {
		next()
	}
	now = now.Add(2 * time.Hour)
	create(t, s, rec(next()), rec("zzz-imported"), rec("7zzz"), rec("01j0000000000000000000000z"))
	require.NoError(t, s.Close())
	now = time.UnixMilli(-5)
	s = open(t, path, o)
	next()

	// The newest id counts when its record is gone, too.
	update(t, s, func(tx *metadata.Tx) error { return tx.Replace("zzz-imported", rec(next())) })
	update(t, s, func(tx *metadata.Tx) error { return tx.Delete(last) })
	require.NoError(t, s.Close())
	s = open(t, path, o)
	next()

	// At the end of time ids still differ.
	end := metadata.ID("7ZZZZZZZZZ0000000000000000")
	create(t, s, rec(end))
	require.NoError(t, s.Close())
	s = open(t, path, o)
	one, two := s.NewID(), s.NewID()
	require.NotEqual(t, one, two)
}

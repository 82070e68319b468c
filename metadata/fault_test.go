package metadata

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// The tests of this file make the disk fail, at each write and at each sync
// that bbolt does. bbolt has no seam for it, so they reach into it: its
// writes go through a function in the DB, and its syncs through the number of
// its descriptor, which can be made to lead elsewhere.

// fault is one way in which a commit fails. A commit is: growing the file,
// writes of pages, a sync, the write of a meta page, a sync.
type fault struct {
	at   string // "grow", "page", "page sync", "meta" or "meta sync"
	nth  int    // which page
	part int    // of a write, in bytes; -1 is all of it, with an error all the same
}

func (f fault) String() string { return fmt.Sprintf("%s %d, %d bytes", f.at, f.nth, f.part) }

// known says whether the store can know that nothing has changed.
func (f fault) known() bool {
	return f.at != "meta sync" && (f.at != "meta" || f.part == 0)
}

// faultyDisk stands between a store and its file.
type faultyDisk struct {
	t     *testing.T
	real  *os.File // the file, by a descriptor of our own
	other int      // a descriptor that can be neither read nor synced
	fd    int
	meta  int64 // where pages begin that are no meta pages

	armed  *fault
	err    error
	pages  int // written since arm
	hit    bool
	logger // bbolt tells it about failed syncs
}

type logger struct{ bolt.Logger }

func hook(t *testing.T, s *Store) *faultyDisk {
	t.Helper()
	h := s.now.Load()
	fd := int(h.file.Fd())
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	require.NoError(t, err)
	var pipe [2]int
	require.NoError(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	require.NoError(t, unix.Close(pipe[1]))
	d := &faultyDisk{t: t, real: os.NewFile(uintptr(dup), s.path), other: pipe[0], fd: fd, meta: 2 * h.pageSize}
	t.Cleanup(func() {
		require.NoError(t, d.real.Close())
		require.NoError(t, unix.Close(d.other))
	})
	db := reflect.ValueOf(h.db).Elem()
	*(*func([]byte, int64) (int, error))(unsafe.Pointer(db.FieldByName("ops").FieldByName("writeAt").UnsafeAddr())) = d.writeAt
	*(*bolt.Logger)(unsafe.Pointer(db.FieldByName("logger").UnsafeAddr())) = d
	return d
}

// arm makes the next commit fail.
func (d *faultyDisk) arm(f *fault, err error) {
	if d.armed != nil && d.armed.at == "grow" {
		require.NoError(d.t, unix.Dup3(int(d.real.Fd()), d.fd, unix.O_CLOEXEC))
	}
	d.armed, d.err, d.pages, d.hit = f, err, 0, false
	if f != nil && f.at == "grow" {
		d.hit = true
		d.divert()
	}
}

func (d *faultyDisk) writeAt(b []byte, off int64) (int, error) {
	at := "meta"
	if off >= d.meta {
		at = "page"
		d.pages++
	}
	f := d.armed
	if f != nil && f.at == at && (at == "meta" || f.nth == d.pages) {
		d.hit = true
		if f.part >= 0 {
			b = b[:min(f.part, len(b))]
		}
		n, err := d.real.WriteAt(b, off)
		return n, errors.Join(d.err, err)
	}
	if f != nil && f.at == at+" sync" {
		d.divert()
	}
	return d.real.WriteAt(b, off)
}

func (d *faultyDisk) divert() {
	require.NoError(d.t, unix.Dup3(d.other, d.fd, unix.O_CLOEXEC))
}

func (d *faultyDisk) Debugf(string, ...any) {}

// Errorf is called when something failed; the disk is well from there on.
func (d *faultyDisk) Errorf(string, ...any) {
	if d.armed != nil && strings.HasSuffix(d.armed.at, "sync") {
		d.hit = true
		require.NoError(d.t, unix.Dup3(int(d.real.Fd()), d.fd, unix.O_CLOEXEC))
	}
}

// step is one operation of a history.
type step struct {
	name string
	do   func(*testing.T, *Store) error
}

func faultHistory() []step {
	record := func(id ID, parents ...ID) *Record {
		return &Record{
			ID: id, State: Committed, Op: Layer, Key: "key-" + string(id), Parents: parents, Type: "t", Size: 5,
			ChainID: "sha256:x", Values: []Value{{Name: "v", Data: []byte("data"), Index: "index"}},
		}
	}
	in := func(fn func(*Tx) error) func(*testing.T, *Store) error {
		return func(t *testing.T, s *Store) error { return s.Update(t.Context(), fn) }
	}
	return []step{
		{"create", in(func(tx *Tx) error { return tx.Create(record("a")) })},
		{"create child", in(func(tx *Tx) error { return tx.Create(record("b", "a")) })},
		{"attach", in(func(tx *Tx) error {
			return errors.Join(tx.SetAttachment("b", "log", make([]byte, 10_000)), tx.SetAttachment("a", "x", nil))
		})},
		{"put", in(func(tx *Tx) error {
			r, err := tx.Get("a")
			if err != nil {
				return err
			}
			r.Values, r.State = nil, Finalized
			_, err = tx.Put(r)
			return err
		})},
		{"replace", in(func(tx *Tx) error { return tx.Replace("b", record("c", "a")) })},
		{"touch and flush", func(t *testing.T, s *Store) error {
			s.uses.mu.Lock()
			clear(s.uses.gathered) // a try that failed has gathered it, too
			s.uses.mu.Unlock()
			s.Touch("a", time.Unix(100, 0))
			return s.Flush(t.Context())
		}},
		{"many", in(func(tx *Tx) error {
			for i := range 30 {
				r := record(ID(fmt.Sprintf("many%03d", i)), "c")
				r.Description = strings.Repeat("grow", 10_000)
				if err := tx.Create(r); err != nil {
					return err
				}
			}
			return nil
		})},
		{"delete", in(func(tx *Tx) error {
			for i := range 20 {
				if err := tx.Delete(ID(fmt.Sprintf("many%03d", i))); err != nil {
					return err
				}
			}
			return nil
		})},
	}
}

// dump is all that can be read, one line each.
func dump(t *testing.T, s *Store) []string {
	t.Helper()
	var out []string
	require.NoError(t, s.View(t.Context(), func(tx *Tx) error {
		for r, err := range tx.Records() {
			require.NoError(t, err)
			b, err := encodeRecord(r)
			require.NoError(t, err)
			out = append(out, fmt.Sprintf("%s %x", r.ID, b))
			for name := range tx.Attachments(r.ID) {
				data, err := tx.Attachment(r.ID, name)
				require.NoError(t, err)
				out = append(out, fmt.Sprintf("%s %s %d", r.ID, name, len(data)))
			}
		}
		totals, err := tx.Totals()
		require.NoError(t, err)
		out = append(out, fmt.Sprint(totals))
		for k, id := range tx.ByIndexPrefix("") {
			out = append(out, k+" "+string(id))
		}
		for f, err := range tx.Check() {
			require.NoError(t, err)
			t.Errorf("finding %s: %s", f.Code, f.Message)
		}
		return nil
	}))
	return out
}

// memDir is a directory whose syncs cost nothing, where there is one.
func memDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "lamina-metadata-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

func faultOptions() Options {
	return Options{FlushInterval: -1, Now: func() time.Time { return time.Unix(1, 0) }}
}

// plan runs the history once and returns what each step wrote: the numbers of
// pages, and the states between the steps.
func plan(t *testing.T, storeFree bool) (pages []int, states [][]string) {
	t.Helper()
	s, err := Open(t.Context(), filepath.Join(memDir(t), "s.db"), faultOptions())
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	setFreelist(s, storeFree)
	d := hook(t, s)
	states = append(states, dump(t, s))
	for _, st := range faultHistory() {
		d.arm(nil, nil)
		require.NoError(t, st.do(t, s), st.name)
		pages = append(pages, d.pages)
		states = append(states, dump(t, s))
	}
	return pages, states
}

// setFreelist makes commits store the free pages or not, as they would early
// and late in the life of a store.
func setFreelist(s *Store, stored bool) {
	if !stored {
		s.transactions.Store(freelistTxs)
	}
}

func TestEveryWriteAndSyncFails(t *testing.T) {
	for _, storeFree := range []bool{true, false} {
		pages, states := plan(t, storeFree)
		for i, st := range faultHistory() {
			require.NotZero(t, pages[i], "step %s wrote nothing", st.name)
			faults := []fault{
				{at: "page sync"},
				{at: "meta"},
				{at: "meta", part: boltHeader + 50},
				{at: "meta", part: 2048},
				{at: "meta", part: -1},
				{at: "meta sync"},
			}
			if st.name == "many" {
				faults = append(faults, fault{at: "grow"})
			}
			for n := range pages[i] {
				if n > 5 && n < pages[i]-3 {
					continue // one page of many
				}
				faults = append(faults, fault{at: "page", nth: n + 1, part: []int{0, 1000, -1}[n%3]})
			}
			for _, f := range faults {
				t.Run(fmt.Sprintf("free pages stored %t, %s, %s", storeFree, st.name, f), func(t *testing.T) {
					failOnce(t, storeFree, i, f, states)
				})
			}
		}
	}
}

// failOnce lets step i of the history fail once.
func failOnce(t *testing.T, storeFree bool, i int, f fault, states [][]string) {
	path := filepath.Join(memDir(t), "s.db")
	s, err := Open(t.Context(), path, faultOptions())
	require.NoError(t, err)
	setFreelist(s, storeFree)
	d := hook(t, s)
	history := faultHistory()
	for _, st := range history[:i] {
		require.NoError(t, st.do(t, s), st.name)
	}
	before, after := states[i], states[i+1]

	d.arm(&f, syscall.EIO)
	err = history[i].do(t, s)
	require.True(t, d.hit, "nothing failed")
	require.Error(t, err)
	d.arm(nil, nil)
	if f.known() {
		require.NotErrorIs(t, err, ErrUnknownOutcome)
		if f.at == "page" || f.at == "meta" {
			require.ErrorIs(t, err, syscall.EIO)
		}
		if history[i].name == "touch and flush" {
			require.Equal(t, 1, s.Stats().WaitingUses, "a use that was not written waits")
		} else {
			require.Equal(t, before, dump(t, s), "nothing may have changed")
		}
		require.NoError(t, history[i].do(t, s), "the same call works now")
		require.Equal(t, after, dump(t, s))
		require.NoError(t, s.Close())
	} else {
		require.ErrorIs(t, err, ErrUnknownOutcome)
		require.True(t, errdefs.IsUnavailable(err))
		never := func(*Tx) error { t.Error("a broken store ran a function"); return nil }
		require.ErrorIs(t, s.View(t.Context(), never), ErrUnknownOutcome)
		require.ErrorIs(t, s.Update(t.Context(), never), ErrUnknownOutcome)
		require.ErrorIs(t, s.Flush(t.Context()), ErrUnknownOutcome)
		s.Touch("a", time.Unix(200, 0))
		require.NoError(t, s.Close())
	}

	s, err = Open(t.Context(), path, faultOptions())
	require.NoError(t, err)
	got := dump(t, s)
	if f.known() {
		require.Equal(t, after, got)
	} else {
		require.Contains(t, [][]string{before, after}, got, "neither before nor after")
	}
	// The store goes on, from wherever it is.
	require.NoError(t, s.Update(t.Context(), func(tx *Tx) error {
		return tx.Create(&Record{ID: "last", State: Committed, Op: Base, Key: "last"})
	}))
	require.NoError(t, s.Close())
	requirePages(t, path)
}

// requirePages looks at bbolt's pages, our way and its own.
func requirePages(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	m, err := newestMeta(f)
	require.NoError(t, err)
	_, err = walkPages(fileSource{f}, m)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true})
	require.NoError(t, err)
	require.NoError(t, db.View(func(tx *bolt.Tx) error {
		for err := range tx.Check() {
			t.Error(err)
		}
		return nil
	}))
	require.NoError(t, db.Close())
}

// TestCloseFails: what Close cannot write is an error unless it is only a
// help for the next Open.
func TestCloseFails(t *testing.T) {
	for _, errno := range []error{syscall.ENOSPC, syscall.EIO} {
		for _, touched := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, uses %t", errno, touched), func(t *testing.T) {
				path := filepath.Join(memDir(t), "s.db")
				s, err := Open(t.Context(), path, faultOptions())
				require.NoError(t, err)
				setFreelist(s, false)
				d := hook(t, s)
				require.NoError(t, faultHistory()[0].do(t, s))
				if touched {
					s.Touch("a", time.Unix(100, 0))
				}
				want := dump(t, s)
				d.arm(&fault{at: "page", nth: 1}, errno)
				err = s.Close()
				require.True(t, d.hit)
				if errors.Is(errno, syscall.ENOSPC) && !touched {
					require.NoError(t, err)
				} else {
					require.ErrorIs(t, err, errno)
				}
				s, err = Open(t.Context(), path, faultOptions())
				require.NoError(t, err, "the lock is free")
				if !touched {
					require.Equal(t, want, dump(t, s))
				}
				require.NoError(t, s.Close())
				requirePages(t, path)
			})
		}
	}
}

func TestFullDiskIsTyped(t *testing.T) {
	for _, errno := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		s, err := Open(t.Context(), filepath.Join(memDir(t), "s.db"), faultOptions())
		require.NoError(t, err)
		d := hook(t, s)
		d.arm(&fault{at: "page", nth: 1}, &os.PathError{Op: "write", Path: "x", Err: errno})
		err = faultHistory()[0].do(t, s)
		require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
		require.ErrorIs(t, err, errno)
		d.arm(nil, nil)
		require.NoError(t, faultHistory()[0].do(t, s))
		require.NoError(t, s.Close())
	}
}

// TestNeighbourTooLarge: of two updates in one transaction that does not fit
// the small one goes through.
func TestNeighbourTooLarge(t *testing.T) {
	o := faultOptions()
	o.MaxSize = 4 << 20
	s, err := Open(t.Context(), filepath.Join(memDir(t), "s.db"), o)
	require.NoError(t, err)
	require.NoError(t, faultHistory()[0].do(t, s))
	s.Touch("a", time.Unix(100, 0))
	before := dump(t, s)

	batch := []*call{
		{ctx: t.Context(), wake: make(chan struct{}, 1), fn: func(tx *Tx) error { return tx.SetAttachment("a", "big", make([]byte, 8<<20)) }},
		{ctx: t.Context(), wake: make(chan struct{}, 1), fn: func(tx *Tx) error { return tx.SetAttachment("a", "small", []byte("s")) }},
	}
	l := &leader{s: s, batch: batch}
	l.run(true)
	require.True(t, errdefs.IsResourceExhausted(batch[0].err), "%v", batch[0].err)
	require.ErrorIs(t, batch[0].err, berrors.ErrMaxSizeReached)
	require.NoError(t, batch[1].err)
	require.Len(t, dump(t, s), len(before)+1)
	require.NoError(t, s.Close())
}

// TestDiskCutUnderneath: a page that is gone while the store is open is an
// error, not a signal.
func TestDiskCutUnderneath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	s, err := Open(t.Context(), path, faultOptions())
	require.NoError(t, err)
	require.NoError(t, s.Update(t.Context(), func(tx *Tx) error {
		for i := range 200 {
			if err := tx.Create(&Record{ID: ID(fmt.Sprintf("r%03d", i)), State: Committed, Op: Base, Description: strings.Repeat("x", 2000)}); err != nil {
				return err
			}
		}
		return nil
	}))
	require.NoError(t, os.Truncate(path, 4*s.now.Load().pageSize))
	err = s.View(t.Context(), func(tx *Tx) error {
		n := 0
		for range tx.Records() {
			n++
		}
		require.Less(t, n, 200)
		return nil
	})
	require.ErrorIs(t, err, ErrDamaged)
	require.Error(t, s.Update(t.Context(), func(tx *Tx) error {
		_, err := tx.Get("r100")
		return err
	}))
	_ = s.Close() // whatever it says, it returns
}

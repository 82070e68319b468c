package metadata

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// longest is how long opening and checking a damaged store may take: what takes
// milliseconds and does not end by then never does.
const longest = time.Minute

// specimen is a small store, closed cleanly, with a page of each kind.
type specimen struct {
	content  []byte
	pageSize int
	meta     boltMeta
	records  map[ID]*Record
	data     map[ID][]byte
	kinds    map[string]int // a page of each kind
}

func newSpecimen(t *testing.T) *specimen {
	t.Helper()
	path := filepath.Join(memDir(t), "s.db")
	s, err := Open(t.Context(), path, faultOptions())
	require.NoError(t, err)
	sp := &specimen{records: map[ID]*Record{}, data: map[ID][]byte{}, kinds: map[string]int{}}
	// One transaction each leaves many former pages behind, which look well.
	for i := range 12 {
		id := ID(fmt.Sprintf("r%02d", i))
		r := &Record{
			ID: id, State: Committed, Op: Layer, Key: "key-" + string(id), Type: "t", Size: int64(i),
			Description: strings.Repeat("d", 900), Values: []Value{{Name: "v", Data: []byte("data"), Index: strings.Repeat("i", 400) + string(id)}},
		}
		if i%4 != 0 {
			r.Parents = []ID{ID(fmt.Sprintf("r%02d", i/4*4))}
		}
		require.NoError(t, s.Update(t.Context(), func(tx *Tx) error {
			if err := tx.Create(r); err != nil || i > 2 {
				return err
			}
			sp.data[id] = []byte(strings.Repeat("a", 3000*i))
			return tx.SetAttachment(id, "a", sp.data[id])
		}))
	}
	// One that replaced another is in that one's row.
	sp.data["r12"] = []byte("attached")
	require.NoError(t, s.Update(t.Context(), func(tx *Tx) error {
		r := &Record{ID: "q", State: Committed, Op: Layer, Key: "key-q", Parents: []ID{"r00"}, Values: []Value{{Name: "v", Index: "q"}}}
		next := *r
		next.ID, next.State = "r12", Mutable
		return errors.Join(tx.Create(r), tx.SetAttachment("q", "a", sp.data["r12"]), tx.Replace("q", &next))
	}))
	// Former revisions lie in pages that are free now.
	for i := range 6 {
		require.NoError(t, s.Update(t.Context(), func(tx *Tx) error {
			r, err := tx.Get("r11")
			if err != nil {
				return err
			}
			r.Retain = i%2 == 0
			_, err = tx.Put(r)
			return err
		}))
	}
	require.NoError(t, s.View(t.Context(), func(tx *Tx) error {
		for r, err := range tx.Records() {
			require.NoError(t, err)
			sp.records[r.ID] = r
		}
		return nil
	}))
	require.NoError(t, s.Close())

	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	sp.meta, err = newestMeta(f)
	require.NoError(t, err)
	sp.pageSize = int(sp.meta.pageSize)
	sp.content = make([]byte, int(sp.meta.used)*sp.pageSize)
	_, err = f.ReadAt(sp.content, 0)
	require.NoError(t, err)
	sp.kinds = map[string]int{"meta 0": 0, "meta 1": 1, "free": int(sp.meta.freelist), "root": int(sp.meta.root)}
	w := newPageWalk(&tree{src: mapSource(sp.content), pageSize: uint64(sp.pageSize), used: sp.meta.used, root: sp.meta.root})
	w.page = func(p page) {
		switch {
		case p.isBranch():
			sp.kinds["branch"] = int(p.id)
		case p.more > 0:
			sp.kinds["long leaf"], sp.kinds["overflow"] = int(p.id), int(p.id)+1
		case p.id != sp.meta.root && string(p.key(0)[:1]) == "r":
			sp.kinds["records"] = int(p.id)
		case p.id != sp.meta.root:
			sp.kinds["index"] = int(p.id)
		}
	}
	w.run()
	require.Empty(t, w.damaged)
	require.Len(t, sp.kinds, 9)
	return sp
}

// outcome is what became of a damaged store.
type outcome struct{ refused, damaged, whole int }

// try opens a damaged store, reads all of it, checks and repairs it.
func (sp *specimen) try(t *testing.T, dir, what string, b []byte, repair, look bool, o *outcome) {
	t.Helper()
	path := filepath.Join(dir, "s.db")
	require.NoError(t, os.WriteFile(path, b, 0o600))
	start := time.Now()
	s, err := Open(t.Context(), path, faultOptions())
	if err != nil {
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrForeign) && !errors.Is(err, ErrNewerSchema) {
			t.Fatalf("%s: %v", what, err)
		}
		o.refused++
	} else {
		lost := 0
		if look {
			lost = sp.readAll(t, what, s)
		}
		found, err := check(t, s)
		switch {
		case err != nil:
			require.ErrorIs(t, err, ErrDamaged, what)
			o.damaged++
		case lost > 0 || len(found) > 0:
			require.NotEmpty(t, found, "%s: %d rows are lost, and nobody says so", what, lost)
			if o.damaged < 3 {
				t.Logf("%s: %s", what, found[0].Message)
			}
			o.damaged++
		default:
			o.whole++
		}
		_ = s.Close() // it may have to write to what is damaged
	}
	if took := time.Since(start); took > longest {
		t.Fatalf("%s: it took %s", what, took)
	}
	if repair {
		require.NoError(t, os.WriteFile(path, b, 0o600))
		sp.repair(t, what, path)
	}
}

func check(t *testing.T, s *Store) (found []Finding, err error) {
	t.Helper()
	verr := s.View(t.Context(), func(tx *Tx) error {
		for f, ferr := range tx.Check() {
			if ferr != nil {
				return ferr
			}
			found = append(found, f)
		}
		return nil
	})
	return found, verr
}

// readAll reads what was written, and whatever else there is. All must be as
// it was, or an error, or missing.
func (sp *specimen) readAll(t *testing.T, what string, s *Store) (lost int) {
	t.Helper()
	for id, want := range sp.records {
		err := s.View(t.Context(), func(tx *Tx) error {
			r, err := tx.Get(id)
			if err != nil {
				return err
			}
			sp.same(t, what, r)
			if owner, err := tx.ByKey(want.Key); err == nil {
				require.Equal(t, id, owner, what)
			} else {
				lost++
			}
			for got := range tx.ByIndex(want.Values[0].Index) {
				require.Equal(t, id, got, what)
			}
			if data, have := sp.data[id]; have {
				got, err := tx.Attachment(id, "a")
				if err != nil {
					return err
				}
				require.True(t, bytes.Equal(data, got), what)
			}
			return nil
		})
		if err != nil {
			lost++
			require.True(t, errdefs.IsNotFound(err) || errors.Is(err, ErrDamaged), "%s: %v", what, err)
		}
	}
	err := s.View(t.Context(), func(tx *Tx) error {
		for r, err := range tx.Records() {
			if err == nil {
				sp.same(t, what, r)
			}
		}
		_, err := tx.Totals()
		for range tx.Unsettled() {
			continue
		}
		for range tx.ByIndexPrefix("") {
			continue
		}
		return err
	})
	if err != nil {
		require.ErrorIs(t, err, ErrDamaged, what)
	}
	return lost
}

// same is quick, for it is asked a million times.
func (sp *specimen) same(t *testing.T, what string, r *Record) {
	t.Helper()
	if want := sp.records[r.ID]; want == nil || !reflect.DeepEqual(want, r) {
		t.Fatalf("%s: record %q is %+v, not %+v", what, r.ID, r, want)
	}
}

// repair makes the store whole, out of nothing but what was in it.
func (sp *specimen) repair(t *testing.T, what, path string) {
	t.Helper()
	report, err := Repair(t.Context(), path, faultOptions())
	if err != nil {
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrForeign) && !errors.Is(err, ErrNewerSchema) {
			t.Fatalf("%s: %v", what, err)
		}
		return
	}
	s, err := Open(t.Context(), path, faultOptions())
	require.NoError(t, err, what)
	left, err := check(t, s)
	require.NoError(t, err, what)
	for _, f := range left {
		require.True(t, stays(f), "%s: %s", what, f.Message)
		if f.Code == CodeParentMissing {
			require.Contains(t, report.Descendants, f.ID, what)
		}
	}
	got := map[ID]bool{}
	require.NoError(t, s.View(t.Context(), func(tx *Tx) error {
		for r, err := range tx.Records() {
			require.NoError(t, err, what)
			want := sp.records[r.ID]
			require.NotNil(t, want, "%s: %q is back from the dead", what, r.ID)
			require.Equal(t, want, r, what)
			got[r.ID] = true
		}
		return nil
	}))
	require.NoError(t, s.Close())
	if report.Whole {
		require.Len(t, got, len(sp.records), what)
		return
	}
	require.NotEmpty(t, report.Findings, what)
	kept, err := os.Stat(report.Kept)
	require.NoError(t, err, what)
	require.NotZero(t, kept.Size())
	for id := range sp.records {
		if !got[id] {
			require.Contains(t, slices.Concat(report.Lost, report.Quarantined), id, "%s: lost, and nobody says so", what)
		}
	}
	again, err := Repair(t.Context(), path, faultOptions())
	require.NoError(t, err, what)
	require.True(t, again.Whole, what)
	require.NoError(t, os.Remove(report.Kept))
}

func full() bool { return os.Getenv("LAMINA_TEST_FULL") == "1" }

// TestEveryByteFlipped changes bytes of a page of each kind, or of all.
func TestEveryByteFlipped(t *testing.T) {
	sp := newSpecimen(t)
	kinds := sp.kinds
	if full() {
		kinds = map[string]int{}
		for i := range int(sp.meta.used) {
			kinds[fmt.Sprintf("page %d", i)] = i
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			dir, o := memDir(t), outcome{}
			b := slices.Clone(sp.content)
			for i := 0; i < sp.pageSize; i += stride {
				at := kinds[kind]*sp.pageSize + i
				// Behind what is in use of a page nobody takes notice.
				unused := !full() && b[at] == 0 && len(bytes.Trim(b[max(at-16, 0):min(at+16, len(b))], "\x00")) == 0
				if unused && i%16 != 0 && !strings.HasPrefix(kind, "meta") {
					continue
				}
				// Check looks at everything; whether reading gets it right, too, is
				// asked where pages have their structure, and elsewhere at times.
				look := full() || !unused && (i < 400 || i%8 == 0)
				flips := []byte{1 << (i % 8)}
				if full() {
					flips = []byte{1, 2, 0x80, 0xff}
				}
				for _, bits := range flips {
					b[at] ^= bits
					sp.try(t, dir, fmt.Sprintf("%s, byte %d, bits %#x", kind, i, bits), b, i%128 < 6 && i < 1024, look, &o)
					b[at] ^= bits
				}
			}
			t.Logf("rig: %d damaged stores refused, %d opened with the damage named, %d whole", o.refused, o.damaged, o.whole)
		})
	}
}

// TestEveryPageLost zeroes each page, and cuts the file at each.
func TestEveryPageLost(t *testing.T) {
	sp := newSpecimen(t)
	dir, o := memDir(t), outcome{}
	for i := range int(sp.meta.used) {
		b := slices.Clone(sp.content)
		clear(b[i*sp.pageSize : (i+1)*sp.pageSize])
		sp.try(t, dir, fmt.Sprintf("page %d zeroed", i), b, true, true, &o)
		sp.try(t, dir, fmt.Sprintf("cut at page %d", i), sp.content[:i*sp.pageSize], true, true, &o)
		sp.try(t, dir, fmt.Sprintf("cut in page %d", i), sp.content[:i*sp.pageSize+100], true, true, &o)
	}
	require.NotZero(t, o.refused)
	require.NotZero(t, o.damaged)
	require.NotZero(t, o.whole, "free pages do not matter")
	t.Logf("rig: %d damaged stores refused, %d opened with the damage named, %d whole", o.refused, o.damaged, o.whole)
}

// TestEveryBranchAstray makes each branch of a store that was closed cleanly
// lead to each other page. What bbolt would do with one that leads back ends
// the process.
func TestEveryBranchAstray(t *testing.T) {
	sp := newSpecimen(t)
	dir, o := memDir(t), outcome{}
	e := binary.NativeEndian
	astray := func(at int) {
		b := slices.Clone(sp.content)
		for to := range sp.meta.used + 1 {
			if old := e.Uint64(sp.content[at:]); to != old && to != 0 {
				e.PutUint64(b[at:], to)
				sp.try(t, dir, fmt.Sprintf("%d leads to %d instead of %d", at, to, old), b, to%5 == 0, true, &o)
			}
		}
	}
	w := newPageWalk(&tree{src: mapSource(sp.content), pageSize: uint64(sp.pageSize), used: sp.meta.used, root: sp.meta.root})
	w.page = func(p page) {
		for i := range p.count {
			el := int(p.id)*sp.pageSize + boltHeader + i*elementSize
			if p.isBranch() {
				astray(el + 8)
			} else if v, nested := p.value(i); nested && e.Uint64(v) != 0 {
				at, k, _ := p.bounds(i)
				astray(int(p.id)*sp.pageSize + int(at+k))
			}
		}
	}
	w.run()
	require.NotZero(t, o.damaged+o.refused)
	t.Logf("rig: %d damaged stores refused, %d opened with the damage named, %d whole", o.refused, o.damaged, o.whole)
}

// TestWriteToDamaged: what is written to a store with a damaged page does not
// make things worse.
func TestWriteToDamaged(t *testing.T) {
	sp := newSpecimen(t)
	dir := memDir(t)
	path := filepath.Join(dir, "s.db")
	wrote, refused := 0, 0
	for i := 2; i < int(sp.meta.used); i++ {
		for _, at := range []int{8, 10, 12, 20, 24, 28, 40} {
			b := slices.Clone(sp.content)
			b[i*sp.pageSize+at] ^= 0x15
			require.NoError(t, os.WriteFile(path, b, 0o600))
			s, err := Open(t.Context(), path, faultOptions())
			if err != nil {
				require.ErrorIs(t, err, ErrDamaged)
				continue
			}
			for n := range 5 {
				err := s.Update(t.Context(), func(tx *Tx) error {
					if n%2 == 0 {
						return tx.Delete(ID(fmt.Sprintf("r%02d", 4*n+3)))
					}
					return tx.Create(&Record{ID: ID(fmt.Sprintf("n%02d", n)), State: Committed, Op: Base, Key: fmt.Sprint(n)})
				})
				if err == nil {
					wrote++
				} else {
					refused++
					require.True(t, errors.Is(err, ErrDamaged) || errors.Is(err, ErrUnknownOutcome) || errdefs.IsNotFound(err), "page %d: %v", i, err)
				}
			}
			for id, want := range sp.records {
				_ = s.View(t.Context(), func(tx *Tx) error {
					r, err := tx.Get(id)
					if err == nil {
						require.Equal(t, want, r)
					}
					return err
				})
			}
			_ = s.Close()
		}
	}
	require.NotZero(t, wrote)
	require.NotZero(t, refused)
	t.Logf("%d written, %d refused", wrote, refused)
}

// TestPageInUseIsFree: a list of free pages that holds one that is in use, in
// good order, is noticed before anything is written there.
func TestPageInUseIsFree(t *testing.T) {
	sp := newSpecimen(t)
	e, list := binary.NativeEndian, int(sp.meta.freelist)*sp.pageSize
	w, err := walkPages(mapSource(sp.content), sp.meta)
	require.NoError(t, err)
	tried := 0
	for i := range int(e.Uint16(sp.content[list+10:])) {
		at := list + boltHeader + 8*i
		low, high := uint64(1), sp.meta.used
		if i > 0 {
			low = e.Uint64(sp.content[at-8:])
		}
		if i+1 < int(e.Uint16(sp.content[list+10:])) {
			high = e.Uint64(sp.content[at+8:])
		}
		for id := low + 1; id < high; id++ {
			if !w.reached[id] {
				continue
			}
			b := slices.Clone(sp.content)
			e.PutUint64(b[at:], id)
			for _, sealed := range []bool{true, false} {
				if !sealed {
					clear(b[sealAt : sealAt+sealSize])
					clear(b[sp.pageSize+sealAt : sp.pageSize+sealAt+sealSize])
				}
				path := filepath.Join(memDir(t), "s.db")
				require.NoError(t, os.WriteFile(path, b, 0o600))
				_, err := Open(t.Context(), path, faultOptions())
				require.ErrorIs(t, err, ErrDamaged, "page %d", id)
				tried++
			}
		}
	}
	require.NotZero(t, tried)
}

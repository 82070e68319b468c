package metadata

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Report says what Repair found and did.
type Report struct {
	// Whole says that there was nothing to repair, and nothing was done.
	Whole bool
	// Findings is what was wrong, as Check says it. Those of a file that
	// bbolt could not have opened are among them. Records in quarantine, and
	// records without a parent, stay as they are: what they lack is lost.
	Findings []Finding
	// Kept is where the file is that was repaired.
	Kept string
	// Records and Attachments are how many are in the new file.
	Records, Attachments int
	// Lost are records that something in the file speaks of and that were not
	// found, sorted. A record that had several ids is named by one of them.
	Lost []ID
	// Quarantined are records, named in the same way, of which bytes were found that say nothing, or
	// that another record stands in the way of, sorted. The bytes are in the
	// new file's quarantine.
	Quarantined []ID
	// Descendants are records that were found and have a lost or quarantined
	// one among their ancestors, sorted. They are in the new file.
	Descendants []ID
}

// Repair makes the store at path whole again, out of what can be read of it.
// It goes over the file without bbolt, takes each record and attachment whose
// checksum is right, wherever it is in use, and writes them into a new file,
// with everything that is derived computed again. The former file stays beside
// it, as PATH.damaged-TIME. Killed at any step it leaves the former file under
// its name, or the new one; it can be run again at any time, and a store that
// is whole it leaves alone. It needs free space of the size of what is in use.
//
// Errors: not found; *LockedError; ErrForeign and ErrNewerSchema for files that
// are not for this version to repair; ErrDamaged if no meta page can be read,
// without which nobody can tell a record from what it was before.
func Repair(ctx context.Context, path string, o Options) (report Report, err error) {
	o = o.withDefaults()
	if o.ReadOnly {
		return Report{}, ErrReadOnly
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return Report{}, fmt.Errorf("repair store: %w: %w", err, errdefs.ErrNotFound)
	}
	f, err := acquire(ctx, path, o)
	if err != nil {
		return Report{}, err
	}
	defer func() { err = errors.Join(err, closeFile(f)) }()
	r := &repair{ctx: ctx, path: path, opts: o, old: f}
	if err := r.run(); err != nil {
		return r.report, fmt.Errorf("repair %s: %w", path, err)
	}
	return r.report, nil
}

type repair struct {
	ctx    context.Context
	path   string
	opts   Options
	old    *os.File
	meta   boltMeta
	tx     *Tx // reads the old file
	report Report
}

func (r *repair) run() error {
	whole, err := r.examine()
	if err != nil || whole {
		r.report.Whole = err == nil
		return err
	}
	s, err := r.salvage()
	if err != nil {
		return err
	}
	return r.write(s)
}

// examine finds out what is wrong.
func (r *repair) examine() (whole bool, err error) {
	m, sl, sealed, damaged, err := newest(r.old)
	if err != nil {
		return false, err
	}
	info, err := r.old.Stat()
	if err != nil {
		return false, err
	}
	if most := uint64(info.Size())/uint64(m.pageSize) + 1<<20; m.used > most {
		return false, fmt.Errorf("file has %d bytes, %d pages are in use: %w", info.Size(), m.used, ErrDamaged)
	}
	r.meta = m
	src := fileSource{r.old}
	r.tx = &Tx{tree: &tree{src: src, pageSize: uint64(m.pageSize), used: m.used, root: m.root, passOver: true}}
	if set := freeSet(r.old, m); set != nil {
		r.tx.tree.free = *set
	}
	schema, err := r.tx.schema()
	switch {
	case err == nil && schema > SchemaVersion:
		return false, fmt.Errorf("schema %d, this version knows %d: %w", schema, SchemaVersion, ErrNewerSchema)
	case err != nil && !r.ours():
		if _, err := r.tx.tree.page(m.root, nil, nil); err != nil {
			return false, err
		}
		return false, ErrForeign
	}
	find := func(err error) {
		if err != nil {
			r.report.Findings = append(r.report.Findings, Finding{Code: CodePageDamaged, Bucket: "database page", Message: err.Error()})
		}
	}
	if damaged {
		find(errDamagedMeta(m))
	}
	if info.Size() < int64(m.used)*int64(m.pageSize) {
		find(fmt.Errorf("file has %d bytes of %d: %w", info.Size(), int64(m.used)*int64(m.pageSize), ErrDamaged))
	}
	if err := prepare(r.old, m, sl, sealed); err != nil && r.pagesAreWhole() {
		find(err)
	}
	for f, err := range r.tx.Check() {
		if err != nil {
			return false, err
		}
		r.report.Findings = append(r.report.Findings, f)
	}
	r.tx.tree.passOver = true
	return !slices.ContainsFunc(r.report.Findings, func(f Finding) bool { return !stays(f) }), nil
}

// stays says whether a finding is of what is lost for good: writing the file
// again would not make it go away.
func stays(f Finding) bool { return f.Code == CodeRecordQuarantined || f.Code == CodeParentMissing }

// pagesAreWhole says whether Check will find nothing wrong with pages.
func (r *repair) pagesAreWhole() bool {
	w := newPageWalk(r.tx.tree)
	w.run()
	return len(w.damaged) == 0
}

// ours says whether a file whose schema cannot be read is a store all the same.
func (r *repair) ours() bool {
	names, err := r.tx.rootKeys()
	n := 0
	for _, b := range buckets() {
		if names[b] {
			n++
		}
	}
	// All or most of them, or none because the page that lists them is lost.
	return err != nil || n > len(buckets())/2 || (n == 0 && r.orphansAreOurs())
}

func (r *repair) orphansAreOurs() bool {
	found := false
	r.orphans(func(k, v []byte) {
		if _, err := decodeRecord(ID(k), v); err == nil {
			found = true
		}
	})
	return found
}

// salvaged is what can be read.
type salvaged struct {
	records     map[ID]*Record    // by their rows
	quarantine  [][2][]byte       // key as stored and value, of the old file
	unread      map[ID][]byte     // bytes that were found under an id
	attachments map[string][]byte // by key; those of the records only
	meta        Meta
	sequences   map[string]uint64
}

// salvage reads what can be read.
func (r *repair) salvage() (*salvaged, error) {
	s := &salvaged{records: map[ID]*Record{}, unread: map[ID][]byte{}, attachments: map[string][]byte{}, sequences: map[string]uint64{}}
	take := func(k, v []byte) {
		if len(k) == 0 || len(k) > MaxIDLen || v == nil {
			return
		}
		rec, err := decodeRecord(ID(k), v)
		if err == nil {
			err = validate(rec)
		}
		if err != nil {
			s.unread[ID(k)] = v
			return
		}
		s.records[rec.row] = rec
	}
	for k, v := range r.tx.scan(bucketRecord, nil) {
		take(k, v)
	}
	r.orphans(func(k, v []byte) {
		// What this is can only be told from a checksum that is right.
		if _, err := decodeRecord(ID(k), v); err == nil && s.records[ID(k)] == nil {
			take(k, v)
		}
	})
	for id := range s.records {
		delete(s.unread, id)
	}
	r.salvageAttachments(s)
	for k, v := range r.tx.scan(bucketQuarantine, nil) {
		if _, _, ok := splitQuarantine(k); ok && v != nil {
			s.quarantine = append(s.quarantine, [2][]byte{k, v})
		}
	}
	for _, b := range []string{bucketRecord, bucketQuarantine} {
		n, err := r.tx.sequence(b)
		if err == nil {
			s.sequences[b] = n
		}
	}
	if m, err := r.tx.Meta(); err == nil {
		s.meta = m
	} else {
		s.meta = Meta{Created: r.opts.Now()}
	}
	return s, errors.Join(r.tx.err, context.Cause(r.ctx))
}

func (r *repair) salvageAttachments(s *salvaged) {
	take := func(k, v []byte) {
		row, _, ok := splitAttachment(k)
		if !ok || s.records[row] == nil || s.attachments[string(k)] != nil {
			return
		}
		if _, err := unframe(k, v); err == nil {
			s.attachments[string(k)] = v
		}
	}
	for k, v := range r.tx.scan(bucketAttachment, nil) {
		take(k, v)
	}
	r.orphans(take)
}

// orphans calls row for what looks like the rows of leaves that are in use and
// that no walk can read: damaged themselves, or below a damaged page. Pages
// that are free hold records as they were once, and must not be looked at, so
// leaves below a damaged page can be found only if free pages are known.
func (r *repair) orphans(row func(k, v []byte)) {
	t := r.tx.tree
	w := newPageWalk(t)
	w.goOn = true
	whole := map[uint64]bool{}
	w.page = func(p page) { whole[p.id] = true }
	w.run()
	own := map[uint64]bool{}
	if r.meta.freelist != boltNoFreelist {
		if b, err := freelistBytes(t.src, r.meta); err == nil {
			for i := range uint64(len(b)) / t.pageSize {
				own[r.meta.freelist+i] = true
			}
		}
	}
	behind := uint64(0) // pages that belong to an orphan before them
	for id := uint64(2); id < t.used; id++ {
		_, free := t.free[id]
		switch {
		case whole[id], own[id], free, id < behind:
			continue
		case !w.reached[id] && t.free == nil:
			continue
		case w.reached[id] && w.tail[id]:
			continue
		}
		behind = id + 1 + r.loose(id, w.reached[id], row)
	}
}

// loose goes over what may be the elements of a damaged leaf, and returns the
// number of pages that belong to it. A page that nobody leads to has to say
// itself that it is one: it could be somebody's data.
func (r *repair) loose(id uint64, reached bool, row func(k, v []byte)) (more uint64) {
	t := r.tx.tree
	b, err := t.src.bytes(id*t.pageSize, t.pageSize)
	if err != nil {
		return 0
	}
	p := parse(id, b)
	if p.isBranch() || !reached && (p.flags != pageLeaf || binary.NativeEndian.Uint64(b) != id) {
		return 0
	}
	if n := pagesBehind(b); n < t.used-id {
		if all, err := t.src.bytes(id*t.pageSize, (n+1)*t.pageSize); err == nil {
			p.b, more = all, n
		}
	}
	p.flags = pageLeaf
	p.count = min(p.count, (len(p.b)-boltHeader)/elementSize)
	if p.count == 0 { // damaged, perhaps
		p.count = (int(t.pageSize) - boltHeader) / elementSize
	}
	for i := range p.count {
		at, klen, vlen := p.bounds(i)
		if at+klen+vlen > uint64(len(p.b)) || klen == 0 {
			continue
		}
		if v, nested := p.value(i); !nested {
			row(slices.Clone(p.key(i)), slices.Clone(v))
		}
	}
	return more
}

// compare fills the report with what did not get through.
func (r *repair) compare(s *salvaged) {
	// What cannot be read is known by its row, and by the names that lead there.
	missing, names := map[ID]bool{}, map[ID]ID{}
	for row := range s.unread {
		missing[row] = true
	}
	for _, b := range []string{bucketIndex, bucketChild, bucketSnapshot, bucketBlob, bucketUnsettled, bucketAlias} {
		for k, v := range r.tx.scan(b, nil) {
			row, ok := rowOwner(b, k, v)
			if !ok || s.records[row] != nil {
				continue
			}
			missing[row] = true
			if b == bucketAlias {
				names[ID(k)] = row
			}
		}
	}
	children := map[ID][]ID{}
	found := map[ID]bool{}
	for _, rec := range s.records {
		found[rec.ID] = true
	}
	for _, rec := range s.records {
		for _, p := range rec.Parents {
			row := cmp.Or(names[p], p)
			children[row] = append(children[row], rec.ID)
			if !found[p] {
				missing[row] = true
			}
		}
	}
	below := map[ID]bool{}
	todo := slices.Collect(maps.Keys(missing))
	for len(todo) > 0 {
		id := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, c := range children[id] {
			if !below[c] {
				below[c] = true
				todo = append(todo, c)
			}
		}
	}
	// The id that a record got last mostly sorts behind those before it.
	known := map[ID]ID{}
	for name, row := range names {
		known[row] = max(known[row], name, row)
	}
	for row := range missing {
		name := cmp.Or(known[row], row)
		if s.unread[row] != nil {
			r.report.Quarantined = append(r.report.Quarantined, name)
		} else {
			r.report.Lost = append(r.report.Lost, name)
		}
	}
	slices.Sort(r.report.Lost)
	slices.Sort(r.report.Quarantined)
	r.report.Descendants = slices.Sorted(maps.Keys(below))
	r.report.Records, r.report.Attachments = len(s.records), len(s.attachments)
}

func repairFile(path string) string { return path + ".repair" }

// step asks whether to go on.
func (r *repair) step(name string) error {
	if err := context.Cause(r.ctx); err != nil {
		return err
	}
	return ioError(name, r.opts.Step(name))
}

// keep gives the old file a second name, unless a run that was killed did.
func (r *repair) keep() error {
	if err := r.step("repair keep"); err != nil {
		return err
	}
	info, err := r.old.Stat()
	if err != nil {
		return err
	}
	names, err := filepath.Glob(globQuote(r.path) + ".damaged-*")
	if err != nil {
		return err
	}
	for _, n := range names {
		if there, err := os.Lstat(n); err == nil && os.SameFile(info, there) {
			r.report.Kept = n
			return nil
		}
	}
	stamp := r.path + ".damaged-" + r.opts.Now().UTC().Format("20060102T150405Z")
	for i := 0; ; i++ {
		name := stamp
		if i > 0 {
			name = fmt.Sprintf("%s-%d", stamp, i)
		}
		err := os.Link(r.path, name)
		if err == nil {
			r.report.Kept = name
			return syncDir(filepath.Dir(r.path))
		}
		if !errors.Is(err, fs.ErrExist) {
			return ioError("keep the damaged file", err)
		}
	}
}

// globQuote makes a pattern that matches exactly the path.
func globQuote(path string) string {
	var b []byte
	for i := range len(path) {
		if c := path[i]; c == '*' || c == '?' || c == '[' || c == '\\' {
			b = append(b, '\\')
		}
		b = append(b, path[i])
	}
	return string(b)
}

// write makes the new file and gives it the name.
func (r *repair) write(s *salvaged) (err error) {
	if err := r.step("repair file"); err != nil {
		return err
	}
	tmp := repairFile(r.path)
	if err := removeIfThere(tmp); err != nil {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return ioError("repair", err)
	}
	writeInPlace(f)
	renamed := false
	defer func() {
		if !renamed {
			err = errors.Join(err, removeIfThere(tmp))
		}
		err = errors.Join(err, closeFile(f))
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("lock %s: %w", tmp, err)
	}
	db, err := openBoltFresh(f, r.opts, int(r.meta.pageSize))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := r.fill(&refill{db: db, r: r, s: s}); err != nil {
		return ioError("repair", err)
	}
	if err := writeSeal(f); err != nil {
		return ioError("repair", err)
	}
	r.compare(s)
	if err := r.keep(); err != nil {
		return err
	}
	if err := r.step("repair rename"); err != nil {
		return err
	}
	if err := os.Rename(tmp, r.path); err != nil {
		return ioError("repair", err)
	}
	renamed = true
	if err := r.opts.Step("repair sync"); err != nil {
		return ioError("repair", err)
	}
	return syncDir(filepath.Dir(r.path))
}

// fill writes what was salvaged, and syncs it.
func (r *repair) fill(w *refill) error {
	steps := []func() error{w.begin, w.records, w.attachments, w.quarantine, w.end}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	if err := r.step("repair data"); err != nil {
		return err
	}
	return w.db.Sync()
}

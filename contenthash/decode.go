package contenthash

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Store gives back what Save wrote.
type Store interface {
	// Page returns the page of a name; errdefs.ErrNotFound if there is none.
	Page(name string) ([]byte, error)
}

// DamagedError says that what was stored cannot be used. The tree that comes
// with it knows nothing, so digests are computed anew and the next Save
// replaces everything.
type DamagedError struct {
	// Page is the name of the page that is wrong.
	Page string
	Err  error
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("stored content hashes, page %q: %v", e.Page, e.Err)
}

// Unwrap gives what is wrong, and errdefs.ErrDataLoss.
func (e *DamagedError) Unwrap() []error { return []error{e.Err, errdefs.ErrDataLoss} }

// Load returns the tree that was saved in s, a new one if there is none.
//
// It always returns a tree that can be used. With a *DamagedError that is a
// new one, and somebody should be told. Other errors are those of the store.
func Load(s Store) (*Tree, error) {
	t := New()
	index, err := s.Page(indexName)
	if errors.Is(err, errdefs.ErrNotFound) {
		return t, nil
	}
	if err != nil {
		return t, fmt.Errorf("read content hashes: %w", err)
	}
	if err := t.load(s, index); err != nil {
		return New(), err
	}
	return t, nil
}

// Limits of what is decoded, so that hostile pages cost no more than some
// hundred times their size. What is written stays far below them.
const (
	maxPage  = 256 << 10
	maxIndex = 64 << 20
	maxName  = 1 << 10
	// maxPath is also how long a path is read from a tree: eight times what
	// one system call takes.
	maxPath = 32 << 10
	// maxBounds is for all bounds of an index together.
	maxBounds = 64 << 20
)

func (t *Tree) load(s Store, index []byte) error {
	trust, rootSum, err := t.decodeIndex(index)
	if err != nil {
		return &DamagedError{Page: indexName, Err: err}
	}
	d := decoder{t: t, trust: trust}
	t.oldest = d.epoch(trust == trustAll)
	for i, p := range t.pages.list {
		name := pageName(p.number)
		data, err := s.Page(name)
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return fmt.Errorf("read content hashes: %w", err)
		}
		if err == nil {
			d.hi, d.last = "", i+1 == len(t.pages.list)
			if !d.last {
				d.hi = t.pages.list[i+1].bound
			}
			err = d.page(name, data, p)
		}
		if err != nil {
			return &DamagedError{Page: name, Err: err}
		}
	}
	if len(d.path) == 0 {
		return &DamagedError{Page: indexName, Err: errors.New("no root")}
	}
	if rootSum != nil {
		t.root.dir.sum, t.root.dir.hasSum, t.root.dir.sumEpoch = *rootSum, true, d.epoch(trust == trustAll)
	}
	return nil
}

var errTruncated = errors.New("ends early")

// input is a payload that is being taken apart.
type input struct {
	rest []byte
	err  error
}

func (in *input) fail(err error) {
	if in.err == nil {
		in.err = err
	}
	in.rest = nil
}

func (in *input) uvarint() uint64 {
	v, n := binary.Uvarint(in.rest)
	if n <= 0 {
		in.fail(errTruncated)
		return 0
	}
	in.rest = in.rest[n:]
	return v
}

func (in *input) varint() int64 {
	v, n := binary.Varint(in.rest)
	if n <= 0 {
		in.fail(errTruncated)
		return 0
	}
	in.rest = in.rest[n:]
	return v
}

// bytes takes n bytes; they are part of the input.
func (in *input) bytes(n uint64) []byte {
	if n > uint64(len(in.rest)) {
		in.fail(errTruncated)
		return nil
	}
	b := in.rest[:n]
	in.rest = in.rest[n:]
	return b
}

func (in *input) byte() byte {
	if b := in.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (in *input) sum() (s sum) {
	copy(s[:], in.bytes(uint64(len(s))))
	return s
}

// key takes a key and puts it in the place of the one before. Keys rise, and
// the shared part is as long as it can be.
func (in *input) key(prev []byte, first bool) (key []byte, shared int) {
	common, length := in.uvarint(), in.uvarint()
	suffix := in.bytes(length)
	switch {
	case in.err != nil:
	case common > uint64(len(prev)), first && common != 0:
		in.fail(errors.New("key without the one before"))
	case first:
		prev = prev[:0]
	case len(suffix) == 0, common < uint64(len(prev)) && suffix[0] <= prev[common]:
		in.fail(errors.New("keys do not rise"))
	}
	if in.err == nil && common+length > maxPath {
		in.fail(errors.New("key is too long"))
	}
	if in.err != nil {
		return prev, 0
	}
	return append(prev[:common], suffix...), int(common)
}

// open checks the frame of a page and returns its payload.
func open(name string, data []byte, limit int) (*input, uint32, error) {
	if len(data) < pageHead || len(data) > limit {
		return nil, 0, fmt.Errorf("%d bytes", len(data))
	}
	if data[0] != pageMagic {
		return nil, 0, errors.New("is no page of content hashes")
	}
	if data[1] != pageVersion {
		return nil, 0, fmt.Errorf("version %d is not known", data[1])
	}
	crc := binary.LittleEndian.Uint32(data[2:])
	if crc != pageCRC(name, data[pageHead:]) {
		return nil, 0, errors.New("checksum differs")
	}
	return &input{rest: data[pageHead:]}, crc, nil
}

func (t *Tree) decodeIndex(data []byte) (trust byte, rootSum *sum, err error) {
	in, _, err := open(indexName, data, maxIndex)
	if err != nil {
		return 0, nil, err
	}
	flags := in.byte()
	trust = flags & iTrust
	if flags&^iAll != 0 || trust > trustMixed {
		return 0, nil, fmt.Errorf("flags %#x are not known", flags)
	}
	t.legacy, t.ownerless = flags&iLegacy != 0, flags&iOwnerless != 0
	if flags&iSum != 0 {
		s := in.sum()
		rootSum = &s
	}
	set := pageSet{index: slices.Clone(data)}
	seen := map[uint64]bool{}
	var bound []byte
	total := 0
	count := in.uvarint()
	for i := uint64(0); i < count && in.err == nil; i++ {
		p := page{number: in.uvarint()}
		if crc := in.bytes(4); crc != nil {
			p.crc = binary.LittleEndian.Uint32(crc)
		}
		bound, _ = in.key(bound, i == 0)
		if total += len(bound); total > maxBounds {
			in.fail(errors.New("bounds are too long"))
		}
		p.bound = string(bound)
		if p.number == 0 || p.number > 1<<62 || seen[p.number] {
			in.fail(fmt.Errorf("page number %d", p.number))
		}
		seen[p.number] = true
		set.next = max(set.next, p.number+1)
		set.list = append(set.list, p)
	}
	switch {
	case in.err != nil:
		return 0, nil, in.err
	case len(in.rest) > 0:
		return 0, nil, errors.New("goes on behind its end")
	case len(set.list) == 0 || set.list[0].bound != "":
		return 0, nil, errors.New("does not begin with the root")
	}
	t.pages = set
	return trust, rootSum, nil
}

// decoder makes nodes of pages, in order.
type decoder struct {
	t     *Tree
	trust byte
	// path are the directories around the last entry, the root first, with the
	// lengths of their keys.
	path []step
	key  []byte
	hi   string
	last bool
}

type step struct {
	n      *node
	length int
}

func (d *decoder) page(name string, data []byte, p page) error {
	in, crc, err := open(name, data, maxPage)
	if err != nil {
		return err
	}
	if crc != p.crc {
		return errors.New("is not the one that the index names")
	}
	count := in.uvarint()
	if count > uint64(len(in.rest))/4 {
		return errTruncated
	}
	nodes := make([]node, count)
	var ctime int64
	for i := range nodes {
		n := &nodes[i]
		d.place(in, n, p.bound, i == 0)
		ctime = d.node(in, n, ctime)
		if in.err != nil {
			return fmt.Errorf("entry %d: %w", i, in.err)
		}
	}
	if len(in.rest) > 0 {
		return errors.New("goes on behind its end")
	}
	return nil
}

// place takes the key of n and puts n into its directory.
func (d *decoder) place(in *input, n *node, bound string, first bool) {
	before, shared := d.key, 0
	if first {
		d.key, _ = in.key(nil, true)
		for shared < len(before) && shared < len(d.key) && before[shared] == d.key[shared] {
			shared++
		}
	} else {
		d.key, shared = in.key(d.key, false)
	}
	switch {
	case in.err != nil:
		return
	case first && string(d.key) < bound, !d.last && string(d.key) >= d.hi:
		in.fail(errors.New("entry of another page"))
		return
	case len(d.key) == 0:
		d.t.root = n
		d.path = append(d.path, step{n, 0})
		return
	}
	tail := d.key[max(0, len(d.key)-maxName-1):]
	cut := bytes.LastIndexByte(tail, 0)
	if cut < 0 && len(tail) < len(d.key) {
		in.fail(errors.New("name is too long"))
		return
	}
	name := tail[cut+1:]
	cut = max(0, len(d.key)-len(name)-1)
	for len(d.path) > 0 && d.path[len(d.path)-1].length > cut {
		d.path = d.path[:len(d.path)-1]
	}
	// The directory's key begins the one before, and shared says that it
	// begins this one as well.
	if d.key[0] == 0 || len(d.path) == 0 || d.path[len(d.path)-1].length != cut || shared < cut {
		in.fail(errors.New("has no directory"))
		return
	}
	if !validName(name) {
		in.fail(fmt.Errorf("name %q", name))
		return
	}
	n.name, n.parent = string(name), d.path[len(d.path)-1].n
	n.parent.dir.children = append(n.parent.dir.children, n)
}

func validName(name []byte) bool {
	s := string(name)
	return s != "" && s != "." && s != ".." && !strings.ContainsAny(s, "/\x00")
}

// node decodes what is known of n.
func (d *decoder) node(in *input, n *node, ctime int64) int64 {
	first, flags := in.byte(), flag(in.byte())
	n.kind, n.flags = kind(first&eKind), flags
	known := fDigest | fStat | fRacy | fSaved
	if first&^eAll != 0 || n.kind > kindMax || flags&^known != 0 {
		in.fail(errors.New("flags that are not known"))
		return ctime
	}
	if n.kind == kindDir {
		n.dir = &dirInfo{listed: first&eListed != 0}
		if n.parent != nil {
			d.path = append(d.path, step{n, len(d.key)})
		}
	} else if first&(eListed|eSum) != 0 || n.parent == nil {
		in.fail(errors.New("is no directory"))
		return ctime
	}
	n.epoch = d.epoch(d.trust == trustAll || d.trust == trustMixed && flags&fSaved != 0)
	if flags&fDigest != 0 {
		n.digest = in.sum()
	}
	if flags&fStat != 0 {
		n.stat.Ino = in.uvarint()
		n.stat.Ctime = ctime + in.varint()
		n.stat.Mtime = n.stat.Ctime + in.varint()
		n.stat.Size = in.varint()
		ctime = n.stat.Ctime
	}
	if first&eLink != 0 {
		link := string(in.bytes(in.uvarint()))
		if n.kind != kindSymlink || link == "" || strings.IndexByte(link, 0) >= 0 {
			in.fail(errors.New("target of a link"))
		}
		n.link = &link
	}
	if first&eSum != 0 {
		// Where entries are not all alike, what is below may not be trusted.
		n.dir.sum, n.dir.hasSum, n.dir.sumEpoch = in.sum(), true, d.epoch(d.trust == trustAll)
	}
	return ctime
}

// epoch is that of facts that are trusted or not.
func (d *decoder) epoch(trusted bool) uint32 {
	if trusted {
		return d.t.epoch
	}
	return 0
}

// UnconfirmStored returns a stored index page changed so that all entries of
// the tree have to be validated, whatever the pages say: what belongs into the
// transaction that gives a snapshot to a writer. Other pages stay as they are.
// Nil without an error says that all pages must go: nothing of a tree that
// BuildKit stored outlives a writer.
func UnconfirmStored(index []byte) ([]byte, error) {
	if _, _, err := open(indexName, index, maxIndex); err != nil {
		return nil, &DamagedError{Page: indexName, Err: err}
	}
	out := slices.Clone(index)
	if len(out) > pageHead {
		if out[pageHead]&iLegacy != 0 {
			return nil, nil
		}
		out[pageHead] &^= iTrust // trustNone
	}
	endPage(indexName, out)
	return out, nil
}

// IndexPage is the name of the index page, the one that UnconfirmStored takes.
const IndexPage = indexName

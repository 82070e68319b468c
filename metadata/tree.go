package metadata

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"sort"
	"sync/atomic"
)

// tree reads the rows of one state of the file, from its pages. It looks at
// each page before it goes by it (see page.check), so a damaged one is an
// error of whoever needs it, and no walk goes in circles: the ranges of the
// pages below a branch do not meet.
type tree struct {
	src      source
	pageSize uint64
	used     uint64
	root     uint64
	// checked, if not nil, are pages whose elements have been looked at.
	checked *checkedPages
	// free, if not nil, are pages that are known not to be in use.
	free map[uint64]struct{}
	// passOver makes walks pass over what is damaged, and look-ups find
	// nothing there.
	passOver bool

	// roots are the buckets that were found: this state has them where they
	// are. A tree belongs to one goroutine.
	roots []namedRoot
	// known, if not nil, tells other trees of the state, which txid made.
	known *knownRoots
	txid  uint64
	// stack is what the last look-up went by, and spare what a walk did that is
	// over, to be used again.
	stack, spare []position
	// passed, if set, hears of each page that a walk passes over.
	passed func(error)
}

// maxDepth is more than any tree of bbolt has: each branch has two pages
// below it at least, so one of this depth would not fit into a disk.
const maxDepth = 64

// page reads a branch or a leaf.
func (t *tree) page(id uint64, from, to []byte) (page, error) {
	if id < 2 || id >= t.used {
		return page{}, badPage(id, "it lies outside of the file")
	}
	if _, ok := t.free[id]; ok {
		return page{}, badPage(id, "it is in use and in the list of free ones")
	}
	b, err := t.src.bytes(id*t.pageSize, boltHeader)
	if err != nil {
		return page{}, badPage(id, "%v", err)
	}
	if have := binary.NativeEndian.Uint64(b); have != id {
		return page{}, badPage(id, "it says that it is page %d", have)
	}
	p := parse(id, b)
	p.more = pagesBehind(b)
	if p.flags != pageBranch && p.flags != pageLeaf {
		return page{}, badPage(id, "it has the flags %#x", p.flags)
	}
	if p.more >= t.used-id {
		return page{}, badPage(id, "it has %d pages behind it", p.more)
	}
	if p.b, err = t.src.bytes(id*t.pageSize, (p.more+1)*t.pageSize); err != nil {
		return page{}, badPage(id, "%v", err)
	}
	if !t.checked.has(id) {
		if err := p.check(); err != nil {
			return page{}, err
		}
		t.checked.add(id)
	}
	return p, p.within(from, to)
}

// checkedPages are the pages of an open file whose elements have been looked
// at. Nobody but this store writes the file, so that holds for as long as it is
// open: what takes the place of a page was in memory, and whole, before. What
// leads to a page may be damaged all the same, and is looked at each time.
type checkedPages struct {
	bits atomic.Pointer[[]atomic.Uint64]
}

// cover makes room for so many pages. A bit that somebody sets meanwhile may
// be lost, and its page looked at again.
func (c *checkedPages) cover(pages uint64) {
	have := c.bits.Load()
	if have != nil && uint64(len(*have)) > pages/64 {
		return
	}
	bits := make([]atomic.Uint64, pages/64+pages/512+1)
	if have != nil {
		for i := range *have {
			bits[i].Store((*have)[i].Load())
		}
	}
	c.bits.CompareAndSwap(have, &bits)
}

// at is the word that has the bit of a page, nil if there is none.
func (c *checkedPages) at(id uint64) *atomic.Uint64 {
	if c == nil {
		return nil
	}
	if bits := c.bits.Load(); bits != nil && id/64 < uint64(len(*bits)) {
		return &(*bits)[id/64]
	}
	return nil
}

func (c *checkedPages) has(id uint64) bool {
	word := c.at(id)
	return word != nil && word.Load()&(1<<(id%64)) != 0
}

func (c *checkedPages) add(id uint64) {
	if word := c.at(id); word != nil {
		word.Or(1 << (id % 64))
	}
}

// bucketRoot is where the rows of a bucket are.
type bucketRoot struct {
	page     uint64
	inline   *page // instead of a page of its own
	sequence uint64
}

// lookUp is a cursor for one look-up, which ends before the next one begins.
func (t *tree) lookUp(b bucketRoot) treeCursor {
	return treeCursor{t: t, root: b, stack: t.stack[:0]}
}

// walk is a cursor that may stand while others look something up. Whoever is
// done with it calls end.
func (t *tree) walk(b bucketRoot) treeCursor {
	c := treeCursor{t: t, root: b, stack: t.spare[:0]}
	t.spare = nil
	return c
}

// end gives back what the cursor went by.
func (c *treeCursor) end() {
	if c.t != nil && c.stack != nil {
		c.t.spare, c.stack = c.stack, nil
	}
}

// forget drops what points into the memory map, and keeps the room for it.
func (t *tree) forget() *tree {
	for _, s := range [][]position{t.stack, t.spare} {
		clear(s[:cap(s)])
	}
	*t = tree{stack: t.stack[:0], spare: t.spare[:0]}
	return t
}

type namedRoot struct {
	name string
	bucketRoot
}

// knownRoots are where buckets of the newest state are that was read. One that
// is inline is none of them: it lies in a memory map that may move.
type knownRoots struct{ newest atomic.Pointer[stateRoots] }

type stateRoots struct {
	txid uint64
	list []namedRoot
}

func (k *knownRoots) of(txid uint64) []namedRoot {
	if have := k.newest.Load(); have != nil && have.txid == txid {
		return slices.Clip(have.list)
	}
	return nil
}

// add may do nothing, if somebody else adds.
func (k *knownRoots) add(txid uint64, r namedRoot) {
	have := k.newest.Load()
	next := &stateRoots{txid: txid, list: []namedRoot{r}}
	switch {
	case have == nil || have.txid < txid:
	case have.txid > txid:
		return
	default:
		next.list = append(slices.Clip(have.list), r)
	}
	k.newest.CompareAndSwap(have, next)
}

// bucket finds a bucket of the top level.
func (t *tree) bucket(name string) (b bucketRoot, ok bool, err error) {
	for i := range t.roots {
		if t.roots[i].name == name {
			return t.roots[i].bucketRoot, true, nil
		}
	}
	if b, ok, err = t.findBucket(name); ok {
		t.roots = append(t.roots, namedRoot{name, b})
		if t.known != nil && b.inline == nil {
			t.known.add(t.txid, namedRoot{name, b})
		}
	}
	return b, ok, err
}

func (t *tree) findBucket(name string) (b bucketRoot, ok bool, err error) {
	c := t.lookUp(bucketRoot{page: t.root})
	defer func() { t.stack = c.stack }()
	if ok, err = c.seek([]byte(name)); err != nil || !ok || string(c.key()) != name {
		return b, false, err
	}
	v, nested := c.value()
	if !nested {
		return b, false, nil
	}
	b.page, b.sequence, b.inline, err = nestedBucket(c.top().p.id, v)
	if err != nil && t.passOver {
		return b, false, nil
	}
	return b, err == nil, err
}

// get finds a row. A nested bucket, which does not belong here, is none.
func (t *tree) get(bucket string, key []byte) (v []byte, ok bool, err error) {
	b, ok, err := t.bucket(bucket)
	if err != nil || !ok {
		return nil, false, err
	}
	c := t.lookUp(b)
	defer func() { t.stack = c.stack }()
	if ok, err = c.seek(key); err != nil || !ok || !bytes.Equal(c.key(), key) {
		return nil, false, err
	}
	v, nested := c.value()
	return v, !nested, nil
}

// look checks the pages that bbolt goes by when it changes the row, and those
// beside them, with which it may merge them.
func (t *tree) look(bucket string, key []byte, neighbours bool) error {
	b, ok, err := t.bucket(bucket)
	if err != nil || !ok || b.inline != nil {
		return err
	}
	c := t.lookUp(b)
	defer func() { t.stack = c.stack }()
	if err := c.descend(key); err != nil || !neighbours {
		return err
	}
	for _, at := range c.stack[:len(c.stack)-1] {
		for _, i := range []int{at.i - 1, at.i + 1} {
			if i >= 0 && i < at.p.count {
				if _, err := t.page(at.p.below(i), at.lower(i), at.upper(i)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// treeCursor walks a bucket.
type treeCursor struct {
	t     *tree
	root  bucketRoot
	stack []position
}

// position is an element of a page that has keys in [from, to).
type position struct {
	p        page
	i        int
	from, to []byte
}

// lower and upper bound the keys below element i of a branch. What is less
// than all keys of a branch is below its first one.
func (at *position) lower(i int) []byte {
	if i > 0 {
		return at.p.key(i)
	}
	return at.from
}

func (at *position) upper(i int) []byte {
	if i+1 < at.p.count {
		return at.p.key(i + 1)
	}
	return at.to
}

func (c *treeCursor) top() *position { return &c.stack[len(c.stack)-1] }

func (c *treeCursor) key() []byte { return c.top().p.key(c.top().i) }

func (c *treeCursor) value() (v []byte, nested bool) { return c.top().p.value(c.top().i) }

// push goes to the page that the top of the stack leads to, or to the root.
func (c *treeCursor) push() error {
	if len(c.stack) == 0 {
		if c.stack == nil {
			c.stack = make([]position, 0, 4) // as deep as most trees are
		}
		if c.root.inline != nil {
			c.stack = append(c.stack, position{p: *c.root.inline})
			return nil
		}
		p, err := c.t.page(c.root.page, nil, nil)
		if err == nil {
			c.stack = append(c.stack, position{p: p})
		}
		return err
	}
	at := c.top()
	if len(c.stack) == maxDepth {
		return badPage(at.p.id, "it lies %d pages deep", maxDepth)
	}
	below := position{from: at.lower(at.i), to: at.upper(at.i)}
	for _, above := range c.stack {
		if above.p.id == at.p.below(at.i) {
			return badPage(at.p.id, "it leads back to page %d", above.p.id)
		}
	}
	var err error
	if below.p, err = c.t.page(at.p.below(at.i), below.from, below.to); err == nil {
		c.stack = append(c.stack, below)
	}
	return err
}

// descend goes down to the leaf that has the key or would have it.
func (c *treeCursor) descend(key []byte) error {
	c.stack = c.stack[:0]
	for {
		if err := c.push(); err != nil {
			return err
		}
		at := c.top()
		at.i = sort.Search(at.p.count, func(i int) bool { return bytes.Compare(at.p.key(i), key) >= 0 })
		if !at.p.isBranch() {
			return nil
		}
		if at.i > 0 && (at.i == at.p.count || !bytes.Equal(at.p.key(at.i), key)) {
			at.i--
		}
	}
}

// seek moves to the first row whose key is not less than key.
func (c *treeCursor) seek(key []byte) (ok bool, err error) {
	if err := c.descend(key); err != nil {
		if !c.mayPass(err) {
			return false, err
		}
		if len(c.stack) == 0 {
			return false, nil
		}
		c.top().i++
	}
	return c.settle()
}

// next moves on.
func (c *treeCursor) next() (ok bool, err error) {
	if len(c.stack) == 0 {
		return false, nil
	}
	c.top().i++
	return c.settle()
}

// mayPass says whether an error is one of the pages that a walk may skip.
func (c *treeCursor) mayPass(err error) bool {
	if !c.t.passOver || !errors.Is(err, ErrDamaged) {
		return false
	}
	if c.t.passed != nil {
		c.t.passed(err)
	}
	return true
}

// settle goes to the first row at or behind the position.
func (c *treeCursor) settle() (ok bool, err error) {
	for len(c.stack) > 0 {
		at := c.top()
		switch {
		case at.i >= at.p.count:
			c.stack = c.stack[:len(c.stack)-1]
			if len(c.stack) > 0 {
				c.top().i++
			}
		case !at.p.isBranch():
			return true, nil
		default:
			if err := c.push(); err != nil {
				if !c.mayPass(err) {
					return false, err
				}
				at.i++
			}
		}
	}
	return false, nil
}

// leaves calls leaf for the leaves of a bucket, but for those at or below
// pages that skip says yes to.
func (t *tree) leaves(b bucketRoot, skip func(id uint64) bool, leaf func(*page)) error {
	if b.inline != nil {
		leaf(b.inline)
		return nil
	}
	todo := []subtree{{page: b.page}}
	for n := uint64(0); len(todo) > 0; n++ {
		next := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if skip(next.page) {
			continue
		}
		p, err := t.page(next.page, next.from, next.to)
		if err != nil {
			return err
		}
		if n > t.used {
			return badPage(next.page, "it is reached again and again")
		}
		if !p.isBranch() {
			leaf(&p)
			continue
		}
		at := position{p: p, from: next.from, to: next.to}
		for i := range p.count {
			todo = append(todo, subtree{page: p.below(i), from: at.lower(i), to: at.upper(i)})
		}
	}
	return nil
}

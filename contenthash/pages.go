package contenthash

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
)

// pageSet says which part of the tree stands in which stored page, and which
// pages have to be written again.
//
// The entries, in the order of a walk (that of their keys), are cut into pages
// of some 16 KiB, each of which covers the keys from its bound to that of the
// next. A bound stays when the entry it was taken from goes.
type pageSet struct {
	// list is sorted by bound; the first bound is the root's key.
	list []page
	// all says that nothing that is stored counts.
	all bool
	// next is the number of the next page.
	next uint64
	// index is the index page as stored.
	index []byte
}

type page struct {
	number uint64
	bound  string
	crc    uint32
	dirty  bool
}

func pageName(number uint64) string { return "p" + strconv.FormatUint(number, 36) }

// indexName is that of the page that lists the others.
const indexName = "index"

const (
	// pageTarget is the size of a page that is written, in bytes, about: large
	// enough that a key-value store does not mind the number of them, small
	// enough that one changed file costs little.
	pageTarget = 16 << 10
	// A page that is smaller than one in pageSmall parts of that is joined with
	// the next one.
	pageSmall = 8
	// entrySize is about what an entry takes beside its name and link.
	entrySize = 64
)

// replaceAll says that the tree has nothing to do with what is stored.
func (p *pageSet) replaceAll() {
	*p = pageSet{all: true}
}

// touch says that facts of n changed, or that n comes or goes.
func (p *pageSet) touch(n *node) {
	if p.all {
		return
	}
	p.list[p.find(n.key())].dirty = true
}

// find returns the page that covers key.
func (p *pageSet) find(key string) int {
	i, ok := slices.BinarySearchFunc(p.list, key, func(p page, key string) int {
		return strings.Compare(p.bound, key)
	})
	if ok {
		return i
	}
	return i - 1
}

// Saved is what has to be written so that Load gives the tree again. All of it
// belongs into one transaction.
type Saved struct {
	// Replace says that all pages that were stored before go.
	Replace bool
	// Put are pages by name, Delete the names of pages that go.
	Put    map[string][]byte
	Delete []string

	t *Tree
}

// Empty says that what is stored is up to date.
func (s *Saved) Empty() bool { return !s.Replace && len(s.Put) == 0 && len(s.Delete) == 0 }

// Failed tells the tree that this was not written; the next Save then has
// everything. It must be called before the next Save.
func (s *Saved) Failed() {
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	s.t.pages.replaceAll()
}

// Save returns the pages that changed since the last Save or Load, encoded,
// and an index page. A file more or less changes one page and the index.
func (t *Tree) Save() *Saved {
	t.mu.Lock()
	defer t.mu.Unlock()
	trust := t.trustMode()
	if trust == trustMixed {
		t.touchTrust(t.root)
	}
	s := &Saved{t: t, Put: map[string][]byte{}, Replace: t.pages.all}
	if t.pages.all {
		t.pages = pageSet{list: []page{{dirty: true}}, next: 1}
	}
	t.savePages(s)
	index := t.appendIndex(nil, trust)
	if !bytes.Equal(index, t.pages.index) {
		t.pages.index = index
		s.Put[indexName] = index
	}
	return s
}

// savePages writes the dirty pages again and cuts them where they have grown.
func (t *Tree) savePages(s *Saved) {
	var out []page
	for i := 0; i < len(t.pages.list); i++ {
		p := t.pages.list[i]
		if !p.dirty {
			out = append(out, p)
			continue
		}
		w := walker{lo: p.bound}
		for {
			w.hi, w.last = "", i+1 == len(t.pages.list)
			if !w.last {
				w.hi = t.pages.list[i+1].bound
			}
			w.found, w.size = w.found[:0], 0
			w.walk(t.root, nil)
			if w.last || w.size >= t.pageTarget/pageSmall {
				break
			}
			i++ // too small: take in the next one
			s.drop(t.pages.list[i])
		}
		out = t.cut(s, out, p, &w)
	}
	t.pages.list = out
}

// cut encodes the entries of w as pages, the first under the number of p.
func (t *Tree) cut(s *Saved, out []page, p page, w *walker) []page {
	entries := w.found
	if len(entries) == 0 {
		if len(out) > 0 { // the page before covers its keys, too
			s.drop(p)
			return out
		}
	}
	for first := true; first || len(entries) > 0; first = false {
		n, size := 0, 0
		for n < len(entries) && (n == 0 || size < t.pageTarget) {
			size += entries[n].size()
			n++
		}
		if !first {
			p = page{bound: entries[0].key()}
		}
		if p.number == 0 {
			p.number = t.pages.next
			t.pages.next++
		}
		hi, last := w.hi, w.last
		if n < len(entries) {
			hi, last = entries[n].key(), false
		}
		var data []byte
		data, p.crc = t.encodePage(p, entries[:n], hi, last)
		p.dirty = false
		s.Put[pageName(p.number)] = data
		out = append(out, p)
		entries = entries[n:]
	}
	return out
}

// drop takes a page out of what is stored.
func (s *Saved) drop(p page) {
	if p.number != 0 {
		s.Delete = append(s.Delete, pageName(p.number))
	}
}

// walker finds the nodes with keys from lo up to hi, or with last to the end.
type walker struct {
	lo, hi string
	last   bool
	found  []*node
	size   int
}

func (n *node) size() int {
	size := entrySize + len(n.name)
	if n.link != nil {
		size += len(*n.link)
	}
	return size
}

// walk takes n, whose key is key, and what is below it.
func (w *walker) walk(n *node, key []byte) {
	if string(key) >= w.lo {
		w.found = append(w.found, n)
		w.size += n.size()
	}
	if n.dir == nil {
		return
	}
	childKey := func(c *node) []byte {
		if len(key) == 0 {
			return append(key, c.name...)
		}
		return append(append(key, 0), c.name...)
	}
	children := n.dir.children
	// The first child that may lie in the range is the last one whose key is
	// not above lo.
	start, _ := slices.BinarySearchFunc(children, w.lo, func(c *node, lo string) int {
		return strings.Compare(string(childKey(c)), lo)
	})
	for _, c := range children[max(start-1, 0):] {
		k := childKey(c)
		if !w.last && string(k) >= w.hi {
			return
		}
		w.walk(c, k)
	}
}

// How the trust of stored entries is told. Most trees are of one kind, and
// become of the other all at once, which must not rewrite their pages.
const (
	trustNone  = iota // all have to be validated
	trustAll          // none has to
	trustMixed        // each says it itself
)

func (t *Tree) trustMode() byte {
	if t.writing {
		return trustNone
	}
	if t.oldest >= t.trusted {
		return trustAll // known without a walk
	}
	var yes, no bool
	t.eachFact(t.root, func(n *node) {
		if t.trusts(n) {
			yes = true
		} else {
			no = true
		}
	})
	switch {
	case yes && no:
		return trustMixed
	case no:
		return trustNone
	default:
		t.oldest = t.trusted
		return trustAll
	}
}

// eachFact calls visit for each node of which something is known that could be
// wrong.
func (t *Tree) eachFact(n *node, visit func(*node)) {
	if n != t.root || n.flags != 0 || n.dir.listed {
		visit(n)
	}
	if n.dir != nil {
		for _, c := range n.dir.children {
			t.eachFact(c, visit)
		}
	}
}

// touchTrust marks the pages whose entries tell another trust than they have.
func (t *Tree) touchTrust(n *node) {
	if n.has(fSaved) != t.trusts(n) {
		t.pages.touch(n)
	}
	if n.dir != nil {
		for _, c := range n.dir.children {
			t.touchTrust(c)
		}
	}
}

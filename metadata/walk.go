package metadata

// pageWalk looks at every page that can be reached, and that none is reached
// twice.
type pageWalk struct {
	t *tree
	// reached are the pages in use, those behind others among them.
	reached []bool
	// tail are pages that belong to one before them.
	tail    map[uint64]bool
	todo    []subtree
	damaged []*DamagedError
	// goOn makes the walk go on behind a damaged page.
	goOn bool
	// page, if set, is called for every page that is as it should be.
	page func(page)
}

// subtree is a page and the range of the keys in and below it.
type subtree struct {
	page     uint64
	from, to []byte
}

// walkPages looks at the structure of every page, without believing any of
// it: ids, bounds, the order of keys, and that no page is reached twice. It
// reads the whole file.
func walkPages(src source, m boltMeta) (*pageWalk, error) {
	w := newPageWalk(&tree{src: src, pageSize: uint64(m.pageSize), used: m.used, root: m.root})
	w.run()
	if len(w.damaged) > 0 {
		return w, w.damaged[0]
	}
	return w, nil
}

func newPageWalk(t *tree) *pageWalk {
	return &pageWalk{t: t, reached: make([]bool, t.used), tail: map[uint64]bool{}}
}

func (w *pageWalk) run() {
	w.push(subtree{page: w.t.root})
	for len(w.todo) > 0 && (w.goOn || len(w.damaged) == 0) {
		next := w.todo[len(w.todo)-1]
		w.todo = w.todo[:len(w.todo)-1]
		w.visit(next)
	}
}

func (w *pageWalk) fail(err error) {
	if d, ok := err.(*DamagedError); ok { //nolint:errorlint // made here, and never wrapped
		w.damaged = append(w.damaged, d)
	}
}

func (w *pageWalk) push(t subtree) {
	switch {
	case t.page < 2 || t.page >= w.t.used:
		w.fail(badPage(t.page, "it lies outside of the file"))
	case w.reached[t.page]:
		w.fail(badPage(t.page, "it is reached twice"))
	default:
		w.reached[t.page] = true
		w.todo = append(w.todo, t)
	}
}

func (w *pageWalk) visit(t subtree) {
	p, err := w.t.page(t.page, t.from, t.to)
	if err != nil {
		w.fail(err)
		return
	}
	for o := t.page + 1; o <= t.page+p.more; o++ {
		if w.reached[o] {
			w.fail(badPage(o, "it is reached twice"))
			return
		}
		w.reached[o] = true
		w.tail[o] = true
	}
	if w.page != nil {
		w.page(p)
	}
	at := position{p: p, from: t.from, to: t.to}
	for i := range p.count {
		if p.isBranch() {
			w.push(subtree{page: p.below(i), from: at.lower(i), to: at.upper(i)})
			continue
		}
		if v, nested := p.value(i); nested {
			root, _, inline, err := nestedBucket(p.id, v)
			if err != nil {
				w.fail(err)
			} else if inline == nil {
				w.push(subtree{page: root})
			}
		}
	}
}

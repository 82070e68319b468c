package cachetest

import (
	"maps"
	"slices"
	"strings"

	"github.com/lamina-build/lamina/cache"
)

// outcome is how a call ends, as callers see it.
type outcome string

const (
	ok       outcome = "ok"
	notFound outcome = "not found"
	locked   outcome = "locked"
	refused  outcome = "refused" // a failed precondition
	invalid  outcome = "invalid"
)

// record is what the model knows of one record. Its maps are replaced, never
// written to.
type record struct {
	state cache.State
	// unrecorded mutables are in memory only.
	unrecorded bool
	parent     string
	files      map[string]string
	values     map[string]string // name to index key
	labels     map[string]string
	attached   map[string]string
	text       string
	kind       string // the record's type
	// retain and after are the policy, now and after an interruption. keep
	// says that a power cut may be survived without a sync, durable that there
	// was one.
	retain, after, interrupted, keep, durable bool
	// uses are counted with the last handle, if one of them touched it.
	uses    uint64
	touched bool

	// Whoever holds it: handles, mounts, and other processes.
	writers, readers, mounts, writing, shared, exclusive int
}

// held says whether this process holds r; others say so by their holds.
func (r *record) held() bool { return r.writers+r.readers+r.mounts > 0 }

// Model is what a cache must look like from outside, by the names that a
// history gives to its records. Each method is one operation: it says how that
// must end, and changes the model only if it ends well.
type model struct{ records map[string]*record }

func newModel() *model { return &model{records: map[string]*record{}} }

func (m *model) clone() *model {
	out := newModel()
	for name, r := range m.records {
		c := *r
		out.records[name] = &c
	}
	return out
}

func (m *model) names() []string { return slices.Sorted(maps.Keys(m.records)) }

// stored is the record of that name, nil if the store has none.
func (m *model) stored(name string) *record {
	if r := m.records[name]; r != nil && !r.unrecorded {
		return r
	}
	return nil
}

// children are the records that have name as parent.
func (m *model) children(name string) (out []string) {
	for _, n := range m.names() {
		if m.records[n].parent == name {
			out = append(out, n)
		}
	}
	return out
}

// pinned says whether name cannot go because of somebody at work in it, or in
// an unrecorded child.
func (m *model) pinned(name string) bool {
	r := m.records[name]
	if r.held() || r.shared+r.exclusive > 0 {
		return true
	}
	return slices.ContainsFunc(m.children(name), func(c string) bool { return m.records[c].unrecorded })
}

func (m *model) create(name, parent string, r record) outcome {
	r.state, r.unrecorded, r.parent = cache.Mutable, !r.retain, parent
	if parent != "" {
		if out := m.finalize(parent); out != ok {
			return out
		}
		r.files = m.records[parent].files
	}
	r.writers = 1
	m.records[name] = &r
	return ok
}

// commit also takes a value over from the parent, if take names one.
func (m *model) commit(name, take string) outcome {
	r := m.records[name]
	if r.writing > 0 {
		return refused
	}
	if p := m.records[r.parent]; p != nil && take != "" {
		if index, has := p.values[take]; has {
			r.values = with(r.values, take, index)
			p.values = without(p.values, take)
		}
	}
	r.state, r.unrecorded, r.durable = cache.Committed, false, false
	if r.interrupted {
		r.interrupted, r.retain, r.after = false, r.after, false
	}
	r.writers, r.readers = 0, 1
	return ok
}

func (m *model) finalize(name string) outcome {
	r := m.records[name]
	if r.state == cache.Committed {
		if r.exclusive > 0 {
			return locked
		}
		r.state = cache.Finalized
	}
	return ok
}

func (m *model) get(name string) outcome {
	r := m.records[name]
	switch {
	case r == nil:
		return notFound
	case r.state == cache.Mutable && r.writers > 0:
		return locked
	case r.state == cache.Mutable:
		return refused
	}
	r.readers++
	return ok
}

// getMutable reopens name as next, or continues it.
func (m *model) getMutable(name, next string) outcome {
	r := m.stored(name)
	switch {
	case r == nil:
		return notFound
	case r.state != cache.Mutable && r.state != cache.Committed:
		return refused
	case m.pinned(name):
		return locked
	}
	if r.state == cache.Committed {
		delete(m.records, name)
		m.records[next] = r
		r.state, r.durable = cache.Mutable, false
		r.retain, r.after, r.interrupted = true, r.retain, true
		r.attached = without(r.attached, cache.FileList)
	}
	r.writers = 1
	return ok
}

// attach gives the handle back for the hold that somebody took on name.
func (m *model) attach(name string) outcome {
	r := m.stored(name)
	switch {
	case r == nil:
		return notFound
	case r.state != cache.Mutable:
		return refused
	case r.held():
		return locked
	}
	r.writers = 1
	return ok
}

// release gives a handle back; touch says that it counts as a use.
func (m *model) release(name string, writer, touch bool) outcome {
	r := m.records[name]
	if writer && r.unrecorded {
		if r.mounts > 0 {
			return refused
		}
		delete(m.records, name)
		return ok
	}
	if writer {
		r.writers--
	} else {
		r.readers--
	}
	if r.touched = r.touched || touch; r.touched && r.writers+r.readers == 0 {
		r.touched = false
		r.uses++
	}
	return ok
}

// detach turns a handle into the hold of another process.
func (m *model) detach(name string, writer, touch bool) outcome {
	r := m.records[name]
	switch {
	case r.unrecorded:
		return refused
	case r.exclusive > 0, writer && r.shared > 0:
		return locked
	case writer:
		r.exclusive++
	default:
		r.shared++
	}
	return m.release(name, writer, touch && !writer)
}

func (m *model) edit(name string, change func(*record)) outcome {
	r := m.records[name]
	change(r)
	r.unrecorded = r.unrecorded && !r.retain
	return ok
}

// remove says of each name how its removal ends.
func (m *model) remove(names ...string) map[string]outcome {
	out := map[string]outcome{}
	for _, name := range names {
		switch {
		case m.stored(name) == nil:
			out[name] = notFound
		case m.pinned(name):
			out[name] = locked
		default:
			out[name] = ok
		}
	}
	for changed := true; changed; {
		changed = false
		for _, name := range names {
			for _, c := range m.children(name) {
				if out[c] != ok && out[name] == ok {
					out[name], changed = refused, true
				}
			}
		}
	}
	for name, o := range out {
		if o == ok {
			delete(m.records, name)
		}
	}
	return out
}

// prune removes whatever nobody needs, of one type or of all.
func (m *model) prune(kind string) (gone []string) {
	for changed := true; changed; {
		changed = false
		for _, name := range m.names() {
			r := m.records[name]
			if !r.unrecorded && (kind == "" || r.kind == kind) && !m.pinned(name) && len(m.children(name)) == 0 {
				delete(m.records, name)
				gone, changed = append(gone, name), true
			}
		}
	}
	slices.Sort(gone)
	return gone
}

// search lists the names by index key, of all keys that begin with prefix.
func (m *model) search(prefix string) (out []string) {
	for name, r := range m.records {
		for _, index := range r.values {
			if entry := index + " " + name; !r.unrecorded && index != "" && strings.HasPrefix(index, prefix) && !slices.Contains(out, entry) {
				out = append(out, entry)
			}
		}
	}
	slices.Sort(out)
	return out
}

func (m *model) sync() {
	for _, r := range m.records {
		r.durable = r.durable || r.state != cache.Mutable
	}
}

// reopen is the end of a process and the next open, after a clean end or
// another one, in the same boot or after a power cut, which ends the other
// processes, too.
func (m *model) reopen(sameBoot bool) {
	for name, r := range m.records {
		r.writers, r.readers, r.mounts, r.writing, r.touched = 0, 0, 0, 0, false
		if r.unrecorded {
			delete(m.records, name)
		}
	}
	if sameBoot {
		return
	}
	for changed := true; changed; {
		changed = false
		for name, r := range m.records {
			r.shared, r.exclusive = 0, 0
			survives := r.durable
			if r.state == cache.Mutable {
				survives = r.keep
			}
			if !survives || r.parent != "" && m.records[r.parent] == nil {
				delete(m.records, name)
				changed = true
			}
		}
	}
}

func with(m map[string]string, key, value string) map[string]string {
	out := maps.Clone(m)
	if out == nil {
		out = map[string]string{}
	}
	out[key] = value
	return out
}

func without(m map[string]string, key string) map[string]string {
	out := maps.Clone(m)
	delete(out, key)
	return out
}

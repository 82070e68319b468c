package metadatatest

import (
	"maps"
	"slices"
	"time"

	"github.com/lamina-build/lamina/metadata"
)

// model is what a store must do, said in maps.
type model struct {
	records map[metadata.ID]*metadata.Record
	files   map[metadata.ID]map[string]string
	// first is the id that was replaced first, for records that replaced one:
	// it is not given out again as long as they are there.
	first map[metadata.ID]metadata.ID
}

func newModel() *model {
	return &model{map[metadata.ID]*metadata.Record{}, map[metadata.ID]map[string]string{}, map[metadata.ID]metadata.ID{}}
}

func (m *model) clone() *model {
	c := &model{maps.Clone(m.records), map[metadata.ID]map[string]string{}, maps.Clone(m.first)}
	for id, f := range m.files {
		c.files[id] = maps.Clone(f)
	}
	return c
}

func (m *model) children(id metadata.ID) (out []metadata.ID) {
	for c, r := range m.records {
		if slices.Contains(r.Parents, id) {
			out = append(out, c)
		}
	}
	slices.Sort(out)
	return out
}

// taken says whether r collides with another record than except.
func (m *model) taken(r *metadata.Record, except metadata.ID, namesToo bool) bool {
	mine := append([]metadata.ID{r.ID}, r.Aliases...)
	for id, o := range m.records {
		if slices.Contains(mine, m.first[id]) {
			return true
		}
		if id != except || namesToo {
			for _, n := range append([]metadata.ID{o.ID}, o.Aliases...) {
				if slices.Contains(mine, n) {
					return true
				}
			}
		}
		if id != except {
			for _, k := range []string{o.Key, o.Was} {
				if k != "" && (k == r.Key || k == r.Was) {
					return true
				}
			}
		}
	}
	return false
}

func (m *model) create(r *metadata.Record) bool {
	if m.taken(r, "", true) || !m.all(r.Parents) {
		return false
	}
	n := *r
	n.Revision = 1
	m.records[r.ID] = &n
	return true
}

func (m *model) all(ids []metadata.ID) bool {
	return !slices.ContainsFunc(ids, func(id metadata.ID) bool { return m.records[id] == nil })
}

func (m *model) put(r *metadata.Record) bool {
	old := m.records[r.ID]
	if old == nil || m.taken(r, r.ID, false) {
		return false
	}
	n := *r
	n.Revision, n.Parents, n.UsageCount, n.LastUsed = old.Revision+1, old.Parents, old.UsageCount, old.LastUsed
	m.records[r.ID] = &n
	return true
}

func (m *model) remove(id metadata.ID) bool {
	if m.records[id] == nil || len(m.children(id)) > 0 {
		return false
	}
	delete(m.records, id)
	delete(m.files, id)
	delete(m.first, id)
	return true
}

func (m *model) replace(old metadata.ID, r *metadata.Record) bool {
	o := m.records[old]
	if o == nil || len(m.children(old)) > 0 || m.taken(r, old, true) || !m.all(r.Parents) || slices.Contains(r.Parents, old) {
		return false
	}
	files, first := m.files[old], m.first[old]
	if first == "" {
		first = old
	}
	m.remove(old)
	m.first[r.ID] = first
	n := *r
	n.Revision = 1
	m.records[r.ID] = &n
	if files != nil {
		m.files[r.ID] = files
	}
	return true
}

func (m *model) touch(id metadata.ID, at time.Time) {
	if r := m.records[id]; r != nil {
		n := *r
		n.UsageCount++
		if at.After(n.LastUsed) {
			n.LastUsed = at
		}
		m.records[id] = &n
	}
}

//go:build invariants

package cache

import "fmt"

// assertLocked panics unless somebody holds mu: the caller's name ends in
// Locked and was called without it.
func (m *Manager) assertLocked() {
	if m.mu.TryLock() {
		m.mu.Unlock()
		panic("cache: manager lock is not held")
	}
}

// assertCounts panics when more was taken back from an entry than was given.
func (m *Manager) assertCounts(e *entry) {
	if e.uses < 0 || e.lives < 0 || e.lives < e.uses+len(e.handles) {
		panic(fmt.Sprintf("cache: entry of record %s has %d lives for %d uses and %d handles", e.id, e.lives, e.uses, len(e.handles)))
	}
}

// assertEmpty panics when an entry is left that nobody refers to, or is
// referred to although no operation is under way and nobody holds it.
func (m *Manager) assertEmpty() {
	m.lock()
	defer m.unlock()
	for id, e := range m.entries {
		children := 0
		for _, other := range m.entries {
			for _, p := range other.parents {
				if p == e {
					children++
				}
			}
		}
		if want := len(e.handles) + len(e.mounts) + children; e.lives != want || e.leaving != nil || e.driving != "" {
			panic(fmt.Sprintf("cache: entry of record %s has %d lives for %d who hold it, driving %q", id, e.lives, want, e.driving))
		}
	}
}
